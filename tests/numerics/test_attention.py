import pytest
import torch

from lorakit.numerics import blocked_attention
from lorakit.numerics.attention import full_attention


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 3e-2)]
)
@pytest.mark.parametrize(("tokens", "seen"), [(1, 1), (9, 4), (261, 77), (1100, 1100)])
def test_full_attention_equals_eager_float64(tokens, seen, dtype, tolerance):
    torch.manual_seed(tokens)
    leaves = [torch.randn(2, 3, n, 8).to(dtype).requires_grad_() for n in (tokens, seen, seen)]
    q, k, v = exact = [x.detach().double().requires_grad_() for x in leaves]
    out, expected = full_attention(*leaves, 0.3), (q @ k.transpose(-1, -2) * 0.3).softmax(-1) @ v
    pull = torch.randn(out.shape).to(dtype)
    out.backward(pull)
    expected.backward(pull.double())
    assert (out.dtype, out.shape) == (dtype, expected.shape)
    for got, want in [(out, expected), *((a.grad, b.grad) for a, b in zip(leaves, exact, strict=True))]:
        assert (got.double() - want).abs().max() <= tolerance * want.abs().max().clamp_min(1)  # of one key: 0


@pytest.mark.parametrize(("tokens", "seen"), [(1, 1), (13, 1), (40, 77), (33, 33)])
def test_the_blocked_kernel_is_exact_across_its_blocks(tokens, seen, monkeypatch):
    monkeypatch.setattr(blocked_attention, "BLOCK", 10 * seen)
    torch.manual_seed(seen)
    q, k, v = (torch.randn(5, n, 4, dtype=torch.float64, requires_grad=True) for n in (tokens, seen, seen))
    out = blocked_attention.blocked_attention(q, k, v, 0.5)
    expected = (q @ k.transpose(1, 2) * 0.5).softmax(-1) @ v
    torch.testing.assert_close(out, expected)
    pull = torch.randn_like(expected)
    got = torch.autograd.grad(out, (q, k, v), pull)
    for ours, theirs in zip(got, torch.autograd.grad(expected, (q, k, v), pull), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_blocked_kernel_sums_over_its_blocks_in_float32(monkeypatch):
    """A block a query, and terms of one sign: a sum in bfloat16 stops growing."""
    monkeypatch.setattr(blocked_attention, "BLOCK", 1)
    torch.manual_seed(0)
    leaves = [torch.rand(1, n, 4).bfloat16().requires_grad_() for n in (600, 3, 3)]
    q, k, v = (x.detach().double().requires_grad_() for x in leaves)
    expected = (q @ k.transpose(1, 2) * 0.5).softmax(-1) @ v
    pull = torch.rand(expected.shape).bfloat16()
    got = torch.autograd.grad(blocked_attention.blocked_attention(*leaves, 0.5), leaves[1:], pull)
    for ours, theirs in zip(got, torch.autograd.grad(expected, (k, v), pull.double()), strict=True):
        assert (ours.double() - theirs).abs().max() <= 1e-2 * theirs.abs().max()
