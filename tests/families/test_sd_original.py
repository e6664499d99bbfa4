"""A single-file checkpoint merged into a single file in its own names, and into a diffusers folder."""

import errno
import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from lorakit.adapters.convert import convert
from lorakit.adapters.delta import product
from lorakit.adapters.files import read_adapter
from lorakit.adapters.inject import adapter_state, inject, load_adapter_state
from lorakit.adapters.linear import plain_layers
from lorakit.adapters.merging import layers
from lorakit.adapters.merging.base import OpenBase, open_single
from lorakit.adapters.merging.merge import merge
from lorakit.adapters.merging.plan import plan_merge
from lorakit.adapters.write import write_peft
from lorakit.commands.adapters import open_base
from lorakit.errors import ConflictError, ModelError
from lorakit.families.place import Place
from lorakit.families.sd import compare
from lorakit.families.sd.base import Parts, load_parts
from lorakit.families.sd.compare import PROMPTS
from lorakit.families.sd.conditioning import ids_of
from lorakit.families.sd.original import open_original, open_stable_diffusion
from lorakit.families.sd.pack import packed_names
from lorakit.families.sd.stored import load_with
from lorakit.families.sd.targets import TEXT_GROUPS, UNET_GROUPS
from lorakit.recipe.schema import Adapter
from lorakit.storage.bases import BaseLocation, resolve
from tests.families.test_sd_single_file import UNET, models, write
from tests.faults.harness import files, forked, lorakit
from tests.tiny import tiny_clip_tokenizer
from tests.torture import trace

__all__ = ["models"]
PLACE = Place(torch.device("cpu"), torch.float32)
EVERYTHING = Adapter(rank=2, targets=["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1", "time_emb_proj"])
SECTIONS = {"unet": EVERYTHING, "text_encoder": Adapter(rank=2, alpha=3, targets="attention+mlp")}
GROUPS = {"unet": UNET_GROUPS, "text_encoder": TEXT_GROUPS, "text_encoder_2": TEXT_GROUPS}


def open_clip(text: nn.Module, prefix: str = "cond_stage_model.model.", layers: int = 3) -> dict[str, Tensor]:
    """A text encoder of two layers as OpenCLIP names it; with ``layers`` 3, one that Stable Diffusion 2 never uses."""
    old = {k.removeprefix("text_model."): v for k, v in text.state_dict().items()}
    names = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    }
    tensors = {new: old[name] for name, new in names.items()}
    layer = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    layer["self_attn.out_proj"] = "attn.out_proj"
    for number in range(layers):
        source, target = f"encoder.layers.{min(number, 1)}.", f"transformer.resblocks.{number}."
        for kind in ("weight", "bias"):
            tensors |= {f"{target}{new}.{kind}": old[f"{source}{name}.{kind}"] for name, new in layer.items()}
            stacked = [old[f"{source}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            tensors[f"{target}attn.in_proj_{kind}"] = torch.cat(stacked)
    if "text_projection.weight" in old:
        tensors["text_projection"] = old["text_projection.weight"].T
    return {prefix + name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


@pytest.fixture(params=["clip", "open clip"])
def base(request: pytest.FixtureRequest, models: dict[str, Any], tmp_path: Path) -> BaseLocation:
    (tmp_path / "base").mkdir()
    path = write(tmp_path / "base", models)
    if request.param == "open clip":
        tensors = {k: v for k, v in load_file(path).items() if not k.startswith("cond_stage_model.")}
        shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 1}
        torch.manual_seed(1)
        text = CLIPTextModel(CLIPTextConfig(vocab_size=len(tiny_clip_tokenizer()), **shape, hidden_act="gelu"))
        save_file(tensors | open_clip(text), path, {"modelspec.prediction_type": "epsilon"})
    else:
        save_file({k: v.half() if k.startswith("model.") else v for k, v in load_file(path).items()}, path)
    return resolve(str(path))


@pytest.fixture
def adapter(base: BaseLocation, tmp_path: Path) -> Path:
    """A LoRA for UNet and text encoder that changes what they compute."""
    parts = load_parts(base, PLACE)
    for component, section in SECTIONS.items():
        write_disturbed(parts, component, section, tmp_path / "adapter" / component)
    return tmp_path / "adapter"


def write_disturbed(parts: Parts, component: str, section: Adapter, folder: Path) -> None:
    module = parts.adaptable[component]
    injection = inject(module, section, GROUPS[component], seed=0)
    generator = torch.Generator().manual_seed(2)
    state = {k: 0.05 * torch.randn(v.shape, generator=generator) for k, v in adapter_state(module).items()}
    load_adapter_state(module, state)
    write_peft(folder, adapter_state(module), injection, base_name="x")


def expected(base: BaseLocation, adapter: Path) -> Parts:
    """Base + adapter, as `generate` has them."""
    return load_with(base, [(adapter, 1.0)], PLACE)


@pytest.mark.parametrize("dora", [False, True])
def test_it_runs_from_its_file(base: BaseLocation, tmp_path: Path, dora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Base + adapter, with LoRA on convolutions and in the text encoder, predict what PEFT's layers do."""
    monkeypatch.setattr(layers, "READ", 20000)
    parts, adapter = load_parts(base, PLACE), tmp_path / "adapter"
    for component, section in SECTIONS.items():
        write_disturbed(parts, component, section.model_copy(update={"dora": dora}), adapter / component)
    ids, opened = ids_of(parts.conditioning, PROMPTS), open_single(base, open_original(base))
    adapters = plan_merge(base, opened, [(adapter, 1.0)], tmp_path / "out").adapters
    with torch.inference_mode():
        found = compare._prediction(compare._running(base, opened, adapters), parts.conditioning, ids, 16)
    bones = compare.Skeleton(parts.unet, parts.conditioning, parts.vae, parts.factor, parts.size, {})
    with torch.inference_mode(), ExitStack() as plain:
        for module in parts.adaptable.values():
            plain.enter_context(plain_layers(module))
        wanted = compare._prediction(bones, parts.conditioning, ids, 16)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    with torch.inference_mode():
        bare = compare._prediction(compare._running(base, opened), parts.conditioning, ids, 16)
    assert (bare - wanted).abs().max() > 0.01, "the adapter says something"


def pieces(parts: Parts) -> dict[str, nn.Module]:
    return {**parts.adaptable, "vae": parts.vae}


def equal(found: nn.Module, wanted: nn.Module) -> None:
    state = wanted.state_dict()
    assert state.keys() == found.state_dict().keys()
    for name, tensor in found.state_dict().items():
        turned = name == "text_projection.weight"  # its transpose is in a single file, where the sums are made
        torch.testing.assert_close(tensor.float(), state[name].float(), rtol=0, atol=1e-6 if turned else 0, msg=name)


def test_single_file_to_single_file(base: BaseLocation, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "base" / "merged.safetensors"
    report = merge(plan_merge(base, open_single(base, open_original(base)), [(adapter, 1.0)], out))
    before, after = load_file(base.path), load_file(out)
    assert list(before) == list(after)
    with safe_open(base.path, "pt") as one, safe_open(out, "pt") as two:
        assert one.metadata() == two.metadata()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    layers = {"cond_stage_model", "model"}
    assert {key.split(".")[0] for key in changed} == layers
    assert all(before[key].dtype == after[key].dtype for key in before)
    assert report.changed >= len(changed)
    wanted, parts = expected(base, adapter), load_parts(resolve(str(out)), PLACE)
    for component in ("unet", "text_encoder", "vae"):
        equal(pieces(parts)[component], pieces(wanted)[component])


@pytest.mark.fault(60)
def test_60_what_lies_beside_a_merged_file_stays(base: BaseLocation, adapter: Path, tmp_path: Path) -> None:
    receipt = tmp_path / "merged.merge_receipt.json"
    receipt.write_text("precious")
    plan = plan_merge(base, open_single(base, open_original(base)), [(adapter, 1.0)], tmp_path / "merged.safetensors")
    with pytest.raises(ConflictError, match=r"merged\.merge_receipt\.json: exists already"):
        merge(plan)
    assert receipt.read_text() == "precious"
    assert not plan.out.exists()
    merge(plan, overwrite=True)
    assert "sha256" in receipt.read_text()
    with pytest.raises(ConflictError, match=r"merged\.safetensors: exists already"):
        merge(plan)


@pytest.mark.skipif(not trace.supported(), reason="the filter is for Linux on x86-64")
def test_a_merged_file_keeps_its_receipt_until_another_takes_its_place(
    base: BaseLocation, adapter: Path, tmp_path: Path
) -> None:
    merged = ("merge", base.path, adapter, tmp_path / "merged.safetensors")
    assert forked(*merged).code == 0
    before = files(tmp_path)
    forked(*merged, "--scale", "2", "--overwrite", refused={"rename": errno.EIO}).refused(6, "Input/output")
    assert files(tmp_path) == before


def test_a_name_whose_receipt_has_none(base: BaseLocation, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / f"{'x' * 240}.safetensors"
    for more in ((), ("--dry-run",)):
        lorakit("merge", base.path, adapter, out, *more).refused(6, "receipt.json: cannot write: File name too long")
    assert not out.exists()


def test_what_no_component_computes_with_need_not_be_finite(base: BaseLocation, adapter: Path, tmp_path: Path) -> None:
    """Training code's tables: those of a schedule that ends in noise alone divide by zero."""
    extra = {"sqrt_recip_alphas_cumprod": torch.tensor([1.0, float("inf")])}
    told = {"modelspec.prediction_type": "epsilon"}
    save_file(load_file(base.path) | extra, base.path, told)
    out = tmp_path / "merged.safetensors"
    merge(plan_merge(base, open_stable_diffusion(base), [(adapter, 1.0)], out))
    assert torch.equal(load_file(out)["sqrt_recip_alphas_cumprod"], extra["sqrt_recip_alphas_cumprod"])
    tensors = load_file(base.path)
    key = next(key for key in tensors if key.startswith("first_stage_model."))
    tensors[key].view(-1)[0] = float("nan")
    save_file(tensors, base.path, told)
    with pytest.raises(ModelError, match="NaN or infinity in the base"):
        merge(plan_merge(base, open_stable_diffusion(base), [(adapter, 1.0)], out), overwrite=True)


def test_an_adapter_is_extracted_from_two_single_files(base: BaseLocation, tmp_path: Path) -> None:
    tensors = load_file(base.path)
    keys = {
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": slice(None),
        "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight": slice(64, 128),
        "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.k_proj.weight": slice(None),
    }
    changes = []
    for key, rows in keys.items():
        if key in tensors:
            tensors[key] = tensors[key].float()
            shape = tensors[key][rows].shape
            changes.append(torch.ones(shape[0], 1) * torch.linspace(-1, 1, shape[1]))
            tensors[key][rows] += changes[-1]
    tuned = tmp_path / "tuned.safetensors"
    save_file(tensors, tuned, {"modelspec.prediction_type": "epsilon"})
    assert lorakit("extract", base.path, tuned, tmp_path / "found", "--rank", "1").code == 0
    found = read_adapter(tmp_path / "found", open_base(base).models).components
    assert [len(found[component]) for component in ("unet", "text_encoder")] == [1, 1]
    for component, change in zip(("unet", "text_encoder"), changes, strict=True):
        ((path, delta),) = found[component].items()
        assert path.endswith({"unet": "attn1.to_q", "text_encoder": "k_proj"}[component])
        torch.testing.assert_close(product(delta), change, rtol=1e-4, atol=1e-4)


def test_single_file_to_folder_and_diffusers_reads_both(base: BaseLocation, adapter: Path, tmp_path: Path) -> None:
    opened = open_single(base, open_original(base))
    folder, file = tmp_path / "folder", tmp_path / "base" / "merged.safetensors"
    merge(plan_merge(base, opened, [(adapter, 1.0)], folder))
    merge(plan_merge(base, opened, [(adapter, 1.0)], file))
    wanted = expected(base, adapter)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    for component in ("unet", "text_encoder", "vae"):
        equal(getattr(pipeline, component), pieces(wanted)[component])
    single = StableDiffusionPipeline.from_single_file(
        str(file), config=str(folder), local_files_only=True, dtype=torch.float32, safety_checker=None
    )
    for component in ("unet", "text_encoder", "vae"):
        equal(getattr(single, component), pieces(wanted)[component])
    assert json.loads((folder / "model_index.json").read_text())["text_encoder"] == ["transformers", "CLIPTextModel"]
    # Older versions of transformers know CLIP by these names and files alone.
    assert all(name.startswith("text_model.") for name in load_file(folder / "text_encoder/model.safetensors"))
    vocabulary = json.loads((folder / "tokenizer/vocab.json").read_text())
    assert vocabulary == {piece: i for piece, i in tiny_clip_tokenizer().get_vocab().items() if piece in vocabulary}
    assert len(vocabulary) > 200
    assert (folder / "tokenizer/merges.txt").is_file()


def test_what_is_refused(base: BaseLocation, adapter: Path, tmp_path: Path) -> None:
    opened = open_single(base, open_original(base))
    with pytest.raises(ConflictError, match="OUT is the base"):
        merge(plan_merge(base, opened, [(adapter, 1.0)], base.path), overwrite=True)
    (tmp_path / "there.safetensors").write_bytes(b"x")
    with pytest.raises(ConflictError, match="exists"):
        merge(plan_merge(base, opened, [(adapter, 1.0)], tmp_path / "there.safetensors"))
    (tmp_path / "base" / "tokenizer").rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="vocabulary"):
        merge(plan_merge(base, opened, [(adapter, 1.0)], tmp_path / "folder"))
    assert not (tmp_path / "folder").exists()
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.fixture
def folder(models: dict[str, Any], tmp_path: Path) -> BaseLocation:
    """The same models as a diffusers folder; as in Stable Diffusion 1.5's, nothing says that it predicts epsilon."""
    schedule = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    StableDiffusionPipeline(
        *(models["vae"], models["text_encoder"], tiny_clip_tokenizer(), models["unet"], schedule, None, None),
        requires_safety_checker=False,
    ).save_pretrained(tmp_path / "base")
    config = tmp_path / "base" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "prediction_type"}))
    return resolve(str(tmp_path / "base"))


@pytest.mark.parametrize("old", [False, True])
def test_a_folder_becomes_a_single_file(
    folder: BaseLocation, models: dict[str, Any], tmp_path: Path, old: bool
) -> None:
    """Stable Diffusion 1.5's VAE too, whose attention has the names of early versions of diffusers."""
    if old:
        file = folder.path / "vae" / "diffusion_pytorch_model.safetensors"
        early = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        tensors = load_file(file)
        for new, name in early.items():
            tensors = {key.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): t for key, t in tensors.items()}
        assert any("query" in key for key in tensors)
        save_file(tensors, file, {"format": "pt"})
    for component, section in SECTIONS.items():
        write_disturbed(load_parts(folder, PLACE), component, section, tmp_path / "adapter" / component)
    out, plain = tmp_path / "merged.safetensors", write(tmp_path, models)
    merge(plan_merge(folder, _packable(folder), [(tmp_path / "adapter", 1.0)], out))
    kept = {key: t for key, t in load_file(plain).items() if "position_ids" not in key and key != "alphas_cumprod"}
    found = load_file(out)
    assert {key: t.shape for key, t in found.items()} == {key: t.shape for key, t in kept.items()}
    assert all(torch.equal(found[key], kept[key]) for key in kept if key.startswith("first_stage_model."))
    wanted, parts = expected(folder, tmp_path / "adapter"), load_parts(resolve(str(out)), PLACE)
    for component, module in pieces(parts).items():
        equal(module, pieces(wanted)[component])


def test_a_kohya_file_merges_into_a_single_file(base: BaseLocation, adapter: Path, tmp_path: Path) -> None:
    parts = load_parts(base, PLACE)
    saved = read_adapter(adapter, parts.adaptable)
    convert(saved, tmp_path / "style.safetensors", "kohya", models=parts.adaptable, base_name="x")
    found = []
    for number, path in enumerate((adapter, tmp_path / "style.safetensors")):
        out = tmp_path / "base" / f"{number}.safetensors"
        merge(plan_merge(base, open_single(base, open_original(base)), [(path, 1.0)], out))
        found.append(load_file(out))
    assert found[0].keys() == found[1].keys()
    for key, tensor in found[0].items():
        torch.testing.assert_close(found[1][key], tensor, rtol=2e-3, atol=1e-6)


def test_a_folder_of_sd_2_becomes_a_single_file(models: dict[str, Any], tmp_path: Path) -> None:
    """OpenCLIP's names; the layer that Stable Diffusion 2 never uses, which readers expect, is the last one again."""
    torch.manual_seed(1)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 1}
    text = CLIPTextModel(CLIPTextConfig(vocab_size=len(tiny_clip_tokenizer()), **shape, hidden_act="gelu"))
    unet = UNet2DConditionModel(**UNET, use_linear_projection=True, attention_head_dim=(1, 1))
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    schedule = PNDMScheduler(**betas, steps_offset=1, prediction_type="v_prediction")
    StableDiffusionPipeline(
        *(models["vae"], text, tiny_clip_tokenizer(), unet, schedule, None, None), requires_safety_checker=False
    ).save_pretrained(tmp_path / "base")
    folder, out = resolve(str(tmp_path / "base")), tmp_path / "merged.safetensors"
    merge(plan_merge(folder, _packable(folder), [], out))
    found = load_file(out)
    for name, tensor in open_clip(text).items():
        assert torch.equal(found.pop(name), tensor), name
    assert not [name for name in found if name.startswith("cond_stage_model.")]
    tiny_clip_tokenizer().save_pretrained(tmp_path / "tokenizer")
    parts = load_parts(resolve(str(out)), PLACE)
    assert parts.schedule["prediction_type"] == "v_prediction"
    for component, module in pieces(load_parts(folder, PLACE)).items():
        equal(pieces(parts)[component], module)


def _packable(folder: BaseLocation) -> OpenBase:
    return replace(open_stable_diffusion(folder), packed=packed_names(folder))


def test_what_a_single_file_cannot_say_is_refused(folder: BaseLocation, tmp_path: Path) -> None:
    config = folder.path / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_head_dim": 4}))
    with pytest.raises(ModelError, match="attention_head_dim is 4, a single file's readers take it to be 8"):
        packed_names(folder)
    with pytest.raises(ConflictError, match="only a Stable Diffusion"):
        plan_merge(folder, open_stable_diffusion(folder), [], tmp_path / "out.safetensors")
