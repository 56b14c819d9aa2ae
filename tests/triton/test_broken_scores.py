"""Scores, gradient products and sandwiches broken on purpose: a value test has to see each of the changed lines.

Every mutant is run against a test as it stands in test_scores.py, test_gradients.py or test_precondition.py: what lives
there is a hole in that test. Not in the list are changes without a meaning: a mask that guards what another one sets to
zero anyway, or what is never stored.
"""

from __future__ import annotations

import pytest
import torch

from pyinf.ops import triton_precondition
from pyinf.triton_kernels import (
    dense_scores,
    fixed_order,
    gradients,
    low_rank_scores,
    precondition,
    precondition_low_rank,
    tiles,
)
from tests.triton import mutants, test_gradients, test_precondition, test_scores

USERS = {
    tiles: (low_rank_scores, dense_scores, precondition, precondition_low_rank),
    fixed_order: (gradients,),
}


# Tests of test_*.py with arguments; ``patch`` is a MonkeyPatch of its own.
def ranks(patch):
    test_scores.test_low_rank_tiles(40, 16, False, True)


def ranks_per_token(patch):
    test_scores.test_low_rank_tiles(5, 8, True, False)


def shared_inputs(patch):
    test_scores.test_layers_that_share_an_input(torch.float16, False, patch)


def by_sequence(patch):
    test_scores.test_dense_tiles_by_sequence(4, torch.float16)


def by_token(patch):
    test_scores.test_dense_tiles_by_token(2, False)


def by_token_split(patch):
    test_scores.test_dense_tiles_by_token(2, True)


def by_token_whole(patch):
    test_scores.test_dense_tiles_by_token(1, True)


def segments(patch):
    test_scores.test_sums_over_more_tiles_than_one_block()


def norms(patch):
    test_gradients.test_each_sequence_goes_its_own_way(torch.float32, patch)


def triangles(patch):
    test_gradients.test_norms_over_triangles_of_tiles()


def ghost_products(patch):
    test_gradients.test_both_ways_of_a_product(True, False)


def tile_products(patch):
    test_gradients.test_both_ways_of_a_product(False, False)


def exchanged_products(patch):
    test_gradients.test_both_ways_of_a_product(False, True)


def partial_sums(patch):
    test_gradients.test_partial_sums()


def products(patch):
    test_precondition.test_product_tiles(3, True)


def sandwich(patch):
    test_precondition.test_sandwich(33, 65, torch.float32)


def sandwich_in_half(patch):
    test_precondition.test_half_precision_does_not_overflow()


def sketch(patch):
    test_precondition.test_sketch_tiles(80, False)


def sketch_transposed(patch):
    test_precondition.test_sketch_tiles(16, True)


def low_rank(patch):
    test_precondition.test_low_rank(torch.float32, "tiles", patch)


def low_rank_written(patch):
    test_precondition.test_low_rank(torch.float32, "written", patch)


def low_rank_gradients(patch):
    test_precondition.test_low_rank(torch.float32, "gradients first", patch)


def like_torch(patch):
    test_precondition.test_low_rank_like_torch()


def test_matrix(patch):
    test_precondition.test_the_test_matrix_is_the_shared_one()


test_matrix.__test__ = False

MUTANTS = [
    # low_rank_scores
    (low_rank_scores, "        R0 += BK\n", "", ranks),
    (low_rank_scores, "            R1 += BK\n", "", shared_inputs),
    (low_rank_scores, "            R2 += BK\n", "", shared_inputs),
    (low_rank_scores, "tl.load(R1 + R_offsets", "tl.load(R0 + R_offsets", shared_inputs),
    (low_rank_scores, "tl.load(R2 + R_offsets", "tl.load(R1 + R_offsets", shared_inputs),
    (low_rank_scores, "        a += BK * a_column", "        a += BK", ranks),
    (low_rank_scores, "mask=row_mask[:, None] & (inner < d_in - start)[None, :]", "mask=row_mask[:, None]", ranks),
    (low_rank_scores, "a_rows[:, None] + inner[None, :] * a_column", "a_rows[:, None] + inner[None, :]", ranks),
    (low_rank_scores, "L + query * d_out * RANK + part * RB * L_rank", "L + query * d_out * RANK", ranks),
    (low_rank_scores, "L + query * d_out * RANK + part", "L + query * d_out + part", ranks),
    (low_rank_scores, "query_lane * (d_out * RANK) + rank_lane * L_rank", "query_lane * (d_out * RANK)", ranks),
    (low_rank_scores, "rank_lane * L_rank, row_mask", "rank_lane * L_out, row_mask", ranks),
    (low_rank_scores, "column_mask & (part * RB + rank_lane < RANK)", "column_mask", ranks),
    (low_rank_scores, "at = (query * RANK + part * RB) * d_in", "at = query * RANK * d_in", ranks),
    (low_rank_scores, "(query_lane * RANK + rank_lane) * d_in", "(query_lane + rank_lane) * d_in", ranks_per_token),
    (low_rank_scores, "a + first * a_row", "a", ranks),
    (low_rank_scores, "g0 + first * g0_row", "g0", ranks),
    (low_rank_scores, "g1 + first * g1_row, L1", "g0 + first * g0_row, L1", shared_inputs),
    (low_rank_scores, "both += s1 *", "both = s1 *", shared_inputs),
    (low_rank_scores, "both += s2 *", "both += s1 *", shared_inputs),
    (low_rank_scores, "sums += tl.sum(", "sums = tl.sum(", ranks),
    (low_rank_scores, "for part in range(0, PARTS)", "for part in range(1, PARTS)", ranks),
    (low_rank_scores, "query_lane = lane // RB", "query_lane = lane % BQ", ranks_per_token),
    (low_rank_scores, "tl.load(at, mask=mask, other=0.0) + sums", "sums", ranks_per_token),
    (low_rank_scores, "at = out + query * out_query", "at = out", ranks_per_token),
    (low_rank_scores, "q.to(tl.int64)[None, :] * out_query", "q.to(tl.int64)[None, :]", ranks_per_token),
    (low_rank_scores, "steps, n * BQ + q, queries", "steps, q, queries", ranks),
    # dense_scores
    (dense_scores, "g + start * g_row", "g + b * g_row", by_sequence),
    (dense_scores, "(stop - start).to(tl.int32)", "(stop - start - 1).to(tl.int32)", by_sequence),
    (dense_scores, "g, a, offsets, b + 1, sequences", "g, a, offsets, b, sequences", by_sequence),
    (dense_scores, "g, a, offsets, b + 3, sequences", "g, a, offsets, b + 2, sequences", by_sequence),
    (dense_scores, "x2, b + 2, sequences", "x3, b + 2, sequences", by_sequence),
    (dense_scores, "* tiles + tile\n    tl.store", "* tiles\n    tl.store", by_sequence),
    (dense_scores, "g += first_row * g_column", "g += first_row", by_sequence),
    (dense_scores, "a += first_column * a_column", "a += first_column", by_sequence),
    (dense_scores, "column_offsets = c * a_column", "column_offsets = c", by_sequence),
    (dense_scores, "at = V + first_row * V_row + first_column", "at = V + first_row * V_row + first_row", by_sequence),
    (dense_scores, "(c < d_in - n * BN)[None, :]\n    for", "(c < d_in)[None, :]\n    for", by_sequence),
    (dense_scores, "        at += V_query\n", "", by_sequence),
    (dense_scores, "tile = tl.program_id(0) // groups", "tile = tl.program_id(0) % groups", by_sequence),
    (dense_scores, "total += tl.load(partial + at", "total = tl.load(partial + at", segments),
    (dense_scores, "q = (pair % queries)", "q = (pair // queries)", segments),
    (dense_scores, "tl.load(where, mask=inside, other=0.0) + tl.sum(total, axis=1)", "tl.sum(total, axis=1)", segments),
    (dense_scores, "V += query.to(tl.int64) * V_query", "V += query.to(tl.int64)", by_token),
    (dense_scores, "V + column * V_row", "V", by_token),
    (dense_scores, "at = g + column * g_column", "at = g + column", by_token),
    (dense_scores, "at + r[:, None] * g_row + c[None, :] * g_column", "at + r[:, None] * g_row + c[None, :]", by_token),
    (dense_scores, "for n in range(split,", "for n in range(0,", by_token),
    (dense_scores, "sums += tl.sum(y", "sums = tl.sum(y", by_token),
    (dense_scores, "out + split.to(tl.int64) * split_stride, sums", "out, sums", by_token),
    (dense_scores, "a += first * a_row\n    g +=", "g +=", by_token),
    (dense_scores, "sums += tl.load(at, mask=row_mask, other=0.0)", "pass", by_token_whole),
    (dense_scores, "query.to(tl.int64) * out_query + (first", "query.to(tl.int64) + (first", by_token_split),
    (dense_scores, "(first + r) * out_token", "r * out_token", by_token_whole),
    # tiles: what the score and precondition kernels share
    (tiles, "return first + inside % height, inside // height", "return first, inside // height", products),
    (tiles, "first = group * GROUP", "first = group", products),
    (tiles, "x += BK * x_depth", "x += BK", products),
    (tiles, "y += BK * y_depth", "y += BK", products),
    (tiles, "inner < depth - start", "inner < depth", products),
    (tiles, "total = tl.dot(left, right, total,", "total = tl.dot(left, right,", products),
    (tiles, "mask=row_mask[:, None] & (inner", "mask=(row_mask | ~row_mask)[:, None] & (inner", by_sequence),
    (tiles, "mask=column_mask[None, :] & (inner", "mask=(column_mask | ~column_mask)[None, :] & (inner", by_sequence),
    (tiles, "mask=row_mask[:, None] & (inner < depth - start)[None, :]", "mask=row_mask[:, None]", products),
    (tiles, "mask=column_mask[None, :] & (inner < depth - start)[:, None]", "mask=column_mask[None, :]", products),
    (tiles, "tl.load(offsets + middle) <= row", "tl.load(offsets + middle) < row", ranks),
    (tiles, "inside = (rows >= start) & (rows < stop)", "inside = rows < stop", ranks),
    (tiles, "inside = (rows >= start) & (rows < stop)", "inside = (rows >= start) & (rows <= stop)", ranks),
    (tiles, "last = sequence_of(offsets, sequences, steps, last_row)", "last = first", ranks),
    (tiles, "row = (tile + b).to(tl.int64)", "row = tile.to(tl.int64)", ranks),
    (tiles, "last = ((stop - 1) // TILE)", "last = (stop // TILE)", ranks),
    (tiles, "first = (start // TILE)", "first = ((start + TILE - 1) // TILE)", ranks),
    (tiles, "t = tile + tl.arange(0, BT)", "t = first + tl.arange(0, BT)", segments),
    (tiles, "mask = (t <= last)[:, None]", "mask = (t < last)[:, None]", ranks),
    (tiles, "at = (t + b).to(tl.int64) * queries", "at = t.to(tl.int64) * queries", ranks),
    (tiles, "            partial += split_stride\n        where", "        where", by_token),
    (tiles, "held + tl.sum(total, axis=0)", "tl.sum(total, axis=0)", ranks),
    (tiles, "        partial += split_stride\n    where", "    where", by_token_split),
    (tiles, "tl.load(where, mask=mask, other=0.0) + total", "total", by_token_split),
    (tiles, "partial + q * tokens + t, mask", "partial + q * queries + t, mask", by_token_split),
    (tiles, "q * scores_query + t * scores_token", "q * scores_token + t * scores_query", segments),
    # gradient_dot, gradient_norm
    (
        gradients,
        "rows1[:, None] * row1 + inner[None, :] * col1",
        "rows1[:, None] * row1 + inner[None, :]",
        ghost_products,
    ),
    (gradients, "rows2[None, :] * row2", "rows1[None, :] * row2", ghost_products),
    (gradients, "inside = inner < d\n", "inside = inner <= d\n", ghost_products),
    (gradients, "total = tl.dot(left, right, total,", "total = tl.dot(left, right,", ghost_products),
    (gradients, "mask=inside[:, None] & ok2[None, :]", "mask=inside[:, None]", norms),
    (gradients, "mask=ok1[:, None] & inside[None, :]", "mask=inside[None, :]", norms),
    (gradients, "mask=ok1[:, None] & inside[None, :]", "mask=ok1[:, None]", ghost_products),
    (gradients, "mask=o_in[:, None] & inside[None, :]", "mask=inside[None, :]", tile_products),
    (gradients, "mask=inside[:, None] & i_in[None, :]", "mask=inside[:, None]", tile_products),
    (gradients, "mask=inside[:, None] & i_in[None, :]", "mask=i_in[None, :]", tile_products),
    (gradients, "b = pair // count2", "b = pair % count2", ghost_products),
    (gradients, "t = (p // tiles2) * BT", "t = (p % tiles2) * BT", ghost_products),
    (gradients, "for p in range(split, tl.cdiv(length1, BT)", "for p in range(0, tl.cdiv(length1, BT)", ghost_products),
    (
        gradients,
        "start1 + t, start2 + s, t < length1, s < length2, g1",
        "t, start2 + s, t < length1, s < length2, g1",
        ghost_products,
    ),
    (
        gradients,
        "total += tl.sum(by_a * by_g)\n    tl.store(partial + split.to(tl.int64) * pairs",
        "total += tl.sum(by_a + by_g)\n    tl.store(partial + split.to(tl.int64) * pairs",
        ghost_products,
    ),
    (
        gradients,
        "token = t + tl.arange(0, BT)\n        inside = token < length\n",
        "token = t + tl.arange(0, BT)\n        inside = token < length - 1\n",
        tile_products,
    ),
    (gradients, "i.to(tl.int64)[None, :] * a_col", "i.to(tl.int64)[None, :]", tile_products),
    (gradients, "o = (tile // across) * BO", "o = (tile % across) * BO", tile_products),
    (
        gradients,
        "start = tl.load(offsets2 + c)\n        length",
        "start = tl.load(offsets2)\n        length",
        tile_products,
    ),
    (gradients, "b * by_first + c * by_second", "b * by_second + c * by_first", exchanged_products),
    (gradients, "tl.sum(first * second)", "tl.sum(first * first)", tile_products),
    (gradients, "tl.where(i == j, 1.0, 2.0)", "1.0", triangles),
    (gradients, "upper = column < tiles - r", "upper = column <= tiles - r", triangles),
    (gradients, "r - tiles % 2", "r - 1", triangles),
    (gradients, "length <= crossover, tl.cdiv", "length < crossover, tl.cdiv", norms),
    (gradients, "tl.where(length > crossover, length, 0)", "tl.where(length >= crossover, length, 0)", norms),
    (gradients, "for p in range(split, tiles *", "for p in range(0, tiles *", triangles),
    (gradients, "tl.sum(full * full)", "tl.sum(full)", norms),
    (fixed_order, "row = first + tl.arange(0, DEPTH)", "row = tl.arange(0, DEPTH)", partial_sums),
    (fixed_order, "mask=(row < splits)[:, None]", "mask=(row < splits - 1)[:, None]", partial_sums),
    (fixed_order, "total += tl.sum(values, axis=0)", "total = tl.sum(values, axis=0)", partial_sums),
    (fixed_order, "total * factor, mask", "total, mask", partial_sums),
    (fixed_order, "tl.sqrt(tl.maximum(total, 0.0))", "tl.maximum(total, 0.0)", partial_sums),
    # precondition
    (precondition, "x + q * x_batch", "x", products),
    (precondition, "y + q * y_batch", "y", products),
    (precondition, "at = out + q * out_batch + first_row", "at = out + first_row", products),
    (precondition, "first_column * y_column", "first_row * y_column", products),
    (precondition, "r * x_row, c * y_column", "r * x_row, c * y_depth", products),
    (precondition, "r < rows_left, c < columns_left", "r < rows_left - 1, c < columns_left", products),
    (precondition, "(r < rows_left)[:, None]", "(r <= rows_left)[:, None]", products),
    (precondition, "(r < rows_left)[:, None]", "(r < rows_left - 1)[:, None]", products),
    (precondition, "lam.to(tl.float32) + damping", "lam.to(tl.float32)", products),
    (precondition, "first_row * lam_row + first_column * lam_column", "first_row * lam_row", products),
    (
        precondition,
        "r[:, None] * lam_row + c[None, :] * lam_column",
        "r[:, None] * lam_column + c[None, :] * lam_row",
        products,
    ),
    (precondition, "total = total / (", "total = total * (", products),
    (precondition, "(lam + damping))", "lam)", sandwich),
    (precondition, "at = x + q * x_batch", "at = x", sandwich),
    (precondition, "at + r * lam_row + c * lam_column", "at + r * lam_column + c * lam_row", sandwich),
    (precondition, "row = m.to(tl.int64) * BM", "row = m.to(tl.int64)", sandwich),
    (
        triton_precondition,
        "product(out, x[:, :d_out], right.mT[:, :d_in])",
        "product(out, x[:, :d_out], right[:, :d_in])",
        sandwich,
    ),
    (triton_precondition, "left.mT, x, Lam, damping)", "left, x, Lam, damping)", sandwich),
    (triton_precondition, "left, x)\n        product", "left.mT, x)\n        product", sandwich),
    (triton_precondition, "out.copy_(product(whole, left, x)", "out.copy_(product(whole, left.mT, x)", sandwich),
    (triton_precondition, "out.div_(scale)", "out", sandwich_in_half),
    # precondition_low_rank
    (precondition_low_rank, "x += start * x_token + first_row", "x += first_row", sketch),
    (precondition_low_rank, "y += start * y_token", "y += 0", sketch),
    (precondition_low_rank, "Lam += first_row * lam_row", "Lam += first_row", sketch),
    (precondition_low_rank, "at = Lam + column * lam_column", "at = Lam + column * lam_row", sketch),
    (
        precondition_low_rank,
        "mask=column_mask[:, None] & (wa < width)",
        "mask=(c >= 0)[:, None] & (wa < width)",
        sketch,
    ),
    (precondition_low_rank, "omega += q * omega_query", "omega += 0", sketch),
    (precondition_low_rank, "at = omega + column * omega_row", "at = omega", sketch),
    (precondition_low_rank, "y + column * y_column", "y", sketch),
    (precondition_low_rank, "wb = WA + tl.arange(0, WB)", "wb = tl.arange(0, WB)", sketch),
    (precondition_low_rank, "for n in range(split,", "for n in range(0,", sketch),
    (precondition_low_rank, "total_a = tl.dot(tile, test, total_a,", "total_a = tl.dot(tile, test,", sketch),
    (precondition_low_rank, "tile / (factor + damping)", "tile / factor", sketch),
    (
        precondition_low_rank,
        "tl.where(mask, tile / (factor + damping), 0.0)",
        "tile * (factor + damping)",
        sketch_transposed,
    ),
    (
        precondition_low_rank,
        "r[:, None] * lam_row + c[None, :] * lam_column",
        "r[:, None] * lam_column + c[None, :] * lam_row",
        sketch_transposed,
    ),
    (precondition_low_rank, "squares += tl.sum", "squares = tl.sum", sketch),
    (precondition_low_rank, "* queries + q) * row_tiles + m", "* queries + q) * row_tiles", sketch),
    (precondition_low_rank, "at = out + split.to(tl.int64) * out_split", "at = out", sketch),
    (precondition_low_rank, "out + r[:, None] * out_row + c", "out + r[:, None] * columns + c", test_matrix),
    (precondition_low_rank, "first = tl.program_id(1) * K", "first = 0 * K", test_matrix),
    (precondition_low_rank, "r = tl.program_id(0) * R +", "r =", test_matrix),
    (precondition_low_rank, "STREAM_SKETCH = 3", "STREAM_SKETCH = 2", like_torch),
    (triton_precondition, "self._sides[::-1] if transposed", "self._sides if transposed", low_rank),
    (
        triton_precondition,
        "Lam = self._Lam.mT if transposed else self._Lam\n        (rows",
        "Lam = self._Lam.mT.contiguous().view(self._Lam.shape).mT if transposed else self._Lam\n        (rows",
        low_rank,
    ),
    (
        triton_precondition,
        "M = self._M.mT if transposed",
        "M = self._M.mT.contiguous().view(self._M.shape).mT if transposed",
        low_rank_written,
    ),
    (triton_precondition, "product(M, bases[0].mT, G", "product(M, bases[0], G", low_rank_gradients),
    (triton_precondition, "x.mT[None], y[None], Lam, damping", "x.mT[None], y[None]", low_rank_written),
    (
        triton_precondition,
        "padded(R, r, columns, dtype), right.mT[:, :d_in]",
        "padded(R, r, columns, dtype), right[:, :d_in]",
        low_rank,
    ),
    (triton_precondition, "(root[:, :, None] * vh[:, :r])", "vh[:, :r]", low_rank),
    (triton_precondition, "left, padded(L, rows", "left.mT, padded(L, rows", low_rank),
    (triton_precondition, "kept = s[:, :r].double().square()", "kept = s[:, :r].double()", low_rank),
]
NAMES = [f"{module.__name__.rpartition('.')[2]}-{test.__name__}-{i}" for i, (module, _, _, test) in enumerate(MUTANTS)]


@pytest.mark.parametrize(("module", "old", "new", "test"), MUTANTS, ids=NAMES)
def test_a_broken_line_is_seen(module, old, new, test, tmp_path, monkeypatch):
    copy = mutants.broken_copy(module, old, new, tmp_path, monkeypatch)
    mutants.put_in_place(module, copy, monkeypatch, USERS.get(module, ()))
    seen = (AssertionError, torch.linalg.LinAlgError)  # the latter: NaN where a factorisation comes next
    with pytest.raises(seen, match=mutants.SEEN), pytest.MonkeyPatch.context() as patch:
        test(patch)


@pytest.mark.parametrize("module", dict.fromkeys(m for m, *_ in MUTANTS), ids=lambda m: m.__name__.rpartition(".")[2])
def test_an_unbroken_copy_is_not_seen(module, tmp_path, monkeypatch):
    """So that it is the changed line which the tests see."""
    copy = mutants.broken_copy(module, "import torch", "import torch", tmp_path, monkeypatch)
    mutants.put_in_place(module, copy, monkeypatch, USERS.get(module, ()))
    for test in dict.fromkeys(test for changed, _, _, test in MUTANTS if changed is module):
        with pytest.MonkeyPatch.context() as patch:
            test(patch)
