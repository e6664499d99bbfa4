"""Each function beside its formula in float64, values and every gradient."""

import pytest
import torch
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from lorakit.numerics import elementwise
from lorakit.numerics.elementwise import rms_norm, rotate, signed, swiglu

TOLERANCES = [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)]


def check(ours, formula, leaves, tolerance):
    exact = [x.detach().double().requires_grad_() for x in leaves]
    out, expected = ours(*leaves), formula(*exact)
    assert out.dtype == leaves[0].dtype
    pull = torch.randn(out.shape).to(out.dtype)
    out.backward(pull)
    expected.backward(pull.double())
    for got, want in [(out, expected), *((a.grad, b.grad) for a, b in zip(leaves, exact, strict=True))]:
        assert (got.double() - want).abs().max() <= tolerance * want.abs().max()


def leaf(*shape, dtype):
    return torch.randn(shape).to(dtype).requires_grad_()


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("shape", [(1, 3), (7, 33), (2, 5, 64)])
@pytest.mark.parametrize("by_torch", [False, True])
def test_rms_norm(shape, by_torch, dtype, tolerance, monkeypatch):
    """By own arithmetic, and as a GPU has it, which here PyTorch puts together from several kernels."""
    monkeypatch.setattr(elementwise, "_is_one_kernel", lambda _: by_torch)
    torch.manual_seed(0)
    weight = torch.randn(shape[-1]).to(dtype)

    def formula(x):
        return x * (x.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * weight.double()

    check(lambda x: rms_norm(x, weight, 1e-3), formula, [leaf(*shape, dtype=dtype)], tolerance)


def test_rms_norm_rounds_as_transformers_does():
    torch.manual_seed(0)
    norm = LlamaRMSNorm(48, 1e-5).bfloat16().requires_grad_(False)
    norm.weight.copy_(torch.randn(48))
    x = torch.randn(9, 48).bfloat16()
    assert torch.equal(rms_norm(x, norm.weight, 1e-5), norm(x))


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_swiglu(dtype, tolerance):
    torch.manual_seed(0)
    leaves = [leaf(5, 37, dtype=dtype) for _ in range(2)]
    check(swiglu, lambda gate, up: functional.silu(gate) * up, leaves, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_rotate_is_transformers_rotary_embedding(dtype, tolerance):
    torch.manual_seed(0)
    angles = torch.randn(6, 4).double().repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def formula(x):
        turned, _ = apply_rotary_pos_emb(x, x, cos.double(), sin.double(), unsqueeze_dim=1)
        return turned

    def ours(x):
        return rotate(x, cos.unsqueeze(1), signed(sin).unsqueeze(1))

    check(ours, formula, [leaf(6, 3, 8, dtype=dtype)], tolerance)


def test_a_trainable_norm_is_refused():
    with pytest.raises(ValueError, match="freeze"):
        rms_norm(torch.ones(2, 4), torch.ones(4, requires_grad=True), 1e-5)
