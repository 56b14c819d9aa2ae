"""Projected methods against their formulas written out: explicit gradients, explicit projections, dense inverses."""

from __future__ import annotations

import core_oracle as oracle
import projected_oracle as po
import pytest
import torch
from projected_oracle import Case, dense_matrix, flat, solve, two_sided
from safetensors.torch import save_file

import pyinf
from pyinf.data.checkpoints import checkpoint_weights
from pyinf.errors import ConfigError
from pyinf.store.compress import layer_seed

TOLERANCE = 1e-9


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def case(request) -> Case:
    return Case(request.param)


@pytest.fixture(scope="module")
def small() -> Case:
    return Case("gpt2")


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert found.shape == wanted.shape
    assert oracle.error(found, wanted) < tolerance


# -- LoGra -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping, mode", [(0.1, "relative"), (3.0, "absolute")])
def test_logra_raw(case: Case, damping: float, mode: str) -> None:
    P = two_sided(case.layers, 5)
    R, Q = ({n: g @ P[n] for n, g in flat(G).items()} for G in (case.G, case.V))
    wanted = sum(solve(R[n], Q[n], damping, mode) @ R[n].T for n in case.names)
    close(case.scores("logra", rank=5, damping=damping, damping_mode=mode), wanted)


def test_logra_several_dampings_from_one_fit(small: Case) -> None:
    attributor = small.attributor("logra", rank=5).fit(small.train)
    found = attributor.score(small.queries, small.train, dampings=[0.01, 1.0])
    P = two_sided(small.layers, 5)
    R, Q = ({n: g @ P[n] for n, g in flat(G).items()} for G in (small.G, small.V))
    for damping in (0.01, 1.0):
        close(found[damping].values, sum(solve(R[n], Q[n], damping) @ R[n].T for n in small.names))
        assert found[damping].meta["damping"] == damping


def test_logra_without_compression_is_the_block_fisher(case: Case) -> None:
    """A side no wider than k is left whole: the projected curvature is then the layer's empirical Fisher matrix."""
    G, V = flat(case.G), flat(case.V)
    close(case.scores("logra", rank=64), sum(solve(G[n], V[n], 0.1) @ G[n].T for n in case.names))


@pytest.mark.parametrize("normalise", ["relatif", "cosine"])
def test_logra_normalised(small: Case, normalise: str) -> None:
    P = two_sided(small.layers, 4)
    R, Q = ({n: g @ P[n] for n, g in flat(G).items()} for G in (small.G, small.V))
    wanted = sum(solve(R[n], Q[n], 0.1) @ R[n].T for n in small.names)
    own = sum((solve(R[n], R[n], 0.1) * R[n]).sum(1) for n in small.names).sqrt()
    asked = sum((solve(R[n], Q[n], 0.1) * Q[n]).sum(1) for n in small.names).sqrt()
    wanted = wanted / own / (asked[:, None] if normalise == "cosine" else 1)
    found = small.scores("logra", rank=4, normalise=normalise)
    close(found, wanted)
    if normalise == "cosine":
        assert float(found.abs().max()) <= 1


def kronecker_scores(case: Case, sides: dict, corrected: bool) -> torch.Tensor:
    """K-FAC or EK-FAC of projected gradients: covariances of projected tokens, eigenvalues theirs or the rows'."""
    inputs, grads = case.tokens()
    total = 0
    for n in case.names:
        P_g, P_a = sides[n]
        a, g = torch.cat(inputs[n]) @ P_a, torch.cat(grads[n]) @ P_g
        d_a, V_a = torch.linalg.eigh(a.T @ a / len(a))
        d_g, V_g = torch.linalg.eigh(g.T @ g / len(g))
        R, Q = (V_g.T @ (P_g.T @ G[n] @ P_a) @ V_a for G in (case.G, case.V))
        Lam = R.square().mean(0) if corrected else torch.outer(d_g, d_a) * len(a) / len(case.train)
        total = total + (Q / (Lam + 0.1 * Lam.mean())).flatten(1) @ R.flatten(1).T
    return total


def drawn_sides(case: Case, k: int) -> dict:
    out = {}
    for layer in case.layers:
        own = layer_seed(0, layer.name)
        out[layer.name] = tuple(
            po.random_matrix((0, d), (0, k), own, stream, "rademacher", dtype=torch.float64) / k**0.5
            for d, stream in ((layer.d_out, po.STREAM_G), (layer.columns, po.STREAM_A))
        )
    return out


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
def test_logra_kronecker(case: Case, curvature: str) -> None:
    wanted = kronecker_scores(case, drawn_sides(case, 5), curvature == "ekfac")
    close(case.scores("logra", rank=5, curvature=curvature), wanted, 1e-7)


def test_logra_of_leading_eigenvectors(case: Case) -> None:
    inputs, grads = case.tokens()
    sides = {}
    for n in case.names:
        a, g = torch.cat(inputs[n]), torch.cat(grads[n])
        sides[n] = tuple(torch.linalg.eigh(x.T @ x / len(x))[1][:, -4:] for x in (g, a))
    wanted = kronecker_scores(case, sides, False)
    close(case.scores("logra", rank=4, init="factors", curvature="kfac"), wanted, 1e-7)
    R, Q = ({n: (s[0].T @ G[n] @ s[1]).flatten(1) for n, s in sides.items()} for G in (case.G, case.V))
    close(case.scores("logra", rank=4, init="factors"), sum(solve(R[n], Q[n], 0.1) @ R[n].T for n in case.names), 1e-7)


@pytest.mark.parametrize("keep", [True, False])
def test_the_op_projects_alike(case: Case, keep: bool) -> None:
    """On an accelerator the op does both products, and draws matrices that are too large to keep."""
    attributor = case.attributor("logra", rank=5, curvature="none").fit(case.train)
    wanted = attributor.score(case.queries, case.train).values
    sides = attributor._run.compressor.sides
    sides.fused, sides.keep, attributor._run.table.held = True, keep, None
    sides._kept.clear()
    close(attributor.score(case.queries, case.train).values, wanted, TOLERANCE if keep else 1e-6)  # drawn in float32


# -- TRAK --------------------------------------------------------------------------------------------------------------


def trak_features(case: Case, G: dict, k: int, kind: str, joint: bool, checkpoint: int = 0) -> list[torch.Tensor]:
    seed = layer_seed(0, "", f"checkpoint {checkpoint}")
    parts = [flat(G)[layer.name] @ dense_matrix(layer, k, seed, kind) for layer in case.layers]
    return [sum(parts)] if joint else parts


@pytest.mark.parametrize("kind", ["rademacher", "normal", "sparse"])
@pytest.mark.parametrize("joint", [True, False])
def test_trak(case: Case, kind: str, joint: bool) -> None:
    R, Q = (trak_features(case, G, 6, kind, joint) for G in (case.G, case.V))
    wanted = sum(solve(r, q, 0.1) @ r.T for r, q in zip(R, Q, strict=True))
    # Philox's normal numbers are drawn in float32 by the fast backends.
    close(case.scores("trak", rank=6, projection=kind, joint=joint), wanted, 1e-5 if kind == "normal" else TOLERANCE)


def test_trak_projects_in_blocks(small: Case, monkeypatch) -> None:
    """Blocks of rows and of sequences: the matrix of a layer is that of its blocks, one under another."""
    monkeypatch.setattr("pyinf.store.compress.flat._BLOCK", 100)
    monkeypatch.setattr("pyinf.store.compress.flat._WORKSPACE", 150)
    assert len(po.row_blocks(small.layers[0])) > 1
    R, Q = (trak_features(small, G, 6, "rademacher", True)[0] for G in (small.G, small.V))
    close(small.scores("trak", rank=6), solve(R, Q, 0.1) @ R.T)


@pytest.fixture(scope="module")
def trail(tmp_path_factory):
    """Two checkpoints with the gradients, margin gradients and misses under each, and made-up moments."""
    case, directory = Case("gpt2"), tmp_path_factory.mktemp("trail")
    generator = torch.Generator().manual_seed(0)
    case.files, case.at, case.moments = [], [], []
    modules = dict(case.model.named_modules())
    for number in range(2):
        weights = {
            k: (p.detach() + 0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype)).contiguous()
            for k, p in case.model.named_parameters()
        }
        first = {k: 0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for k, p in weights.items()}
        second = {k: 0.1 * torch.rand(p.shape, generator=generator, dtype=p.dtype) for k, p in weights.items()}
        paths = {}
        for kind, tensors in (("weights", weights), ("first", first), ("second", second)):
            paths[kind] = directory / f"{kind}-{number}.safetensors"
            save_file(tensors, str(paths[kind]))
        case.files.append(paths)
        with checkpoint_weights(case.model, weights):
            case.at.append((case.gradients(case.train), case.gradients(case.queries), *margins(case)))
        held = []
        for tensors in (first, second):
            for k, parameter in case.model.named_parameters():
                parameter.grad = tensors[k]
            held.append({n: oracle.weight_gradient(modules[n]) for n in case.names})
        case.model.zero_grad()
        case.moments.append(held)
    return case


def margins(case: Case) -> tuple[dict, torch.Tensor]:
    """Gradients of ``−Σ_t log(p_t/(1 − p_t))`` and ``mean_t (1 − p_t)``."""
    missing = []

    def loss(model, example):
        ids = torch.as_tensor(example["input_ids"])
        p = model(input_ids=ids[None]).logits[0, :-1].softmax(-1).gather(1, ids[1:, None])[:, 0]
        missing.append(float((1 - p).mean().detach()))
        return -(p / (1 - p)).log().sum()

    found = oracle.gradients(case.model, case.train, case.names, loss)
    return {n: torch.stack([G[n] for G in found]) for n in case.names}, torch.tensor(missing, dtype=torch.float64)


@pytest.mark.parametrize("output", ["loss", "margin"])
@pytest.mark.parametrize("joint", [True, False])
def test_trak_over_checkpoints(trail: Case, output: str, joint: bool) -> None:
    wanted, weight = 0, 0
    for c, (G, V, M, missing) in enumerate(trail.at):
        R = trak_features(trail, M if output == "margin" else G, 6, "rademacher", joint, c)
        Q = trak_features(trail, V, 6, "rademacher", joint, c)
        wanted = wanted + sum(solve(r, q, 0.1) @ r.T for r, q in zip(R, Q, strict=True)) / 2
        weight = weight + missing / 2
    files = [paths["weights"] for paths in trail.files]
    found = trail.scores("trak", rank=6, joint=joint, output=output, checkpoints=files)
    close(found, wanted * weight if output == "margin" else wanted, 1e-8)


# -- TrackStar ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moments", ["factored", "full"])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("mix", [0.0, 0.9])
def test_trackstar(trail: Case, moments: str, given: bool, mix: float) -> None:
    case, epsilon = trail, 1e-4
    P = two_sided(case.layers, 5)
    total, own, asked = 0, 0, 0
    for layer in case.layers:
        n = layer.name
        V = case.moments[0][1][n] if given else case.G[n].square().mean(0)
        if moments == "full":
            inverse = 1 / (V.sqrt() + epsilon)
        else:
            r, c = V.mean(1) / V.mean().sqrt(), V.mean(0) / V.mean().sqrt()
            inverse = 1 / torch.outer(r.sqrt() + epsilon**0.5, c.sqrt() + epsilon**0.5)
        R, Q = ((G[n] * inverse).flatten(1) @ P[n] for G in (case.G, case.V))
        K = mix * Q.T @ Q / len(Q) + (1 - mix) * R.T @ R / len(R)
        d, U = torch.linalg.eigh(K + 0.1 * K.diagonal().mean() * torch.eye(len(K)).double())
        half = U / d.sqrt() @ U.T  # R^{-1/2}
        total = total + (Q @ half) @ (R @ half).T
        own, asked = own + (R @ half).square().sum(1), asked + (Q @ half).square().sum(1)
    wanted = total / own.sqrt() / asked.sqrt()[:, None]
    options = {"second_moments": [case.files[0]["second"]]} if given else {}
    found = case.scores("trackstar", rank=5, moments=moments, mix=mix, epsilon=epsilon, **options)
    close(found, wanted, 1e-8)


# -- LESS --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("unit", ["token", "sequence"])
def test_less(trail: Case, given: bool, unit: str) -> None:
    case, rates, wanted = trail, [2.0, 0.5], 0
    labels = torch.tensor([max(1, len(e["input_ids"]) - 1) for e in case.train]).double()
    for c, (G, V, _, _) in enumerate(case.at):
        R, Q = 0, 0
        for layer in case.layers:
            n = layer.name
            g = G[n] / (labels[:, None, None] if unit == "token" else 1)
            m, v = (t[n] for t in case.moments[c]) if given else (g.mean(0), g.square().mean(0))
            direction = (0.9 * m + 0.1 * g) / (0.999 * v + 0.001 * g.square() + 1e-8).sqrt()
            P = dense_matrix(layer, 12, 0, "rademacher")
            R, Q = R + direction.flatten(1) @ P, Q + V[n].flatten(1) @ P
        wanted = wanted + rates[c] * torch.nn.functional.normalize(Q) @ torch.nn.functional.normalize(R).T
    options = {"checkpoints": [p["weights"] for p in case.files], "learning_rates": rates}
    if given:
        options |= {f"{k}_moments": [p[k] for p in case.files] for k in ("first", "second")}
    close(case.scores("less", rank=12, loss_unit=unit, **options), wanted, 1e-8)


def test_less_moments_need_one_a_checkpoint(trail: Case) -> None:
    files = [p["weights"] for p in trail.files]
    with pytest.raises(ConfigError, match="learning_rates has 3 entries for 2 checkpoints"):
        trail.scores("less", rank=4, checkpoints=files, learning_rates=[1.0, 2.0, 3.0])


# -- one bit -----------------------------------------------------------------------------------------------------------


def whitened(case: Case, attributor: pyinf.Attributor, count: int) -> dict:
    """``{layer: (z of the training set, z of the queries)}``, coordinates chosen by hand from the factors."""
    out = {}
    for n in case.names:
        factor = attributor.factors.layers[n]
        U_S, U_A = factor.basis, attributor.factors.inputs[factor.group].basis
        Lam = factor.corrected.flatten()
        kept = sorted(range(len(Lam)), key=lambda i, Lam=Lam: (-float(Lam[i]), i))[:count]
        weight = (Lam[kept] + 0.1 * Lam.mean()) ** -0.5
        out[n] = tuple((U_S.T @ G[n] @ U_A).flatten(1)[:, sorted(kept)] for G in (case.G, case.V))
        order = torch.tensor(kept).argsort()
        out[n] = tuple(z * weight[order] for z in out[n])
    return out


def test_onebit_with_every_coordinate_is_ekfac(case: Case) -> None:
    close(
        case.scores("onebit", rotation="none", coordinates=10_000, format="float32"),
        case.scores("ekfac", certify=False),
    )


@pytest.mark.parametrize("gather", [16, 0])
def test_onebit_coordinates(case: Case, gather: int, monkeypatch) -> None:
    """The whole grid and a gather, or the coordinates one by one."""
    monkeypatch.setattr("pyinf.store.compress.onebit._GATHER", gather)
    attributor = case.attributor("onebit", rotation="none", coordinates=30, format="float32")
    found = attributor.run(case.train, case.queries).values
    z = whitened(case, attributor, 30)
    close(found, sum(q @ r.T for r, q in z.values()))


def test_onebit_principal_directions(small: Case) -> None:
    attributor = small.attributor("onebit", coordinates=40, rank=3, format="float32")
    found = attributor.run(small.train, small.queries).values
    wanted = 0
    for r, q in whitened(small, attributor, 40).values():
        P = torch.linalg.svd(r, full_matrices=False)[2][:3].T
        wanted = wanted + (q @ P) @ (r @ P).T
    close(found, wanted, 1e-8)
    close(small.scores("onebit", coordinates=40, rank=3, spread=False, format="float32"), wanted, 1e-8)


def test_onebit_hadamard(small: Case) -> None:
    attributor = small.attributor("onebit", coordinates=40, rank=16, rotation="hadamard", format="float32")
    found = attributor.run(small.train, small.queries).values
    wanted = 0
    for n, (r, q) in whitened(small, attributor, 40).items():
        signs, kept = attributor._run.compressor._drawn(n, 40)
        assert len(signs) == 64 and len(set(kept.tolist())) == 16 and set(signs.tolist()) == {1.0, -1.0}
        S = (signs.double()[:40, None] * po.hadamard_matrix(64)[:40])[:, kept] * 2.0  # √(64/16)
        wanted = wanted + (q @ S) @ (r @ S).T
    close(found, wanted)


def test_hadamard_with_all_coordinates_keeps_inner_products(small: Case) -> None:
    whole = small.scores("onebit", coordinates=40, rank=64, rotation="hadamard", format="float32")
    close(whole, small.scores("onebit", coordinates=40, rotation="none", format="float32"))


def test_onebit_signs_and_one_scale(small: Case) -> None:
    attributor = small.attributor("onebit", coordinates=40, rank=16, rotation="hadamard")
    scores = attributor.run(small.train, small.queries)
    wanted = 0
    for n, (r, q) in whitened(small, attributor, 40).items():
        signs, kept = attributor._run.compressor._drawn(n, 40)
        S = (signs.double()[:40, None] * po.hadamard_matrix(64)[:40])[:, kept] * 2.0
        row = r @ S
        scale = row.abs().mean(1, keepdim=True).bfloat16().double()
        wanted = wanted + (q @ S) @ torch.where(row < 0, -scale, scale).T
    close(scores.values, wanted, 1e-6)
    assert scores.meta["bytes_per_example"] == len(small.names) * (16 // 8 + 2)


def test_onebit_refits_the_rows_for_another_damping(small: Case) -> None:
    options = {"rotation": "none", "coordinates": 10_000, "format": "float32"}
    attributor = small.attributor("onebit", **options).fit(small.train)
    found = attributor.score(small.queries, small.train, dampings=[0.1, 1.0])
    exact = small.attributor("ekfac").fit(small.train).score(small.queries, small.train, dampings=[0.1, 1.0])
    for damping in (0.1, 1.0):
        close(found[damping].values, exact[damping].values)
