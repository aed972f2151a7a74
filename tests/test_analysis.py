"""Section 7 of the paper against closed forms; Factors stand alone, so no model is needed."""

import math
from dataclasses import dataclass

import pytest
import torch

from lora_studio.core.analysis import (
    Spectrum,
    amplification,
    directions,
    phi,
    random_phi,
    spectrum,
    truncate,
)


@dataclass(frozen=True, kw_only=True)
class Factors:
    A: torch.Tensor
    B: torch.Tensor
    scale: float

    def dense(self) -> torch.Tensor:
        return self.scale * self.B @ self.A


def drawn(out: int = 20, width: int = 12, rank: int = 4, scale: float = 1.7, seed: int = 0) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(*shape, generator=generator).double() for shape in ((rank, width), (out, rank)))
    return Factors(A=A, B=B, scale=scale)


def orthonormal(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def of(*values: float, out: int = 9, width: int = 7) -> Spectrum:
    """An update with exactly these singular values."""
    count = len(values)
    return Spectrum(
        U=orthonormal(out, count, 1), S=torch.tensor(values, dtype=torch.float64), V=orthonormal(width, count, 2)
    )


# ---- spectrum ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("out", "width", "rank"), [(20, 12, 4), (12, 20, 1), (6, 30, 6), (30, 5, 8), (4, 4, 6)])
def test_the_spectrum_is_that_of_the_dense_product(out: int, width: int, rank: int) -> None:
    factors = drawn(out, width, rank, scale=0.3)
    found, dense = spectrum(factors), factors.dense()
    count = len(found.S)
    assert count == min(rank, out, width)
    assert torch.allclose(found.S, torch.linalg.svdvals(dense)[:count], atol=1e-12)
    assert torch.allclose(found.U @ found.S.diag() @ found.V.T, dense, atol=1e-12)
    for vectors in (found.U, found.V):
        assert torch.allclose(vectors.T @ vectors, torch.eye(count).double(), atol=1e-12)
    assert math.isclose(found.norm, float(dense.norm()), rel_tol=1e-12) and found.rank == count


def test_effective_rank_counts_equal_values_and_ignores_the_scale() -> None:
    assert of(5.0).effective_rank == pytest.approx(1)
    assert of(2.0, 2.0, 2.0).effective_rank == pytest.approx(3)
    assert 1 < of(3.0, 1.0).effective_rank < 2
    assert of(3.0, 1.0).effective_rank == pytest.approx(of(300.0, 100.0).effective_rank)
    assert of(3.0, 1.0).effective_rank == pytest.approx(4 / 3**0.75)  # exp of -3/4 ln 3/4 - 1/4 ln 1/4


def test_the_rank_that_keeps_a_share_counts_squares() -> None:
    values = of(4.0, 2.0, 1.0)  # squares 16, 4, 1 of 21
    assert [values.rank_keeping(share) for share in (0.5, 0.7, 16 / 21, 0.9, 0.95, 0.99, 1.0)] == [1, 1, 1, 2, 2, 3, 3]


def test_an_update_of_zero_has_no_rank_and_amplifies_nothing() -> None:
    found = spectrum(Factors(A=torch.randn(3, 8), B=torch.zeros(6, 3), scale=2.0))
    assert (found.norm, found.rank, found.effective_rank, found.rank_keeping(0.99)) == (0.0, 0, 0.0, 0)
    row = amplification(found, torch.randn(6, 8))
    assert (row.factor, row.along_delta, row.along_weight, row.along_random) == (0.0, 0.0, 0.0, 0.0)


# ---- truncation --------------------------------------------------------------------------------------------------


def test_truncating_at_the_full_rank_gives_the_update_back() -> None:
    factors = drawn(rank=4)
    for rank in (4, 9):
        same = truncate(factors, rank)
        assert same.scale == 1.0 and same.A.shape == (4, 12) and same.B.shape == (20, 4)
        assert torch.allclose(same.dense(), factors.dense(), atol=1e-12)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_truncation_is_the_best_of_its_rank(rank: int) -> None:
    factors = drawn(rank=4)
    dense, smaller = factors.dense(), truncate(factors, rank)
    U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
    assert torch.allclose(smaller.dense(), U[:, :rank] @ S[:rank].diag() @ Vh[:rank], atol=1e-12)
    missed = float((dense - smaller.dense()).norm())
    assert missed == pytest.approx(float(S[rank:].norm()))  # Eckart and Young
    for seed in range(5):  # no other product of this rank comes nearer, the best one in random directions included
        Q = orthonormal(20, rank, seed)
        assert float((dense - Q @ Q.T @ dense).norm()) > missed


def test_truncated_factors_keep_dtype_and_balance() -> None:
    factors = Factors(A=torch.randn(4, 12), B=torch.randn(20, 4), scale=0.5)
    smaller = truncate(factors, 2)
    assert smaller.A.dtype == smaller.B.dtype == torch.float32
    assert torch.allclose(smaller.A @ smaller.A.T, smaller.B.T @ smaller.B, atol=1e-4)


# ---- subspaces ---------------------------------------------------------------------------------------------------


def test_phi_of_a_matrix_with_itself_is_one_on_the_diagonal() -> None:
    V = directions(drawn().A)
    same = phi(V, V)
    assert torch.allclose(same, torch.ones(4, 4).double())  # the first i lie wholly within the first j


def test_phi_of_orthogonal_subspaces_is_zero() -> None:
    Q = orthonormal(12, 6, 3)
    assert torch.allclose(phi(Q[:, :2], Q[:, 2:]), torch.zeros(2, 4).double(), atol=1e-24)


def test_the_strongest_direction_of_a_comes_first() -> None:
    A = drawn().A
    assert torch.allclose((A @ directions(A)).norm(dim=0), torch.linalg.svdvals(A))


def test_phi_is_the_definition_entry_by_entry() -> None:
    V, other = orthonormal(12, 3, 4), orthonormal(12, 5, 5)
    grid = phi(V, other)
    for i in range(1, 4):
        for j in range(1, 6):
            cosines = torch.linalg.svdvals(V[:, :i].T @ other[:, :j])
            assert float(grid[i - 1, j - 1]) == pytest.approx(float((cosines**2).sum()) / min(i, j))
    assert torch.allclose(grid, phi(other, V).T)


def test_phi_does_not_depend_on_how_a_is_turned() -> None:
    A, other = drawn(seed=1).A, directions(drawn(seed=2).A)
    Q = orthonormal(4, 4, 6)
    assert torch.allclose(phi(directions(Q @ A), other), phi(directions(A), other))
    mixed = drawn(width=4).A  # any mixture at all spans the same space
    assert float(phi(directions(mixed @ A), other)[-1, -1]) == pytest.approx(float(phi(directions(A), other)[-1, -1]))


def test_the_directions_of_the_update_follow_b_and_those_of_a_do_not() -> None:
    factors = drawn()
    turned = Factors(A=factors.A, B=factors.B @ torch.diag(torch.tensor([1.0, 9, 1, 1]).double()), scale=1.0)
    V = directions(factors.A)
    assert torch.allclose(phi(V, directions(turned.A)), torch.ones(4, 4).double())
    assert float(phi(spectrum(factors).V, spectrum(turned).V)[0, 0]) < 0.99
    assert float(phi(V, spectrum(factors).V)[-1, -1]) == pytest.approx(1)  # the same space in other axes


def test_random_subspaces_lie_at_the_baseline() -> None:
    pairs = [(orthonormal(64, 4, seed), orthonormal(64, 8, 1000 + seed)) for seed in range(400)]
    mean = torch.stack([phi(*pair) for pair in pairs]).mean(0)
    expected = random_phi(4, 8, 64)
    assert float(expected[1, 4]) == 5 / 64 and float(expected[3, 1]) == 4 / 64
    assert torch.allclose(mean, expected, rtol=0.15)


# ---- amplification -----------------------------------------------------------------------------------------------


def test_amplification_of_a_rank_one_update_made_by_hand() -> None:
    # W stretches the first axis by 10 and the second by 0.5; the update adds 6 along the second
    W = torch.diag(torch.tensor([10.0, 0.5, 0.0]))
    A, B = torch.tensor([[0.0, 3.0, 0.0]]), torch.tensor([[0.0], [1.0], [0.0]])
    row = amplification(spectrum(Factors(A=A, B=B, scale=2.0)), W)
    assert (row.rank, row.delta_norm, row.along_delta) == (1, pytest.approx(6), pytest.approx(0.5))
    assert row.factor == pytest.approx(12) and row.along_weight == pytest.approx(10)
    assert row.weight_norm == pytest.approx(math.hypot(10, 0.5))
    assert row.along_random == pytest.approx(math.hypot(10, 0.5) / 3)


def test_a_multiple_of_the_weight_amplifies_by_that_multiple() -> None:
    W = drawn(rank=3)
    update = spectrum(Factors(A=W.A, B=W.B, scale=0.25 * W.scale))
    row = amplification(update, W.dense())
    assert row.factor == pytest.approx(0.25, rel=1e-4) and row.along_delta == pytest.approx(row.along_weight, rel=1e-4)


@pytest.mark.parametrize("shape", [(15, 24), (24, 15)])
def test_the_three_columns_are_the_projections_of_table_7(shape: tuple[int, int]) -> None:
    W = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    update = spectrum(drawn(*shape, rank=3))
    row = amplification(update, W)
    U, _, Vh = torch.linalg.svd(W)
    assert row.along_weight == pytest.approx(float((U[:, :3].T @ W @ Vh[:3].T).norm()), rel=1e-4)
    assert row.along_delta == pytest.approx(float((update.U.T.float() @ W @ update.V.float()).norm()), rel=1e-4)
    draws = [
        float((orthonormal(shape[0], 3, seed).T @ W.double() @ orthonormal(shape[1], 3, seed + 500)).norm())
        for seed in range(300)
    ]
    assert row.along_random == pytest.approx(math.sqrt(sum(one**2 for one in draws) / 300), rel=0.1)
