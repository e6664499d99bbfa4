"""The LoRA linear function beside the same formula in plain autograd, in float64, and beside PEFT's own layers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from lorakit.numerics.lora import Magnitude, lora_added, lora_linear, norms, row_squares


def tensors(inputs: int, outputs: int, rank: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(inputs * 100 + outputs * 10 + rank)
    shapes = ((outputs, inputs), (outputs,), (rank, inputs), (outputs, rank), (outputs,))
    w, bias, a, b, m = (torch.randn(shape, dtype=dtype) for shape in shapes)
    return [w, bias, a.requires_grad_(), b.requires_grad_(), (m.abs() + 0.5).requires_grad_()]


def plain(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, m: Tensor | None) -> Tensor:
    if m is None:
        return functional.linear(x, w + scale * b @ a, bias)
    whole = w + scale * b @ a
    direction = whole / whole.detach().norm(dim=1, keepdim=True)
    return functional.linear(x, m[:, None] * direction, bias)


@settings(max_examples=40, deadline=None)
@given(
    leading=st.lists(st.integers(1, 4), max_size=3),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5)),
    scale=st.sampled_from([1.0, 0.25, 3.0]),
    dora=st.booleans(),
    biased=st.booleans(),
    learned_input=st.booleans(),
)
def test_the_loss_and_every_gradient_are_plain_autograds(
    leading: list[int], sizes: tuple[int, int, int], scale: float, dora: bool, biased: bool, learned_input: bool
) -> None:
    w, bias, a, b, m = tensors(*sizes)
    x = torch.randn(*leading, sizes[0], dtype=torch.float64, requires_grad=learned_input)
    magnitude = Magnitude(m, row_squares(w, torch.float64)) if dora else None
    inputs = [t for t in (x, a, b, *([m] if dora else [])) if t.requires_grad]
    ours = lora_linear(x, (w, bias if biased else None), (a, b), scale, 0.0, magnitude)
    theirs = plain(x, w, bias if biased else None, a, b, scale, m if dora else None)
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs)
    upstream = torch.randn_like(ours)
    for mine, wanted in zip(
        torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(theirs, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(mine, wanted)


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_hides_numbers_from_the_adapter_alone(dora: bool) -> None:
    w, _, a, b, m = tensors(64, 6, 3)
    x = torch.randn(5, 64, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    kept = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - 0.3)
    assert 0 < kept.sum() < kept.numel()
    magnitude = Magnitude(m, row_squares(w, torch.float64)) if dora else None
    inputs = [x, a, b, *([m] if dora else [])]
    torch.manual_seed(3)
    ours = lora_linear(x, (w, None), (a, b), 0.5, 0.3, magnitude)
    theirs = x @ w.T + 0.5 * (x * kept / 0.7) @ a.T @ b.T
    if dora:
        theirs = theirs * m / (w + 0.5 * b @ a).detach().norm(dim=1)
    torch.testing.assert_close(ours, theirs)
    upstream = torch.randn_like(ours)
    for mine, wanted in zip(
        torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(theirs, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(mine, wanted)


def test_norms_need_no_sum() -> None:
    w, _, a, b, _ = tensors(40, 7, 4)
    torch.testing.assert_close(norms(w, (a, b), 0.7, row_squares(w, torch.float64)), (w + 0.7 * b @ a).norm(dim=1))


@pytest.mark.parametrize("dora", [False, True])
def test_bfloat16_is_as_near_as_its_digits_allow(dora: bool) -> None:
    """Inputs rounded to bfloat16 once, then exact arithmetic in float64, is what it is measured against."""
    w, bias, a, b, m = (t.detach() for t in tensors(96, 48, 8, torch.float32))
    x = torch.randn(200, 96)
    low = [t.bfloat16() for t in (x, w, bias)]
    learned = [low[0].requires_grad_(), *(t.requires_grad_() for t in ((a, b, m) if dora else (a, b)))]
    magnitude = Magnitude(m, row_squares(low[1], m.dtype)) if dora else None
    ours = lora_linear(low[0], (low[1], low[2]), (a, b), 0.5, 0.0, magnitude)
    exact = [t.detach().double().requires_grad_() for t in (low[0], a.bfloat16(), b.bfloat16(), *learned[3:])]
    theirs = plain(exact[0], low[1].double(), low[2].double(), exact[1], exact[2], 0.5, exact[3] if dora else None)
    upstream = torch.randn(200, 48).bfloat16()
    mine = torch.autograd.grad(ours, learned, upstream)
    wanted = torch.autograd.grad(theirs, exact, upstream.double())
    assert [g.dtype for g in mine] == [torch.bfloat16, *[torch.float32] * len(learned[1:])]
    for got, expected in zip((ours, *mine), (theirs, *wanted), strict=True):
        assert (got.double() - expected).norm() < 0.01 * expected.norm()


def test_doras_sums_over_bfloat16_are_nearer_than_its_digits() -> None:
    """Norms over 512 columns and the magnitude's gradient over 4,096 rows, of numbers of one sign; B is 0 yet."""
    torch.manual_seed(0)
    x, w, upstream = (torch.rand(shape).bfloat16() for shape in ((4096, 512), (16, 512), (4096, 16)))
    a, b, m = torch.randn(4, 512), torch.zeros(16, 4), torch.ones(16, requires_grad=True)
    squares, lengths = row_squares(w, m.dtype), w.double().norm(dim=1)
    torch.testing.assert_close(norms(w, (a, b), 0.5, squares).double(), lengths, rtol=1e-5, atol=0)
    (found,) = torch.autograd.grad(lora_linear(x, (w, None), (a, b), 0.5, 0.0, Magnitude(m, squares)), m, upstream)
    expected = (upstream.double() * (x.double() @ w.double().T)).sum(0) / lengths
    torch.testing.assert_close(found.double(), expected, rtol=5e-4, atol=0)


def test_a_base_that_learns_is_refused() -> None:
    w, _, a, b, _ = tensors(4, 3, 2)
    with pytest.raises(ValueError, match="freeze"):
        lora_linear(torch.ones(1, 4, dtype=torch.float64), (w.requires_grad_(), None), (a, b), 1.0)


def test_dropout_takes_an_input_of_any_strides() -> None:
    """SDXL's proj_in gets its rows out of a transposed picture."""
    w, bias, a, b, _ = tensors(6, 5, 2)
    x = torch.randn(2, 6, 7, dtype=torch.float64).transpose(1, 2)
    found = []
    for given_x in (x, x.contiguous()):
        torch.manual_seed(0)
        found.append(lora_linear(given_x, (w, bias), (a, b), 1.0, dropout=0.5))
    assert torch.equal(*found)
    torch.autograd.grad(found[0].sum(), [a, b])


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("leading", [(), (5,), (2, 3)])
def test_what_is_added_to_another_layers_output_is_plain_autograds(dropout: float, leading: tuple[int, ...]) -> None:
    _, _, a, b, _ = tensors(7, 4, 3)
    x = torch.randn(*leading, 7, dtype=torch.float64, requires_grad=True)
    y = torch.randn(*leading, 4, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(5)
    ours = lora_added(x, y, (a, b), 1.5, dropout)
    torch.manual_seed(5)
    kept = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - dropout) if dropout else torch.ones_like(x).bool()
    theirs = y + 1.5 * (x * kept / (1 - dropout)) @ a.T @ b.T
    torch.testing.assert_close(ours, theirs)
    upstream = torch.randn_like(ours)
    for mine, wanted in zip(
        torch.autograd.grad(ours, (x, y, a, b), upstream),
        torch.autograd.grad(theirs, (x, y, a, b), upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, wanted)


def test_the_other_layers_output_may_be_of_another_dtype() -> None:
    """int8 layers give what they compute in, which is not always the input's."""
    _, _, a, b, _ = tensors(7, 4, 3, torch.float32)
    x, y = torch.randn(5, 7, requires_grad=True), torch.randn(5, 4).bfloat16().requires_grad_()
    out = lora_added(x, y, (a, b), 1.0)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert (x.grad is not None, y.grad is not None and y.grad.dtype) == (True, torch.bfloat16)
