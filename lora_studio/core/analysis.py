"""Section 7 of the paper as functions: what an update ΔW = scale · B A is made of, and what it adds to W.

Every function works on the factors. B A, which is as large as the weight, is never formed: with B = Q_b R_b and
Aᵀ = Q_a R_a, the singular values of the update are those of the small R_b R_aᵀ (r, r), and its singular vectors
are Q_b and Q_a turned by its own. That is done in fp64 on the CPU, since the factors are small.

    ΔW = U diag(S) Vᵀ    U (rows, r) directions of the output, V (in, r) directions of the input

For DoRA all of this is about the low-rank part, scale · B A; its magnitudes rescale rows and have no directions.
For an embedding A has a column per token, so V are directions over the vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from lora_studio.core.lora import Factors

NEGLIGIBLE = 1e-6  # of the largest singular value; the factors are fp32


@dataclass(frozen=True, kw_only=True, eq=False)
class Spectrum:
    """The thin singular value decomposition of one update, fp64 on the CPU."""

    U: torch.Tensor  # (rows, r)
    S: torch.Tensor  # (r,), falling
    V: torch.Tensor  # (in, r)

    @property
    def norm(self) -> float:
        """‖ΔW‖, Frobenius."""
        return float(self.S.norm())

    @property
    def rank(self) -> int:
        """How many directions the update has; at most the adapter's rank."""
        return int((self.S / self.S[0] > NEGLIGIBLE).sum()) if self.norm else 0

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the singular values divided by their sum (Roy and Vetterli, 2007).

        k equal values give k, one alone gives 1, an update of zero gives 0.
        """
        if not self.norm:
            return 0.0
        shares = self.S / self.S.sum()
        return math.exp(float(torch.special.entr(shares).sum()))

    def rank_keeping(self, share: float) -> int:
        """The smallest rank whose best approximation keeps `share` of ‖ΔW‖²."""
        kept = (self.S**2).cumsum(0)
        return int((kept < share * kept[-1]).sum()) + 1 if self.norm else 0


def spectrum(factors: Factors) -> Spectrum:
    """Singular values and vectors of scale · B A, in O((rows + in) · r²)."""
    A, B = factors.A.detach().cpu().double(), factors.B.detach().cpu().double()
    Qb, Rb = torch.linalg.qr(B)  # (rows, k), (k, r)
    Qa, Ra = torch.linalg.qr(A.T)  # (in, l), (l, r)
    U, S, Vh = torch.linalg.svd(factors.scale * Rb @ Ra.T, full_matrices=False)
    return Spectrum(U=Qb @ U, S=S, V=Qa @ Vh.T)


def truncate(factors: Factors, rank: int) -> Factors:
    """The best approximation of the update with at most `rank` directions (Eckart and Young), its scale now 1.

    Each factor takes the root of the singular values. At the full rank it is the same update, at rank 0 none. A DoRA
    magnitude stays as it is.
    """
    assert rank >= 0, rank
    whole = spectrum(factors)
    root = whole.S[:rank].sqrt()
    A, B = root[:, None] * whole.V[:, :rank].T, whole.U[:, :rank] * root
    return replace(factors, A=A.to(factors.A), B=B.to(factors.B), scale=1.0)


# ---- subspace similarity: equation 4, appendix G, figures 3 and 4 ------------------------------------------------


def directions(A: torch.Tensor) -> torch.Tensor:
    """Right singular vectors of A alone, strongest first: (in, r). The paper compares these."""
    return torch.linalg.svd(A.detach().cpu().double(), full_matrices=False).Vh.T


def phi(V: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """φ(i, j) = ‖V_iᵀ V'_j‖² / min(i, j) for all i and j: how much of one subspace lies in the other, 0 to 1.

    V (in, r) and other (in, r') have orthonormal columns, V_i is the first i of them; entry [i - 1, j - 1] of the
    result (r, r'). It is the mean squared cosine of the principal angles. (With the projection metric
    d² = p - Σσ², p = min(i, j), it is (p - d²) / p; appendix G prints (1 - d²) / p.)
    """
    shared = ((V.T @ other) ** 2).cumsum(0).cumsum(1)
    rank, others = shared.shape
    return shared / _grid(rank, others, torch.minimum)


def random_phi(rank: int, other: int, width: int) -> torch.Tensor:
    """What φ(i, j) is on average between random subspaces of `width` dimensions: max(i, j) / width."""
    return _grid(rank, other, torch.maximum) / width


def _grid(rows: int, columns: int, of: Callable) -> torch.Tensor:
    """(rows, columns): `of` the row number and the column number, both counted from 1."""
    return of(torch.arange(1, rows + 1).double()[:, None], torch.arange(1, columns + 1).double()[None])


# ---- the update against the weight: table 7 ----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Amplification:
    """One row of table 7. `along_…` is ‖Uᵀ W V‖ with U, V the first `rank` singular directions of that matrix."""

    rank: int
    weight_norm: float  # ‖W‖
    delta_norm: float  # ‖ΔW‖
    along_delta: float  # what W already has in the update's own directions
    along_weight: float  # in its own directions: the most that any directions hold
    along_random: float  # in random directions

    @property
    def factor(self) -> float:
        """‖ΔW‖ / ‖Uᵀ W V‖: how many times the update amplifies its directions; 0 for no update."""
        if not self.delta_norm:
            return 0.0
        return self.delta_norm / self.along_delta if self.along_delta else math.inf


def amplification(update: Spectrum, weight: torch.Tensor) -> Amplification:
    """How much the update amplifies directions that `weight` (rows, in) already has (section 7.3).

    The weight's own directions need no vectors: ‖Uᵀ W V‖² is then the sum of its largest squared singular values,
    and those are the largest eigenvalues of W Wᵀ. For random orthonormal U and V the mean of ‖Uᵀ W V‖² is
    rank² ‖W‖² / (rows · in); its root stands for the paper's one random draw.
    """
    W = weight.detach().float()
    rank = update.rank
    U, V = update.U[:, :rank].to(W), update.V[:, :rank].to(W)
    gram = W @ W.T if len(W) <= W.shape[1] else W.T @ W  # the smaller of the two
    strongest = torch.linalg.eigvalsh(gram.cpu())[len(gram) - rank :].clamp(min=0)
    norm = float(W.norm())
    return Amplification(
        rank=rank,
        weight_norm=norm,
        delta_norm=update.norm,
        along_delta=float((U.T @ W @ V).norm()),
        along_weight=float(strongest.sum().sqrt()),
        along_random=rank * norm / math.sqrt(W.numel()),
    )
