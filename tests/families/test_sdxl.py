"""Stable Diffusion XL on a tiny one made on the spot: what it predicts, learns, draws and saves, beside diffusers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from PIL import Image
from safetensors import safe_open

from lorakit.adapters.convert import convert
from lorakit.adapters.files import read_adapter
from lorakit.commands.adapters import open_base
from lorakit.data.images import cut_out
from lorakit.errors import ModelError
from lorakit.families.place import Place
from lorakit.families.sd import task as sd
from lorakit.families.sd.drawing import DrawSettings
from lorakit.families.sd.generate import open_painter
from lorakit.families.sd.plan import plan
from lorakit.numerics.order import Layout
from lorakit.recipe.schema import PictureData, SDAdapter, SDBase, SDOptimizer, SDSample, SDTrain
from lorakit.storage.bases import resolve
from lorakit.storage.checks import read_json
from tests.tiny import tiny_sdxl

CPU = torch.device("cpu")
PLACE = Place(CPU, torch.float32)
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers' Euler


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sdxl(tmp_path_factory.mktemp("sdxl") / "base")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for i in range(6):
        size = (90, 130, 3) if i % 2 else (64, 64, 3)
        Image.fromarray(random.integers(0, 255, size, np.uint8)).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(f"a red apple and {i} cats")
    return root


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def make(base: Path, folder: Path) -> Callable[..., sd.SDTask]:
    def build(adapter: dict[str, Any] | None = None, sample: dict[str, Any] | None = None, **data: Any) -> sd.SDTask:
        pictures = {"path": str(folder), "resolution": 64, "bucket_step": 16, "held_out": 0.0, **data}
        return sd.load(
            SDBase(model=str(base)),
            SDAdapter(rank=2, alpha=4, **(adapter or {})),
            PictureData.model_validate(pictures),
            sd.Learning.of(SDTrain(), SDOptimizer()),
            SDSample.model_validate(sample or {}),
            Layout(3, 4),
            PLACE,
        )

    return build


def pipeline(base: Path) -> Any:
    opened: Any = StableDiffusionXLPipeline
    pipe = opened.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def disturb(task: sd.SDTask) -> None:
    for group, _ in task.parameter_groups():
        for parameter in group:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("negative", ["", "a cat"])
def test_latents_are_those_of_diffusers_pipeline(tmp_path: Path, base: Path, zeros: bool, negative: str) -> None:
    place = base if zeros else tiny_sdxl(tmp_path / "base", zeros=False)
    painter = open_painter(resolve(str(place)), [], CPU, torch.float32)
    settings = DrawSettings(steps=3, guidance_scale=5.0, negative_prompt=negative, width=64, height=48)
    found = painter._denoise(["a red apple", "a cat on a table"], [7, 8], settings)
    noise = torch.cat([torch.randn((1, 4, 12, 16), generator=torch.Generator().manual_seed(seed)) for seed in (7, 8)])
    expected = pipeline(place)(
        ["a red apple", "a cat on a table"],
        negative_prompt=[negative] * 2 if negative else None,
        num_inference_steps=3,
        guidance_scale=5.0,
        width=64,
        height=48,
        latents=noise,
        output_type="latent",
    ).images
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_three_steps_of_pndm(base: Path) -> None:
    """SDXL's schedule does not say, as SD 1.5's does, that PNDM has no Runge-Kutta steps to begin with; with them
    diffusers fails for fewer than four."""
    painter = open_painter(resolve(str(base)), [], CPU, torch.float32)
    assert painter._denoise(["a cat"], [0], DrawSettings(steps=3, scheduler="pndm")).isfinite().all()


def test_the_loss_is_a_plain_diffusers_computation(make: Callable[..., sd.SDTask], base: Path, folder: Path) -> None:
    task = make(adapter={"text_encoder": False}, caption_dropout=0.3)
    disturb(task)
    batch = next(task.batches("train", 0))
    theirs = pipeline(base)
    task.save(folder.parent / "run", "xl")
    theirs.load_lora_weights(folder.parent / "run" / "xl.safetensors")
    schedule = DDPMScheduler.from_config(theirs.scheduler.config)
    stream = task._loaded.maker
    captions = {e.id: e.caption for e in task.examples.train}
    total, seen = 0.0, 0
    for group in batch.groups:  # type: ignore[attr-defined]
        for n in range(len(group.timesteps)):
            frame = group.frames[n]
            bucket = (int(frame[5]), int(frame[4]))
            assert tuple(group.noisy.shape[-2:]) == (bucket[1] // 4, bucket[0] // 4)
            states, _, pooled, _ = _nearest(theirs, [*captions.values(), ""], group.text["states"][n])
            torch.testing.assert_close(group.text["pooled"][n], pooled[0], rtol=1e-4, atol=1e-5)
            added = {"text_embeds": pooled, "time_ids": frame[None]}
            with torch.no_grad():
                predicted = theirs.unet(
                    group.noisy[n][None], group.timesteps[n], states, added_cond_kwargs=added
                ).sample[0]
            total += float((predicted - group.target[n]).double().square().mean())
            seen += 1
    assert seen == batch.count == 4
    assert len(schedule.alphas_cumprod) == len(stream.alphas)
    assert task.loss(batch).item() == pytest.approx(total, rel=1e-4)


def _nearest(pipe: Any, captions: list[str], states: torch.Tensor) -> Any:
    """diffusers' encoding of the caption whose states are these; an empty one is zeros, as in training SDXL."""
    for caption in captions:
        with torch.no_grad():
            found = pipe.encode_prompt(caption, device="cpu", do_classifier_free_guidance=False)
        if not caption:
            found = [None if tensor is None else torch.zeros_like(tensor) for tensor in found]
        if torch.allclose(found[0][0], states, rtol=1e-4, atol=1e-5):
            return found
    raise AssertionError("the states are of no caption")


def test_the_sizes_that_the_unet_is_told(make: Callable[..., sd.SDTask]) -> None:
    """130 x 90 pixels into a bucket of 80 x 48: scaled by 80/130 to 80 x 55.38, 7.38 rows cut, half of them on top."""
    assert cut_out((130, 90), (80, 48), (0.5, 0.5), mirror=False) == (90, 130, 4, 0, 48, 80)
    assert cut_out((130, 90), (48, 80), (0.25, 0.5), mirror=False) == (90, 130, 0, 17, 80, 48)
    assert cut_out((130, 90), (48, 80), (0.25, 0.5), mirror=True) == (90, 130, 0, 51, 80, 48)
    frames = {e.id: e.frame for e in make().examples.train}
    assert frames["0.png"] == (64, 64, 0, 0, 64, 64)
    height, width, top, left, *bucket = frames["1.png"]
    assert (height, width) == (90, 130)
    assert (bucket[1], bucket[0]) in make().examples.buckets
    assert (top, left) == cut_out((130, 90), (bucket[1], bucket[0]), (0.5, 0.5), mirror=False)[2:4]


def test_both_text_encoders_learn_and_are_saved(make: Callable[..., sd.SDTask], base: Path, tmp_path: Path) -> None:
    task = make(adapter={"text_encoder": True}, sample={"prompts": ["a red apple"], "steps": 2}, caption_dropout=0.0)
    assert {key.split(".")[0] for key in task.adapter_state()} == {"unet", "text_encoder", "text_encoder_2"}
    disturb(task)
    batch = next(task.batches("train", 0))
    assert set(batch.groups[0].text) == {"ids"}  # type: ignore[attr-defined]
    task.loss(batch).backward()
    still = [name for name, p in task.model.named_parameters() if p.requires_grad and p.grad is None]
    assert all("encoders.text_encoder.encoder.layers.1." in name for name in still), "only what is past the states read"
    task.save(tmp_path, "xl", {"data": {"path": "x"}})
    task.sample(tmp_path)
    drawn = np.asarray(Image.open(tmp_path / "000.png")).astype(int)
    for adapter in (tmp_path / "adapter", tmp_path / "xl.safetensors"):
        painter = open_painter(resolve(str(base)), [(adapter, 1.0)], CPU, torch.float32)
        [(picture, _)] = painter.draw(["a red apple"], DrawSettings(steps=2))
        assert np.abs(np.asarray(picture) - drawn).max() <= 1
    with safe_open(tmp_path / "xl.safetensors", "pt") as file:
        metadata, names = file.metadata(), list(file.keys())
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert metadata["modelspec.resolution"] == "64x64"
    assert any(name.startswith("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.") for name in names)
    assert any(name.startswith("lora_te1_text_model_encoder_layers_0_self_attn_q_proj.") for name in names)
    assert any(name.startswith("lora_te2_text_model_encoder_layers_1_self_attn_out_proj.") for name in names)
    theirs = pipeline(base)
    theirs.load_lora_weights(tmp_path / "xl.safetensors")
    ours = open_painter(resolve(str(base)), [(tmp_path / "adapter", 1.0)], CPU, torch.float32)
    noise = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(0))
    options = {"num_inference_steps": 2, "guidance_scale": 7.5, "latents": noise, "width": 64, "height": 64}
    expected = theirs("a red apple", output_type="latent", **options).images
    found = ours._denoise(["a red apple"], [0], DrawSettings(steps=2))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_formats_and_weights_add_up(make: Callable[..., sd.SDTask], base: Path, tmp_path: Path) -> None:
    task = make(adapter={"text_encoder": True})
    disturb(task)
    task.save(tmp_path, "xl")
    location, models = resolve(str(base)), open_base(resolve(str(base))).models
    saved = read_adapter(tmp_path / "xl.safetensors", models)
    convert(saved, tmp_path / "diffusers", "diffusers", models=models, base_name="")
    settings = DrawSettings(steps=2)
    one = open_painter(location, [(tmp_path / "adapter", 1.0)], CPU, torch.float32)
    expected = one._denoise(["a red apple"], [0], settings)
    parts = [(tmp_path / "adapter", 0.25), (tmp_path / "xl.safetensors", 0.25), (tmp_path / "diffusers", 0.5)]
    painter = open_painter(location, parts, CPU, torch.float32)
    assert not any("lora" in name for name, _ in painter.parts.unet.named_modules())
    found = painter._denoise(["a red apple"], [0], settings)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_the_plan_is_what_load_makes(make: Callable[..., sd.SDTask], base: Path, folder: Path) -> None:
    data = PictureData(path=str(folder), resolution=64, bucket_step=16, held_out=0.0)
    adapter = SDAdapter(rank=2, alpha=4, text_encoder=True)
    planned = plan(SDBase(model=str(base)), adapter, data, SDSample(), Layout(3, 4), PLACE)
    task = make(adapter={"text_encoder": True})
    state = task.adapter_state()
    assert {target.name for target in planned.modules} == {key.split(".lora_")[0] for key in state}
    assert planned.trainable_parameters == sum(tensor.numel() for tensor in state.values())
    assert planned.memory["activations"] > 0


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("unet", "addition_time_embed_dim", 4, "pooled text and sizes"),
        ("unet", "addition_embed_type", None, "addition_embed_type"),
    ],
)
def test_parts_that_do_not_fit_are_refused(tmp_path: Path, part: str, field: str, value: Any, message: str) -> None:
    import json

    broken = tiny_sdxl(tmp_path / "base")
    config = broken / part / "config.json"
    config.write_text(json.dumps({**read_json(config), field: value}))
    with pytest.raises(ModelError, match=message):
        open_painter(resolve(str(broken)), [], CPU, torch.float32)
