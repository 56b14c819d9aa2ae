"""``precondition`` and ``precondition_low_rank`` by the Triton kernels of the same names.

Products take one dtype: that of all operands, or float32 where one of them is float32 (multiplied as
``precision.float32_precision`` says). In half precision what lies between two products is rounded to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyinf.ops import costs
from pyinf.ops.precision import float32_precision
from pyinf.ops.triton_backend import FLOATS, check_tensors, register_triton, run
from pyinf.ops.triton_layout import common_dtype, device_offsets, near, one_device, padded, rounded

__all__ = ["precondition", "precondition_low_rank"]


def _check(*operands: Tensor | None) -> str | None:
    reason = check_tensors(*operands) or one_device(*operands)
    if reason is None and common_dtype(*operands) is None:
        reason = "bfloat16 and float16 have no common dtype; convert one of the tensors"
    return reason


def check_sandwich(V: Tensor, U_S: Tensor | None, U_A: Tensor | None, Lam: Tensor, damping: float) -> str | None:
    """One device; float32, bfloat16 or float16, not both of the latter; any layout."""
    return _check(V, U_S, U_A) or check_tensors(Lam, dtypes=FLOATS) or one_device(V, Lam)


def _denominator(Lam: Tensor, damping: float, rows: int, columns: int, dtype: torch.dtype):
    """(Λ padded with ones, damping, s): what a kernel divides by, and what its results must be divided by once more.

    float16 would overflow: there both are divided by ``s = min(Λ) + damping`` first, so that no element grows by the
    division. s is None otherwise.
    """
    if dtype != torch.float16:
        return padded(Lam, rows, columns, Lam.dtype, 1.0), damping, None
    shifted = Lam.float() + damping
    scale = shifted.amin()
    return padded(shifted / scale, rows, columns, torch.float32, 1.0), 0.0, scale


class _Products:
    """Products of one call: dtype, precision, device."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        from pyinf.triton_kernels import precondition as kernels

        self.dtype, self.device, self.precision, self._kernels = dtype, device, float32_precision(), kernels

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def __call__(self, out: Tensor, x: Tensor, y: Tensor, Lam: Tensor | None = None, damping: float = 0.0) -> Tensor:
        """``out[q] = x[q] @ y[q]``, divided; a two-dimensional operand is shared by the batch."""
        x, y = (z.expand(out.shape[0], *z.shape) if z.dim() == 2 else z for z in (x, y))
        run(self._kernels.product(out, x, y, Lam, damping, self.precision), self.device)
        return out


def precondition(V: Tensor, U_S: Tensor | None, U_A: Tensor | None, Lam: Tensor, damping: float) -> Tensor:
    """Up to four batched products; the division rides on the last one before the rotation back."""
    from pyinf.triton_kernels import precondition as kernels

    queries, d_out, d_in = V.shape
    out = torch.empty(V.shape, dtype=torch.float32, device=V.device)
    if out.numel() == 0:
        return out
    if U_S is None and U_A is None:
        run(kernels.divide(out, near(V), near(Lam), damping), V.device)
        return out
    dtype = common_dtype(V, U_S, U_A)
    assert dtype is not None  # check_sandwich
    product = _Products(dtype, V.device)
    rows, columns = rounded(d_out), rounded(d_in)
    x = padded(V, rows, columns, dtype)
    left = None if U_S is None else padded(U_S, rows, rows, dtype)
    right = None if U_A is None else padded(U_A, columns, columns, dtype)
    Lam, damping, scale = _denominator(Lam, damping, rows, columns, dtype)
    if left is None:
        x = product(product.empty(queries, rows, columns), x, right, Lam, damping)
    else:
        if right is not None:
            x = product(product.empty(queries, rows, columns), x, right)
        x = product(product.empty(queries, rows, columns), left.mT, x, Lam, damping)
    if right is not None:
        if left is not None:
            x = product(product.empty(queries, rows, columns), left, x)
        product(out, x[:, :d_out], right.mT[:, :d_in])
    elif (rows, columns) == (d_out, d_in):
        product(out, left, x)
    else:
        whole = torch.empty(queries, rows, columns, dtype=torch.float32, device=V.device)
        out.copy_(product(whole, left, x)[:, :d_out, :d_in])
    return out if scale is None else out.div_(scale)


def check_low_rank(g, a, offsets, U_S, U_A, Lam, damping, rank, power_iterations=1, seed=0) -> str | None:
    """One device; float32, bfloat16 or float16, not both of the latter; any layout."""
    return _check(g, a, U_S, U_A) or check_tensors(Lam, dtypes=FLOATS) or one_device(g, Lam)


class _Tiles:
    """``M_q X`` and ``M_qᵀ X`` with every tile of ``M_q`` formed from the rotated factors when it is needed."""

    def __init__(self, product: _Products, gs: Tensor, as_: Tensor, marks: Tensor, Lam: Tensor, damping: float) -> None:
        from pyinf.triton_kernels import precondition_low_rank as kernels
        from pyinf.triton_kernels.configs import family_of

        self._sides, self._marks, self._Lam, self._damping = (gs, as_), marks, Lam, damping
        self._product, self._kernels, self._family = product, kernels, family_of(product.device)

    def __call__(self, X: Tensor, transposed: bool, energy: bool = False) -> tuple[Tensor, Tensor | None]:
        """The product, float32, and with ``energy`` also ``‖M_q‖²`` (float64)."""
        x, y = self._sides[::-1] if transposed else self._sides
        Lam = self._Lam.mT if transposed else self._Lam
        (rows, columns), queries, make = Lam.shape, X.shape[0], self._product
        config = self._kernels.choose(X.shape[2], make.dtype, make.precision, self._family)
        splits = self._kernels.splits_of(rows, columns, queries, config, self._family)
        tiles = -(-rows // config.constants["BM"])
        float32 = {"dtype": torch.float32, "device": make.device}
        out = torch.empty(splits, queries, rows, X.shape[2], **float32)
        squares = torch.empty(splits, queries, tiles, **float32) if energy else None
        found = self._kernels.sketch(
            out, squares, x, y, self._marks, Lam, X, self._damping, make.precision, config
        )  # fmt: skip
        run(found, make.device)
        return out.sum(0), None if squares is None else squares.double().sum((0, 2))


class _Written:
    """The same with every ``M_q`` written down once, in the dtype of the products: for long queries and high ranks."""

    def __init__(
        self, product: _Products, g: Tensor, a: Tensor, marks: list[int], Lam: Tensor, damping: float, bases
    ) -> None:
        """``bases`` None: g and a are rotated. Else (U_S, U_A): form each gradient first, then rotate it."""
        self._product, count = product, len(marks) - 1
        self._M = product.empty(count, *Lam.shape)
        for q in range(count):
            x, y, M = g[marks[q] : marks[q + 1]], a[marks[q] : marks[q + 1]], self._M[q : q + 1]
            if bases is None:
                product(M, x.mT[None], y[None], Lam, damping)
                continue
            G = product(product.empty(1, *Lam.shape), x.mT[None], y[None])
            G = product(product.empty(1, *Lam.shape), G, bases[1])
            product(M, bases[0].mT, G, Lam, damping)

    def __call__(self, X: Tensor, transposed: bool, energy: bool = False) -> tuple[Tensor, Tensor | None]:
        """The product, float32, and with ``energy`` also ``‖M_q‖²`` (float64)."""
        M = self._M.mT if transposed else self._M
        out = torch.empty(*M.shape[:2], X.shape[2], dtype=torch.float32, device=M.device)
        squares = torch.linalg.vector_norm(M, dim=(1, 2), dtype=torch.float64).square() if energy else None
        return self._product(out, M, X), squares


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
    """Rotate the factors; range finder (Halko, Martinsson, Tropp 2011) on a matrix whose tiles are formed as needed.

    Long queries (``costs.sketch_is_cheaper``) and ranks beyond what stays in registers write the divided gradients of
    the queries down instead. The small decompositions are torch's; a power iteration orthonormalises once and rescales
    the columns of the transposed product.
    """
    from pyinf.triton_kernels import precondition_low_rank as kernels

    queries, (d_out, d_in) = offsets.numel() - 1, Lam.shape
    r = min(rank, d_out, d_in)
    float32 = {"dtype": torch.float32, "device": g.device}
    marks = device_offsets(offsets, g.shape[0], g.device)
    if queries == 0 or r == 0:
        return (
            torch.zeros(queries, d_out, r, **float32),
            torch.zeros(queries, r, d_in, **float32),
            torch.ones(queries, **float32),
        )
    dtype = common_dtype(g, a, U_S, U_A)
    assert dtype is not None  # check_low_rank
    product = _Products(dtype, g.device)
    rows, columns = rounded(d_out), rounded(d_in)
    width = min(rounded(r + 8), d_out, d_in)  # columns beyond the rank: the last kept ones become accurate
    wide = rounded(width)
    gs, as_ = padded(g, g.shape[0], rows, dtype), padded(a, a.shape[0], columns, dtype)
    left = None if U_S is None else padded(U_S, rows, rows, dtype)
    right = None if U_A is None else padded(U_A, columns, columns, dtype)
    Lam, damping, scale = _denominator(Lam, damping, rows, columns, dtype)

    tiles = wide <= kernels.WIDEST and costs.sketch_is_cheaper(-(-g.shape[0] // queries), power_iterations)
    first = tiles or costs.rotate_first_is_cheaper(g.shape[0], d_out, d_in, queries)
    if first or left is None or right is None:
        gs = gs if left is None else product(product.empty(1, *gs.shape), gs, left)[0]
        as_ = as_ if right is None else product(product.empty(1, *as_.shape), as_, right)[0]
        bases = None
    else:
        bases = (left, right)
    if tiles:
        apply = _Tiles(product, gs, as_, marks, Lam, damping)
    else:
        apply = _Written(product, gs, as_, offsets.tolist(), Lam, damping, bases)

    def operand(x: Tensor, size: int) -> Tensor:
        return padded(x, size, wide, dtype)

    omega = product.empty(columns, wide)
    run(kernels.normal_matrix(omega, seed), g.device)
    Y, total = apply(omega.expand(queries, -1, -1), transposed=False, energy=True)
    basis = torch.linalg.qr(Y[:, :d_out, :width]).Q
    for _ in range(power_iterations):
        Z, _ = apply(operand(basis, rows), transposed=True)
        Z = Z / torch.linalg.vector_norm(Z, dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        Y, _ = apply(operand(Z, columns), transposed=False)
        basis = torch.linalg.qr(Y[:, :d_out, :width]).Q
    small, _ = apply(operand(basis, rows), transposed=True)  # (basisᵀ M)ᵀ
    qr = torch.linalg.qr(small[:, :d_in, :width])
    u, s, vh = torch.linalg.svd(qr.R.mT)
    root = s[:, :r].sqrt()
    L = basis @ (u[:, :, :r] * root[:, None, :])
    R = (root[:, :, None] * vh[:, :r]) @ qr.Q.mT
    kept = s[:, :r].double().square().sum(1)
    energy = torch.where(total > 0, kept / total, torch.ones_like(total)).clamp(max=1.0).float()
    if left is not None:
        L = product(torch.empty(queries, rows, rounded(r), **float32), left, padded(L, rows, rounded(r), dtype))
        L = L[:, :d_out, :r].contiguous()
    if right is not None:
        R = product(torch.empty(queries, r, d_in, **float32), padded(R, r, columns, dtype), right.mT[:, :d_in])
    if scale is not None:
        L, R = L.div_(scale.sqrt()), R.div_(scale.sqrt())
    return L, R, energy


register_triton("precondition", precondition, check_sandwich)
register_triton("precondition_low_rank", precondition_low_rank, check_low_rank)
