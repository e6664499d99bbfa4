"""convert, resize and extract killed at operations on files: OUT is absent or complete, and what was left is swept."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.adapters.outline import adaptable
from lorakit.adapters.write import taken_apart, write_peft
from lorakit.commands.adapters import open_base
from lorakit.storage.bases import resolve
from lorakit.storage.manifest import sha256
from tests.adapters.merging.test_merge_parts import adapter
from tests.adapters.test_convert import random_delta
from tests.tiny import tiny_llama
from tests.torture import trace
from tests.torture.warm import Warm

pytestmark = [
    pytest.mark.fault(59),
    pytest.mark.skipif(not trace.supported(), reason="no tracing here: it takes Linux on x86-64"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, another of its shape, an adapter for them, and one for Stable Diffusion."""
    folder = tmp_path_factory.mktemp("killed")
    for seed, name in enumerate(("base", "tuned")):
        tiny_llama(folder / name, dtype=torch.bfloat16, tied=False, seed=seed)
    adapter(folder / "base", folder / "a", seed=0, target_modules=["q_proj", "down_proj"])
    unet = open_base(resolve("builtin:mini-sd")).models["unet"]
    layers = {path: layer for path, layer in adaptable(unet).items() if path.endswith("to_q")}
    changes = {path: random_delta(layer, 2, 3.0, torch.float32, dora=False, seed=0) for path, layer in layers.items()}
    write_peft(folder / "style" / "unet", *taken_apart(changes, unet), base_name="builtin:mini-sd")
    return folder


def commands(models: Path) -> dict[str, tuple[Any, ...]]:
    base = ("--base", models / "base")
    return {
        "gguf": ("convert", models / "a", "out.gguf", "--to", "gguf", *base),
        "diffusers": ("convert", models / "style", "out.safetensors", "--to", "diffusers"),
        "folder": ("convert", models / "a", "out", "--to", "peft", "--dtype", "float16", *base),
        "resize": ("resize", models / "a", "out", "--rank", 2, *base),
        "extract": ("extract", models / "base", models / "tuned", "out", "--rank", 2),
    }


@pytest.mark.parametrize("kind", ["gguf", "diffusers", "folder", "resize", "extract"])
def test_killed_and_made_again(models: Path, warm: Warm, tmp_path: Path, kind: str) -> None:
    words = [str(word) for word in commands(models)[kind]]
    name = next(word for word in words if word.startswith("out"))

    def outcome(out: Path) -> dict[str, str]:
        return {path.name: sha256(path) for path in ([out] if out.is_file() else out.iterdir())}

    assert warm.run(words, tmp_path / "whole").code == 0
    whole = outcome(tmp_path / "whole" / name)
    traced = warm.run(words, tmp_path / "traced", {"trace": {"root": str(tmp_path / "traced")}})
    assert traced.code == 0, traced.err
    count, leftovers = len(traced.operations), 0
    assert count > 3
    for number in sorted({*range(0, count, max(1, count // 5)), count - 1}):
        cwd = tmp_path / str(number)
        done = warm.run(words, cwd, {"trace": {"root": str(cwd), "kill_at": number, "torn": number % 2 == 0}})
        assert done.code == -9, (number, done.err)
        left = [path.name for path in cwd.iterdir()]
        assert all(each == name or each.startswith(".tmp-") for each in left)
        leftovers += any(each.startswith(".tmp-") for each in left)
        if name in left:
            assert outcome(cwd / name) == whole
            continue
        assert warm.run(words, cwd).code == 0
        assert [path.name for path in cwd.iterdir()] == [name], "what was left is swept"
        assert outcome(cwd / name) == whole
    assert leftovers
