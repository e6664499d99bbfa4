"""A single file of Stable Diffusion XL under its original names: read, merged, and written; all beside diffusers'
own reader of such files."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorakit.adapters.inject import adapter_state, inject
from lorakit.adapters.merging.base import open_single
from lorakit.adapters.merging.merge import merge
from lorakit.adapters.merging.plan import plan_merge
from lorakit.adapters.write import write_peft
from lorakit.errors import ModelError
from lorakit.families.place import Place
from lorakit.families.sd.base import Parts, load_parts
from lorakit.families.sd.compare import compare
from lorakit.families.sd.conditioning import ids_of
from lorakit.families.sd.drawing import DrawSettings
from lorakit.families.sd.generate import open_painter
from lorakit.families.sd.original import open_original, open_stable_diffusion
from lorakit.families.sd.pack import packed_names
from lorakit.families.sd.single_file import read_configs
from lorakit.families.sd.skeleton import skeleton
from lorakit.recipe.schema import Adapter
from lorakit.storage.bases import BaseLocation, resolve
from tests.families.test_sd_original import EVERYTHING, equal, expected, pieces, write_disturbed
from tests.families.test_sd_original import open_clip as open_clip_names
from tests.families.test_sd_single_file import unet_name, vae_tensors
from tests.tiny import tiny_clip_tokenizer, tiny_sdxl

CPU = torch.device("cpu")
PLACE = Place(CPU, torch.float32)
ONE = "conditioner.embedders.0.transformer.text_model."
TWO = "conditioner.embedders.1.model."
SECTIONS = {
    "unet": EVERYTHING,
    "text_encoder": Adapter(rank=2, alpha=3, targets="attention+mlp"),
    "text_encoder_2": Adapter(rank=2, alpha=3, targets=["q_proj", "v_proj", "out_proj", "fc2", "text_projection"]),
}
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers' Euler


def original_tensors(parts: Parts) -> dict[str, Tensor]:
    """A base's tensors as Stability's code names them, with what only such files hold."""
    encoders = parts.conditioning.encoders
    attention = [False, True, True]
    unet = {unet_name(name, attention, 2): tensor for name, tensor in parts.unet.state_dict().items()}
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in unet.items()} | vae_tensors(parts.vae)
    for name, tensor in encoders["text_encoder"].state_dict().items():
        tensors[f"{ONE}{name.removeprefix('text_model.')}"] = tensor
    tensors |= open_clip_names(encoders["text_encoder_2"], TWO, 2)
    tensors |= {f"{ONE}embeddings.position_ids": torch.arange(77)[None], f"{TWO}logit_scale": torch.tensor(4.6)}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> BaseLocation:
    return resolve(str(tiny_sdxl(tmp_path_factory.mktemp("xl") / "base")))


@pytest.fixture(scope="module")
def file(folder: BaseLocation, tmp_path_factory: pytest.TempPathFactory) -> BaseLocation:
    place = tmp_path_factory.mktemp("single")
    tiny_clip_tokenizer().save_pretrained(place / "tokenizer")
    save_file(original_tensors(load_parts(folder, PLACE)), place / "xl.safetensors")
    return resolve(str(place / "xl.safetensors"))


@pytest.fixture(scope="module")
def adapter(folder: BaseLocation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA for UNet and both text encoders, the transposed projection among them."""
    place, parts = tmp_path_factory.mktemp("adapter"), load_parts(folder, PLACE)
    for component, section in SECTIONS.items():
        write_disturbed(parts, component, section, place / component)
    return place


def from_single_file(file: Path, folder: BaseLocation) -> Any:
    """diffusers' own reader, with the folder's configs."""
    opened: Any = StableDiffusionXLPipeline
    pipe = opened.from_single_file(str(file), config=str(folder.path), local_files_only=True, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_it_is_the_folder_that_it_was_made_from(file: BaseLocation, folder: BaseLocation) -> None:
    found, wanted = load_parts(file, PLACE), load_parts(folder, PLACE)
    for component, module in pieces(found).items():
        equal(module, pieces(wanted)[component])
    captions = ["a red apple", ""]
    ids = ids_of(wanted.conditioning, captions)
    assert torch.equal(ids_of(found.conditioning, captions), ids)
    theirs = wanted.conditioning.encode(ids)
    for name, tensor in found.conditioning.encode(ids).items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=0)
    assert (found.factor, found.conditioning.kind) == (wanted.factor, wanted.conditioning.kind)
    assert found.vae.config.scaling_factor == wanted.vae.config.scaling_factor
    bones = skeleton(file, torch.float32)
    assert {n: t.shape for n, t in bones.unet.state_dict().items()} == {
        n: t.shape for n, t in wanted.unet.state_dict().items()
    }
    assert bones.size == (128 * 4, 128 * 4)


def test_it_draws_what_diffusers_draws_from_it(file: BaseLocation, folder: BaseLocation) -> None:
    pipe = from_single_file(file.path, folder)
    painter = open_painter(file, [], CPU, torch.float32)
    noise = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(0))
    options = {"num_inference_steps": 3, "guidance_scale": 7.5, "latents": noise, "width": 64, "height": 64}
    theirs = pipe("a red apple", output_type="latent", **options).images
    found = painter._denoise(["a red apple"], [0], DrawSettings(steps=3, width=64, height=64))
    torch.testing.assert_close(found, theirs, rtol=1e-3, atol=1e-4)


def test_single_file_to_single_file(file: BaseLocation, folder: BaseLocation, adapter: Path) -> None:
    out = file.path.parent / "merged.safetensors"
    plan = plan_merge(file, open_single(file, open_original(file)), [(adapter, 1.0)], out)
    merge(plan)
    before, after = load_file(file.path), load_file(out)
    assert {key: (t.shape, t.dtype) for key, t in before.items()} == {k: (t.shape, t.dtype) for k, t in after.items()}
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert f"{TWO}text_projection" in changed
    assert f"{TWO}transformer.resblocks.1.attn.in_proj_weight" in changed
    assert not any(key.startswith("first_stage_model.") for key in changed)
    wanted, pipe = expected(folder, adapter), from_single_file(out, folder)
    parts = load_parts(resolve(str(out)), PLACE)
    for component, module in pieces(wanted).items():
        equal(pieces(parts)[component], module)
        equal(getattr(pipe, component), module)
    assert compare(file, plan.adapters, out).difference < 1e-4


def test_a_single_file_is_compared_without_a_tokenizer(
    file: BaseLocation, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vocabulary of CLIP's is needed to draw, not to see whether two models compute the same."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    shutil.copyfile(file.path, tmp_path / "xl.safetensors")
    alone, out = resolve(str(tmp_path / "xl.safetensors")), tmp_path / "merged.safetensors"
    plan = plan_merge(alone, open_single(alone, open_original(alone)), [(adapter, 1.0)], out)
    merge(plan)
    share, _, told = compare(alone, plan.adapters, out)
    assert share < 1e-4
    assert "random tokens" in told
    assert compare(alone, (), out).difference > 1e-3
    with pytest.raises(ModelError, match="holds no tokenizer"):
        load_parts(alone, PLACE)


def test_single_file_to_folder(file: BaseLocation, folder: BaseLocation, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "folder"
    merge(plan_merge(file, open_single(file, open_original(file)), [(adapter, 1.0)], out))
    wanted = expected(folder, adapter)
    opened: Any = StableDiffusionXLPipeline
    pipe = opened.from_pretrained(out)
    for component, module in pieces(wanted).items():
        equal(getattr(pipe, component), module)
    assert pipe.tokenizer.pad_token != pipe.tokenizer_2.pad_token == "!"
    index = json.loads((out / "model_index.json").read_text())
    assert index["text_encoder_2"] == ["transformers", "CLIPTextModelWithProjection"]
    assert index["force_zeros_for_empty_prompt"]


def test_a_folder_becomes_a_single_file(
    file: BaseLocation, folder: BaseLocation, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "merged.safetensors"
    opened = replace(open_stable_diffusion(folder), packed=packed_names(folder))
    plan = plan_merge(folder, opened, [(adapter, 1.0)], out)
    merge(plan)
    assert compare(folder, plan.adapters, out).difference < 1e-4, (
        "the folder's latents are smaller than the file's readers assume"
    )
    found, there = load_file(out), load_file(file.path)
    only_there = {f"{ONE}embeddings.position_ids", f"{TWO}logit_scale"}
    assert {k: t.shape for k, t in found.items()} == {k: t.shape for k, t in there.items() if k not in only_there}
    assert all(torch.equal(found[key], there[key]) for key in found if key.startswith("first_stage_model."))
    with safe_open(out, "pt") as opened_file:
        assert opened_file.metadata()["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    wanted, pipe = expected(folder, adapter), from_single_file(out, folder)
    tiny_clip_tokenizer().save_pretrained(tmp_path / "tokenizer")
    parts = load_parts(resolve(str(out)), PLACE)
    for component, module in pieces(wanted).items():
        equal(getattr(pipe, component), module)
        equal(pieces(parts)[component], module)


def test_what_it_predicts_is_told_by_tensors(file: BaseLocation, tmp_path: Path) -> None:
    tensors = load_file(file.path)
    assert read_configs(file.path).schedule["prediction_type"] == "epsilon"
    save_file(tensors | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, tmp_path / "v.safetensors")
    schedule = read_configs(tmp_path / "v.safetensors").schedule
    assert (schedule["prediction_type"], schedule["rescale_betas_zero_snr"]) == ("v_prediction", True)
    copy = tiny_sdxl(tmp_path / "folder")
    path = copy / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text()) | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    path.write_text(json.dumps(config))
    location = resolve(str(copy))
    out = tmp_path / "packed.safetensors"
    merge(plan_merge(location, replace(open_stable_diffusion(location), packed=packed_names(location)), [], out))
    assert {"v_pred", "ztsnr"} <= load_file(out).keys()
    assert read_configs(out).schedule == schedule


@pytest.mark.parametrize(
    ("path", "values", "message"),
    [
        ("unet/config.json", {"attention_head_dim": [1, 1, 2]}, "attention_head_dim is"),
        ("vae/config.json", {"scaling_factor": 0.2}, "scaling_factor is 0.2"),
        ("text_encoder_2/config.json", {"eos_token_id": 7}, "reads token 7"),
        ("scheduler/scheduler_config.json", {"beta_end": 0.02}, "noise schedule"),
        ("model_index.json", {"force_zeros_for_empty_prompt": False}, "force_zeros_for_empty_prompt is False"),
    ],
)
def test_what_a_single_file_cannot_say_is_refused(
    tmp_path: Path, path: str, values: dict[str, Any], message: str
) -> None:
    copy = tiny_sdxl(tmp_path / "base")
    (copy / path).write_text(json.dumps(json.loads((copy / path).read_text()) | values))
    with pytest.raises(ModelError, match=message):
        packed_names(resolve(str(copy)))


def test_dora_of_the_transposed_projection_is_refused(file: BaseLocation, tmp_path: Path) -> None:
    module: nn.Module = load_parts(file, PLACE).adaptable["text_encoder_2"]
    injection = inject(module, Adapter(rank=2, targets=["text_projection"], dora=True), {}, seed=0)
    write_peft(tmp_path / "adapter" / "text_encoder_2", adapter_state(module), injection, base_name="x")
    opened = open_single(file, open_original(file))
    with pytest.raises(ModelError, match="transposed"):
        plan_merge(file, opened, [(tmp_path / "adapter", 1.0)], tmp_path / "out.safetensors")
    merge(plan_merge(file, opened, [(tmp_path / "adapter", 1.0)], tmp_path / "out"))
