"""Drawing against diffusers' StableDiffusionPipeline, adapters, bounds, and what a picture file says of itself."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from lorakit.adapters.inject import adapter_parameters, adapter_state, inject
from lorakit.adapters.write import deltas, write_kohya, write_peft
from lorakit.errors import ModelError, NonFiniteError, RecipeError
from lorakit.families.sd.drawing import SCHEDULERS, DrawSettings
from lorakit.families.sd.generate import Painter, open_painter
from lorakit.families.sd.pictures import grid, parameters, save_picture
from lorakit.families.sd.targets import UNET_GROUPS
from lorakit.recipe.schema import SDAdapter
from lorakit.storage.bases import resolve
from tests.tiny import tiny_sd

# diffusers hands torch tensors to numpy the old way in some schedulers.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
CPU = torch.device("cpu")
PROMPTS = ["a red apple", "a cat", "a rocket"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("base") / "sd")


@pytest.fixture(scope="module")
def v_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("base") / "v", "v_prediction")


@pytest.fixture(scope="module")
def painter(base: Path) -> Painter:
    return open_painter(resolve(str(base)), [], CPU, torch.float32)


def noise(seeds: list[int], size: tuple[int, int] = (16, 16)) -> torch.Tensor:
    return torch.cat([torch.randn((1, 4, *size), generator=torch.Generator().manual_seed(s)) for s in seeds])


def reference(painter: Painter, name: str | None, **options: Any) -> tuple[torch.Tensor, list[Image.Image]]:
    """Final latents and pictures of diffusers' own pipeline around the same modules."""
    parts = painter.parts
    kind, extra = (parts.schedule["_class_name"], {}) if name is None else SCHEDULERS[name]
    scheduler = getattr(diffusers, kind).from_config(dict(parts.schedule), **extra)  # the tiny base sets no solver
    text, tokenizer = parts.conditioning.encoders["text_encoder"], parts.conditioning.tokenizers[0]
    pieces = (parts.vae, text, tokenizer, parts.unet, scheduler, None, None)
    pipeline = StableDiffusionPipeline(*pieces, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline(**options, output_type="latent").images
    with torch.no_grad():
        decoded = parts.vae.decode(latents / parts.vae.config.scaling_factor).sample
    return latents, pipeline.image_processor.postprocess(decoded)


def difference(ours: Image.Image, theirs: Image.Image) -> int:
    return int(np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int)).max())


@pytest.mark.parametrize(
    "name", [None, "ddim", "pndm", "heun", "euler", "euler_trailing", "dpm++2m", "dpm++2m_karras", "unipc"]
)
def test_pictures_equal_the_pipelines(painter: Painter, name: str | None) -> None:
    settings = DrawSettings(negative_prompt="a drawing", steps=5, guidance_scale=6.0, seed=7, scheduler=name)
    latents, theirs = reference(
        painter,
        name,
        prompt=PROMPTS,
        negative_prompt=["a drawing"] * 3,
        num_inference_steps=5,
        guidance_scale=6.0,
        latents=noise([7, 7, 7]),
    )
    torch.testing.assert_close(painter._denoise(PROMPTS, [7, 7, 7], settings), latents, rtol=1e-4, atol=2e-4)
    ours = [picture for picture, _ in painter.draw(PROMPTS, settings)]
    assert max(difference(a, b) for a, b in zip(ours, theirs, strict=True)) <= 1


def test_a_v_prediction_base_another_size_and_no_guidance(v_base: Path) -> None:
    painter = open_painter(resolve(str(v_base)), [], CPU, torch.float32)
    settings = DrawSettings(steps=4, guidance_scale=1.0, width=48, height=80, scheduler="ddim")
    [(ours, metadata)] = painter.draw(["a cat"], settings)
    sizes = {"width": 48, "height": 80, "latents": noise([0], (20, 12))}
    _, [theirs] = reference(painter, "ddim", prompt="a cat", num_inference_steps=4, guidance_scale=1.0, **sizes)
    assert ours.size == (48, 80) == (metadata["width"], metadata["height"])
    assert difference(ours, theirs) <= 1


@pytest.mark.parametrize("name", ["euler", "euler_a", "ddpm", "dpm++2m_sde", "lcm"])
def test_a_picture_depends_on_its_seed_and_not_on_the_batch(painter: Painter, name: str) -> None:
    many = painter.draw(PROMPTS, DrawSettings(steps=4, seed=3, count=2, scheduler=name))
    assert [m["seed"] for _, m in many] == [3, 4] * 3
    [(alone, metadata)] = painter.draw([PROMPTS[1]], DrawSettings(steps=4, seed=4, scheduler=name))
    assert metadata == many[3][1]
    assert difference(alone, many[3][0]) <= 1
    assert difference(many[2][0], many[3][0]) > 1


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_guidance_of_one_or_less_draws_from_the_prompt_alone(painter: Painter, scale: float) -> None:
    """As diffusers' pipeline, which models of a few steps are told a scale of 0."""
    settings = DrawSettings(steps=3, guidance_scale=scale, negative_prompt="a cat", scheduler="euler_trailing")
    options = {"prompt": "a dog", "negative_prompt": "a cat", "num_inference_steps": 3, "guidance_scale": scale}
    expected, _ = reference(painter, "euler_trailing", **options, latents=noise([0]))
    torch.testing.assert_close(painter._denoise(["a dog"], [0], settings), expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("name", ["euler", "heun", "dpm++2m", "unipc"])
def test_a_scheduler_is_what_its_name_says_whatever_the_base_sets(base: Path, tmp_path: Path, name: str) -> None:
    path = shutil.copytree(base, tmp_path / "base")
    config = path / "scheduler/scheduler_config.json"
    more = {
        "use_karras_sigmas": True,
        "algorithm_type": "sde-dpmsolver++",
        "solver_order": 3,
        "final_sigmas_type": "sigma_min",
    }
    config.write_text(json.dumps(json.loads(config.read_text()) | more))
    drawn = [
        open_painter(resolve(str(one)), [], CPU, torch.float32)._denoise(
            ["a cat"], [1], DrawSettings(steps=5, scheduler=name)
        )
        for one in (base, path)
    ]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("name", ["pndm", "heun"])
def test_schedulers_that_cannot_end_in_noise_alone(base: Path, tmp_path: Path, name: str) -> None:
    path = shutil.copytree(base, tmp_path / "base")
    config = path / "scheduler/scheduler_config.json"
    more = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    config.write_text(json.dumps(json.loads(config.read_text()) | more))
    painter = open_painter(resolve(str(path)), [], CPU, torch.float32)
    with pytest.raises(RecipeError, match=f"{name} has no schedule that ends in noise alone") as caught:
        painter.draw(["a cat"], DrawSettings(steps=2, scheduler=name))
    assert "ddim" in caught.value.hint
    painter.draw(["a cat"], DrawSettings(steps=2, scheduler="ddim"))
    painter.draw(["a cat"], DrawSettings(steps=25, scheduler="dpm++2m_karras"))  # which has its first timestep twice


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("a (red:1.3) cat", "(red:1.3)"),
        ("a cat <lora:style:0.8>", "<lora:style:0.8>"),
        ("a cat --n blurry", "--n"),
        ("a [red:0.5] cat", "[red:0.5]"),
        ("(score_9:1.2), a cat", "(score_9:1.2)"),
        ("a (red: 1) cat", "(red: 1)"),
        ("a cat (note:)", None),
        ("a cat (red) at 10:30 (showing 10:30, aspect 16:9), (Genesis 1:1) - no", None),
    ],
)
def test_other_programs_syntax_is_told(
    painter: Painter, caplog: pytest.LogCaptureFixture, prompt: str, told: str | None
) -> None:
    painter.draw([prompt], DrawSettings(steps=1))
    assert ("is read as words" in caplog.text) == (told is not None)
    assert (told or "") in caplog.text


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        (DrawSettings(width=30), "width"),
        (DrawSettings(height=4096), "height"),
        (DrawSettings(width=-8), "width"),
        (DrawSettings(steps=0), "steps"),
        (DrawSettings(steps=1001), "steps"),
        (DrawSettings(count=100_000), "count"),
        (DrawSettings(guidance_scale=float("nan")), "guidance_scale"),
        (DrawSettings(scheduler="eular"), "scheduler"),
        (DrawSettings(scheduler="lcm", steps=51), "steps"),
    ],
)
@pytest.mark.fault(67)
def test_settings_out_of_bounds(painter: Painter, settings: DrawSettings, field: str) -> None:
    with pytest.raises(RecipeError) as caught:
        painter.draw(PROMPTS, settings)
    assert caught.value.where == field


@pytest.mark.fault(69)
def test_a_prompt_that_is_cut_is_told_with_its_tail(painter: Painter, caplog: pytest.LogCaptureFixture) -> None:
    long = "a red apple " * 30 + "on a white table"
    with caplog.at_level(logging.WARNING, "lorakit"):
        painter.draw(["a cat"], DrawSettings(steps=1))
        assert not caplog.records
        painter.draw([long], DrawSettings(steps=1))
    assert len(caplog.records) == 1
    assert "white table'" in caplog.text


@pytest.mark.fault(68)
def test_non_finite_latents_are_an_error(base: Path) -> None:
    painter = open_painter(resolve(str(base)), [], CPU, torch.float32)
    with torch.no_grad():
        painter.parts.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="seed 0"):
        painter.draw(["a cat"], DrawSettings(steps=2))


def test_a_png_keeps_its_settings(painter: Painter, tmp_path: Path) -> None:
    [(picture, metadata)] = painter.draw(["a café,\nat night"], DrawSettings(steps=2, negative_prompt="blur"))
    save_picture(picture, metadata, tmp_path / "0.png")
    read = Image.open(tmp_path / "0.png")
    assert difference(read, picture) == 0
    assert json.loads(read.text["lorakit"]) == metadata
    assert read.text["parameters"].splitlines()[:2] == ["a café, at night", "Negative prompt: blur"]
    assert read.text["parameters"] == parameters(metadata)
    assert "Steps: 2, Sampler: PNDMScheduler, CFG scale: 7.5, Seed: 0, Size: 64x64" in read.text["parameters"]


def test_a_grid_holds_every_picture_and_its_label() -> None:
    pictures = [Image.new("RGB", (64, 64), (10 * i, 0, 0)) for i in range(5)]
    labels = ["short", "", "a label that is far too long for one line and for two " * 3, "x" * 300, "bad\x1b[31m\nname"]
    sheet = grid(pictures, labels)
    found = {colour for _, colour in sheet.getcolors(10**6)}
    assert {(10 * i, 0, 0) for i in range(5)} <= found
    assert sheet.width == 3 * (128 + 6) + 6
    one = grid(pictures[:1], ["a"])
    assert one.getbbox() is not None
    assert one.width == 128 + 12
    blank = grid(pictures[:1], [""])
    assert one.size == blank.size
    assert one.tobytes() != blank.tobytes()


def test_the_settings_are_a_plain_text_chunk(painter: Painter, tmp_path: Path) -> None:
    [(picture, metadata)] = painter.draw(["a cat"], DrawSettings(steps=1))
    save_picture(picture, metadata, tmp_path / "a.png")
    assert b"tEXtparameters\0a cat" in (tmp_path / "a.png").read_bytes()


def test_adapters_are_laid_over_the_base_with_their_weights(base: Path, tmp_path: Path) -> None:
    """At weight 1 the picture is the one of weights that hold W + scale * B A; at 0 it is the base's."""
    location = resolve(str(base))
    settings = DrawSettings(steps=3, scheduler="ddim")
    plain = open_painter(location, [], CPU, torch.float32)
    before = plain._denoise(["a cat"], [0], settings)
    injection = inject(plain.parts.unet, SDAdapter(rank=2, alpha=6.0), UNET_GROUPS, seed=0)
    for parameter in adapter_parameters(plain.parts.unet).values():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    state = adapter_state(plain.parts.unet)
    write_peft(tmp_path / "a" / "unet", state, injection, base_name="tiny")
    changes = {"unet": deltas(state, injection)}
    known = {"title": "style", "version": "sd_v1", "prediction_type": "epsilon", "resolution": 64}
    write_kohya(tmp_path / "b.safetensors", changes, models=plain.parts.adaptable, **known)
    by_hand = open_painter(location, [], CPU, torch.float32)
    modules = dict(by_hand.parts.unet.named_modules())
    with torch.no_grad():
        for target in injection.targets:
            a, b = (state[f"{target.name}.lora_{x}.weight"] for x in "AB")
            modules[target.name].weight += 3.0 * b @ a
    expected = by_hand._denoise(["a cat"], [0], settings)
    assert float((expected - before).abs().max()) > 1e-2
    both = [(tmp_path / "a", 0.25), (tmp_path / "b.safetensors", 0.75)]
    for adapters in ([(tmp_path / "a", 1.0)], [(tmp_path / "b.safetensors", 1.0)], both):
        drawn = open_painter(location, adapters, CPU, torch.float32)._denoise(["a cat"], [0], settings)
        torch.testing.assert_close(drawn, expected, rtol=1e-3, atol=1e-4)
    off = open_painter(location, [(tmp_path / "a", 0.0)], CPU, torch.float32)
    torch.testing.assert_close(off._denoise(["a cat"], [0], settings), before, rtol=1e-4, atol=1e-5)
    (tmp_path / "c").mkdir()
    write_peft(tmp_path / "c" / "a" / "unet", {k: 2 * v for k, v in state.items()}, injection, base_name="tiny")
    first, second = (open_painter(location, [(folder / "a", 0.25)], CPU, torch.float32).adapters
                     for folder in (tmp_path, tmp_path / "c"))  # fmt: skip
    assert [(one["name"], one["weight"]) for one in (*first, *second)] == [("a", 0.25)] * 2
    assert first != second, "a batch that goes on tells them apart"


def test_an_adapter_that_does_not_fit_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        open_painter(resolve(str(base)), [(tmp_path, 1.0)], CPU, torch.float32)
