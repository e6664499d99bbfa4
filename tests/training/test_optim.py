import copy
import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorakit.errors import CheckpointError
from lorakit.recipe.schema import Optimizer, Train
from lorakit.training import optim

NAMES = ("adamw", "adamw_8bit", "paged_adamw_8bit", "lion_8bit")


def parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def gradients(parameters: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step + 1)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)


def run(name: str, steps: int, *shapes: tuple[int, ...]) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    params = parameters(*shapes)
    optimizer, scheduler = optim.build([(params, 1e-2)], Optimizer(name=name), 100)
    for step in range(steps):
        gradients(params, step)
        optimizer.step()
        scheduler.step()
    return params, optimizer


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit", "lion_8bit"])
def test_state_is_8_bit_from_256_elements_on(name: str) -> None:
    params, optimizer = run(name, 2, (16, 16), (4, 320), (255,), (80, 80))
    dtypes = [optimizer.state[p]["state1"].dtype for p in params]
    assert dtypes == [torch.uint8, torch.uint8, torch.float32, torch.uint8]
    if "adamw" in name:
        assert [optimizer.state[p]["state2"].dtype for p in params] == dtypes
    assert any(optimizer.state[p]["state1"].unique().numel() > 10 for p in params)


def test_8_bit_adamw_follows_the_32_bit_one() -> None:
    """Block-wise quantization changes the path a little and the direction not at all."""
    start = parameters((64, 64))[0].detach()
    exact, quantized = (run(name, 20, (64, 64))[0][0].detach() - start for name in ("adamw", "adamw_8bit"))
    cosine = torch.cosine_similarity(exact.flatten(), quantized.flatten(), dim=0)
    assert cosine > 0.99
    assert not torch.equal(exact, quantized)


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_is_its_formula(name: str) -> None:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2) and Lion (Chen et al. 2023, arXiv:2302.06675,
    algorithm 2), in float64. Of so few numbers the 8-bit ones keep state in float32."""
    recipe = Optimizer(name=name, learning_rate=1e-2, schedule="cosine", warmup=3, weight_decay=0.1, betas=(0.8, 0.95))
    params = parameters((5, 7))
    optimizer, scheduler = optim.build([(params, recipe.learning_rate)], recipe, 10)
    w = params[0].detach().double()
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for step in range(10):
        gradients(params, step)
        g = params[0].grad.double()
        rate = optim.learning_rate_at(recipe, step, 10)
        if name == "lion_8bit":
            direction, m = (0.8 * m + 0.2 * g).sign(), 0.95 * m + 0.05 * g
        else:
            m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
            direction = (m / (1 - 0.8 ** (step + 1))) / ((v / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8)
        w = w - rate * 0.1 * w - rate * direction
        optimizer.step()
        scheduler.step()
    torch.testing.assert_close(params[0].detach().double(), w, rtol=0, atol=2e-6)


def test_paged_on_the_cpu_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings(record=True) as caught:
        run("paged_adamw_8bit", 3, (16, 16))
    assert not caught
    assert [r.message for r in caplog.records if "paged" in r.message] == [
        "paged optimizer state needs CUDA; on the CPU paged_adamw_8bit is adamw_8bit"
    ]


@pytest.mark.parametrize("name", NAMES)
def test_state_goes_through_files_bit_for_bit(name: str, tmp_path: Path) -> None:
    shapes = ((16, 16), (7, 70), (9,))
    params, optimizer = run(name, 3, *shapes)
    tensors, meta = optim.state_to_tensors(optimizer)
    save_file(tensors, tmp_path / "state.safetensors")
    assert len([key for key in tensors if "qmap" in key]) <= 2

    again = [nn.Parameter(p.detach().clone()) for p in params]
    restored, scheduler = optim.build([(again, 1e-2)], Optimizer(name=name), 100, start=3)
    optim.load_state_tensors(restored, load_file(tmp_path / "state.safetensors"), meta)
    for p, q in zip(params, again, strict=True):
        old, new = optimizer.state[p], restored.state[q]
        assert old.keys() == new.keys()
        for key, value in old.items():
            assert torch.equal(value, new[key]) if isinstance(value, Tensor) else value == new[key]
    again_tensors, again_meta = optim.state_to_tensors(restored)
    assert again_tensors.keys() == tensors.keys(), "quantization maps are no longer shared"
    assert again_meta == meta

    straight, _ = run(name, 6, *shapes)
    for step in range(3, 6):
        gradients(again, step)
        restored.step()
        scheduler.step()
    assert all(torch.equal(p, q) for p, q in zip(straight, again, strict=True))


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_state_of_another_adapter_is_refused(name: str) -> None:
    tensors, meta = optim.state_to_tensors(run(name, 1, (16, 16), (16, 32))[1])
    for shapes in ([(16, 16)], [(16, 16), (16, 64)]):
        optimizer, _ = optim.build([(parameters(*shapes), 1e-2)], Optimizer(name=name), 100)
        with pytest.raises(CheckpointError):
            optim.load_state_tensors(optimizer, tensors, meta)
    other, _ = optim.build([(parameters((16, 16), (16, 32)), 1e-2)], Optimizer(name="lion_8bit"), 100)
    with pytest.raises(CheckpointError):
        optim.load_state_tensors(other, copy.copy(tensors), meta)


def test_state_json_is_plain() -> None:
    _, meta = optim.state_to_tensors(run("adamw_8bit", 2, (16, 16), (16, 16))[1])
    assert json.loads(meta)["scalars"] == {"0.step": 2, "1.step": 2}
    assert json.loads(meta)["shared"] == {"1.qmap1": "0.qmap1", "1.qmap2": "0.qmap2"}


def test_schedules() -> None:
    def curve(**options: object) -> list[float]:
        recipe = Optimizer(learning_rate=2.0, **options)
        return [optim.learning_rate_at(recipe, step, 10) for step in range(11)]

    assert curve(schedule="constant", warmup=0) == [2.0] * 11
    assert curve(schedule="constant", warmup=3)[:4] == [0.5, 1.0, 1.5, 2.0]
    assert curve(schedule="constant", warmup=1) == [1.0] + [2.0] * 10
    assert curve(schedule="constant", warmup=0.3) == curve(schedule="constant", warmup=3)
    assert curve(schedule="linear", warmup=0) == pytest.approx([2 - 0.2 * s for s in range(11)])
    cosine = curve(schedule="cosine", warmup=2)
    assert cosine[2] == 2.0
    assert cosine[6] == pytest.approx(1 + math.cos(math.pi / 2))
    assert cosine[10] == 0.0


@pytest.mark.parametrize("start", [0, 4])
def test_scheduler_sets_what_the_pure_function_says(start: int) -> None:
    recipe = Optimizer(name="adamw", learning_rate=3e-4, warmup=0.2)
    first, second = parameters((2, 2)), parameters((3,))
    optimizer, scheduler = optim.build([(first, 3e-4), (second, 1.5e-4)], recipe, 10, start=start)
    for step in range(start, 10):
        expected = optim.learning_rate_at(recipe, step, 10)
        assert [g["lr"] for g in optimizer.param_groups] == [expected, pytest.approx(expected / 2, rel=1e-12)]
        gradients([*first, *second], step)
        optimizer.step()
        scheduler.step()


def test_a_run_that_nobody_gave_a_length_is_told_of_when_it_is_short():
    assert "is 5 steps" in optim.advice(Train(), 4.75)
    assert optim.advice(Train(), 100) == ""
    assert optim.advice(Train(steps=5), 4.75) == ""
    assert optim.advice(Train(epochs=1), 4.75) == ""
