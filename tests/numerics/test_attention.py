import pytest
import torch

from lorakit.numerics import blocked_attention
from lorakit.numerics.attention import BLOCK, full_attention, matmul_attention, packed_attention


def reference(q, k, v, lengths, scale):
    """Eager attention in float64 with an explicit block-diagonal causal mask."""
    q, k, v = q.double(), k.double(), v.double()
    groups = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position = torch.arange(q.shape[1])
    seen = (document[:, None] == document) & (position[:, None] >= position)
    scores = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, float("-inf"))
    return scores.softmax(-1) @ v


def inputs(heads, key_heads, tokens, width, dtype):
    torch.manual_seed(tokens)
    shapes = ((heads, tokens, width), (key_heads, tokens, width), (key_heads, tokens, width))
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def check(kernel, heads, key_heads, lengths, width, dtype, tolerance):
    leaves = inputs(heads, key_heads, sum(lengths), width, dtype)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    scale = width**-0.5
    out, expected = kernel(*leaves, lengths, scale), reference(*exact, lengths, scale)
    assert out.dtype == dtype
    pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(pull.to(dtype))
    expected.backward(pull.to(dtype).double())
    pairs = [(out, expected), *((a.grad, b.grad) for a, b in zip(leaves, exact, strict=True))]
    for got, want in pairs:
        assert (got.double() - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("lengths", [[7], [1, 13, 3], [5, 5, 1, 30], [2] * 9])
@pytest.mark.parametrize(("heads", "key_heads"), [(9, 3), (4, 4), (6, 1)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_equals_eager_float64_with_a_block_mask(lengths, heads, key_heads, dtype, tolerance):
    check(packed_attention, heads, key_heads, lengths, 16, dtype, tolerance)


@pytest.mark.parametrize("length", [1, 17, BLOCK, BLOCK + 1, 2 * BLOCK + 3])
def test_matmul_kernel_is_exact_across_its_blocks(length):
    def kernel(q, k, v, lengths, scale):
        del lengths
        return matmul_attention(q.view(k.shape[0], -1, *q.shape[1:]), k, v, scale).reshape_as(q)

    check(kernel, 4, 2, [length], 8, torch.float64, 1e-12)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 3e-2)]
)
@pytest.mark.parametrize(("tokens", "seen"), [(1, 1), (9, 4), (BLOCK + 5, 77), (1100, 1100)])
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
        assert (got.double() - want).abs().max() <= tolerance * want.abs().max()


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


def test_bfloat16_on_the_cpu_stays_within_its_rounding():
    check(packed_attention, 6, 2, [11, 29, 3], 16, torch.bfloat16, 3e-2)


def test_no_gradient_keeps_nothing():
    q, k, v = (x.detach() for x in inputs(4, 2, 9, 8, torch.bfloat16))
    assert not packed_attention(q, k, v, [4, 5], 1.0).requires_grad


def test_refuses_lengths_that_do_not_fit():
    q, k, v = inputs(4, 2, 9, 8, torch.float32)
    with pytest.raises(ValueError, match="9 tokens"):
        packed_attention(q, k, v, [4, 4], 1.0)
    with pytest.raises(ValueError, match="share"):
        packed_attention(q[:3], k, v, [9], 1.0)
