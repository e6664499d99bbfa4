import pytest
import torch
from torch.nn import functional

from lorakit.numerics import cross_entropy
from lorakit.numerics.cross_entropy import linear_cross_entropy


def case(rows, width, vocabulary, dtype):
    torch.manual_seed(rows)
    hidden = torch.randn(rows, width).to(dtype).requires_grad_()
    return hidden, torch.randn(vocabulary, width).to(dtype), torch.randint(vocabulary, (rows,))


@pytest.mark.parametrize(("chunk_rows", "exact_rows"), [(1, 1), (3, 2), (100, 100), (100, 4), (100, 0)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_equals_float64_cross_entropy(monkeypatch, chunk_rows, exact_rows, dtype, tolerance):
    hidden, weight, targets = case(10, 16, 37, dtype)
    monkeypatch.setattr(cross_entropy, "CHUNK_NUMBERS", chunk_rows * 37)
    monkeypatch.setattr(cross_entropy, "EXACT_NUMBERS", exact_rows * 37)
    exact = hidden.detach().double().requires_grad_()
    expected = functional.cross_entropy(exact @ weight.double().T, targets, reduction="sum")
    expected.backward()
    loss = linear_cross_entropy(hidden, weight, targets)
    (3 * loss).backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert abs(loss.item() - expected.item()) <= tolerance * expected.item()
    assert (hidden.grad.double() - 3 * exact.grad).abs().max() <= tolerance * 3 * exact.grad.abs().max()


def test_a_loss_scale_above_the_largest_half_float():
    hidden, weight, targets = case(10, 16, 37, torch.float16)
    exact = hidden.detach().double().requires_grad_()
    functional.cross_entropy(exact @ weight.double().T, targets, reduction="sum").backward()
    (65536.0 * linear_cross_entropy(hidden, weight, targets)).backward()
    fits = 65536 * exact.grad.abs() < 60000
    assert fits.any()
    assert (hidden.grad.double() - 65536 * exact.grad)[fits].abs().max() <= 5e-3 * 65536 * exact.grad[fits].abs().max()


def test_no_rows_give_zero():
    hidden, weight, targets = case(0, 16, 37, torch.float32)
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad.shape == (0, 16)


def test_without_gradient_nothing_is_kept():
    hidden, weight, targets = case(5, 16, 37, torch.float32)
    assert not linear_cross_entropy(hidden.detach(), weight, targets).requires_grad


def test_a_trainable_head_is_refused():
    hidden, weight, targets = case(5, 16, 37, torch.float32)
    with pytest.raises(ValueError, match="freeze"):
        linear_cross_entropy(hidden, weight.requires_grad_(), targets)
