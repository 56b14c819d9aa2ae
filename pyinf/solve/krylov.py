"""Arnoldi's influence: the curvature's leading eigenvectors, from a Krylov space that no query shaped."""

from __future__ import annotations

import torch
from torch import Tensor

from pyinf.solve.operators import Damped, Operator, Outcome, Solution, error_bound, relative_residuals

__all__ = ["arnoldi", "lanczos"]


def lanczos(operator: Operator, scale: Tensor, steps: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ritz values ``[k]`` (descending) and orthonormal Ritz vectors ``[k, D]`` of ``diag(s) C diag(s)``.

    Arnoldi's iteration for a symmetric operator, from a random start, orthogonalised twice against all former
    directions; memory ``[steps, D]``. It ends early where the space is exhausted.
    """
    size = operator.size
    generator = torch.Generator().manual_seed(seed + 0xA)
    q = torch.randn(1, size, generator=generator).to(device=scale.device, dtype=scale.dtype)
    basis = scale.new_zeros(min(steps, size), size)
    alphas: list[float] = []
    betas: list[float] = []
    q = q / q.norm()
    for step in range(basis.shape[0]):
        basis[step] = q[0]
        w = scale * operator(scale * q)
        alphas.append(float((w * q).sum()))
        known = basis[: step + 1]
        for _ in range(2):
            w = w - (w @ known.T) @ known
        beta = float(w.norm())
        if step + 1 == basis.shape[0] or not beta > 1e3 * torch.finfo(scale.dtype).eps * max(map(abs, alphas)):
            break
        betas.append(beta)
        q = w / beta
    T = torch.diag(torch.tensor(alphas, dtype=torch.float64))
    off = torch.tensor(betas[: len(alphas) - 1], dtype=torch.float64)
    T += torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(T)
    order = values.argsort(descending=True)
    rotation = vectors[:, order].T.to(device=scale.device, dtype=scale.dtype)
    return values[order].to(device=scale.device, dtype=scale.dtype), rotation @ basis[: len(alphas)]


def arnoldi(
    curvature: Operator,
    V: Tensor,
    damping: Tensor,
    steps: int = 60,
    rank: int | None = None,
    complement: bool = False,
    tol: float = 1e-2,
    seed: int = 0,
) -> Solution:
    """``x = D Σ_k ⟨u_k, D v⟩/(θ_k + 1) u_k`` with ``D = λ^(−1/2)`` and ``(θ_k, u_k)`` the leading eigenpairs of
    ``D C D`` found in ``steps`` Krylov steps.

    As published the rest of the space is dropped; with ``complement`` it is kept at ``1/λ``, as if the curvature were
    zero there. ``facts["captured_energy"]`` is the share of ``‖Dv‖²`` inside the space, per query.

    Source: Schioppa et al. 2022, arXiv 2112.03052.
    """
    before = curvature.products
    root = damping.rsqrt()
    values, vectors = lanczos(curvature, root, steps, seed)
    positive = values > 0
    values, vectors = values[positive][:rank], vectors[positive][:rank]
    W = V * root
    inside = W @ vectors.T
    weights = 1 / (1 + values)
    X = (inside * (weights - 1)) @ vectors + W if complement else (inside * weights) @ vectors
    X = X * root
    energy = inside.square().sum(dim=1) / W.square().sum(dim=1).clamp(min=torch.finfo(W.dtype).tiny)
    facts = {"captured_energy": energy.clamp(max=1).tolist(), "steps": int(vectors.shape[0])}
    R = V - Damped(curvature, damping)(X)
    residuals, bounds = relative_residuals(R, V), error_bound(X, R, V, damping)
    outcomes = []
    for residual, bound in zip(residuals.tolist(), bounds.tolist(), strict=True):
        if max(residual, bound) <= tol:
            outcomes.append(Outcome("solved"))
            continue
        text = f"{vectors.shape[0]} Krylov directions leave a relative residual of {residual:.2g}; raise steps"
        outcomes.append(Outcome("approximate", text))
    steps_done = [int(vectors.shape[0])] * V.shape[0]
    return Solution(X, outcomes, steps_done, residuals.tolist(), bounds.tolist(), curvature.products - before, facts)
