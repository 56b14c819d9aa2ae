"""Philox against its published vectors, in PyTorch and in C++, and the moments of what is drawn from it."""

from __future__ import annotations

import pytest
import torch

from pyinf.errors import ConfigError
from pyinf.ops import philox, random_projection, sparse_projection, use_backend

VECTORS = [  # known answers published with Random123, philox4x32 with 10 rounds: counter, key, output
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_known_answers(counter, key, expected):
    from pyinf import _C

    words = philox.philox4x32(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(w) for w in words) == expected
    assert _C.philox4x32(*counter, *key) == expected


@pytest.mark.parametrize("distribution", philox.DISTRIBUTIONS)
@pytest.mark.parametrize("first", [0, (1 << 32) - 7])
def test_any_window_holds_the_same_elements(distribution, first):
    whole = philox.random_matrix((first, first + 20), (0, 300), 5, 2, distribution)
    for i0, i1, j0, j1 in ((0, 20, 3, 4), (7, 9, 127, 130), (19, 20, 0, 300), (0, 1, 255, 299)):
        part = philox.random_matrix((first + i0, first + i1), (j0, j1), 5, 2, distribution)
        assert torch.equal(part, whole[i0:i1, j0:j1])
    assert philox.random_matrix((3, 3), (0, 5), 0).shape == (0, 5)


def test_streams_and_seeds_differ():
    drawn = [
        philox.random_matrix((0, 8), (0, 256), seed, stream) for seed, stream in ((0, 0), (1, 0), (0, 1), (1 << 32, 0))
    ]
    for i in range(4):
        for j in range(i):
            assert 0.3 < (drawn[i] == drawn[j]).float().mean() < 0.7


def test_moments():
    signs = philox.random_matrix((0, 200), (0, 1000), 3)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert abs(signs.mean()) < 5 / 200000**0.5
    normal = philox.random_matrix((0, 200), (0, 1000), 3, 0, "normal")
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((normal.double() ** power).mean() - moment) < 5 * (spread / 200000) ** 0.5
    bucket, sign = philox.sparse_coordinates((0, 20000), 10, 2, 0)
    counts = torch.bincount(bucket.flatten(), minlength=10).double()
    assert ((counts - 4000) ** 2 / 4000).sum() < 30  # chi-squared with 9 degrees of freedom
    assert abs(sign.mean()) < 5 / 40000**0.5


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_the_matrix_itself(backend):
    """Projecting the identity shows every element, whatever way the work is cut."""
    with use_backend(backend):
        shown = random_projection(torch.eye(600), 600, seed=11) * 600**0.5
    assert torch.allclose(shown, philox.random_matrix((0, 600), (0, 600), 11), atol=1e-5)


@pytest.mark.parametrize("kind", ["rademacher", "normal", "sparse"])
def test_inner_products_are_kept_on_average(kind):
    x = torch.nn.functional.normalize(torch.randn(2, 40, generator=torch.Generator().manual_seed(0)), dim=1)
    seeds, k = 100, 32
    found = torch.zeros(2, 2)
    for seed in range(seeds):
        y = sparse_projection(x, k, seed, 2) if kind == "sparse" else random_projection(x, k, seed, kind)
        found += y @ y.T / seeds
    assert (found - x @ x.T).abs().max() < 5 * (2 / (k * seeds)) ** 0.5


def test_unknown_distribution():
    with pytest.raises(ConfigError, match="rademacher"):
        random_projection(torch.ones(1, 2), 3, distribution="uniform")
