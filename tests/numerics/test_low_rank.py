"""Low-rank factors against numpy's singular values, on odd shapes."""

import numpy as np
import pytest
import torch

from lorakit.numerics import low_rank
from lorakit.numerics.low_rank import factor, thin


@pytest.mark.parametrize(("rows", "columns"), [(7, 7), (5, 40), (40, 5), (1, 9)])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_error_is_what_the_singular_values_left_out_say(rows: int, columns: int, rank: int) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns), dtype=torch.float64)
    values = np.linalg.svd(matrix.numpy(), compute_uv=False)
    b, a, share = factor(matrix, rank)
    assert b.shape[0] == rows
    assert a.shape[1] == columns
    assert b.shape[1] == a.shape[0] == min(rank, rows, columns)
    left = float((matrix - b @ a).square().sum())
    assert left == pytest.approx((values[rank:] ** 2).sum(), abs=1e-9)
    assert share == pytest.approx((values[:rank] ** 2).sum() / (values**2).sum())


@pytest.mark.parametrize(
    ("out", "wide", "inputs", "rank"), [(20, 8, 30, 3), (6, 8, 30, 8), (20, 8, 5, 4), (9, 1, 9, 1)]
)
def test_thinning_a_product_is_factoring_it(out: int, wide: int, inputs: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(out)
    b, a = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((out, wide), (wide, inputs)))
    thin_b, thin_a, share = thin(b, a, rank)
    best_b, best_a, best = factor(b @ a, rank)
    assert share == pytest.approx(best)
    torch.testing.assert_close(thin_b @ thin_a, best_b @ best_a)


def test_nothing_is_kept_whole() -> None:
    b, a, share = factor(torch.zeros(3, 4), 2)
    assert share == 1
    assert not b.any()
    assert not a.any()


@pytest.mark.parametrize("kind", ["noise", "low rank", "decaying"])
@pytest.mark.parametrize("rank", [1, 8, 24])
def test_a_large_matrix_keeps_what_all_singular_values_allow(
    kind: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flat spectra too, where a subspace settles slowest; without the decomposition of the whole."""
    monkeypatch.setattr(low_rank, "LARGE", 100)
    generator = torch.Generator().manual_seed(rank)
    matrix = torch.randn(200, 300, generator=generator, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    if kind == "low rank":
        matrix = matrix[:, :12] @ matrix[:12]
    elif kind == "decaying":
        matrix = u * torch.arange(1, 201) ** -0.5 @ vh
    values = np.linalg.svd(matrix.numpy(), compute_uv=False) ** 2
    b, a, share = factor(matrix, rank)
    assert b.shape == (200, rank)
    assert a.shape == (rank, 300)
    assert share == pytest.approx(values[:rank].sum() / values.sum(), rel=3e-6)
    left = float((matrix - b @ a).square().sum())
    assert left == pytest.approx((1 - share) * values.sum(), abs=1e-9 * values.sum())


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
@pytest.mark.parametrize("rank", [90, 250])
def test_many_values_of_a_large_matrix(shape: tuple[int, int], rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As good as all singular values allow, also where the last of those asked for are nothing but rounding."""
    monkeypatch.setattr(low_rank, "LARGE", 100)
    generator = torch.Generator().manual_seed(rank)
    full = torch.randn(*shape, generator=generator, dtype=torch.float64)
    for matrix in (full, full[:, :50] @ full[:50], torch.zeros(shape, dtype=torch.float64)):
        values = np.linalg.svd(matrix.numpy(), compute_uv=False) ** 2
        b, a, share = factor(matrix, rank)
        assert (b.shape, a.shape) == ((shape[0], min(rank, 200)), (min(rank, 200), shape[1]))
        left, total = float((matrix - b @ a).square().sum()), float(values.sum())
        assert left == pytest.approx(values[rank:].sum(), rel=1e-9, abs=1e-9 * total)
        assert share == pytest.approx(values[:rank].sum() / total if total else 1.0, abs=1e-12)
