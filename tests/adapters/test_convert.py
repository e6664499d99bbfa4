"""Adapters from format to format: every change comes back, whatever the rank, alpha and dtype, and nothing is lost."""

import itertools
import json
import resource
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, LlamaConfig, LlamaForCausalLM

from lorakit.adapters.convert import Conversion, convert
from lorakit.adapters.delta import Delta, SavedAdapter
from lorakit.adapters.files import read_adapter
from lorakit.adapters.outline import adaptable
from lorakit.adapters.pieces import open_pieces
from lorakit.adapters.write import write_diffusers
from lorakit.commands.adapters import named_base
from lorakit.errors import ConflictError, ModelError, RecipeError, ResourceError
from tests.tiny import tiny_sd_unet, tiny_sdxl_unet

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ENDINGS = {"peft": "", "diffusers": ".safetensors", "kohya": ".safetensors", "gguf": ".gguf"}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def models(family: str) -> dict[str, nn.Module]:
    """Tiny bases on the meta device."""
    with torch.device("meta"):
        if family == "llama":
            shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 99}
            return {"model": LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **shape))}
        if family == "sd 1":
            return {"unet": tiny_sd_unet(), "text_encoder": CLIPTextModel(CLIPTextConfig(**TEXT))}
        return {
            "unet": tiny_sdxl_unet(),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**TEXT)),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(projection_dim=32, **TEXT)),
        }


MODELS = {family: models(family) for family in ("sd", "sd 1", "llama")}


def random_delta(layer: nn.Module, rank: int, alpha: float, dtype: torch.dtype, *, dora: bool, seed: int) -> Delta:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    kernel = layer.kernel_size if isinstance(layer, nn.Conv2d) else ()
    outputs, inputs = layer.weight.shape[:2]
    rank = min(rank, outputs, inputs)
    ones = (1,) * len(kernel)
    magnitude = normal(outputs).abs() + 0.5 if dora else None
    return Delta(normal(rank, inputs, *kernel), normal(outputs, rank, *ones), alpha / rank, magnitude)


def some_adapter(family: str, choose: Callable[[list[Any]], Any], *, dora: bool = False) -> SavedAdapter:
    """An adapter for every seventh layer, convolutions of 3x3 and 1x1 among them (all of LLaMA's linear layers); each
    component's dtype, each layer's rank and alpha from ``choose``."""
    components: dict[str, dict[str, Delta]] = {}
    for component, model in MODELS[family].items():
        step, dtype = 1 if family == "llama" else 7, DTYPES[choose(sorted(DTYPES))]
        layers = [(path, layer) for path, layer in adaptable(model).items() if path != "lm_head"][::step]
        components[component] = {
            path: random_delta(
                layer, choose([1, 2, 3, 4, 8]), choose([0.5, 1.0, 3.0, 4.0, 7.3, 64.0]), dtype, dora=dora, seed=number
            )
            for number, (path, layer) in enumerate(layers)
        }
    return SavedAdapter("llama" if family == "llama" else "sd", components, "peft", {})


def product(delta: Delta) -> torch.Tensor:
    return delta.scale * (delta.B.double().flatten(1) @ delta.A.double().flatten(1))


def there_and_back(saved: SavedAdapter, formats: list[str], family: str, folder: Path) -> SavedAdapter:
    """``saved`` through each format in turn, every file read for the next and within one rounding of it."""
    for number, form in enumerate(formats):
        out = folder / f"{number}-{form}{ENDINGS[form]}"
        done = convert(saved, out, form, models=MODELS[family], base_name="tiny")  # type: ignore[arg-type]
        assert isinstance(done, Conversion)
        back = read_adapter(out, MODELS[family])
        assert back.metadata.get("modelspec.title", out.stem) == out.stem
        assert back.format == form
        within_one_rounding(saved, back)
        saved = back
    return saved


def within_one_rounding(saved: SavedAdapter, back: SavedAdapter) -> None:
    """Every change is there, and off by no more than rounding each number of B once; magnitudes are equal."""
    before, after = saved.all_deltas(), back.all_deltas()
    assert before.keys() == after.keys()
    for place, delta in before.items():
        other, info = after[place], torch.finfo(after[place].B.dtype)
        sizes = delta.A.double().flatten(1).abs()
        room = info.eps / 2 * abs(delta.scale) * (delta.B.double().flatten(1).abs() @ sizes)
        room += (
            info.smallest_normal * info.eps / 2 * abs(other.scale) * sizes.sum(0)
        )  # of numbers below the normal ones
        assert bool(((product(delta) - product(other)).abs() <= room * (1 + 1e-6)).all()), place
        if delta.magnitude is not None:
            assert other.magnitude is not None
            assert torch.equal(delta.magnitude.float(), other.magnitude.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["peft", "diffusers", "kohya", "gguf"])
def test_a_scale_and_a_dtype_round_once_together(form: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    if (form, dtype) == ("gguf", torch.bfloat16):
        return
    family, random = "llama" if form == "gguf" else "sd 1", Random(0)
    saved = some_adapter(family, lambda options: "float32" if "float32" in options else random.choice(options))
    out = tmp_path / f"a{ENDINGS[form]}"
    convert(saved, out, form, models=MODELS[family], base_name="", dtype=dtype)
    back = read_adapter(out, MODELS[family]).all_deltas()
    for place, delta in saved.all_deltas().items():
        exact = delta.B.double() * (delta.scale / back[place].scale)
        assert torch.equal(back[place].B, exact.to(dtype)), place
        assert torch.equal(back[place].A, delta.A.to(dtype)), place


def without_some_alphas(saved: SavedAdapter, family: str, random: Random, folder: Path) -> SavedAdapter:
    """The adapter as a kohya file, half of whose modules have lost their alpha, tells it."""
    path = folder / "alphas.safetensors"
    convert(saved, path, "kohya", models=MODELS[family], base_name="")
    tensors = load_file(path)
    save_file({k: t for k, t in tensors.items() if not k.endswith(".alpha") or random.random() < 0.5}, path)
    return read_adapter(path, MODELS[family])


SD_ROUNDS = [list(order) for order in itertools.permutations(["peft", "diffusers", "kohya"])]
ROUNDS = {"sd": SD_ROUNDS, "sd 1": SD_ROUNDS, "llama": [["peft", "gguf", "peft"], ["gguf", "peft", "gguf"]]}


@pytest.mark.parametrize("family", ROUNDS)
@settings(max_examples=12, deadline=None)
@given(random=st.randoms(use_true_random=False), dora=st.booleans(), missing=st.booleans())
def test_a_round_through_all_formats_gives_the_same_changes(
    family: str, random: Random, dora: bool, missing: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("round")
    formats = random.choice(ROUNDS[family])
    if dora and family == "llama":
        formats = ["peft", "peft"]  # GGUF refuses DoRA
    saved = some_adapter(family, random.choice, dora=dora)
    if missing and family != "llama":
        saved = without_some_alphas(saved, family, random, folder)
    there_and_back(saved, formats, family, folder)


def test_a_missing_alpha_means_the_rank_in_every_format(tmp_path: Path) -> None:
    saved = some_adapter("sd", lambda options: options[-1])
    convert(saved, tmp_path / "a.safetensors", "kohya", models=MODELS["sd"], base_name="")
    tensors = {k: v for k, v in load_file(tmp_path / "a.safetensors").items() if not k.endswith(".alpha")}
    save_file(tensors, tmp_path / "b.safetensors")
    bare = read_adapter(tmp_path / "b.safetensors", MODELS["sd"])
    assert all(delta.scale == 1 for delta in bare.all_deltas().values())
    back = there_and_back(bare, ["peft", "kohya", "diffusers"], "sd", tmp_path)
    for place, delta in bare.all_deltas().items():
        assert torch.equal(product(delta), product(back.all_deltas()[place]))


def test_the_difference_that_is_printed_is_the_one_there_is(tmp_path: Path) -> None:
    """float32 to float16: measured here against the file's own tensors."""
    saved = some_adapter("llama", lambda options: options[1] if options != sorted(DTYPES) else "float32")
    done = convert(saved, tmp_path / "a", "peft", models=MODELS["llama"], base_name="", dtype=torch.float16)
    back = read_adapter(tmp_path / "a").all_deltas()
    largest = max((product(d) - product(back[p])).abs().max().item() for p, d in saved.all_deltas().items())
    assert done.largest == pytest.approx(largest, rel=1e-12)
    assert done.largest > 0
    assert done.dtypes == "float16"
    assert done.modules == len(back) == 14


def test_what_does_not_survive_the_dtype_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    """A that falls to 0, and B whose numbers lose some digits each: none of them too many, but all together."""
    deltas = some_adapter("llama", lambda options: options[0]).components["model"]
    for a, b in ((1e-7, 1.0), (1.0, 1e-6)):
        small = {path: Delta(a * d.A, b * d.B, d.scale) for path, d in deltas.items()}
        saved = SavedAdapter("llama", {"model": small}, "peft", {})
        for out, form in ((tmp_path / "a", "peft"), (tmp_path / "a.gguf", "gguf")):
            with pytest.raises(ModelError, match="more than rounding explains"):
                convert(saved, out, form, models=MODELS["llama"], base_name="", dtype=torch.float16)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault(46)
@pytest.mark.parametrize(("family", "to"), [("llama", "gguf"), ("llama", "peft"), ("sd", "kohya"), ("sd", "diffusers")])
@pytest.mark.parametrize("limit", [500, 4000, 12_000])
def test_a_file_over_the_limit_is_a_disk_that_takes_no_more(tmp_path: Path, family: str, to: Any, limit: int) -> None:
    """The kernel's own refusal, wherever it comes: arrays smaller than a buffer are refused when the file is closed."""
    saved, out = some_adapter(family, lambda choices: choices[-1]), tmp_path / f"out{ENDINGS[to]}"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(ResourceError, match="File too large"):
            convert(saved, out, to, models=MODELS[family], base_name="")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_refusals(tmp_path: Path) -> None:
    llama, sd = (some_adapter(family, lambda options: options[0]) for family in ("llama", "sd"))
    with pytest.raises(RecipeError, match="no format for a language model"):
        convert(llama, tmp_path / "a.safetensors", "kohya", models=MODELS["llama"], base_name="")
    with pytest.raises(RecipeError, match="no format for Stable Diffusion"):
        convert(sd, tmp_path / "a.gguf", "gguf", models=MODELS["sd"], base_name="")
    with pytest.raises(RecipeError, match=r"ends in \.safetensors"):
        convert(sd, tmp_path / "a", "kohya", models=MODELS["sd"], base_name="")
    with pytest.raises(ModelError, match="base's layers"):
        convert(sd, tmp_path / "a.safetensors", "kohya", models=None, base_name="")
    (tmp_path / "there").mkdir()
    with pytest.raises(ConflictError):
        convert(sd, tmp_path / "there", "peft", models=MODELS["sd"], base_name="")
    for name in ("a.safetensors", "a.ckpt"):
        with pytest.raises(RecipeError, match="peft is written as a folder's name"):
            convert(sd, tmp_path / name, "peft", models=MODELS["sd"], base_name="")
    dora = some_adapter("llama", lambda options: options[0], dora=True)
    with pytest.raises(ModelError, match="no DoRA"):
        convert(dora, tmp_path / "a.gguf", "gguf", models=MODELS["llama"], base_name="")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_diffusers_file_says_nothing_that_an_older_peft_does_not_know(tmp_path: Path) -> None:
    """diffusers gives all of it to LoraConfig; these were there before DoRA, PEFT 0.9, but for use_dora."""
    path = tmp_path / "style.safetensors"
    delta = Delta(torch.randn(2, 8), torch.randn(8, 2), 1.0)
    write_diffusers(path, {"unet": {"mid_block.attentions.0.proj_in": delta}}, "tiny")
    with safe_open(path, "pt") as file:
        said = json.loads(file.metadata()["lora_adapter_metadata"])
    old = {"base_model_name_or_path", "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern"}
    assert {key.partition(".")[2] for key in said} == old | {"use_dora", "use_rslora"}


def test_a_folders_name_may_hold_dots_and_a_diffusers_file_names_its_base(tmp_path: Path) -> None:
    saved = some_adapter("sd", lambda options: options[0])
    for to in ("peft", "diffusers"):
        folder = tmp_path / f"{to}-v1.5"
        convert(saved, folder, to, models=MODELS["sd"], base_name="builtin:mini-sd sha256:0")
        assert folder.is_dir()
        assert named_base(open_pieces(folder)) == "builtin:mini-sd"
