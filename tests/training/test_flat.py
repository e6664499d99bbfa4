"""Flat parameters against the same optimizer on each parameter by itself."""

import pytest
import torch
from torch import Tensor, nn

from lorakit.recipe.schema import Optimizer
from lorakit.training import optim
from lorakit.training.flat import BLOCK, FlatParameters

SHAPES = [[(4, 320), (320, 4), (16, 3, 3, 3), (700,)], [(80, 9)]]
"""Of at least a block, none a multiple of it: two groups of a rate each."""
RATES = (1e-2, 2e-3)


def made() -> list[tuple[list[nn.Parameter], float]]:
    generator = torch.Generator().manual_seed(0)
    groups = [[nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes] for shapes in SHAPES]
    return list(zip(groups, RATES, strict=True))


def everything(groups: list[tuple[list[nn.Parameter], float]]) -> list[nn.Parameter]:
    return [parameter for parameters, _ in groups for parameter in parameters]


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "lion_8bit"])
def test_updates_are_those_of_each_parameter(name: str) -> None:
    """Bit for bit: no block of 8-bit state reaches over two parameters."""
    recipe = Optimizer(name=name, weight_decay=0.1)
    one, all_at_once = made(), made()
    flat = FlatParameters(all_at_once, numbers=1)
    optimizers = [optim.build(groups, recipe, 10)[0] for groups in (one, flat.groups)]
    for step in range(6):
        generator = torch.Generator().manual_seed(step)
        for p, q in zip(everything(one), everything(all_at_once), strict=True):
            p.grad = torch.randn(p.shape, generator=generator) * torch.rand((), generator=generator)
            assert q.grad is not None
            q.grad.copy_(p.grad)
        for optimizer in optimizers:
            optimizer.step()
        for p, q in zip(everything(one), everything(all_at_once), strict=True):
            assert torch.equal(p, q)
    kinds = {value.dtype for state in optimizers[1].state.values() for key, value in state.items() if key == "state1"}
    assert kinds == (set() if name == "adamw" else {torch.uint8})


def test_values_and_gradients_are_views() -> None:
    groups = made()
    values: list[Tensor] = [parameter.detach().clone() for parameter in everything(groups)]
    flat = FlatParameters(groups, numbers=3)
    assert [rate for _, rate in flat.groups] == list(RATES)
    assert all(torch.equal(p, value) for p, value in zip(everything(groups), values, strict=True))
    loss = torch.stack([(p * p).sum() / 2 for p in everything(groups)]).sum()
    loss.backward()
    flat.put(loss.detach(), [5, 7])
    told, norm = flat.read()[:3], flat.read()[3]
    assert told == [pytest.approx(float(loss.detach())), 5, 7]
    assert norm == pytest.approx(float(torch.cat([value.flatten().double() for value in values]).norm()))
    for parameter in everything(flat.groups):
        assert torch.equal(parameter, parameter.grad)
        assert parameter.numel() % BLOCK == 0
    everything(flat.groups)[1].data.zero_()
    assert [bool(p.any()) for p in everything(groups)] == [True, True, True, True, False]
