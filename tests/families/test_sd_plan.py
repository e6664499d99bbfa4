"""The plan against what loading really makes: modules, parameters, examples, and the memory that autograd keeps."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lorakit.data.arrange import resolution_of, sizes_of
from lorakit.errors import DataError, ModelError, RecipeError
from lorakit.families.place import Place
from lorakit.families.sd import task as sd
from lorakit.families.sd.plan import plan
from lorakit.numerics.order import Layout
from lorakit.recipe.schema import PictureData, SDAdapter, SDBase, SDOptimizer, SDSample, SDTrain
from tests.tiny import tiny_sd


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("base") / "sd")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    for i in range(9):
        size = (40, 64, 3) if i % 3 == 0 else (64, 64, 3)
        Image.fromarray(np.random.default_rng(i).integers(0, 255, size, np.uint8)).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(f"picture {i}")
    return root


def place(checkpointing: bool = False) -> Place:
    return Place(torch.device("cpu"), torch.float32, checkpointing)


@pytest.mark.parametrize(
    "adapter",
    [
        SDAdapter(rank=2),
        SDAdapter(rank=3, targets="attention+mlp", text_encoder=True),
        SDAdapter(rank=2, targets=["to_q", "fc1"], rank_pattern={"fc1": 4}, text_encoder=True),
        SDAdapter(rank=2, targets="all-linear", dora=True),
    ],
)
def test_the_plan_is_what_load_makes(
    base: Path, folder: Path, adapter: SDAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path))
    data = PictureData(path=str(folder), resolution=64, bucket_step=8, held_out=0.25, flip=True, repeats=2)
    layout = Layout(3, 4)
    planned = plan(SDBase(model=str(base)), adapter, data, layout, place())
    learning = sd.Learning.of(SDTrain(), SDOptimizer())
    task = sd.load(SDBase(model=str(base)), adapter, data, learning, SDSample(), layout, place())
    state = task.adapter_state()
    assert planned.trainable_parameters == sum(t.numel() for t in state.values())
    assert {t.name for t in planned.modules} == {k.split(".lora_")[0] for k in state}
    parts = (*task.parts.adaptable.values(), task.parts.vae)
    frozen = [p for m in parts for p in m.parameters() if not p.requires_grad]
    assert planned.total_parameters == sum(p.numel() for p in frozen)
    assert planned.memory["base weights"] == 4 * planned.total_parameters
    assert (planned.pictures, planned.held_out) == (len(task.examples.train), len(task.examples.held_out)) == (28, 2)
    assert planned.steps_per_epoch == task.steps_per_epoch
    sizes = [task.examples.buckets[e.bucket] for e in task.examples.train]
    assert planned.buckets == {size: sizes.count(size) for size in set(sizes)}
    assert next(tmp_path.glob("latents")).is_dir()


def test_activations_are_what_autograd_keeps(base: Path, folder: Path) -> None:
    data = PictureData(path=str(folder), resolution=64, bucket_step=8)

    def bytes_of(batch: int, checkpointing: bool = False) -> int:
        planned = plan(SDBase(model=str(base)), SDAdapter(rank=2), data, Layout(0, batch), place(checkpointing))
        return planned.memory["activations"]

    assert bytes_of(8) == pytest.approx(2 * bytes_of(4), rel=0.02)
    assert bytes_of(8, checkpointing=True) < 0.5 * bytes_of(8)


def test_a_plan_leaves_no_trace_and_refuses_like_load(
    base: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    data = PictureData(path=str(folder), resolution=64, bucket_step=8)
    plan(SDBase(model=str(base)), SDAdapter(rank=2), data, Layout(0, 4), place())
    assert not (tmp_path / "cache").exists()
    for adapter, pictures, model, error in (
        (SDAdapter(rank=2, targets=["to_qq"]), data, base, RecipeError),
        (SDAdapter(rank=2), data.model_copy(update={"bucket_step": 6}), base, RecipeError),
        (SDAdapter(rank=2), data.model_copy(update={"path": str(tmp_path)}), base, DataError),
        (SDAdapter(rank=2), data, tmp_path / "absent", ModelError),
    ):
        with pytest.raises(error):
            plan(SDBase(model=str(model)), adapter, pictures, Layout(0, 4), place())


def test_the_resolution_is_the_bases_own_where_the_recipe_gives_none() -> None:
    data = PictureData(path="x", bucket_step=8)
    assert resolution_of(data, (64, 64)) == 64
    assert resolution_of(data, (96, 54)) == 72
    assert resolution_of(data.model_copy(update={"resolution": 40}), (64, 64)) == 40
    assert max(width * height for width, height in sizes_of(data, 4, (64, 64))) == 64 * 64
