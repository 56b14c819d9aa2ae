"""TracIn and SOURCE over checkpoints, and second moments as a normaliser, against dense linear algebra in float64."""

from __future__ import annotations

import core_oracle as oracle
import pytest
import torch
from safetensors.torch import save_file

import pyinf
from pyinf.data.checkpoints import checkpoint_weights
from pyinf.errors import ArtifactError, ConfigError

TOLERANCE = 1e-8
LAYERS = {"gpt2": ["*.0.attn.c_proj", "*.1.attn.c_attn"], "llama": ["*.0.*k_proj", "*.0.*v_proj", "*.1.*up_proj"]}


class Case:
    """Three checkpoints of a tiny model with their explicit gradients and made-up second moments."""

    def __init__(self, name: str, directory) -> None:
        self.model = oracle.make(name)
        self.modules = LAYERS[name]
        self.train, self.queries = oracle.data(7, 1), oracle.data(2, 2)
        self.names = pyinf.Attributor(self.model, "grad_dot", modules=self.modules).selection.names
        generator = torch.Generator().manual_seed(0)
        self.files, self.moment_files, self.G, self.V, self.v = [], [], [], [], []
        modules = dict(self.model.named_modules())
        for number in range(3):
            state = {
                k: p.detach() + 0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
                for k, p in self.model.named_parameters()
            }
            moments = {k: torch.rand(p.shape, generator=generator, dtype=p.dtype) for k, p in state.items()}
            for kind, tensors, files in (("weights", state, self.files), ("moments", moments, self.moment_files)):
                files.append(directory / f"{kind}-{number}.safetensors")
                save_file({k: v.contiguous() for k, v in tensors.items()}, str(files[-1]))
            with checkpoint_weights(self.model, self.files[-1]):
                self.G.append(oracle.gradients(self.model, self.train, self.names))
                self.V.append(oracle.gradients(self.model, self.queries, self.names))
                self.tokens = oracle.tokens_seen(self.model, self.train, self.names)
            for k, parameter in self.model.named_parameters():
                parameter.grad = moments[k]
            self.v.append({n: oracle.weight_gradient(modules[n]) for n in self.names})
            self.model.zero_grad()

    def scores(self, method: str, **options):
        return pyinf.attribute(
            self.model, self.train, self.queries, method, modules=self.modules, fisher="empirical",
            eigensolver="fp64", **options,
        ).values  # fmt: skip


@pytest.fixture(scope="module", params=list(LAYERS))
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp("checkpoints"))


def weighted(gradients, weights):
    return [{n: g[n] * weights[n] for n in g} for g in gradients]


@pytest.mark.parametrize("normalise, power", [(None, 0), ("update", 1), ("both", 2)])
def test_tracin_sums_over_checkpoints(case, normalise, power):
    rates = [0.3, 0.2, 0.05]
    options = {} if normalise is None else {"second_moments": case.moment_files, "normalise": normalise, "epsilon": 0.1}
    found = case.scores("tracin", checkpoints=case.files, learning_rates=rates, **options)
    wanted = 0
    for rate, V, G, v in zip(rates, case.V, case.G, case.v, strict=True):
        weights = {n: 1 / (v[n].sqrt() + 0.1) ** power for n in v}
        wanted = wanted + rate * oracle.dot(weighted(V, weights), G)
    assert oracle.error(found, wanted) < TOLERANCE


def test_tracin_keeps_its_other_shapes(case):
    options = dict(modules=case.modules, checkpoints=case.files, learning_rates=0.5, second_moments=case.moment_files)
    attributor = pyinf.Attributor(case.model, "tracin", **options).fit(case.train)
    whole = attributor.score(case.queries, case.train).values
    by_module = attributor.score(case.queries, case.train, per_module=True).values
    assert oracle.error(sum(by_module.values()), whole) < TOLERANCE and list(by_module) == case.names
    tokens = attributor.score(case.queries, case.train, granularity="token").values
    assert oracle.error(tokens.sum(2), whole) < TOLERANCE
    top = attributor.score(case.queries, case.train, topk=3)
    assert torch.equal(top.topk(3)[1], whole.topk(3).indices)
    own = attributor.score(case.train, case.train).values.diagonal()
    assert oracle.error(attributor.self_score(case.train), own) < TOLERANCE


def test_second_moments_alone_normalise_the_dot_product(case):
    found = case.scores("grad_dot", second_moments=str(case.moment_files[0]), epsilon=0.0)
    V = oracle.gradients(case.model, case.queries, case.names)
    G = oracle.gradients(case.model, case.train, case.names)
    wanted = oracle.dot(weighted(V, {n: v.rsqrt() for n, v in case.v[0].items()}), G)
    assert oracle.error(found, wanted) < TOLERANCE
    assert oracle.error(case.scores("grad_dot"), oracle.dot(V, G)) < TOLERANCE


class DenseSegment:
    """A segment's EK-FAC as explicit matrices over vec(G) of each layer, from the checkpoints' own tokens."""

    def __init__(self, case: Case, members: list[int], x: float, adam: bool, epsilon: float = 0.1) -> None:
        self.S, self.F = {}, {}
        tokens = []
        for i in members:
            with checkpoint_weights(case.model, case.files[i]):
                tokens.append(oracle.tokens_seen(case.model, case.train, case.names))
        for name in case.names:
            a = torch.cat([t for inputs, _ in tokens for t in inputs[name]])
            g = torch.cat([t for _, grads in tokens for t in grads[name]])
            U_A, U_S = torch.linalg.eigh(a.T @ a / len(a))[1], torch.linalg.eigh(g.T @ g / len(g))[1]
            G = torch.stack([case.G[i][k][name] for i in members for k in range(len(case.train))])
            v = torch.stack([case.v[i][name] for i in members]).mean(0)
            P = 1 / (v.sqrt() + epsilon) if adam else torch.ones_like(v)
            Lam = (U_S.T @ (G * P.sqrt()) @ U_A).square().mean(0).reshape(-1)
            Q, root = torch.kron(U_S, U_A), P.sqrt().reshape(-1)
            H = Q @ torch.diag(Lam) @ Q.T  # P^½ H P^½
            self.S[name] = root[:, None] * torch.linalg.matrix_exp(-x * H) / root
            d, E = torch.linalg.eigh(H)
            d = d.clamp(min=1e-300)
            self.F[name] = root[:, None] * ((E * (-torch.expm1(-x * d) / d)) @ E.T) * root


@pytest.mark.parametrize("adam", [False, True])
def test_source_against_matrix_exponentials(case, adam):
    """Two segments, of two checkpoints and of one … by repeating the last file, so that their lengths differ in x."""
    files, members = [*case.files, case.files[2]], [[0, 1], [2, 2]]
    rates, steps = [0.02, 0.01, 0.005, 0.005], [3.0, 4.0, 5.0, 2.0]
    moments = [*case.moment_files, case.moment_files[2]]
    options = {"second_moments": moments, "epsilon": 0.1} if adam else {}
    found = case.scores(
        "source", checkpoints=files, learning_rates=rates, steps=steps, segments=2, momentum=0.5,
        loss_unit="sequence", **options,
    )  # fmt: skip
    x = [2 * (0.02 * 3 + 0.01 * 4), 2 * (0.005 * 5 + 0.005 * 2)]
    first, last = DenseSegment(case, members[0], x[0], adam), DenseSegment(case, members[1], x[1], adam)
    wanted = 0
    for number, segment in enumerate((first, last)):
        vectors = [{n: v[n].reshape(-1) for n in v} for v in case.V[2]]
        if number == 0:
            vectors = [{n: last.S[n].T @ v[n] for n in v} for v in vectors]
        vectors = [{n: segment.F[n] @ v[n] for n in v} for v in vectors]
        for i in members[number]:
            flat = [{n: g[n].reshape(-1) for n in g} for g in case.G[i]]
            wanted = wanted + oracle.dot(vectors, flat) / 2
    assert oracle.error(found, wanted) < TOLERANCE
    # the mean over tokens is the same run at a learning rate that counts them
    labels = sum(len(e["input_ids"]) - 1 for e in case.train) / len(case.train)
    scaled = case.scores(
        "source", checkpoints=files, learning_rates=[r * labels for r in rates], steps=steps, segments=2, momentum=0.5,
        **options,
    )  # fmt: skip
    assert oracle.error(scaled, wanted) < TOLERANCE


def test_source_becomes_the_influence_in_the_long_run(case):
    """One segment, x → ∞: ⟨H⁻¹∇f, G⟩ without damping where the curvature is not zero."""
    found = case.scores("source", checkpoints=[case.files[0]], learning_rates=1e-6, steps=1, loss_unit="sequence")
    V, G = case.V[0], case.G[0]
    assert oracle.error(found, 1e-6 * oracle.dot(V, G)) < 1e-2  # a short run: the dot product
    with checkpoint_weights(case.model, case.files[0]):
        attributor = pyinf.Attributor(
            case.model, "ekfac", modules=case.modules, fisher="empirical", damping=1e-4, damping_mode="absolute",
            eigensolver="fp64",
        ).fit(case.train)  # fmt: skip
        damped = attributor.score(case.queries, case.train).values
    long = case.scores("source", checkpoints=[case.files[0]], learning_rates=1.0, steps=1e4, loss_unit="sequence")
    assert float(torch.corrcoef(torch.stack([damped.reshape(-1), long.reshape(-1)]))[0, 1]) > 0.99


def test_the_model_is_as_before(case):
    before = {k: p.clone() for k, p in case.model.state_dict().items()}
    case.scores("tracin", checkpoints=case.files)
    with pytest.raises(RuntimeError), checkpoint_weights(case.model, case.files[1]):
        assert not torch.equal(next(case.model.parameters()), before[next(iter(before))])
        raise RuntimeError
    assert all(torch.equal(before[k], p) for k, p in case.model.state_dict().items())


def test_sources_of_checkpoints(case, tmp_path):
    state = {k: p.detach().clone() for k, p in case.model.named_parameters()}
    names = sorted(state)
    save_file({k: state[k] for k in names[::2]}, str(tmp_path / "model-1.safetensors"))
    save_file({k: state[k] for k in names[1::2]}, str(tmp_path / "model-2.safetensors"))
    own = case.scores("grad_dot")
    for source in (tmp_path, str(tmp_path), lambda: state, state):
        assert torch.equal(case.scores("tracin", checkpoints=source), own)


def test_bad_checkpoints_and_options_say_so(case, tmp_path):
    state = {k: p.detach().clone() for k, p in case.model.named_parameters()}
    first = next(iter(state))
    bad = [
        (ArtifactError, "no parameter", {k: v for k, v in state.items() if k != first}),
        (ArtifactError, "shape", {**state, first: state[first][:1]}),
        (ArtifactError, "lacks", {**state, "extra.weight": state[first]}),
        (ArtifactError, "no safetensors file", tmp_path / "nowhere"),
        (ConfigError, "callable", 3),
    ]
    (tmp_path / "pickle.pt").write_bytes(b"\x80\x04.")
    bad.append((ArtifactError, "never read", tmp_path / "pickle.pt"))
    for error, text, checkpoint in bad:
        with pytest.raises(error, match=text):
            case.scores("tracin", checkpoints=[checkpoint])
    with pytest.raises(ArtifactError, match="negative"):
        case.scores("tracin", second_moments={k: -v.abs() - 1 for k, v in state.items()})
    for text, options in [
        ("needs checkpoints", {}),
        ("needs learning_rates", {"checkpoints": case.files}),
        ("needs steps", {"checkpoints": case.files, "learning_rates": 0.1}),
        ("steps has 2", {"checkpoints": case.files, "learning_rates": 0.1, "steps": [1, 2]}),
        ("equal segments", {"checkpoints": case.files, "learning_rates": 0.1, "steps": 1, "segments": 2}),
    ]:
        with pytest.raises(ConfigError, match=text):
            case.scores("source", **options)
    options = {"checkpoints": case.files, "learning_rates": 0.1, "steps": 1}
    with pytest.raises(ConfigError, match="self-influence"):
        pyinf.Attributor(case.model, "source", modules=case.modules, **options).self_score(case.train)
