"""The smallest LoRA, run in small: the counts are exact, the even digits are learned, folding changes no prediction."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "recipes" / "mnist" / "train.py"


@pytest.fixture(scope="module")
def mnist() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mnist_train", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_even_digits_are_learned_through_lora(mnist: ModuleType) -> None:
    digits = mnist.load("test")
    train = mnist.Digits(digits.pictures[:8000], digits.labels[:8000])
    test = mnist.Digits(digits.pictures[8000:], digits.labels[8000:])
    assert digits.pictures.shape == (10_000, 784)
    assert digits.labels.unique().tolist() == list(range(10))
    result = mnist.run(train, test, epochs=10)
    assert (result.trainable, result.total) == (5_696, 240_842)
    odd = (test.labels % 2 == 1).float().mean().item()
    assert 0.9 * odd < result.before <= odd
    assert result.after > 0.9
    assert result.same


def test_folded_network_is_a_plain_one(mnist: ModuleType) -> None:
    model = mnist.Mlp()
    mnist.inject(model, mnist.LORA, {}, seed=0)
    mnist.fold(model)
    assert {type(module) for module in model.modules()} == {mnist.Mlp, torch.nn.Linear}


def test_script_is_short() -> None:
    assert len(SCRIPT.read_text().splitlines()) < 150
