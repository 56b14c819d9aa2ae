"""The ops in plain torch, tuned: no [B, d_out, d_in] tensor, bounded workspace, float32 accumulation.

On the CPU half-precision inputs are raised to float32 a sequence or a chunk at a time (bf16 products are not faster
there). On CUDA they go to the tensor cores as they are, with float32 results where this torch has ``out_dtype``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pyinf.ops import costs, philox, reference, registry
from pyinf.ops.packing import accumulator_dtype, bounds
from pyinf.ops.quantise import pack_signs, unpack_signs

_HALF = (torch.bfloat16, torch.float16)
_HAS_OUT_DTYPE = hasattr(torch.ops.aten.mm, "dtype") and hasattr(torch.ops.aten.bmm, "dtype")


def _workspace(device: torch.device) -> int:
    """Elements of the largest temporary: what stays in a CPU's second-level caches, or what a GPU fills itself with."""
    return 1 << 20 if device.type == "cpu" else 1 << 26


def _product(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """``x @ y`` (2-D or batched) with the result and the accumulation in ``dtype``."""
    if _HAS_OUT_DTYPE and x.is_cuda and x.dtype == y.dtype and x.dtype in _HALF and dtype == torch.float32:
        return (torch.mm if x.dim() == 2 else torch.bmm)(x, y, out_dtype=torch.float32)
    return torch.matmul(x.to(dtype), y.to(dtype))


def _equal_length(marks: list[int]) -> int | None:
    """The common length of all sequences, or None."""
    if len(marks) < 2:
        return None
    length = marks[1] - marks[0]
    return length if all(marks[b + 1] - marks[b] == length for b in range(len(marks) - 1)) else None


def _batches(marks: list[int], limit: int) -> Iterator[tuple[int, int]]:
    """Runs of sequences [b0, b1) with at most ``limit`` rows each (always at least one sequence)."""
    start = 0
    for b in range(1, len(marks)):
        if marks[b] - marks[start] > limit and b - start > 1:
            yield start, b - 1
            start = b - 1
    if start < len(marks) - 1:
        yield start, len(marks) - 1


def _sum_sequences(values: Tensor, marks: list[int]) -> Tensor:
    """``[N, Q]`` summed over the rows of each sequence, in a fixed order: ``[B, Q]``."""
    length = _equal_length(marks)
    if length is not None:
        return values.view(len(marks) - 1, length, values.shape[1]).sum(1)
    sums = [values[marks[b] : marks[b + 1]].sum(0) for b in range(len(marks) - 1)]
    return torch.stack(sums) if sums else values.new_zeros(0, values.shape[1])


def _gradient_rows(g: Tensor, a: Tensor, marks: list[int], rows: slice, dtype: torch.dtype) -> Tensor:
    """Rows ``rows`` of every sequence's gradient: [B, rows, d_in]."""
    count, length = len(marks) - 1, _equal_length(marks)
    g = g[:, rows]
    if length is not None:
        left = g.reshape(count, length, g.shape[1]).transpose(1, 2)
        return _product(left, a.reshape(count, length, a.shape[1]), dtype)
    out = torch.empty(count, g.shape[1], a.shape[1], dtype=dtype, device=g.device)
    for b in range(count):
        part = slice(marks[b], marks[b + 1])
        if part.stop == part.start:
            out[b].zero_()
        else:
            out[b] = _product(g[part].T, a[part], dtype)
    return out


def _row_blocks(d_out: int, per_row: int, device: torch.device) -> Iterator[slice]:
    step = max(1, min(d_out, _workspace(device) // max(per_row, 1)))
    step = max(16, step // 16 * 16)
    for start in range(0, d_out, step):
        yield slice(start, min(start + step, d_out))


def accumulate_covariance(C: Tensor, x: Tensor, bias: bool = False, mask: Tensor | None = None) -> None:
    """Lower triangle by block rows: (n + 1) / 2n of the full product for n blocks."""
    d = x.shape[1]
    step = 1 << 13 if x.dtype != C.dtype else max(x.shape[0], 1)
    block = _covariance_block(d, x.device)
    for start in range(0, x.shape[0], step):
        part = x[start : start + step]
        if mask is not None:
            part = part[mask[start : start + step]]
        if part.shape[0] == 0:
            continue
        if not (_HAS_OUT_DTYPE and part.is_cuda and part.dtype in _HALF):
            part = part.to(C.dtype)
        for r in range(0, d, block):
            stop = min(r + block, d)
            target = C[r:stop, :stop]
            if part.dtype == C.dtype:
                target.addmm_(part[:, r:stop].T, part[:, :stop])
            else:
                target += _product(part[:, r:stop].T, part[:, :stop], C.dtype)
        if bias:
            C[d, :d] += part.sum(0, dtype=C.dtype)
            C[d, d] += part.shape[0]


def _covariance_block(d: int, device: torch.device) -> int:
    if device.type != "cpu":
        return max(1024, (d + 7) // 8)
    # Measured on AVX-512: 4 blocks are best at 256 columns, 8 from 384 on (1.5 to 1.7 times the full product).
    count = 1 if d < 192 else 4 if d < 384 else 8
    return max(1, -(-d // (16 * count)) * 16)


def accumulate_squared_gradients(Lam: Tensor, g: Tensor, a: Tensor, offsets: Tensor) -> None:
    """Blocks of rows that stay in cache: product, then squared into Λ."""
    marks = bounds(offsets, g.shape[0])
    lengths = [marks[b + 1] - marks[b] for b in range(len(marks) - 1)]
    if g.is_cuda and _equal_length(marks):
        per = max(1, _workspace(g.device) // max(Lam.numel(), 1))
        length = lengths[0]
        for b in range(0, len(lengths), per):
            rows = slice(marks[b], marks[min(b + per, len(lengths))])
            left = g[rows].reshape(-1, length, g.shape[1]).transpose(1, 2)
            full = _product(left, a[rows].reshape(-1, length, a.shape[1]), Lam.dtype)
            Lam += full.square_().sum(0)
        return
    g, a = g.to(Lam.dtype), a.to(Lam.dtype)
    for rows in _row_blocks(Lam.shape[0], 4 * Lam.shape[1], g.device):
        target = Lam[rows]
        buffer = torch.empty_like(target, memory_format=torch.contiguous_format)
        for b, length in enumerate(lengths):
            if length:
                part = slice(marks[b], marks[b + 1])
                torch.mm(g[part, rows].T, a[part], out=buffer)
                target.addcmul_(buffer, buffer)


def precondition(V: Tensor, U_S: Tensor | None, U_A: Tensor | None, Lam: Tensor, damping: float) -> Tensor:
    """Four products, the division in place."""
    dtype = accumulator_dtype(V, U_S, U_A, Lam)
    x = V.to(dtype)
    right = None if U_A is None else U_A.to(dtype)
    left = None if U_S is None else U_S.to(dtype)
    if right is not None:
        x = x @ right
    if left is not None:
        x = left.T @ x
    x = x / (Lam.to(dtype) + damping)
    if left is not None:
        x = left @ x
    return x @ right.T if right is not None else x


def precondition_low_rank(
    g: Tensor,
    a: Tensor,
    offsets: Tensor,
    U_S: Tensor | None,
    U_A: Tensor | None,
    Lam: Tensor,
    damping: float,
    rank: int,
    power_iterations: int = 1,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate the factors, divide one query's gradient, sketch it (Halko, Martinsson, Tropp 2011), rotate back."""
    dtype = accumulator_dtype(g, a, U_S, U_A, Lam)
    marks = bounds(offsets, g.shape[0])
    queries, (d_out, d_in) = len(marks) - 1, Lam.shape
    r = min(rank, d_out, d_in)
    width = min(r + 8, d_out, d_in)  # a few columns more than asked: the last kept ones become accurate
    L = torch.empty(queries, d_out, r, dtype=dtype, device=g.device)
    R = torch.empty(queries, r, d_in, dtype=dtype, device=g.device)
    energy = torch.ones(queries, dtype=dtype, device=g.device)
    inverse = 1 / (Lam.to(dtype) + damping)
    left = None if U_S is None else U_S.to(dtype)
    right = None if U_A is None else U_A.to(dtype)
    omega = philox.random_matrix((0, d_in), (0, width), seed, reference.STREAM_SKETCH, "normal", g.device).to(dtype)
    gs, as_ = g.to(dtype), a.to(dtype)
    if left is not None:
        gs = gs @ left
    if right is not None:
        as_ = as_ @ right
    for q in range(queries):
        part = slice(marks[q], marks[q + 1])
        M = torch.mm(gs[part].T, as_[part]).mul_(inverse)
        basis = torch.linalg.qr(M @ omega).Q
        for _ in range(power_iterations):
            basis = torch.linalg.qr(M @ torch.linalg.qr(M.T @ basis).Q).Q
        small = basis.T @ M
        qr = torch.linalg.qr(small.T)  # small = (Q_r R_r)ᵀ: the decomposition is then only width × width
        u, s, vh = torch.linalg.svd(qr.R.T)
        root = s[:r].sqrt()
        torch.mm(basis, u[:, :r] * root, out=L[q])
        torch.mm(root[:, None] * vh[:r], qr.Q.T, out=R[q])
        # ‖LR‖² + ‖M − LR‖² = ‖M‖², and the part outside the kept subspace is what is lost
        total = M.square().sum(dtype=torch.float64)
        energy[q] = torch.where(total > 0, s[:r].double().square().sum() / total, torch.ones_like(total)).clamp(max=1.0)
    if left is not None:
        L = left @ L
    if right is not None:
        R = R @ right.T
    return L, R, energy


def dense_scores(scores: Tensor, g: Tensor, a: Tensor, offsets: Tensor, V: Tensor, per_token: bool = False) -> None:
    """Gradients a block of rows at a time, each block multiplied with all queries at once."""
    marks = bounds(offsets, g.shape[0])
    dtype = scores.dtype
    if per_token:
        _dense_token_scores(scores, g, a, V)
        return
    count, d_in = len(marks) - 1, a.shape[1]
    if g.device.type == "cpu":
        g, a = g.to(dtype), a.to(dtype)
    flat = V.flatten(1)
    for rows in _row_blocks(g.shape[1], count * d_in, g.device):
        part = _gradient_rows(g, a, marks, rows, dtype).flatten(1)
        scores += flat[:, rows.start * d_in : rows.stop * d_in].to(dtype) @ part.T


def _dense_token_scores(scores: Tensor, g: Tensor, a: Tensor, V: Tensor) -> None:
    dtype = scores.dtype
    step = max(1, _workspace(g.device) // max(g.shape[1], 1))
    for start in range(0, g.shape[0], step):
        rows = slice(start, start + step)
        gs = g[rows].to(dtype)
        for q in range(V.shape[0]):
            scores[q, rows] += (_product(a[rows], V[q].T.to(a.dtype) if a.is_cuda else V[q].T, dtype) * gs).sum(1)


def low_rank_scores(
    scores: Tensor, g: Tensor, a: Tensor, offsets: Tensor, L: Tensor, R: Tensor, per_token: bool = False
) -> None:
    """Either every token on every factor, or the queries rebuilt once and scored densely: whichever is cheaper."""
    marks = bounds(offsets, g.shape[0])
    queries, d_out, r = L.shape
    dtype, d_in = scores.dtype, a.shape[1]
    if not per_token and not costs.low_rank_is_cheaper(g.shape[0], d_out, d_in, queries, r, len(marks) - 1):
        step = max(1, (1 << 25) // (d_out * d_in))
        for q in range(0, queries, step):
            full = L[q : q + step].to(dtype) @ R[q : q + step].to(dtype)
            registry.dispatch("dense_scores", scores[q : q + step], g, a, offsets, full, False)
        return
    left = L.permute(1, 0, 2).reshape(d_out, queries * r)
    right = R.reshape(queries * r, d_in).T
    left = left.to(g.dtype) if g.is_cuda else left.to(dtype)
    right = right.to(a.dtype) if a.is_cuda else right.to(dtype)
    for b0, b1 in _batches(marks, max(1, _workspace(g.device) // max(queries * r, 1))):
        rows = slice(marks[b0], marks[b1])
        both = _product(g[rows], left, dtype).mul_(_product(a[rows], right, dtype))
        tokens = both.view(-1, queries, r).sum(2)
        if per_token:
            scores[:, rows] += tokens.T
        else:
            scores[:, b0:b1] += _sum_sequences(tokens, [m - marks[b0] for m in marks[b0 : b1 + 1]]).T


def gradient_dot(g1: Tensor, a1: Tensor, offsets1: Tensor, g2: Tensor, a2: Tensor, offsets2: Tensor) -> Tensor:
    """Token by token, or through the gradients a block of rows at a time: whichever is cheaper."""
    marks1, marks2 = bounds(offsets1, g1.shape[0]), bounds(offsets2, g2.shape[0])
    dtype = accumulator_dtype(g1, a1, g2, a2)
    count1, count2 = len(marks1) - 1, len(marks2) - 1
    d_out, d_in = g1.shape[1], a1.shape[1]
    out = torch.zeros(count1, count2, dtype=dtype, device=g1.device)
    if costs.dot_is_ghost(g1.shape[0], g2.shape[0], d_out, d_in, count1, count2):
        side = int(_workspace(g1.device) ** 0.5)
        for b0, b1 in _batches(marks1, side):
            rows1 = slice(marks1[b0], marks1[b1])
            local1 = [m - marks1[b0] for m in marks1[b0 : b1 + 1]]
            for c0, c1 in _batches(marks2, side):
                rows2 = slice(marks2[c0], marks2[c1])
                local2 = [m - marks2[c0] for m in marks2[c0 : c1 + 1]]
                pair = _product(g1[rows1], g2[rows2].T, dtype).mul_(_product(a1[rows1], a2[rows2].T, dtype))
                by_first = _sum_sequences(pair, local1)
                out[b0:b1, c0:c1] = _sum_sequences(by_first.T.contiguous(), local2).T
        return out
    for rows in _row_blocks(d_out, (count1 + count2) * d_in, g1.device):
        first = _gradient_rows(g1, a1, marks1, rows, dtype).flatten(1)
        out += first @ _gradient_rows(g2, a2, marks2, rows, dtype).flatten(1).T
    return out


def gradient_norm(g: Tensor, a: Tensor, offsets: Tensor) -> Tensor:
    """Per sequence the cheaper of two Gram matrices and the gradient itself."""
    marks = bounds(offsets, g.shape[0])
    dtype = accumulator_dtype(g, a)
    count, d_out, d_in = len(marks) - 1, g.shape[1], a.shape[1]
    squares = torch.zeros(count, dtype=dtype, device=g.device)
    side = int(_workspace(g.device) ** 0.5)
    for b in range(count):
        length = marks[b + 1] - marks[b]
        rows = slice(marks[b], marks[b + 1])
        if length == 0:
            continue
        if costs.norm_is_ghost(length, d_out, d_in):
            for t in range(rows.start, rows.stop, side):
                part = slice(t, min(t + side, rows.stop))
                gram = _product(g[part], g[rows].T, dtype)
                squares[b] += gram.mul_(_product(a[part], a[rows].T, dtype)).sum()
        else:
            for outputs in _row_blocks(d_out, d_in, g.device):
                squares[b] += _product(g[rows, outputs].T, a[rows], dtype).square_().sum()
    return squares.clamp_(min=0).sqrt_()


def project_gradients(
    g: Tensor,
    a: Tensor,
    offsets: Tensor,
    P_g: Tensor | None,
    P_a: Tensor | None,
    k_g: int,
    k_a: int,
    seed: int,
    distribution: str,
    epilogue: str,
) -> tuple[Tensor, Tensor]:
    """Both sides projected token by token, then one small product per sequence."""
    marks = bounds(offsets, g.shape[0])
    dtype = accumulator_dtype(g, a)
    P_g, P_a = reference.projection_sides(g, a, P_g, P_a, k_g, k_a, seed, distribution)
    left = _product(g, P_g.to(g.dtype) if g.is_cuda else P_g, dtype)
    right = _product(a, P_a.to(a.dtype) if a.is_cuda else P_a, dtype)
    return reference.finish_projection(_gradient_rows(left, right, marks, slice(None), dtype), epilogue)


def random_projection(x: Tensor, k: int, seed: int, distribution: str) -> Tensor:
    """The projection drawn a window at a time, so that it is never held whole."""
    dtype = accumulator_dtype(x)
    out = torch.zeros(x.shape[0], k, dtype=dtype, device=x.device)
    columns = min(k, 1 << 12)
    step = max(1, _workspace(x.device) // 4 // max(columns, 1))
    for j in range(0, k, columns):
        window = (j, min(j + columns, k))
        for i in range(0, x.shape[1], step):
            stop = min(i + step, x.shape[1])
            P = philox.random_matrix((i, stop), window, seed, reference.STREAM_PROJECTION, distribution, x.device)
            out[:, window[0] : window[1]].addmm_(x[:, i:stop].to(dtype), P.to(dtype))
    return out.div_(k**0.5)


def _add_to_buckets(out: Tensor, x: Tensor, first: int, seed: int, nnz: int) -> None:
    """``out [k, B]`` += signed copies of ``x [B, n]``, coordinates ``first`` on, a window at a time, in order."""
    step = max(1, _workspace(x.device) // max(x.shape[0] * nnz, 1))
    for i in range(0, x.shape[1], step):
        stop = min(i + step, x.shape[1])
        window = (first + i, first + stop)
        stream = reference.STREAM_PROJECTION
        bucket, sign = philox.sparse_coordinates(window, out.shape[0], nnz, seed, stream, x.device)
        columns = x[:, i:stop].to(out.dtype).T
        for s in range(nnz):
            signed = columns * sign[:, s, None].to(out.dtype)
            if x.is_cuda:  # index_put_ sorts there, so the order of the additions is fixed; index_add_ does not
                out.index_put_((bucket[:, s],), signed, accumulate=True)
            else:
                out.index_add_(0, bucket[:, s], signed)


def sparse_projection(x: Tensor, k: int, seed: int, nnz: int = 1) -> Tensor:
    """Signed copies added to their buckets, a window of coordinates at a time, always in the same order."""
    out = torch.zeros(k, x.shape[0], dtype=accumulator_dtype(x), device=x.device)
    _add_to_buckets(out, x, 0, seed, nnz)
    return out.T.contiguous().div_(nnz**0.5)


def sparse_projection_factors(g: Tensor, a: Tensor, offsets: Tensor, k: int, seed: int, nnz: int = 1) -> Tensor:
    """A few sequences at a time, and of these a block of rows of the gradients."""
    marks = bounds(offsets, g.shape[0])
    dtype = accumulator_dtype(g, a)
    out = torch.zeros(k, len(marks) - 1, dtype=dtype, device=g.device)
    together = max(1, _workspace(g.device) // (16 * max(a.shape[1], 1)))
    for b in range(0, len(marks) - 1, together):
        part = marks[b : b + together + 1]
        rows = slice(part[0], part[-1])
        shifted = [mark - part[0] for mark in part]
        for outputs in _row_blocks(g.shape[1], a.shape[1] * (len(part) - 1), g.device):
            block = _gradient_rows(g[rows], a[rows], shifted, outputs, dtype).flatten(1)
            buckets = torch.zeros(k, len(part) - 1, dtype=dtype, device=g.device)
            _add_to_buckets(buckets, block, outputs.start * a.shape[1], seed, nnz)
            out[:, b : b + together] += buckets
    return out.T.contiguous().div_(nnz**0.5)


def _sort_keys(scores: Tensor, first: int) -> Tensor:
    """int64 keys that order by score and, among equal scores, by falling index."""
    bits = (scores + 0.0).view(torch.int32).long()
    ordered = torch.where(bits < 0, -(bits & 0x7FFFFFFF) - 1, bits)
    index = torch.arange(first, first + scores.shape[1], device=scores.device)
    return (ordered << 32) + (0xFFFFFFFF - index)


def scan_topk(queries: Tensor, rows: Tensor, k: int, format: str, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows a chunk at a time; only the best k of each query are kept between chunks."""
    dtype = accumulator_dtype(queries, rows)
    count = rows.shape[0]
    k = min(k, count)
    if format == "1bit":
        bits = queries.shape[1] * (8 if queries.dtype == torch.uint8 else 1)
        queries = unpack_signs(queries if queries.dtype == torch.uint8 else pack_signs(queries), bits)
    queries = queries.to(dtype)
    width = max(queries.shape[1], queries.shape[0], 1)
    step = max(k, 1024, _workspace(rows.device) // width)
    best: Tensor | None = None
    values = queries.new_zeros(queries.shape[0], 0)
    for start in range(0, count, step):
        part = rows[start : start + step]
        chunk = unpack_signs(part, bits, dtype) if format == "1bit" else part.to(dtype)
        scores = queries @ chunk.T
        if scale is not None:
            scores = scores * scale[start : start + step].to(dtype)
        if dtype == torch.float64:  # no room for a float64 score and an index in one integer: a stable sort instead
            index = torch.arange(start, start + scores.shape[1], device=rows.device).expand_as(scores)
            both = scores if best is None else torch.cat([values, scores], 1)
            index = index if best is None else torch.cat([best, index], 1)
            values, order = both.sort(dim=1, descending=True, stable=True)
            values, best = values[:, :k], index.gather(1, order[:, :k])
            continue
        keys = _sort_keys(scores, start).topk(min(k, scores.shape[1]), dim=1).values
        best = keys if best is None else torch.cat([best, keys], 1).topk(k, dim=1).values
    if best is None:
        empty = torch.empty(queries.shape[0], 0, dtype=torch.int64, device=rows.device)
        return values, empty
    if dtype == torch.float64:
        return values.contiguous(), best.contiguous()
    ordered = best >> 32
    bits32 = torch.where(ordered < 0, (-(ordered + 1)) | -0x80000000, ordered).int()
    return bits32.view(torch.float32), 0xFFFFFFFF - (best & 0xFFFFFFFF)


for _function in (
    accumulate_covariance,
    accumulate_squared_gradients,
    precondition,
    precondition_low_rank,
    dense_scores,
    low_rank_scores,
    gradient_dot,
    gradient_norm,
    project_gradients,
    random_projection,
    sparse_projection,
    sparse_projection_factors,
    scan_topk,
):
    registry.register(_function.__name__, "torch", _function)
