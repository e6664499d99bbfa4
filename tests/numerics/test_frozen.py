"""Frozen layers beside torch's own, in float64 and in bfloat16 on odd shapes."""

import pytest
import torch
from torch.nn import functional

from lorakit.numerics import frozen
from lorakit.numerics.frozen import FEW_PLACES, MANY_PLACES, convolve, geglu, norm_silu


def compare(ours, theirs, x, constants, dtype, tolerance):
    """Output and input gradient of ``ours`` in ``dtype`` against ``theirs`` in float64 from the same numbers."""
    x, *constants = [t if t is None else t.to(dtype) for t in (x, *constants)]
    exact = [t if t is None else t.double() for t in (x, *constants)]
    x.requires_grad_()
    exact[0].requires_grad_()
    out, expected = ours(x, *constants), theirs(*exact)
    assert (out.dtype, out.shape) == (dtype, expected.shape)
    pull = torch.randn(expected.shape).to(dtype)
    (gradient,) = torch.autograd.grad(out, x, pull)
    (wanted,) = torch.autograd.grad(expected, exact[0], pull.double())
    for got, want in ((out, expected), (gradient, wanted)):
        assert (got.double() - want).abs().max() <= tolerance * want.abs().max()


DTYPES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 2e-2)])


@DTYPES
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(1, 1, 0), (3, 1, 1), (3, 2, 1), (3, 1, 0), (1, 2, 0)])
@pytest.mark.parametrize("side", [3, 7, 19, 33])
def test_convolution(batch, kernel, stride, padding, side, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(frozen, "_is_fast_place", lambda _: True)
    monkeypatch.setattr(frozen, "MANY_WEIGHTS", 1)
    assert 3 * 7 * 8 < FEW_PLACES < 19 * 20 < MANY_PLACES < 33 * 34
    torch.manual_seed(side)
    x, weight = torch.randn(batch, 5, side, side + 1), torch.randn(6, 5, kernel, kernel)
    for bias in (torch.randn(6), None):
        compare(
            lambda x, w, b: convolve(x, w, b, stride, padding),
            lambda x, w, b: functional.conv2d(x, w, b, stride, padding),
            x.clone(),
            (weight, bias),
            dtype,
            tolerance,
        )


@DTYPES
@pytest.mark.parametrize("shape", [(1, 7, 6), (2, 3, 5, 6), (9, 6)])
def test_geglu(shape, dtype, tolerance):
    def plain(x, weight, bias):
        value, gate = functional.linear(x, weight, bias).chunk(2, -1)
        return value * functional.gelu(gate)

    torch.manual_seed(len(shape))
    compare(geglu, plain, torch.randn(shape), (torch.randn(10, 6), torch.randn(10)), dtype, tolerance)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 6, 5, 3), (3, 12, 1, 1), (2, 6, 9)])
def test_norm_silu(shape, dtype, tolerance):
    def plain(x, weight, bias):
        return functional.silu(functional.group_norm(x, 3, weight, bias, 1e-5))

    torch.manual_seed(len(shape))
    constants = (torch.randn(shape[1]), torch.randn(shape[1]))
    compare(lambda x, w, b: norm_silu(x, 3, w, b, 1e-5), plain, 3 * torch.randn(shape) + 1, constants, dtype, tolerance)


def test_a_fast_layer_keeps_nothing_without_a_gradient():
    x = torch.randn(1, 6, 4, 4)
    assert not norm_silu(x, 3, torch.ones(6), torch.zeros(6), 1e-5).requires_grad
    assert not geglu(x, torch.randn(10, 4), torch.randn(10)).requires_grad
