"""Tiny bases, data and recipes, whole and sound, for a test to break in one place."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForCausalLM

from tests.faults.catalogue import FAULTS
from tests.faults.harness import Told
from tests.tiny import tiny_llama, tiny_sd

LLAMA = """\
base: {{model: {folder}/base}}
adapter: {{rank: 4}}
data:
  train: [{{path: {folder}/chats.jsonl}}]
  held_out: 0
  max_tokens: 64
train: {{steps: 2, batch_size: 4}}
output: {{folder: {folder}/runs, name: chats}}
compute: {{device: cpu, precision: fp32}}
"""
SD = """\
base: {{model: {folder}/base}}
adapter: {{rank: 4}}
data:
  path: {folder}/pictures
  resolution: 32
  bucket_step: 8
  held_out: 0
train: {{steps: 2, batch_size: 2}}
output: {{folder: {folder}/runs, name: colours}}
compute: {{device: cpu, precision: fp32}}
"""


@pytest.fixture(scope="session")
def whole_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("whole") / "llama", tied=False, max_shard_size="40KB")


@pytest.fixture(scope="session")
def whole_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("whole") / "sd")


@pytest.fixture(scope="session")
def llama_adapter(tmp_path_factory: pytest.TempPathFactory, whole_llama: Path) -> Path:
    """By PEFT."""
    folder = tmp_path_factory.mktemp("adapters") / "llama"
    model = AutoModelForCausalLM.from_pretrained(whole_llama)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sd_adapter(tmp_path_factory: pytest.TempPathFactory, whole_sd: Path) -> Path:
    """By PEFT, of the UNet."""
    folder = tmp_path_factory.mktemp("adapters") / "sd"
    model = UNet2DConditionModel.from_pretrained(whole_sd / "unet")
    get_peft_model(model, LoraConfig(r=2, target_modules=["to_q"])).save_pretrained(folder / "unet")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def as_the_catalogue_says(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test of a fault expects an exit code that the catalogue has for it."""
    numbers = [number for mark in request.node.iter_markers("fault") for number in mark.args]
    allowed = {code for number in numbers for code in FAULTS[number].codes}
    refused = Told.refused

    def checked(told: Told, code: int, *words: str) -> Told:
        assert not numbers or code in allowed, f"the catalogue has {sorted(allowed)} for {numbers}, not {code}"
        return refused(told, code, *words)

    monkeypatch.setattr(Told, "refused", checked)


def row(number: int) -> str:
    return json.dumps({"messages": [{"role": "user", "content": f"What is {number}?"},
                                    {"role": "assistant", "content": f"It is {number}."}]}) + "\n"  # fmt: skip


@pytest.fixture
def llama(tmp_path: Path, whole_llama: Path, llama_adapter: Path) -> Path:
    """A folder with ``base`` (four shards), ``adapter``, ``chats.jsonl`` of eight rows and ``recipe.yaml``."""
    shutil.copytree(whole_llama, tmp_path / "base")
    shutil.copytree(llama_adapter, tmp_path / "adapter")
    (tmp_path / "chats.jsonl").write_text("".join(row(i) for i in range(8)))
    (tmp_path / "recipe.yaml").write_text(LLAMA.format(folder=tmp_path))
    return tmp_path


@pytest.fixture
def sd(tmp_path: Path, whole_sd: Path, sd_adapter: Path) -> Path:
    """A folder with ``base``, ``adapter``, ``pictures`` (four PNGs with captions) and ``recipe.yaml``."""
    shutil.copytree(whole_sd, tmp_path / "base")
    shutil.copytree(sd_adapter, tmp_path / "adapter")
    (tmp_path / "pictures").mkdir()
    for i in range(4):
        noise = np.random.default_rng(i).integers(0, 255, (40, 40, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"pictures/{i}.png")
        (tmp_path / f"pictures/{i}.txt").write_text(f"colour {i}")
    (tmp_path / "recipe.yaml").write_text(SD.format(folder=tmp_path))
    return tmp_path


@pytest.fixture
def edit() -> Callable[..., None]:
    """``edit(path, key=value)`` changes keys of a JSON object in a file."""

    def edit(path: Path, **changes: object) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


class _Touch:
    """What a pickle holds that leaves a canary where it is opened."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.system, (f"touch '{self.canary}'",)


@pytest.fixture
def canary(tmp_path: Path) -> Callable[[Path], Path]:
    """``canary(path)`` writes a pickle, in torch's own wrapping, that makes a file where it is opened: its path."""
    left = tmp_path / "canary-was-here"

    def canary(path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"weight": _Touch(left)}, path)
        return left

    torch.save({"weight": _Touch(left)}, tmp_path / "proof.pt")
    torch.load(tmp_path / "proof.pt", weights_only=False)
    assert left.exists(), "the canary sings when the pickle is opened"
    left.unlink()
    (tmp_path / "proof.pt").unlink()
    return canary
