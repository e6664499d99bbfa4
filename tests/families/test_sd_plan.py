"""The plan against what loading really makes: modules, parameters, examples, and the memory that autograd keeps."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file

import lorakit.families.sd.skeleton
from lorakit.data.arrange import resolution_of, sizes_of
from lorakit.errors import DataError, ModelError, RecipeError
from lorakit.families.place import Place
from lorakit.families.sd import activations
from lorakit.families.sd import task as sd
from lorakit.families.sd.base import load_parts
from lorakit.families.sd.plan import plan
from lorakit.numerics.order import Layout
from lorakit.recipe.load import load
from lorakit.recipe.schema import PictureData, SDAdapter, SDBase, SDOptimizer, SDRecipe, SDSample, SDTrain
from lorakit.storage.bases import resolve
from tests.families.test_sdxl_single_file import original_tensors
from tests.tiny import tiny_clip_tokenizer, tiny_sd, tiny_sd_unet, tiny_sdxl

CPU = torch.device("cpu")


def tiny_sd_2(folder: Path) -> Path:
    """SD 2's projections and prediction."""
    small = dict(tiny_sd_unet().config) | {"use_linear_projection": True}
    UNet2DConditionModel.from_config(small).save_pretrained(tiny_sd(folder, "v_prediction") / "unet")
    return folder


def single_file(folder: Path) -> Path:
    file = folder.with_suffix(".safetensors")
    base = resolve(str(tiny_sdxl(folder)))
    save_file(original_tensors(load_parts(base, place())), file)
    tiny_clip_tokenizer().save_pretrained(folder.parent / "tokenizer")
    return file


BASES: dict[str, Callable[[Path], Path]] = {
    "1.x": tiny_sd,
    "2.x": tiny_sd_2,
    "xl": tiny_sdxl,
    "xl, a single file": single_file,
}


@pytest.fixture(scope="module", params=BASES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return BASES[request.param](tmp_path_factory.mktemp("base") / "sd")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    for i in range(9):
        size = (40, 64, 3) if i % 3 == 0 else (64, 64, 3)
        Image.fromarray(np.random.default_rng(i).integers(0, 255, size, np.uint8)).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(f"picture {i}")
    return root


def place(checkpointing: bool = False) -> Place:
    return Place(CPU, torch.float32, checkpointing)


@pytest.mark.parametrize(
    "adapter",
    [
        SDAdapter(rank=2),
        SDAdapter(rank=3, targets="attention+mlp", text_encoder=True),
        SDAdapter(rank=2, targets=["to_q", "conv1", "fc1"], rank_pattern={"fc1": 4}, text_encoder=True),
        SDAdapter(rank=2, targets="all-linear", dora=True, dropout=0.1),
    ],
)
def test_the_plan_is_what_load_makes(
    base: Path, folder: Path, adapter: SDAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = PictureData(path=str(folder), resolution=64, bucket_step=8, held_out=0.25, flip=True, repeats=2)
    layout = Layout(3, 4)
    planned = plan(SDBase(model=str(base)), adapter, data, SDSample(), layout, place())
    learning = sd.Learning.of(SDTrain(), SDOptimizer())
    task = sd.load(SDBase(model=str(base)), adapter, data, learning, SDSample(prompts=["a"]), layout, place())
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
    no_libraries(monkeypatch)
    assert plan(SDBase(model=str(base)), adapter, data, SDSample(), layout, place()) == planned


def no_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on a plan that asks diffusers for a model fails."""

    def refuse(*_: object) -> None:
        raise AssertionError("a library is asked")

    monkeypatch.setattr(lorakit.families.sd.skeleton, "skeleton", refuse)
    monkeypatch.setattr(activations, "skeleton", refuse)


@pytest.mark.parametrize(("dtype", "checkpointing"), [(torch.float32, False), (torch.bfloat16, True)])
def test_activations_are_what_autograd_keeps(
    base: Path, folder: Path, dtype: torch.dtype, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of any batch, by a forward pass for one number of pictures."""
    data, adapter = PictureData(path=str(folder), resolution=64, bucket_step=8), SDAdapter(rank=2)
    where = Place(CPU, dtype, checkpointing)
    planned = {
        b: plan(SDBase(model=str(base)), adapter, data, SDSample(), Layout(0, b), where).memory for b in (1, 3, 8)
    }
    for batch, memory in planned.items():
        monkeypatch.setattr(activations, "MANY", batch)
        whole, each = activations.activation_bytes(resolve(str(base)), adapter, (64, 64), where)
        assert memory["activations"] == whole + batch * each > 0
    if checkpointing:
        plain = plan(SDBase(model=str(base)), adapter, data, SDSample(), Layout(0, 8), Place(CPU, dtype))
        assert planned[8]["activations"] < 0.5 * plain.memory["activations"]


def test_a_plan_refuses_like_load(base: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = PictureData(path=str(folder), resolution=64, bucket_step=8)
    sound = (SDAdapter(rank=2), data, SDSample(), base)
    wordless = tmp_path / "wordless" / base.name
    if base.is_dir():
        shutil.copytree(base, wordless)
        for path in (wordless / "tokenizer").iterdir():
            path.unlink()
    else:  # whose tokenizers are in a folder beside it
        wordless.parent.mkdir()
        shutil.copy(base, wordless)
    with pytest.raises(ModelError, match=r"vocabulary|vocab\.json"):
        plan(SDBase(model=str(wordless)), *sound[:3], Layout(0, 4), place())
    for _ in range(2):
        for place_of, spoilt, error in (
            (0, SDAdapter(rank=2, targets=["to_qq"]), RecipeError),
            (1, data.model_copy(update={"bucket_step": 6}), RecipeError),
            (1, data.model_copy(update={"path": str(tmp_path)}), DataError),
            (2, SDSample(width=63), RecipeError),
            (3, tmp_path / "absent", ModelError),
        ):
            adapter, pictures, sample, model = (*sound[:place_of], spoilt, *sound[place_of + 1 :])
            with pytest.raises(error):
                plan(SDBase(model=str(model)), adapter, pictures, sample, Layout(0, 4), place())
        no_libraries(monkeypatch)


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [("unet", "norm_num_groups", 0), ("unet", "down_block_types", ["X", "Y"]), ("scheduler", "beta_schedule", "steep")],
)
def test_a_base_that_changes_is_looked_at_anew(
    folder: Path, tmp_path: Path, part: str, field: str, value: object
) -> None:
    model = tiny_sd(tmp_path / "sd")
    data = PictureData(path=str(folder), resolution=64, bucket_step=8)
    plan(SDBase(model=str(model)), SDAdapter(rank=2), data, SDSample(), Layout(0, 4), place())
    config = model / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {field: value}))
    with pytest.raises(ModelError):
        plan(SDBase(model=str(model)), SDAdapter(rank=2), data, SDSample(), Layout(0, 4), place())


@pytest.mark.parametrize("resolution", [2048, 2049, 100_000])
def test_the_largest_pictures_that_a_recipe_may_have(base: Path, tmp_path: Path, folder: Path, resolution: int) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"data: {{path: {folder}, resolution: {resolution}, buckets: false}}\n")
    if resolution > 2048:
        with pytest.raises(RecipeError, match=r"data\.resolution: must be less than or equal to 2048"):
            load(recipe, SDRecipe)
        return
    data = load(recipe, SDRecipe).data
    found = plan(SDBase(model=str(base)), SDAdapter(rank=2), data, SDSample(), Layout(0, 4), place())
    assert found.buckets.keys() == {(2048, 2048)}
    assert found.memory["activations"] > 2048 * 2048


def test_the_resolution_is_the_bases_own_where_the_recipe_gives_none() -> None:
    data = PictureData(path="x", bucket_step=8)
    assert resolution_of(data, (64, 64)) == 64
    assert resolution_of(data, (96, 54)) == 72
    assert resolution_of(data.model_copy(update={"resolution": 40}), (64, 64)) == 40
    assert max(width * height for width, height in sizes_of(data, 4, (64, 64))) == 64 * 64


def test_buckets_coarser_than_the_resolution_are_told_with_what_helps() -> None:
    with pytest.raises(RecipeError, match="no bucket of 64 pixels fits a resolution of 60") as caught:
        sizes_of(PictureData(path="x", resolution=60), 4, (64, 64))
    assert caught.value.hint == "lower data.bucket_step, or raise data.resolution"
