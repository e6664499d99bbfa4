"""The merged folder against PEFT's own merge, against base + adapter, and against what must not happen."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer, CLIPTextModel, LlamaForCausalLM

from lorakit.adapters.inject import adapter_state, fold, inject, load_adapter_state
from lorakit.adapters.merging import change, stream
from lorakit.adapters.merging.merge import MergeReport, Progress
from lorakit.adapters.merging.merge import merge as write_merge
from lorakit.adapters.merging.plan import Settings, plan_merge
from lorakit.adapters.targets import Injection
from lorakit.adapters.write import deltas, write_kohya, write_peft
from lorakit.errors import ConflictError, ModelError, ResourceError
from lorakit.families.llama.base import as_folder
from lorakit.families.llama.skeleton import open_language_model
from lorakit.families.sd.original import open_stable_diffusion
from lorakit.recipe.schema import Adapter, LlamaAdapter
from lorakit.storage.bases import BaseLocation, resolve
from tests.tiny import tiny_gguf, tiny_llama, tiny_sd

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
GROUPS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "attention+mlp": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
UNET = {"attention": ("to_q", "to_k", "to_v", "to_out.0")}
CLIP = {"attention": ("q_proj", "k_proj", "v_proj", "out_proj")}
TOKENS = torch.arange(24).reshape(2, 12)
EPSILON = {torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def disturbed(model: nn.Module, adapter: Adapter, groups: dict[str, tuple[str, ...]], size: float = 0.3) -> Injection:
    injection = inject(model, adapter, groups, seed=0)
    generator = torch.Generator().manual_seed(1)
    state = {k: t + size * t.std() * torch.randn(t.shape, generator=generator) for k, t in adapter_state(model).items()}
    state = {
        k: size * torch.randn(t.shape, generator=generator) if k.endswith("lora_B.weight") else state[k]
        for k, t in state.items()
    }
    load_adapter_state(model, state)
    return injection


def trained(base: Path, folder: Path, adapter: Adapter) -> LlamaForCausalLM:
    """A LLaMA adapter on disk, and the model with it in memory."""
    model = LlamaForCausalLM.from_pretrained(base)
    injection = disturbed(model, adapter, GROUPS)
    write_peft(folder, adapter_state(model), injection, base_name=str(base), task="CAUSAL_LM")
    return model


def merge(
    base: BaseLocation,
    adapter: Path,
    out: Path,
    *,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    verify: bool = True,
    progress: Progress | None = None,
) -> MergeReport:
    opened = open_stable_diffusion(base) if base.family == "sd" else open_language_model(as_folder(base, torch.float32))
    plan = plan_merge(base, opened, [(adapter, scale)], out, Settings(dtype))
    return write_merge(plan, overwrite=overwrite, verify=verify, progress=progress)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits.float()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


CASES = {
    "plain": (torch.float32, True, "5GB", Adapter(rank=4, alpha=8)),
    "untied": (torch.float32, False, "5GB", Adapter(rank=4, targets="all-linear")),
    "sharded": (torch.float32, False, "40KB", Adapter(rank=4, alpha=8, targets="attention+mlp")),
    "fp16": (torch.float16, True, "5GB", Adapter(rank=4, alpha=8)),
    "bf16": (torch.bfloat16, False, "20KB", Adapter(rank=4, alpha=8)),
    "rslora": (torch.float32, True, "5GB", Adapter(rank=4, alpha=3, rslora=True, alpha_pattern={"k_proj": 5})),
    "ranks": (torch.float32, True, "5GB", LlamaAdapter(rank=4, alpha=3, rank_pattern={"layers.1.*": 2}, layers=[1])),
    "dora": (torch.float32, True, "5GB", Adapter(rank=4, alpha=8, dora=True)),
    "dora bf16": (torch.bfloat16, True, "5GB", Adapter(rank=4, alpha=8, dora=True)),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_pefts_merge(tmp_path: Path, case: str) -> None:
    dtype, tied, shard, adapter = CASES[case]
    base = tiny_llama(tmp_path / "base", tied=tied, dtype=dtype, max_shard_size=shard)
    with_adapter = trained(base, tmp_path / "adapter", adapter)
    report = merge(resolve(str(base)), tmp_path / "adapter", tmp_path / "out")

    # PEFT's merge in float32 is the exact sum; ours may differ from it by one rounding to the base's dtype.
    exact = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "adapter"
    ).merge_and_unload()
    before, after = tensors(base), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = 0
    for name, expected in exact.state_dict().items():
        if name not in after:
            continue
        assert after[name].dtype == dtype
        if torch.equal(expected.to(dtype), before[name]):
            assert torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8))
            continue
        changed += 1
        tolerance = expected.abs() * EPSILON[dtype] + 1e-6
        assert ((after[name].float() - expected).abs() <= tolerance).all()
    assert report.changed == changed > 0
    assert report.dtype == str(dtype).removeprefix("torch.")
    assert report.rounding <= EPSILON[dtype]
    assert (report.lost < 1e-6) == (dtype == torch.float32)
    assert report.lost < 0.05

    merged_model = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with_adapter.float()
    tolerance = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.4}[dtype]
    torch.testing.assert_close(logits(merged_model), logits(with_adapter), rtol=0, atol=tolerance)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(base).chat_template
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_layout_is_kept(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", tied=False, max_shard_size="40KB")
    (base / "LICENSE").write_text("as it is")
    (base / "pytorch_model.bin").write_bytes(b"old")
    trained(base, tmp_path / "adapter", Adapter(rank=4))
    seen: list[tuple[int, int]] = []
    merge(resolve(str(base)), tmp_path / "adapter", tmp_path / "out", progress=lambda *at: seen.append(at))
    names = sorted([*(p.name for p in base.iterdir() if p.suffix != ".bin"), "merge_receipt.json"])
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    was = json.loads((base / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == was["weight_map"]
    assert index["metadata"]["total_size"] == was["metadata"]["total_size"]
    assert seen[-1] == (2 * was["metadata"]["total_size"], 2 * was["metadata"]["total_size"]), "written and verified"
    for shard in base.glob("*.safetensors"):
        with safe_open(shard, "pt") as before, safe_open(tmp_path / "out" / shard.name, "pt") as after:
            assert before.metadata() == after.metadata()
            assert list(before.keys()) == list(after.keys())


def test_scale_and_dtype(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", dtype=torch.float16, max_shard_size="40KB")
    trained(base, tmp_path / "adapter", Adapter(rank=4, alpha=8))
    report = merge(resolve(str(base)), tmp_path / "adapter", tmp_path / "out", scale=-0.5, dtype=torch.float32)
    before, after = tensors(base), tensors(tmp_path / "out")
    lora = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "model.layers.1.self_attn.o_proj"
    a, b = (lora[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
    expected = before[f"{name}.weight"].double() - 0.5 * 2 * b @ a
    torch.testing.assert_close(after[f"{name}.weight"].double(), expected, rtol=1e-6, atol=1e-6)
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    assert report.dtype == "float32"
    assert LlamaForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values()) == report.size


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("sd"))


@pytest.mark.parametrize("form", ["peft", "kohya"])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_stable_diffusion(sd: Path, tmp_path: Path, form: str, dtype: torch.dtype | None) -> None:
    models = {
        "unet": UNet2DConditionModel.from_pretrained(sd / "unet"),
        "text_encoder": CLIPTextModel.from_pretrained(sd / "text_encoder"),
    }
    adapter = Adapter(rank=4, alpha=6, rslora=True)
    injections = {
        "unet": disturbed(models["unet"], adapter, UNET),
        "text_encoder": disturbed(models["text_encoder"], adapter, CLIP),
    }
    states = {name: adapter_state(model) for name, model in models.items()}
    path = tmp_path / "adapter"
    if form == "kohya":
        path = tmp_path / "style.safetensors"
        changes = {name: deltas(states[name], injections[name]) for name in models}
        known = {"title": "style", "version": "sd_v1", "prediction_type": "epsilon", "resolution": 64}
        write_kohya(path, changes, models=models, **known)
    else:
        for name in models:
            write_peft(path / name, states[name], injections[name], base_name="x")
    report = merge(resolve(str(sd)), path, tmp_path / "out", dtype=dtype)
    assert report.changed == len(injections["unet"].targets) + len(injections["text_encoder"].targets)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.safety_checker is None
    for name, model in models.items():
        fold(model)
        for key, expected in model.state_dict().items():
            found = getattr(pipeline, name).state_dict()[key].float()
            bound = expected.abs() * (EPSILON[torch.float16] if dtype else 1e-5) + 1e-6
            assert ((found - expected).abs() <= bound).all(), key
    for part in ("vae", "tokenizer", "scheduler"):
        for file in (sd / part).iterdir():
            if dtype is None or file.suffix == ".json":
                assert (tmp_path / "out" / part / file.name).read_bytes() == file.read_bytes()
    if dtype is None:
        latents, states_ = torch.randn(1, 4, 16, 16), torch.randn(1, 7, 32)
        with torch.no_grad():
            torch.testing.assert_close(
                pipeline.unet(latents, 5, states_).sample,
                models["unet"](latents, 5, states_).sample,
                rtol=1e-3,
                atol=1e-3,
            )


def test_missing_safety_checker_is_left_out(sd: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = Path(shutil.copytree(sd, tmp_path / "base"))
    index = json.loads((base / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (base / "model_index.json").write_text(json.dumps(index))
    unet = UNet2DConditionModel.from_pretrained(sd / "unet")
    injection = disturbed(unet, Adapter(rank=4), UNET)
    write_peft(tmp_path / "adapter" / "unet", adapter_state(unet), injection, base_name="x")
    merge(resolve(str(base)), tmp_path / "adapter", tmp_path / "out")
    assert "safety_checker" in caplog.text
    StableDiffusionPipeline.from_pretrained(tmp_path / "out")


def test_old_clip_names(sd: Path, tmp_path: Path) -> None:
    """A text encoder saved by older transformers has text_model. in front of each tensor, and keeps it."""
    base = Path(shutil.copytree(sd, tmp_path / "base"))
    file = base / "text_encoder" / "model.safetensors"
    save_file({f"text_model.{name}": tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    text = CLIPTextModel.from_pretrained(base / "text_encoder")
    injection = disturbed(text, Adapter(rank=4), CLIP)
    write_peft(tmp_path / "adapter" / "text_encoder", adapter_state(text), injection, base_name="x")
    assert merge(resolve(str(base)), tmp_path / "adapter", tmp_path / "out").changed == 8
    assert all(name.startswith("text_model.") for name in load_file(tmp_path / "out/text_encoder/model.safetensors"))
    fold(text)
    merged_text = CLIPTextModel.from_pretrained(tmp_path / "out" / "text_encoder")
    for name, tensor in text.state_dict().items():
        torch.testing.assert_close(merged_text.state_dict()[name], tensor)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    base = tiny_llama(tmp_path / "base")
    trained(base, tmp_path / "adapter", Adapter(rank=4))
    return base


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.fault(60, 63)
def test_conflicts(llama: Path, tmp_path: Path) -> None:
    base, adapter, out = resolve(str(llama)), tmp_path / "adapter", tmp_path / "out"
    for target in (llama, adapter, llama / "inside", tmp_path):
        with pytest.raises(ConflictError, match="OUT is the"):
            merge(base, adapter, target, overwrite=True)
    merge(base, adapter, out)
    before = contents(tmp_path)
    with pytest.raises(ConflictError, match="exists"):
        merge(base, adapter, out)
    assert contents(tmp_path) == before
    first = tensors(out)
    merge(base, adapter, out, scale=2.0, overwrite=True)
    assert not all(torch.equal(first[name], tensor) for name, tensor in tensors(out).items())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ConflictError, match="not a model's folder"):
        merge(base, adapter, tmp_path / "mine", overwrite=True)


@pytest.mark.fault(64)
def test_overflow_leaves_nothing(tmp_path: Path, llama: Path) -> None:
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor + 200 for name, tensor in load_file(file).items()}, file)
    with pytest.raises(ModelError, match=r"o_proj.weight|q_proj.weight|k_proj.weight|v_proj.weight"):
        merge(resolve(str(llama)), tmp_path / "adapter", tmp_path / "out", dtype=torch.float16)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.fault(64)
def test_overflow_in_the_first_rows_alone(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several blocks that are summed one after the other, and without verifying."""
    monkeypatch.setattr(change, "WORK", 64)
    monkeypatch.setattr(stream, "WORK", 64)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    lora = load_file(file)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    lora[key][0] = 1e9
    save_file(lora, file)
    with pytest.raises(ModelError, match=r"not finite in torch\.float16") as caught:
        merge(resolve(str(llama)), tmp_path / "adapter", tmp_path / "out", dtype=torch.float16, verify=False)
    assert caught.value.where == "model.layers.0.self_attn.q_proj.weight"
    assert not (tmp_path / "out").exists()


@pytest.mark.fault(61)
def test_full_disk_is_told_before(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(ResourceError, match="are free"):
        merge(resolve(str(llama)), tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("llama")
def test_adapter_of_another_base(tmp_path: Path, sd: Path) -> None:
    with pytest.raises(ModelError, match="which the base is not"):
        merge(resolve(str(sd)), tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_gguf_becomes_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    path = tiny_gguf(tmp_path / "base" / "tiny.gguf")
    original = tmp_path / "base" / "tiny-folder"
    with_adapter = trained(original, tmp_path / "adapter", Adapter(rank=4, alpha=8))
    report = merge(resolve(str(path)), tmp_path / "adapter", tmp_path / "out")
    assert report.dtype == "float16"
    merged_model = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert merged_model.dtype == torch.float16
    torch.testing.assert_close(logits(merged_model.float()), logits(with_adapter), rtol=0, atol=0.05)
    merge(resolve(str(path)), tmp_path / "adapter", tmp_path / "out", dtype=torch.float32, overwrite=True)
    merged_model = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged_model), logits(with_adapter), rtol=0, atol=1e-4)
    chat = [{"role": "user", "content": "Hello, fox?"}]
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "out", original))
    assert ours.apply_chat_template(chat)["input_ids"] == theirs.apply_chat_template(chat)["input_ids"]
    assert ours.eos_token == theirs.eos_token
