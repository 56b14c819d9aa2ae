"""Eigenbases of large symmetric matrices by spectral divide and conquer: almost all of it matrix products.

A shift μ splits the spectrum; the matrix sign of ``A − μI`` gives the projector on the eigenvectors above μ; an
orthonormal basis of that space and of its complement turns A into two smaller problems, down to sizes that LAPACK or
cuSOLVER solve in float64 (Nakatsukasa and Higham, SIAM J. Sci. Comput. 35(3), 2013). The sign comes from Newton–Schulz
iterations with the step scaled to the smallest singular value (Chen and Chow 2014), which are products only.

Operations for n rows, split in halves: ``4n³`` for each of about 16 to 22 sign iterations (two products), ``6n³`` for
the basis (a product and two QR factorisations of half the columns, one completed), ``4n³`` to project A and combine;
about ``90n³`` at the first level, a quarter of that at each next one (two halves, an eighth each), so about ``120n³``
in all. cuSOLVER's syevd needs about ``9n³``, of which little runs at the rate of products. No speed is claimed here.

Eigenvectors whose eigenvalues lie within rounding of a shift are mixed with each other; that is an error of the size
of rounding in ``‖AQ − QΛ‖``, which is checked, as ``‖QᵀQ − I‖`` is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pyinf.errors import ConfigError, NonFiniteError

__all__ = ["PRECISIONS", "batched_eigh", "divide_and_conquer", "matrix_sign", "product"]

PRECISIONS = ("ieee", "tf32x3")
"""How float32 matrices are multiplied: by float32 units, or as three products of tf32 parts on tensor cores."""

_LEAF = 1024
_SAFETY = 1.02  # the bound of the norm is raised by this: a value above one would change its sign
_CUSHION = 0.1  # the smallest singular value is taken to be at least this share of the largest in a step


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` as the sum of two matrices that tf32 holds exactly up to 2⁻²² of each element."""
    high = (x.view(torch.int32) & ~0x1FFF).view(torch.float32)
    return high, x - high


@contextlib.contextmanager
def _tensor_cores(on: bool) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if on else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def product(x: Tensor, y: Tensor, precision: str = "ieee") -> Tensor:
    """``x @ y`` in float32 or float64. "tf32x3" multiplies float32 matrices as ``hi·hi + hi·lo + lo·hi`` of their tf32
    parts: what is left out is about 2⁻²² of the product.
    """
    if precision == "ieee" or x.dtype != torch.float32:
        with _tensor_cores(False):
            return x @ y
    (xh, xl), (yh, yl) = _split(x.contiguous()), _split(y.contiguous())
    with _tensor_cores(True):
        return xh @ yl + xl @ yh + xh @ yh


def _norm_bound(A: Tensor) -> Tensor:
    """An upper bound of ``‖A‖₂`` that is close: power iterations on a few vectors, raised, but never above ``‖A‖_F``
    and ``‖A‖_∞``."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(A.shape[0], 8, generator=generator, dtype=torch.float64).to(A)
    for _ in range(12):
        x = torch.linalg.qr(A @ x).Q
    # the residual bounds how far the largest Ritz value can lie below an eigenvalue near it
    y = A @ x
    ritz = torch.linalg.matrix_norm(x.T @ y, 2)
    rest = torch.linalg.matrix_norm(y - x @ (x.T @ y), 2)
    safe = torch.minimum(torch.linalg.matrix_norm(A), A.abs().sum(1).max())
    return torch.minimum((ritz + rest) * 1.05, safe)


def matrix_sign(A: Tensor, precision: str = "ieee", smallest: float | None = None) -> tuple[Tensor, int]:
    """Sign of a symmetric matrix, ``V sign(D) Vᵀ`` for ``A = V D Vᵀ``, and the iterations it took.

    Eigenvalues smaller than ``smallest·‖A‖`` (default: 20 times the rounding of the dtype) come out between −1 and 1:
    to the precision of the dtype they have no sign.
    """
    n = A.shape[0]
    eps = torch.finfo(A.dtype).eps
    bound = _norm_bound(A)
    if not bool(torch.isfinite(bound)):
        raise NonFiniteError("the matrix is not finite")
    if float(bound) == 0:
        return torch.zeros_like(A), 0
    X = A / (bound * _SAFETY)
    low = 20 * eps if smallest is None else smallest
    count = 0
    eye_diagonal = torch.ones(n, dtype=A.dtype, device=A.device)
    while low < 1 - 1e-3:
        step = max(low, _CUSHION)
        alpha = (3 / (1 + step + step * step)) ** 0.5
        X = _newton_schulz(X, alpha, eye_diagonal, precision)
        # the largest bound holds after the step too; the smallest grows to what the step makes of it
        low = min(_step(low, alpha), _step(1.0, alpha)) if step == low else min(_step(low, alpha), 1 - 1e-3)
        count += 1
    for _ in range(3 if A.dtype == torch.float64 else 2):
        X = _newton_schulz(X, 1.0, eye_diagonal, precision)
        count += 1
    return X, count


def _step(x: float, alpha: float) -> float:
    return 0.5 * alpha * x * (3 - (alpha * x) ** 2)


def _newton_schulz(X: Tensor, alpha: float, ones: Tensor, precision: str) -> Tensor:
    """``αX(3I − α²X²)/2``, kept symmetric."""
    square = product(X, X, precision).mul_(-alpha * alpha)
    square.diagonal().add_(3 * ones)
    X = product(X, square, precision).mul_(0.5 * alpha)
    return (X + X.T).mul_(0.5)


def _median_guess(A: Tensor) -> float:
    """Where about half of the eigenvalues lie below: the median of ``|R_ii|`` of a QR factorisation of A, its columns
    in falling order of their diagonal elements. For positive semi-definite A these follow the eigenvalues closely
    enough to split on."""
    order = A.diagonal().argsort(descending=True)
    diagonal = torch.linalg.qr(A[:, order], mode="r").R.diagonal().abs()
    return float(diagonal.median())


def _basis_of(P: Tensor, k: int, precision: str, seed: int) -> tuple[Tensor, Tensor]:
    """Orthonormal bases of the range of the projector ``P`` (k columns) and of its complement."""
    generator = torch.Generator().manual_seed(seed)
    n = P.shape[0]
    test = torch.randn(n, k, generator=generator, dtype=torch.float64).to(P)
    inner = torch.linalg.qr(product(P, test, precision)).Q
    # A Gaussian square is ill-conditioned; a second pass, from a basis already near the range, is not.
    whole = torch.linalg.qr(product(P, inner, precision), mode="complete").Q
    return whole[:, :k], whole[:, k:]


def _split_once(A: Tensor, precision: str, seed: int) -> tuple[Tensor, Tensor] | None:
    """Bases of two invariant subspaces, neither of them tiny; None where no shift separates any eigenvalues."""
    n = A.shape[0]
    eye = torch.eye(n, dtype=A.dtype, device=A.device)
    top = float(_norm_bound(A))
    # Below this a shift stands among eigenvalues that are rounding of the largest one, and separates nothing. What is
    # split off with them is small, so the next level sees it with a precision of its own.
    floor = 500 * torch.finfo(A.dtype).eps * top
    low, high = floor, top
    shift = min(max(_median_guess(A), floor), 0.9 * top)
    best: tuple[int, Tensor, int] | None = None
    for _ in range(4):
        sign, _ = matrix_sign(A - shift * eye, precision)
        k = round((float(sign.diagonal().double().sum()) + n) / 2)
        if 0 < k < n and (best is None or min(k, n - k) > best[0]):
            best = (min(k, n - k), sign, k)
        if n // 5 <= k <= n - n // 5:
            break
        if k > n // 2:
            low = shift
        else:
            high = shift
        # spectra of covariances fall over decades, so the middle is the geometric one
        shift = (low * high) ** 0.5
        if high <= 1.01 * low:
            break
    if best is None:
        return None
    _, sign, k = best
    P = sign.mul_(0.5)
    P.diagonal().add_(0.5)
    if k <= n // 2:
        return _basis_of(P, k, precision, seed)
    P.neg_().diagonal().add_(1)
    lower, upper = _basis_of(P, n - k, precision, seed)
    return upper, lower


def _direct(A: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(A.double())
    return vectors.to(A.dtype), values.to(A.dtype)


def _recurse(A: Tensor, leaf: int, precision: str, seed: int, scale: float) -> tuple[Tensor, Tensor]:
    n = A.shape[0]
    if n <= leaf:
        return _direct(A)
    if float(A.norm()) <= 4 * torch.finfo(A.dtype).eps * scale:  # rounding of the matrix above: any basis will do
        return torch.eye(n, dtype=A.dtype, device=A.device), A.diagonal().clone()
    halves = _split_once(A, precision, seed)
    if halves is None:
        # all eigenvalues within rounding of each other: A is a multiple of the identity to the precision it has
        off = A - A.diagonal().mean() * torch.eye(n, dtype=A.dtype, device=A.device)
        if float(off.norm()) <= 1e3 * torch.finfo(A.dtype).eps * float(A.norm()):
            return torch.eye(n, dtype=A.dtype, device=A.device), A.diagonal().clone()
        return _direct(A)
    bases, spectra = [], []
    for i, V in enumerate(halves):
        inner = product(V.T, product(A, V, precision), precision)
        inner = (inner + inner.T).mul_(0.5)
        Q, d = _recurse(inner, leaf, precision, 2 * seed + i + 1, scale)
        bases.append(product(V, Q, precision))
        spectra.append(d)
    return torch.cat(bases, 1), torch.cat(spectra)


def divide_and_conquer(
    matrix: Tensor,
    leaf: int = _LEAF,
    precision: str = "ieee",
    tolerance: float | None = None,
    name: str = "factor",
) -> tuple[Tensor, Tensor]:
    """Orthogonal ``Q`` and eigenvalues ``d ≥ 0``, ascending, of a positive semi-definite ``matrix``.

    Args:
        matrix: ``[n, n]``, float32 or float64; only the lower triangle is read.
        leaf: sizes up to this are solved directly, in float64.
        precision: one of :data:`PRECISIONS`.
        tolerance: largest ``‖AQ − QΛ‖/‖A‖`` and ``‖QᵀQ − I‖/√n`` that is accepted (Frobenius; default ``1e-5`` for
            float32 and ``1e-12`` for float64), measured in float64.

    Raises:
        ConfigError: unknown precision, or a leaf below 2.
        NonFiniteError: the result is not finite or does not hold the tolerance; use ``eigensolver="fp64"``.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"unknown precision {precision!r}; choose one of: {', '.join(PRECISIONS)}")
    if leaf < 2:
        raise ConfigError(f"leaf is {leaf}; it must be at least 2")
    if not bool(torch.isfinite(matrix.diagonal()).all()):
        raise NonFiniteError(f"the covariance of {name} is not finite; run the model in a wider dtype")
    A = matrix.tril() + matrix.tril(-1).T
    Q, _ = _recurse(A, leaf, precision, 0, float(A.norm()))
    # One step towards the nearest orthogonal matrix undoes the rounding of the levels.
    gram = product(Q.T, Q, precision).mul_(-0.5)
    gram.diagonal().add_(1.5)
    Q = product(Q, gram, precision)
    values = (product(A, Q, precision) * Q).sum(0)
    order = values.argsort()
    Q, values = Q[:, order].contiguous(), values[order]
    if tolerance is None:
        tolerance = 1e-12 if matrix.dtype == torch.float64 else 1e-5
    check_decomposition(A, Q, values, tolerance, name)
    return Q, values.clamp_(min=0)


def check_decomposition(A: Tensor, Q: Tensor, values: Tensor, tolerance: float, name: str = "factor") -> None:
    """Raise ``NonFiniteError`` unless ``‖AQ − QΛ‖/‖A‖`` and ``‖QᵀQ − I‖/√n`` are at most ``tolerance``."""
    from pyinf.curvature.eigen import residuals

    found = residuals(A, Q, values)
    # written so that NaN fails
    if not (found.decomposition <= tolerance and found.orthogonality <= tolerance):
        raise NonFiniteError(
            f"the eigendecomposition of {name} ({A.shape[0]} rows) is not good enough: ‖AQ − QΛ‖/‖A‖ is "
            f"{found.decomposition:.1e} and ‖QᵀQ − I‖/√n {found.orthogonality:.1e}, the tolerance {tolerance:.0e}; "
            "use eigensolver='fp64'"
        )


def batched_eigh(
    matrices: Sequence[Tensor],
    dtype: torch.dtype | None = torch.float64,
    most: int = 1 << 28,
    names: Sequence[str] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """``(Q, d)`` of every matrix, in the order given: those of one size in one batched ``torch.linalg.eigh``.

    For the many small factors of a model: a batched call costs one launch where a loop costs one for each matrix.
    Computed in ``dtype`` (None: the matrices' own), returned in theirs; ``d ≥ 0``, ascending; lower triangles are
    read. At most ``most`` elements are stacked at once.

    Raises ``NonFiniteError`` where a matrix or a result is not finite; it names the matrix by ``names``, else by its
    position.
    """
    names = names if names is not None else [f"matrix {i}" for i in range(len(matrices))]
    out: list[tuple[Tensor, Tensor] | None] = [None] * len(matrices)
    groups: dict[tuple[int, torch.dtype, torch.device], list[int]] = {}
    for i, matrix in enumerate(matrices):
        if not bool(torch.isfinite(matrix.diagonal()).all()):
            raise NonFiniteError(f"the covariance of {names[i]} is not finite; run the model in a wider dtype")
        groups.setdefault((matrix.shape[0], matrix.dtype, matrix.device), []).append(i)
    for (n, own, _), members in groups.items():
        step = max(1, most // max(n * n, 1))
        for start in range(0, len(members), step):
            part = members[start : start + step]
            stack = torch.stack([matrices[i].to(dtype or own) for i in part])
            values, vectors = torch.linalg.eigh(stack, UPLO="L")
            for position, i in enumerate(part):
                Q, d = vectors[position].to(own).contiguous(), values[position].to(own).clamp_(min=0)
                if not bool(torch.isfinite(d).all()) or not bool(torch.isfinite(Q).all()):
                    raise NonFiniteError(f"the eigendecomposition of {names[i]} is not finite")
                out[i] = (Q, d)
    return [pair for pair in out if pair is not None]
