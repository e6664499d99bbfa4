"""Several linear layers as one function, beside plain autograd in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.numerics.joint import Layer, joint_linear


def layer(inputs, outputs, rank, biased, scale, dtype=torch.float64):
    weight, bias, a, b = (
        torch.randn(shape) for shape in ((outputs, inputs), (outputs,), (rank, inputs), (outputs, rank))
    )
    bias = bias.to(dtype) if biased else None
    if not rank:
        return Layer.bare(weight.to(dtype), bias)
    wide = torch.promote_types(dtype, torch.float32)
    return Layer(weight.to(dtype), bias, a.to(wide).requires_grad_(), b.to(wide).requires_grad_(), scale)


def plain(x, layers):
    """In float64; the masters rounded to x's dtype, as the function says."""
    ys = []
    for weight, bias, a, b, scale in layers:
        y = x.double() @ weight.double().T + scale * (x.double() @ a.to(x.dtype).double().T) @ b.to(x.dtype).double().T
        ys.append(y if bias is None else y + bias.double())
    return ys


def learned(x, layers):
    return [t for t in (x, *(t for each in layers for t in (each.a, each.b))) if t.requires_grad]


@settings(max_examples=40, deadline=None)
@given(
    leading=st.lists(st.integers(1, 4), max_size=3),
    inputs=st.integers(1, 9),
    kinds=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 4), st.booleans()), min_size=1, max_size=4),
    learned_input=st.booleans(),
)
def test_the_outputs_and_every_gradient_are_plain_autograds(leading, inputs, kinds, learned_input):
    torch.manual_seed(inputs)
    layers = [layer(inputs, *kind, 0.5 + number) for number, kind in enumerate(kinds)]
    x = torch.randn(*leading, inputs, dtype=torch.float64, requires_grad=learned_input)
    ours, theirs = joint_linear(x, layers), plain(x, layers)
    torch.testing.assert_close(list(ours), theirs)
    if leaves := learned(x, layers):
        upstream = [torch.randn_like(y) for y in theirs]
        got, wanted = (
            torch.autograd.grad(sum((y * pull).sum() for y, pull in zip(ys, upstream, strict=True)), leaves)
            for ys in (ours, theirs)
        )
        torch.testing.assert_close(list(got), list(wanted))


def test_bfloat16_is_as_near_as_its_digits_allow():
    torch.manual_seed(0)
    layers = [layer(96, outputs, rank, biased, 0.5, torch.bfloat16) for outputs, rank, biased in
              ((48, 8, True), (32, 16, False), (64, 0, True))]  # fmt: skip
    x = torch.randn(2, 100, 96).bfloat16().requires_grad_()
    ours, theirs = joint_linear(x, layers), plain(x, layers)
    upstream = [torch.randn(y.shape).bfloat16() for y in theirs]
    leaves = learned(x, layers)
    got = torch.autograd.grad(ours, leaves, upstream)
    wanted = torch.autograd.grad(theirs, leaves, [pull.double() for pull in upstream])
    assert [g.dtype for g in got] == [torch.bfloat16, *[torch.float32] * 4]
    for mine, exact in zip((*ours, *got), (*theirs, *wanted), strict=True):
        assert (mine.double() - exact).norm() < 0.01 * exact.norm()


def test_a_base_that_learns_is_refused():
    weight = torch.ones(3, 4, requires_grad=True)
    with pytest.raises(ValueError, match="freeze"):
        joint_linear(torch.ones(1, 4), [Layer.bare(weight, None)])
