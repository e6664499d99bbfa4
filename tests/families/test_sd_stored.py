"""A base with adapters in its weights beside what `lorakit merge` writes: the same bits, and the same pictures."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit.adapters.inject import adapter_state, inject
from lorakit.adapters.merging.merge import merge
from lorakit.adapters.merging.plan import plan_merge
from lorakit.adapters.write import write_peft
from lorakit.families.place import Place
from lorakit.families.sd.base import load_parts
from lorakit.families.sd.drawing import DrawSettings
from lorakit.families.sd.generate import open_painter
from lorakit.families.sd.original import open_stable_diffusion
from lorakit.families.sd.targets import TEXT_GROUPS, UNET_GROUPS
from lorakit.recipe.schema import Adapter
from lorakit.storage.bases import resolve
from tests.tiny import tiny_sd, tiny_sdxl

# diffusers hands torch tensors to numpy the old way in some schedulers.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
CPU = torch.device("cpu")
GROUPS = {"unet": UNET_GROUPS, "text_encoder": TEXT_GROUPS, "text_encoder_2": TEXT_GROUPS}


def adapters_for(base: Path, out: Path, *, dora: bool) -> list[tuple[Path, float]]:
    """Two that add up, on attention and MLP, or one with DoRA."""
    found = []
    for number, weight in enumerate((0.7,) if dora else (0.7, -0.3)):
        for component, module in load_parts(resolve(str(base)), Place(CPU, torch.float32)).adaptable.items():
            section = Adapter(rank=3 + number, alpha=5.0, targets="attention+mlp", dora=dora)
            injection = inject(module, section, GROUPS[component], seed=number)
            state = adapter_state(module)
            for name in state:
                if "lora_B" in name:
                    state[name].normal_(0, 0.05, generator=torch.Generator().manual_seed(number))
            write_peft(out / str(number) / component, state, injection, base_name="x")
        found.append((out / str(number), weight))
    return found


def merged(base: Path, adapters: list[tuple[Path, float]], out: Path) -> Path:
    location = resolve(str(base))
    merge(plan_merge(location, open_stable_diffusion(location), adapters, out))
    return out


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", ["sd", "mixed", "sdxl"])
def test_base_and_adapters_are_the_merged_model(tmp_path: Path, kind: str, dora: bool) -> None:
    make: Any = tiny_sdxl if kind == "sdxl" else tiny_sd
    base = make(tmp_path / "base", dtype=torch.float16)
    if kind == "mixed":
        file = base / "text_encoder" / "model.safetensors"
        save_file({name: tensor.float() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    adapters = adapters_for(base, tmp_path, dora=dora)
    out = merged(base, adapters, tmp_path / "out")
    settings = DrawSettings(steps=2)
    for dtype in (torch.float32, torch.bfloat16):
        ours, theirs = (open_painter(resolve(str(p)), a, CPU, dtype) for p, a in ((base, adapters), (out, [])))
        for component, module in ours.parts.adaptable.items():
            state = theirs.parts.adaptable[component].state_dict()
            for name, tensor in module.state_dict().items():
                assert tensor.dtype == dtype
                assert torch.equal(tensor, state[name]), f"{component}.{name}"
        [(one, _), (other, _)] = (painter.draw(["a red apple"], settings)[0] for painter in (ours, theirs))
        assert np.array_equal(np.asarray(one), np.asarray(other))
