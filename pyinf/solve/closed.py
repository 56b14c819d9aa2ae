"""Inverses without an iteration over products: DataInf, the Schulz iteration of HyperINF, Woodbury, and dense."""

from __future__ import annotations

import torch
from torch import Tensor

from pyinf.errors import SolverError
from pyinf.solve.fisher import GradientRows
from pyinf.solve.layout import Layout
from pyinf.solve.operators import Operator

__all__ = ["datainf", "dense_matrix", "hyperinf", "schulz", "woodbury"]


def datainf(rows: GradientRows, V: Tensor, damping: Tensor, sequences: int) -> Tensor:
    """``x = (1/n) Σ_i (1/λ)(v − ⟨g_i, v⟩/(λ + ‖g_i‖²) g_i)``, layer by layer: the mean of inverses for the inverse of
    the mean.

    Two matrix products a layer and batch: coefficients ``[Q, B]``, then their sum of gradients.

    Source: Kwon et al. 2024, arXiv 2310.00902.
    """
    layout, out = rows.layout, torch.zeros_like(V)
    targets, right = layout.unpack(out), layout.unpack(V)
    lam = {name: float(d[0, 0, 0]) for name, d in layout.unpack(damping.unsqueeze(0)).items()}

    def take(_: list[int], G: Tensor) -> None:
        for name, part in layout.unpack(G).items():
            g, v = part.flatten(1), right[name].flatten(1)
            share = (v @ g.T) / (lam[name] + g.square().sum(dim=1))
            targets[name].add_((share @ g).view_as(targets[name]))

    rows.each(take)
    return (V - out / max(1, sequences)) / damping


def schulz(M: Tensor, tol: float = 1e-6, max_iterations: int = 100) -> tuple[Tensor, int]:
    """``M⁻¹`` of a symmetric positive definite matrix by ``X ← X(2I − MX)`` from ``I/‖M‖_∞``; quadratic in the end.

    Raises:
        SolverError: the residual ``‖I − MX‖_F/√n`` stops falling above ``tol``, or grows.

    Source: Schulz 1933; Zhou et al. 2024 (HyperINF), arXiv 2410.05090.
    """
    n = M.shape[0]
    eye = torch.eye(n, dtype=M.dtype, device=M.device)
    X = eye / M.abs().sum(dim=1).max()
    last = float("inf")
    for iteration in range(max_iterations):
        E = eye - M @ X
        residual = float(E.norm()) / n**0.5
        if residual <= tol:
            return X, iteration
        if not residual < 1e3 or (residual >= last and last < 0.1):
            break  # the quadratic phase has met rounding, or M is not positive definite
        last = residual
        X = X + X @ E
        X = 0.5 * (X + X.T)
    raise SolverError(
        f"the Schulz iteration stopped at a residual of {residual:.2g}, above {tol:.2g}; raise the damping or run the "
        "model in float64"
    )


def hyperinf(
    rows: GradientRows, V: Tensor, damping: Tensor, sequences: int, side: str = "output", tol: float = 1e-4
) -> tuple[Tensor, int]:
    """``x = M⁻¹ V`` with ``M = (1/(n d_in)) Σ_i G_i G_iᵀ + λI`` (``side="input"``: ``V M⁻¹`` with ``G_iᵀG_i/d_out``),
    inverted by :func:`schulz`.

    Returns:
        ``(X [Q, D], most iterations over layers)``.

    Source: Zhou et al. 2024, arXiv 2410.05090.
    """
    layout = rows.layout
    sums: dict[str, Tensor] = {}

    def take(_: list[int], G: Tensor) -> None:
        for name, part in layout.unpack(G).items():
            tall = part.transpose(0, 1).flatten(1) if side == "output" else part.flatten(0, 1).T
            product = tall @ tall.T / (part.shape[2] if side == "output" else part.shape[1])
            sums[name] = product if name not in sums else sums[name].add_(product)

    rows.each(take)
    out, most = torch.empty_like(V), 0
    targets, lam = layout.unpack(out), layout.unpack(damping.unsqueeze(0))
    for name, v in layout.unpack(V).items():
        M = sums.pop(name).div_(max(1, sequences))
        M.diagonal().add_(float(lam[name][0, 0, 0]))
        inverse, count = schulz(M, tol)
        most = max(most, count)
        targets[name].copy_(inverse @ v if side == "output" else v @ inverse)
    return out, most


def woodbury(G: Tensor, V: Tensor, damping: Tensor, sequences: int) -> Tensor:
    """``(λ + GᵀG/n)⁻¹ v = λ⁻¹v − λ⁻¹Gᵀ(nI + Gλ⁻¹Gᵀ)⁻¹Gλ⁻¹v`` with the ``[N, N]`` Gram matrix of the examples.

    Args:
        G: ``[N, D]`` gradients of single sequences; D × D is never formed.

    The Gram matrix is factorised in float64.
    """
    scaled = G / damping
    gram = (scaled @ G.T).double()
    gram.diagonal().add_(sequences)
    factor = torch.linalg.cholesky(gram)
    inner = torch.cholesky_solve((scaled @ V.T).double(), factor).to(V.dtype)
    return V / damping - inner.T @ scaled


def dense_matrix(operator: Operator, like: Tensor, block: int = 256) -> Tensor:
    """``[D, D]``: the operator applied to the identity, ``block`` rows at a time."""
    n = operator.size
    out = like.new_empty(n, n)
    for start in range(0, n, block):
        eye = like.new_zeros(min(block, n - start), n)
        eye[torch.arange(eye.shape[0]), start + torch.arange(eye.shape[0])] = 1
        out[start : start + eye.shape[0]] = operator(eye)
    return 0.5 * (out + out.T)


def layer_damping(layout: Layout, damping: Tensor) -> dict[str, float]:
    """λ of each layer, from ``[D]``."""
    return {name: float(d[0, 0, 0]) for name, d in layout.unpack(damping.unsqueeze(0)).items()}
