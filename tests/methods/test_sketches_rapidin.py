"""RapidIn's sketch against the vector shuffled, signed and summed step by step as its authors describe it."""

from __future__ import annotations

import json

import pytest
import torch
from sketch_oracle import error, examples, gradients, tiny

import pyinf
from pyinf.errors import ConfigError
from pyinf.ops.philox import random_matrix
from pyinf.store.compress.base import layer_seed
from pyinf.store.compress.rapidin import _SIGN_STREAM, RapidIn, Shuffle, prime_factors

TRAIN, QUERIES = examples(12, 1), examples(3, 2)


def step_by_step(vectors: torch.Tensor, shuffle: Shuffle) -> torch.Tensor:
    """The paper's procedure on the padded vectors themselves: reshape, permute, sign, sum."""
    signs = random_matrix((0, 1), (0, shuffle.size), shuffle.seed, _SIGN_STREAM)[0].double()
    out = []
    for vector in vectors * signs:  # a sign belongs to its coordinate, so it may come before the shuffling
        x = torch.cat([vector, vector.new_zeros(shuffle.padded - vector.numel())])
        for number, (d, goes) in enumerate(shuffle.steps):
            order = goes.argsort()
            x = x.reshape(d, -1)[order] if number % 2 == 0 else x.reshape(-1, d)[:, order]
            x = x.reshape(-1)
        out.append(x.reshape(shuffle.buckets, -1).sum(1))
    return torch.stack(out)


@pytest.mark.parametrize("size, buckets", [(100, 10), (97, 8), (360, 12), (5, 8), (64, 1)])
def test_codes_are_the_shuffled_positions(size, buckets):
    shuffle = Shuffle(size, buckets, rounds=4, seed=3)
    assert len(shuffle.steps) == 8 and shuffle.padded % buckets == 0 and 0 <= shuffle.padded - size < buckets
    at = shuffle.positions(0, shuffle.padded)
    assert sorted(at.tolist()) == list(range(shuffle.padded))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, size, generator=generator, dtype=torch.float64)
    codes = shuffle.codes(0, size)
    S = torch.zeros(size, buckets, dtype=torch.float64)
    S[torch.arange(size), torch.div(codes, 2, rounding_mode="floor").long()] = (1.0 - 2.0 * (codes & 1)).double()
    assert error(x @ S, step_by_step(x, shuffle)) < 1e-12
    halves = torch.cat([shuffle.codes(0, size // 2), shuffle.codes(size // 2, size)])
    assert torch.equal(halves, codes)


def test_prime_factors_multiply_up():
    for n in (1, 2, 97, 360, 1 << 20, 9_999_991):
        found = prime_factors(n)
        product = 1
        for p in found:
            assert all(p % d for d in range(2, min(p, 1000)) if d * d <= p)
            product *= p
        assert product == n


def test_rows_and_scores_are_those_of_the_explicit_sketch():
    model = tiny()
    attributor = pyinf.Attributor(model, "rapidin", k=40, rounds=3).fit(TRAIN)
    names = attributor.selection.names
    flat = [torch.cat([G.flatten(1) for G in gradients(model, data, names).values()], 1) for data in (TRAIN, QUERIES)]
    shuffle = Shuffle(flat[0].shape[1], 40, 3, layer_seed(0, "", "shuffle"))
    rows, queries = (step_by_step(X, shuffle) for X in flat)
    order = [i for batch in attributor._run.table for i in batch.indices]
    assert error(torch.cat(list(attributor._run.table.rows)), rows[order]) < 1e-12
    scores = attributor.score(QUERIES, TRAIN, batch_size=2).values
    assert error(scores, queries @ rows.T) < 1e-10
    cosine = pyinf.Attributor(model, "rapidin", k=40, rounds=3, similarity="cosine").fit(TRAIN, batch_size=1)
    wanted = (queries @ rows.T) / queries.norm(dim=1)[:, None] / rows.norm(dim=1)
    assert error(cosine.score(QUERIES, TRAIN).values, wanted) < 1e-10


def test_inner_products_are_unbiased():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 60, generator=generator, dtype=torch.float64)
    y = x + 0.5 * y
    found = []
    for seed in range(800):
        codes = Shuffle(60, 6, 2, seed).codes(0, 60)
        bucket, sign = torch.div(codes, 2, rounding_mode="floor").long(), (1.0 - 2.0 * (codes & 1)).double()
        one, two = (torch.zeros(6, dtype=torch.float64).index_add_(0, bucket, v * sign) for v in (x, y))
        found.append(float(one @ two))
    found, exact = torch.tensor(found), float(x @ y)
    assert abs(found.mean() - exact) < 4 * found.std() / 800**0.5 < exact / 4


def test_a_saved_compressor_makes_the_same_rows_and_refuses_another_model():
    attributor = pyinf.Attributor(tiny(), "rapidin", k=40).fit(TRAIN)
    run = attributor._run
    settings = json.loads(json.dumps(run.compressor.settings()))
    again = RapidIn.restore(settings, {}, attributor.selection)
    data = attributor._prepare(QUERIES, "queries")
    one, two = (run.query_rows(data, attributor._plan, c) for c in (run.compressor, again))
    assert torch.equal(one, two)
    with pytest.raises(ConfigError, match="other sizes"):
        RapidIn.restore({**settings, "elements": 7}, {}, attributor.selection)
