import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from lorakit.numerics import attention
from lorakit.numerics import packed_attention as module
from lorakit.numerics.packed_attention import BLOCK, matmul_packed_attention, packed_attention
from lorakit.numerics.packing import Packing


def reference(q, k, v, packing, scale):
    """Eager attention in float64, a document at a time with the shared tokens before it, and a whole causal mask."""
    shares = q.shape[1] // k.shape[1]
    q, (k, v) = q.double(), (x.double().repeat_interleave(shares, 1) for x in (k, v))
    place, parts = packing.shared, []
    for length in packing.lengths:
        rows = [*range(packing.shared), *range(place, place + length)]
        queries, keys, values = (x[rows].transpose(0, 1) for x in (q, k, v))
        seen = torch.ones(len(rows), len(rows), dtype=torch.bool).tril()
        scores = (queries @ keys.transpose(1, 2) * scale).masked_fill(~seen, float("-inf"))
        out = (scores.softmax(-1) @ values).transpose(0, 1)
        if not parts:
            parts.append(out[: packing.shared])
        parts.append(out[packing.shared :])
        place += length
    return torch.cat(parts)


def check(kernel, heads, key_heads, packing, width, dtype, tolerance):
    torch.manual_seed(packing.tokens)
    shapes = ((packing.tokens, h, width) for h in (heads, key_heads, key_heads))
    leaves = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    scale = width**-0.5
    out, expected = kernel(*leaves, packing, scale), reference(*exact, packing, scale)
    assert out.dtype == dtype
    pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(pull.to(dtype))
    expected.backward(pull.to(dtype).double())
    pairs = [(out, expected), *((a.grad, b.grad) for a, b in zip(leaves, exact, strict=True))]
    for got, want in pairs:
        assert (got.double() - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("lengths", [[7], [1, 13, 3], [5, 5, 1, 30], [2] * 9, [30, 29, 28, 2]])
@pytest.mark.parametrize(("heads", "key_heads"), [(9, 3), (4, 4), (6, 1)])
@pytest.mark.parametrize("shared", [0, 1, 11])
@pytest.mark.parametrize("kernel", [packed_attention, matmul_packed_attention])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_equals_eager_float64_a_document_at_a_time(kernel, lengths, shared, heads, key_heads, dtype, tolerance):
    check(kernel, heads, key_heads, Packing.of(lengths, shared), 16, dtype, tolerance)


@pytest.mark.parametrize("length", [1, 17, BLOCK, BLOCK + 1, 2 * BLOCK + 3])
@pytest.mark.parametrize("shared", [0, BLOCK + 2])
def test_the_matmul_kernel_is_exact_across_its_blocks(length, shared):
    check(matmul_packed_attention, 4, 2, Packing.of([length, length], shared), 8, torch.float64, 1e-12)


def test_bfloat16_on_the_cpu_stays_within_its_rounding():
    for kernel in (packed_attention, module._fused):
        check(kernel, 6, 2, Packing.of([11, 29, 3], 5), 16, torch.bfloat16, 3e-2)


@pytest.mark.parametrize("kernel", [matmul_packed_attention, module._fused])
def test_the_shared_tokens_gradients_are_summed_in_float32(kernel):
    """Each document is a group, and the terms have one sign: a sum in bfloat16 stops growing."""
    packing = Packing.of([1, 2] * 150, 1)
    assert len(packing.groups) == 301
    torch.manual_seed(0)
    q, k, v, pull = (torch.rand(packing.tokens, 1, 8).bfloat16() for _ in range(4))
    v[0] += 1
    leaves = [x.requires_grad_() for x in (q, k, v)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    got = torch.autograd.grad(kernel(*leaves, packing, 0.5), leaves[1:], pull)
    wanted = torch.autograd.grad(reference(*exact, packing, 0.5), exact[1:], pull.double())
    for ours, theirs in zip(got, wanted, strict=True):
        assert (ours[0].double() - theirs[0]).abs().max() <= 1e-2 * theirs[0].abs().max()


def test_long_documents_take_the_fused_kernel(monkeypatch):
    monkeypatch.setattr(module, "LONGEST_KEPT", 8)
    monkeypatch.setattr(module, "matmul_packed_attention", None)
    check(packed_attention, 4, 2, Packing.of([3, 7], 2), 8, torch.bfloat16, 3e-2)


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize(("shared", "key_heads"), [(0, 3), (4, 3), (4, 6)])
def test_the_fused_kernel_is_a_fused_one(shared, key_heads, shares, monkeypatch):
    """PyTorch silently falls back to a kernel that keeps T x T probabilities where its inputs suit no other."""
    monkeypatch.setattr(attention, "shares_keys", lambda _: shares)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        check(packed_attention, 6, key_heads, Packing.of([11, 10, 29], shared), 16, torch.float32, 2e-6)


def test_no_gradient_keeps_nothing():
    q, k, v = (torch.randn(9, heads, 8, dtype=torch.bfloat16) for heads in (4, 2, 2))
    assert not packed_attention(q, k, v, Packing.of([4, 5]), 1.0).requires_grad


def test_refuses_what_does_not_fit():
    q, k, v = (torch.randn(9, heads, 8) for heads in (4, 2, 2))
    with pytest.raises(ValueError, match="row of 9"):
        packed_attention(q, k, v, Packing.of([4, 4]), 1.0)
    with pytest.raises(ValueError, match="share"):
        packed_attention(q[:, :3], k, v, Packing.of([9]), 1.0)
