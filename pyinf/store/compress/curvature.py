"""Curvature in the space of the rows, section by section: the second moment of the rows, or a Kronecker form of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from pyinf.curvature import absolute_damping
from pyinf.errors import NonFiniteError
from pyinf.store.sections import Section

__all__ = ["Identity", "Kronecker", "Moments", "RowCurvature"]

_WIDE = 1024  # sections up to this width are summed and solved in float64


class RowCurvature:
    """``K_s`` of every section ``s``; ``λ_s = damping · mean eigenvalue of K_s``, or λ itself with ``"absolute"``."""

    def __init__(self, sections: Sequence[Section]) -> None:
        self.sections = sections

    def fit(self, rows: Iterable[Tensor], sequences: int) -> None:
        """Estimate from training rows, as means over ``sequences`` (those without a row have a zero gradient)."""

    def solve(self, rows: Tensor, damping: float, mode: str) -> Tensor:
        """``(K_s + λ_s)⁻¹ r_s`` of every row and section: ``[B, width]``, zeros in columns of no section here."""
        out = torch.zeros_like(rows)
        for section in self.sections:
            columns = slice(section.offset, section.stop)
            out[:, columns] = self._solve(section, rows[:, columns], damping, mode)
        return out

    def _solve(self, section: Section, rows: Tensor, damping: float, mode: str) -> Tensor:
        raise NotImplementedError

    def norms(self, rows: Tensor, damping: float, mode: str) -> Tensor:
        """``√(Σ_s r_sᵀ(K_s + λ_s)⁻¹r_s)`` ``[B]``: the length after half the inverse, root of the self-influence."""
        return (self.solve(rows, damping, mode) * rows).sum(1).clamp_(min=0).sqrt_()

    def tensors(self) -> dict[str, Tensor]:
        """To be kept with a store."""
        return {}

    def load(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """The inverse of :meth:`tensors`."""


class Identity(RowCurvature):
    """``K = I`` without damping: rows stay as they are."""

    def solve(self, rows: Tensor, damping: float, mode: str) -> Tensor:
        """The rows."""
        return rows


class Moments(RowCurvature):
    """``K_s = mean_i r_i r_iᵀ`` ``[w, w]``: the empirical Fisher matrix of the projected gradients.

    ``4w²`` bytes a section (``8w²`` up to a width of 1024), a Cholesky factor as large for the last damping asked for.
    """

    def __init__(self, sections: Sequence[Section]) -> None:
        super().__init__(sections)
        self.K: dict[str, Tensor] = {}
        self._factors: dict[str, tuple[tuple[float, str], Tensor]] = {}

    def fit(self, rows: Iterable[Tensor], sequences: int) -> None:
        """One walk over the rows; ``w²`` multiply-adds a row and section.

        Raises:
            NonFiniteError: a moment is not finite; names the section.
        """
        self.K, self._factors = {}, {}
        for block in rows:
            for section in self.sections:
                X = block[:, section.offset : section.stop]
                wide = X.dtype == torch.float64 or section.width <= _WIDE
                X = X.double() if wide else X
                if section.name not in self.K:
                    self.K[section.name] = X.new_zeros(section.width, section.width)
                self.K[section.name].addmm_(X.T, X)
        for name, K in self.K.items():
            K.div_(max(1, sequences))
            if not bool(torch.isfinite(K.sum())):
                raise NonFiniteError(f"the rows of '{name}' are not finite; run the model in a wider dtype")

    def mixed(self, other: Moments, share: float) -> Moments:
        """``share · other + (1 − share) · self``."""
        out = Moments(self.sections)
        out.K = {name: K * (1 - share) + other.K[name].to(K) * share for name, K in self.K.items()}
        return out

    def _solve(self, section: Section, rows: Tensor, damping: float, mode: str) -> Tensor:
        K, key = self.K[section.name], (damping, mode)
        known = self._factors.get(section.name)
        if known is None or known[0] != key:
            damped = K.double().clone()
            damped.diagonal().add_(absolute_damping(K.diagonal(), damping, mode, section.name))
            L = torch.linalg.cholesky(damped)
            wide = K.dtype == torch.float64
            known = self._factors[section.name] = key, L if wide else L.to(K.dtype)
        L = known[1]
        return torch.cholesky_solve(rows.T.to(L.dtype), L).T.to(rows.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """``K`` of every section."""
        return {f"moment:{name}": K.cpu() for name, K in self.K.items()}

    def load(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """The inverse of :meth:`tensors`."""
        names = [s.name for s in self.sections if f"moment:{s.name}" in tensors]
        self.K = {name: tensors[f"moment:{name}"].to(device) for name in names}
        self._factors = {}


class Kronecker(RowCurvature):
    """``K_s = (V_g ⊗ V_a) diag(Λ) (V_g ⊗ V_a)ᵀ`` for sections ``(k_g, k_a)``.

    ``V_g [k_g, k_g]`` and ``V_a [k_a, k_a]`` diagonalise the covariances of the projected output gradients and inputs.
    With ``eigenvalues`` given ``Λ [k_g, k_a]`` is what K-FAC says; without, ``Λ = mean_i (V_gᵀR_iV_a)²`` over the rows,
    corrected as EK-FAC's (George et al. 2018).
    """

    def __init__(
        self,
        sections: Sequence[Section],
        bases: Mapping[str, tuple[Tensor, Tensor]],
        eigenvalues: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(sections)
        self.bases, self.Lam = dict(bases), dict(eigenvalues or {})
        self.corrected = eigenvalues is None

    def _turned(self, section: Section, rows: Tensor) -> Tensor:
        V_g, V_a = (V.to(rows.dtype) for V in self.bases[section.name])
        return V_g.T @ rows.reshape(-1, *section.shape) @ V_a

    def fit(self, rows: Iterable[Tensor], sequences: int) -> None:
        """One walk over the rows where the eigenvalues are corrected, none otherwise."""
        if not self.corrected:
            return
        self.Lam = {}
        for block in rows:
            for section in self.sections:
                total = self._turned(section, block[:, section.offset : section.stop]).square().sum(0)
                known = self.Lam.get(section.name)
                self.Lam[section.name] = total if known is None else known.add_(total)
        for name, Lam in self.Lam.items():
            Lam.div_(max(1, sequences))
            if not bool(torch.isfinite(Lam.sum())):
                raise NonFiniteError(f"the rows of '{name}' are not finite; run the model in a wider dtype")

    def _solve(self, section: Section, rows: Tensor, damping: float, mode: str) -> Tensor:
        Lam = self.Lam[section.name].to(rows.dtype)
        lam = absolute_damping(Lam, damping, mode, section.name)
        V_g, V_a = (V.to(rows.dtype) for V in self.bases[section.name])
        return (V_g @ (self._turned(section, rows) / (Lam + lam)) @ V_a.T).reshape(rows.shape)

    def tensors(self) -> dict[str, Tensor]:
        """Bases and eigenvalues of every section."""
        out = {f"eigenvalues:{name}": Lam.cpu() for name, Lam in self.Lam.items()}
        for name, (V_g, V_a) in self.bases.items():
            out |= {f"basis_g:{name}": V_g.cpu(), f"basis_a:{name}": V_a.cpu()}
        return out

    def load(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """The inverse of :meth:`tensors`."""
        for section in self.sections:
            name = section.name
            self.bases[name] = tensors[f"basis_g:{name}"].to(device), tensors[f"basis_a:{name}"].to(device)
            if f"eigenvalues:{name}" in tensors:
                self.Lam[name] = tensors[f"eigenvalues:{name}"].to(device)
