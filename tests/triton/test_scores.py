"""low_rank_scores and dense_scores: every route and tile shape against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyinf.errors import BackendUnavailableError, ConfigError
from pyinf.ops import costs, use_backend
from pyinf.ops.triton_scores import low_rank_scores_shared
from pyinf.triton_kernels import dense_scores, low_rank_scores, tiles
from tests.ops.cases import Layer, layer, make_layer, randn, sums
from tests.triton.harness import DTYPES, any_layer, compare, error, framed, gate, quick, sizes, wider

FLOOR = 3e-6
"""Of a sum of very many terms into one number, as in tests/ops/test_values.py."""


def values(shape, seed, dtype, to):
    return randn(*shape, seed=seed, dtype=dtype).to(to)


def low_rank(x: Layer, queries, rank, per_token, seed=0, transposed=False):
    dtype = x.g.dtype
    columns = x.g.shape[0] if per_token else x.offsets.numel() - 1

    def call(to):
        L = values((queries, x.g.shape[1], rank), seed, dtype, to)
        if transposed:
            L = L.mT.contiguous().mT
        R = values((queries, rank, x.a.shape[1]), seed + 1, dtype, to)
        scores = sums(queries, columns, seed=seed + 2, dtype=to)
        torch.ops.pyinf.low_rank_scores(scores, x.g.to(to), x.a.to(to), x.offsets, L, R, per_token)
        return [scores]

    return compare(call, "low_rank_scores", dtype, FLOOR)


def dense(x: Layer, queries, per_token, seed=0):
    dtype = x.g.dtype
    columns = x.g.shape[0] if per_token else x.offsets.numel() - 1

    def call(to):
        V = values((queries, x.g.shape[1], x.a.shape[1]), seed, dtype, to)
        scores = sums(queries, columns, seed=seed + 2, dtype=to)
        torch.ops.pyinf.dense_scores(scores, x.g.to(to), x.a.to(to), x.offsets, V, per_token)
        return [scores]

    return compare(call, "dense_scores", dtype, FLOOR)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("name", ["odd", "short", "no tokens", "no sequences"])
def test_both_ops_on_every_layout(name, per_token, dtype):
    x = layer(name, dtype)
    low_rank(x, 3, 5, per_token)
    dense(x, 3, per_token)
    x = layer(name, dtype, strided=True)
    low_rank(x, 2, 8, per_token, transposed=True)
    dense(x, 2, per_token)


@quick
@given(x=any_layer(), queries=sizes(9), rank=sizes(70), per_token=st.booleans(), seed=st.integers(0, 999))
def test_low_rank_of_any_shape(x, queries, rank, per_token, seed):
    low_rank(x, queries, rank, per_token, seed)


@quick
@given(x=any_layer(), queries=sizes(9), per_token=st.booleans(), seed=st.integers(0, 999))
def test_dense_of_any_shape(x, queries, per_token, seed):
    dense(x, queries, per_token, seed)


def tiny(table, **constants):
    return low_rank_scores.Config({**table["default"]["ieee"].constants, **constants})


def run(launches):
    for launch in launches:
        launch.run()


LENGTHS = [0, 5, 0, 0, 42, 1, 2, 14, 8, 0]  # one ends where a tile of 16 tokens does, one begins at its last


def framed_layer(d_out: int, d_in: int, dtype: torch.dtype, seed: int) -> Layer:
    """Rows and columns apart in memory, NaN around them."""
    x = make_layer(LENGTHS, d_out, d_in, dtype, seed=seed)
    return Layer(framed(x.g), framed(x.a), x.offsets)


@pytest.mark.parametrize(
    ("rank", "block", "per_token"),
    [(1, 1, False), (5, 4, False), (5, 8, True), (16, 16, True), (24, 8, False), (40, 16, False)],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_low_rank_tiles(rank, block, per_token, transposed):
    """Many small tiles: queries, ranks, tokens and depths that end inside one, sequences across and within them."""
    x = framed_layer(21, 35, torch.float32, seed=rank)
    queries = 3
    L, R = randn(queries, 21, rank, seed=1, dtype=torch.float32), randn(queries, rank, 35, seed=2, dtype=torch.float32)
    if transposed:
        L = L.mT.contiguous().mT
    scores = sums(queries, 72 if per_token else 10, seed=3, dtype=torch.float32)
    ref, plain = scores.double(), scores.clone()
    config = tiny(low_rank_scores.CONFIGS, BM=16, BN=16, BK=16, GROUP=2)
    partial = None if per_token else torch.full(low_rank_scores.partial_shape(72, 10, queries, config), float("nan"))
    run(low_rank_scores.launches(scores, [(x.g, L, R)], x.a, x.offsets, partial, "ieee", config, block))
    with use_backend("reference"):
        torch.ops.pyinf.low_rank_scores(plain, x.g, x.a, x.offsets, L, R, per_token)
        torch.ops.pyinf.low_rank_scores(
            ref, x.g.double(), x.a.double(), x.offsets, L.double(), R.double(), per_token
        )  # fmt: skip
    gate(scores, plain, ref, torch.float32, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_token", [False, True])
def test_layers_that_share_an_input(dtype, per_token, monkeypatch):
    """Five layers of different widths, one of another rank: three, one, one, in half precision."""
    x = layer("odd", dtype)
    tokens, d_in, queries = x.a.shape[0], x.a.shape[1], 3
    grids = []
    original = low_rank_scores.Launch.run
    monkeypatch.setattr(
        low_rank_scores.Launch, "run", lambda self: (grids.append(self.constants.get("LAYERS")), original(self))
    )
    layers = []
    for i, (d_out, rank) in enumerate([(33, 5), (7, 5), (16, 5), (33, 4), (20, 5)]):
        g = randn(tokens, d_out, seed=10 + i, dtype=dtype)
        L, R = (
            randn(queries, d_out, rank, seed=20 + i, dtype=dtype),
            randn(queries, rank, d_in, seed=30 + i, dtype=dtype),
        )
        layers.append((g, L, R))
    scores = sums(queries, tokens if per_token else 4, seed=3, dtype=dtype)
    ref, plain = scores.double(), scores.clone()
    low_rank_scores_shared(scores, layers, x.a, x.offsets, per_token)
    launched = [count for count in grids if count is not None]
    assert launched == ([3, 1, 1] if dtype == torch.float16 else [1] * 5)
    with use_backend("reference"):
        for g, L, R in layers:
            torch.ops.pyinf.low_rank_scores(plain, g, x.a, x.offsets, L, R, per_token)
            torch.ops.pyinf.low_rank_scores(
                ref, g.double(), x.a.double(), x.offsets, L.double(), R.double(), per_token
            )  # fmt: skip
    gate(scores, plain, ref, dtype, FLOOR)


@pytest.mark.parametrize("together", [1, 2, 4])
@pytest.mark.parametrize("by", [torch.float32, torch.float16])
def test_dense_tiles_by_sequence(together, by):
    """Groups of sequences that end in the middle, queries in another dtype than g and a, a strided window of them."""
    x = framed_layer(37, 50, torch.float16, seed=together)
    V = randn(6, 37, 50, seed=1, dtype=by)
    V = wider(V.flatten(0, 1), 3).unflatten(0, (6, 37))[1:]
    scores = sums(5, 10, seed=3, dtype=torch.float32)
    ref, plain = scores.double(), scores.clone()
    constants = {"BB": together, "BM": 16, "BN": 32, "BK": 16, "GROUP": 2, "AHEAD": 2}
    config = dense_scores.Config(constants)
    partial = torch.full((10, 5, 3 * 2), float("nan"))
    run(dense_scores.by_sequence(scores, x.g, x.a, x.offsets, V, partial, "ieee", config))
    with use_backend("reference"):
        torch.ops.pyinf.dense_scores(plain, x.g, x.a, x.offsets, V)
        torch.ops.pyinf.dense_scores(ref, x.g.double(), x.a.double(), x.offsets, V.double())
    gate(scores, plain, ref, torch.float16, FLOOR)


@pytest.mark.parametrize("splits", [1, 2, 3])
@pytest.mark.parametrize("per_token", [False, True])
def test_dense_tiles_by_token(splits, per_token):
    x = framed_layer(37, 50, torch.float32, seed=splits)
    V = framed(randn(3, 37, 50, seed=1, dtype=torch.float32))
    scores = sums(3, 72 if per_token else 10, seed=3, dtype=torch.float32)
    ref, plain = scores.double(), scores.clone()
    config = dense_scores.Config({"BM": 16, "BN": 16, "BK": 16})
    shape = (splits, 3, 72) if per_token else (splits, 5 + 10, 3)
    partial = None if per_token and splits == 1 else torch.full(shape, float("nan"))
    run(dense_scores.by_token(scores, x.g, x.a, x.offsets, V, partial, per_token, "ieee", config))
    with use_backend("reference"):
        torch.ops.pyinf.dense_scores(plain, x.g, x.a, x.offsets, V, per_token)
        torch.ops.pyinf.dense_scores(ref, x.g.double(), x.a.double(), x.offsets, V.double(), per_token)
    gate(scores, plain, ref, torch.float32, 1e-6)


def test_sums_over_more_tiles_than_one_block():
    """The second kernels by themselves: more tiles than they take at a time, added to what is there."""
    offsets = torch.tensor([0, 90, 90, 93])  # of tiles of two tokens: 45 in the first sequence
    held, partial = randn(5, 3, seed=1, dtype=torch.float32).T.contiguous().T, torch.full((2, 47 + 3, 5), float("nan"))
    parts = randn(2, 47, 5, seed=2, dtype=torch.float32)
    partial[:, :45], partial[:, 47:49] = parts[:, :45], parts[:, 45:]
    expected = held.double()
    expected[:, 0] += parts[:, :45].double().sum((0, 1))
    expected[:, 2] += parts[:, 45:].double().sum((0, 1))
    run([tiles.segment_sums(held, partial, offsets, 2)])
    assert error(held, expected) < 1e-6

    held, partial = randn(300, 5, seed=3, dtype=torch.float32).T, randn(2, 5, 300, seed=4, dtype=torch.float32)
    expected = held.double() + partial.double().sum(0)
    run([tiles.split_sums(held, partial)])
    assert error(held, expected) < 1e-6

    held, partial = randn(3, 4, seed=5, dtype=torch.float32).T, randn(3, 4, 600, seed=6, dtype=torch.float32)
    expected = held.double() + partial.double().sum(2).T
    x = torch.empty(1, 16)
    run(dense_scores.by_sequence(held, x, x, torch.zeros(4, dtype=torch.int64), torch.empty(4, 16, 16), partial)[1:])
    assert error(held, expected) < 1e-6


def test_a_buffer_of_another_layout_is_added_to():
    """Scores that are a transposed window of a larger buffer; what lies around it stays."""
    x = layer("odd", torch.float32)
    L, R = randn(3, 33, 4, seed=1, dtype=torch.float32), randn(3, 4, 65, seed=2, dtype=torch.float32)
    for per_token in (False, True):
        columns = x.g.shape[0] if per_token else 4
        buffer = torch.full((columns + 2, 14), 9.0)
        window = buffer.T[4:10:2, 1:-1]
        expected = torch.full((3, columns), 9.0, dtype=torch.float64)
        with use_backend("triton"):
            torch.ops.pyinf.low_rank_scores(window, x.g, x.a, x.offsets, L, R, per_token)
            torch.ops.pyinf.dense_scores(window, x.g, x.a, x.offsets, L @ R, per_token)
        with use_backend("reference"):
            for _ in range(2):
                torch.ops.pyinf.dense_scores(
                    expected, x.g.double(), x.a.double(), x.offsets, L.double() @ R.double(), per_token
                )  # fmt: skip
        assert ((window - expected).norm() / expected.norm()).item() < 1e-6
        window.fill_(9.0)
        assert torch.all(buffer == 9.0)


def test_what_the_kernels_do_not_take():
    x = layer("odd", torch.float32)
    V, scores = torch.ones(2, 33, 65), torch.zeros(2, 4)
    with use_backend("triton"):
        for bad in ((scores.double(), x.g, x.a), (scores, x.g.double(), x.a), (scores, x.g, x.a.half())):
            with pytest.raises(BackendUnavailableError, match=r"one dtype|torch\.float"):
                torch.ops.pyinf.dense_scores(*bad, x.offsets, V)
        with pytest.raises(ConfigError, match="offsets"):
            torch.ops.pyinf.dense_scores(scores, x.g, x.a, x.offsets + 1, V)
    with pytest.raises(BackendUnavailableError, match="one dtype"):
        low_rank_scores_shared(scores, [(x.g, V, V.mT), (x.g.half(), V, V.mT)], x.a, x.offsets)


def test_blocks_of_a_rank():
    """A power of two that wastes the least of what it costs; never more queries in a wide tile than fit."""
    large, small = (tiny(low_rank_scores.CONFIGS, BM=n, BN=n) for n in (128, 64))
    assert low_rank_scores.rank_block(40, "half", large) == [64, 128]  # in one block
    assert low_rank_scores.rank_block(200, "half", large) == []
    assert low_rank_scores.rank_block(40, "half_parts", large) == [32, 64, 128]
    assert low_rank_scores.rank_block(64, "half_small", small) == [8, 16, 32, 64]
    assert low_rank_scores.rank_block(1, "ieee", tiny(low_rank_scores.CONFIGS, BM=16, BN=16)) == [1, 2, 4, 8, 16]
    for family in ("sm_80", "sm_86", "sm_90", "default"):
        processors = tiles.MULTIPROCESSORS[family]
        for rank, queries in ((64, 32), (48, 32), (5, 100), (200, 7), (1, 1)):
            config, block = low_rank_scores.choose(8192, queries, rank, 1, torch.bfloat16, "ieee", family)
            found = low_rank_scores._cost(8192, queries, rank, config, block, processors)
            for kind in ("half", "half_parts", "half_small"):
                other = low_rank_scores.CONFIGS[family][kind]
                for b in low_rank_scores.rank_block(rank, kind, other):
                    assert found <= low_rank_scores._cost(8192, queries, rank, other, b, processors)
    config, block = low_rank_scores.choose(8192, 32, 64, 1, torch.bfloat16, "ieee", "sm_90")
    assert config is low_rank_scores.CONFIGS["sm_90"]["half"] and block == 64
    assert low_rank_scores.choose(256, 1, 64, 1, torch.bfloat16, "ieee", "sm_90")[0].constants["BM"] == 64
    assert low_rank_scores.can_share(64, torch.bfloat16, "sm_90")
    assert not low_rank_scores.can_share(65, torch.bfloat16, "sm_90")
    assert not low_rank_scores.can_share(8, torch.float32, "sm_90")


def test_routes_by_cost():
    """The crossovers are formulas: by token, in one launch."""
    assert costs.dense_scores_by_token(8192, 1, 8)  # one query: no gradient is worth forming
    assert not costs.dense_scores_by_token(8192, 16, 16)
    assert costs.dense_scores_by_token(512, 64, 32)  # sixteen tokens a sequence
    assert not costs.dense_scores_by_token(544 * 32, 64, 32)
    for tokens, queries, sequences in ((100, 3, 7), (1000, 20, 50), (64, 5, 64)):
        by_token = tokens * queries
        by_sequence = tokens + costs.VECTOR_WEIGHT * sequences * queries
        assert costs.dense_scores_by_token(tokens, queries, sequences) == (by_token <= by_sequence)
    assert costs.shared_input_is_cheaper([4096, 1024, 1024], 4096, 64)
    assert not costs.shared_input_is_cheaper([14336, 14336], 4096, 2048)
    assert not costs.shared_input_is_cheaper([4096], 4096, 2048)
    assert costs.token_scores_flops(10, 3, 4, 2) == 2 * 10 * 2 * 5 * 3
