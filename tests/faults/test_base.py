"""Faults 24 to 33: the base, by every command that takes one."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.faults.harness import Told, forked, lorakit, untouched

Edit = Callable[..., None]
UNET, VAE, TEXT = "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"
SHARD = "model-00002-of-00004.safetensors"
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def commands(folder: Path) -> list[tuple[object, ...]]:
    """Every command that opens the base of ``folder``."""
    llama = (folder / "chats.jsonl").exists()
    train, file, form = ("train-llama", "lora.gguf", "gguf") if llama else ("train-sd", "lora.safetensors", "kohya")
    return [
        (train, folder / "recipe.yaml"),
        (train, folder / "recipe.yaml", "--dry-run"),
        ("data", folder / "recipe.yaml"),
        ("merge", folder / "base", folder / "adapter", folder / "merged"),
        ("extract", folder / "base", folder / "base", folder / "extracted", "--rank", 2),
        ("convert", folder / "adapter", folder / file, "--to", form, "--base", folder / "base"),
        ("verify", folder / "recipe.yaml"),
        ("generate", "--base", folder / "base", "--prompt", "a", "--out", folder / "out"),
    ]


def refuse(folder: Path, *words: str, weights: bool = False) -> Told:
    """Every command refuses with exit code 4, and leaves all as it is; with ``weights`` only those that read them."""
    chosen = commands(folder)
    for command in [chosen[0], chosen[-1]] if weights else chosen:
        with untouched(folder):
            told = lorakit(*command).refused(4, *words)
    assert not (folder / "merged").exists()
    assert not (folder / "out").exists()
    return told


@pytest.mark.fault(24)
def test_24_missing_shard_index_or_weights(llama: Path) -> None:
    base, aside = llama / "base", llama / "aside"
    for name, told in {
        SHARD: f"shard {SHARD} is missing",
        "model.safetensors.index.json": "no model.safetensors",
        "config.json": "no model's folder",
    }.items():
        (base / name).rename(aside)
        refuse(llama, f"{base}", told)
        aside.rename(base / name)


@pytest.mark.fault(24)
def test_24_missing_part_of_a_stable_diffusion(sd: Path) -> None:
    for name, told in {
        f"{UNET}.safetensors": "no diffusion_pytorch_model.safetensors",
        f"{TEXT}.safetensors": "no model.safetensors",
        "vae": "the folder vae is missing",
        "unet/config.json": "no such file",
        "scheduler/scheduler_config.json": "no such file",
        "vae/config.json": "no such file",
        "text_encoder/config.json": "no such file",
    }.items():
        (sd / "base" / name).rename(sd / "aside")
        refuse(sd, f"{sd}/base", told)
        (sd / "aside").rename(sd / "base" / name)


@pytest.mark.fault(24)
@pytest.mark.parametrize("key", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_24_a_tensor_that_no_shard_has(llama: Path, key: str) -> None:
    """transformers would fill it with random numbers and say so in a log."""
    index = json.loads((llama / "base/model.safetensors.index.json").read_text())
    shard = llama / "base" / index["weight_map"].pop(key)
    save_file({name: tensor for name, tensor in load_file(shard).items() if name != key}, shard, {"format": "pt"})
    (llama / "base/model.safetensors.index.json").write_text(json.dumps(index))
    refuse(llama, key, weights=True)


@pytest.mark.fault(24)
@pytest.mark.parametrize("stem", [UNET, VAE, TEXT])
def test_24_a_tensor_that_a_stable_diffusion_lacks(sd: Path, stem: str) -> None:
    path = sd / f"base/{stem}.safetensors"
    tensors = load_file(path)
    key = sorted(tensors)[len(tensors) // 2]
    del tensors[key]
    save_file(tensors, path, {"format": "pt"})
    refuse(sd, key, weights=True)


@pytest.mark.fault(25)
def test_25_truncated_shard(llama: Path) -> None:
    path = llama / "base" / SHARD
    whole = path.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refuse(llama, str(path))
    path.write_bytes(whole + b"\0")
    refuse(llama, str(path), "truncated or overlong")


@pytest.mark.fault(25)
@pytest.mark.parametrize("stem", [UNET, VAE, TEXT])
def test_25_truncated_weights_of_a_stable_diffusion(sd: Path, stem: str) -> None:
    path = sd / f"base/{stem}.safetensors"
    os.truncate(path, path.stat().st_size - 100)
    refuse(sd, str(path), "truncated")


@pytest.mark.fault(26)
@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "x.bin", "..", "a\0b"])
def test_26_index_that_leads_out(llama: Path, edit: Edit, name: str) -> None:
    shutil.copy(llama / "base" / SHARD, llama / "secret.safetensors")
    edit(llama / "base/model.safetensors.index.json", weight_map={"model.norm.weight": name})
    refuse(llama, "model.safetensors.index.json", "is not a safetensors file of this folder")


@pytest.mark.fault(27)
def test_27_another_architecture(llama: Path, edit: Edit) -> None:
    edit(llama / "base/config.json", architectures=["BertForMaskedLM"], model_type="bert")
    refuse(llama, f"{llama}/base/config.json", "BertForMaskedLM", "LlamaForCausalLM")


@pytest.mark.fault(27)
def test_27_config_and_architecture_that_disagree(llama: Path, edit: Edit) -> None:
    edit(llama / "base/config.json", model_type="bert")
    refuse(llama, f"{llama}/base/config.json", "bert", "LlamaForCausalLM")


@pytest.mark.fault(27)
@pytest.mark.parametrize("name", ["FluxPipeline", "StableDiffusionInpaintPipeline", None])
def test_27_another_pipeline(sd: Path, edit: Edit, name: str | None) -> None:
    edit(sd / "base/model_index.json", _class_name=name)
    refuse(sd, f"{sd}/base/model_index.json", str(name), "StableDiffusionPipeline")


@pytest.mark.fault(27)
def test_27_a_base_of_the_other_family(tmp_path: Path, whole_llama: Path, whole_sd: Path) -> None:
    for command, base, told in (
        ("train-llama", whole_sd, "is a Stable Diffusion"),
        ("train-sd", whole_llama, "is not a Stable Diffusion model"),
    ):
        text = "data: {path: a}" if command == "train-sd" else "data: {train: [{path: a.jsonl}]}"
        (tmp_path / "r.yaml").write_text(text)
        for flags in ((), ("--dry-run",)):
            given = ("--set", f"base.model={base}", "--set", f"output.folder={tmp_path}/runs", *flags)
            lorakit(command, tmp_path / "r.yaml", *given).refused(4, "base.model", str(base), told)


@pytest.mark.fault(28)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.ckpt"])
def test_28_pickle_only(llama: Path, name: str, canary: Callable[[Path], Path]) -> None:
    for path in (llama / "base").glob("model*"):
        path.unlink()
    left = canary(llama / "base" / name)
    refuse(llama, f"{llama}/base", name, "pickle", "never opened")
    (llama / "base/pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    refuse(llama, f"{llama}/base", name, "pickle")
    assert not left.exists()


@pytest.mark.fault(28)
@pytest.mark.parametrize("stem", [UNET, VAE, TEXT])
def test_28_pickle_only_in_a_part(sd: Path, stem: str, canary: Callable[[Path], Path]) -> None:
    (sd / f"base/{stem}.safetensors").unlink()
    left = canary(sd / f"base/{stem}.bin".replace("text_encoder/model", "text_encoder/pytorch_model"))
    refuse(sd, stem.split("/")[0], ".bin", "pickle")
    assert not left.exists()


@pytest.mark.fault(28)
@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.bin", "model.pth"])
def test_28_a_pickle_as_the_base(sd: Path, name: str, canary: Callable[[Path], Path]) -> None:
    left = canary(sd / name)
    told = lorakit("generate", "--base", sd / name, "--prompt", "a", "--out", sd / "out")
    told.refused(4, str(sd / name), "pickle", "never opened")
    canary(sd / "renamed.safetensors")
    lorakit("generate", "--base", sd / "renamed.safetensors", "--prompt", "a").refused(4, "renamed.safetensors")
    canary(sd / "renamed.gguf")
    lorakit("generate", "--base", sd / "renamed.gguf", "--prompt", "a").refused(4, "renamed.gguf", "GGUF")
    assert not left.exists()


CODE = "from pathlib import Path\nPath({!r}).touch()\n"


@pytest.mark.fault(29)
@pytest.mark.parametrize(
    "place", ["modeling_x.py", "custom_generate/generate.py", "deep/er/and/deeper/x.py", "x.PY", "x.so", "x.pyc"]
)
def test_29_python_in_the_folder(llama: Path, place: str) -> None:
    path, left = llama / "base" / place, llama / "left"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(CODE.format(str(left)))
    refuse(llama, str(path), "code")
    assert not left.exists()


@pytest.mark.fault(29)
@pytest.mark.parametrize(
    ("file", "table"),
    [
        ("config.json", {"auto_map": {"AutoModelForCausalLM": "x.Model", "AutoConfig": "x.Config"}}),
        ("config.json", {"trust_remote_code": True, "auto_map": {"AutoConfig": "owner/name--x.Config"}}),
        ("config.json", {"custom_pipelines": {"text-generation": {"impl": "x.Pipe", "pt": ["AutoModel"]}}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["x.Tokenizer", None]}}),
        ("generation_config.json", {"auto_map": {"x": "y"}}),
        ("processor_config.json", {"auto_map": {"AutoProcessor": "x.P"}}),
    ],
)
def test_29_a_config_that_asks_for_code(llama: Path, edit: Edit, file: str, table: dict[str, object]) -> None:
    path = llama / "base" / file
    if not path.exists():
        path.write_text("{}")
    edit(path, **table)
    refuse(llama, str(path), next(key for key in ("auto_map", "custom_pipelines") if key in table))


@pytest.mark.fault(29)
@pytest.mark.parametrize(
    ("file", "table", "told"),
    [
        ("model_index.json", {"custom_pipeline": "owner/name"}, "custom_pipeline"),
        ("model_index.json", {"_class_name": ["x", "StableDiffusionPipeline"]}, "not one of StableDiffusionPipeline"),
        ("model_index.json", {"unet": [["diffusers"], "UNet2DConditionModel"]}, "not part of"),
        ("model_index.json", {"unet": ["os", "system"]}, "unet"),
        ("model_index.json", {"unet": ["diffusers_modules.local.x", "UNet2DConditionModel"]}, "unet"),
        ("model_index.json", {"vae": ["diffusers", "FlaxAutoencoderKL"]}, "vae"),
        ("model_index.json", {"extra": ["builtins", "eval"]}, "extra"),
        ("model_index.json", {"extra": ["x", "Y"], "_class_name": "StableDiffusionPipeline"}, "extra"),
        ("unet/config.json", {"auto_map": {"AutoModel": "unet.x--X"}}, "auto_map"),
        ("text_encoder/config.json", {"auto_map": {"AutoModel": "x.X"}}, "auto_map"),
        ("scheduler/scheduler_config.json", {"auto_map": {"X": "x.X"}}, "auto_map"),
        ("scheduler/scheduler_config.json", {"_class_name": "__import__"}, "scheduler"),
        ("scheduler/scheduler_config.json", {"_class_name": "UNet2DConditionModel"}, "scheduler"),
        ("scheduler/scheduler_config.json", {"_class_name": ["diffusers", "DDIMScheduler"]}, "scheduler"),
    ],
)
def test_29_a_pipeline_that_asks_for_code(sd: Path, edit: Edit, file: str, table: dict[str, object], told: str) -> None:
    edit(sd / "base" / file, **table)
    refuse(sd, told, file)


@pytest.mark.fault(29)
def test_29_code_in_a_part(sd: Path) -> None:
    for place in ("pipeline.py", "unet/unet.py", "vae/deep/x.py"):
        path = sd / "base" / place
        path.parent.mkdir(exist_ok=True)
        path.write_text(CODE.format(str(sd / "left")))
        refuse(sd, str(path), "code")
        path.unlink()
    assert not (sd / "left").exists()


@pytest.mark.fault(30)
def test_30_links_out_of_the_folder(llama: Path) -> None:
    for name in (SHARD, "config.json", "tokenizer.json", "generation_config.json"):
        path, outside = llama / "base" / name, llama / "outside"
        path.rename(outside)
        for target in (outside, "../outside"):
            path.symlink_to(target)
            refuse(llama, str(path), "a link out of the model's folder")
            path.unlink()
        outside.rename(path)
    (llama / "base/loop.json").symlink_to("loop.json")
    refuse(llama, "loop.json")


@pytest.mark.fault(30)
def test_30_a_part_that_is_a_link(sd: Path) -> None:
    (sd / "base/unet").rename(sd / "unet")
    (sd / "base/unet").symlink_to(sd / "unet")
    refuse(sd, f"{sd}/base/unet", "link")


@pytest.mark.fault(30)
def test_30_a_pipe_among_the_files(llama: Path) -> None:
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors.index.json"):
        path, aside = llama / "base" / name, llama / "aside"
        path.rename(aside)
        os.mkfifo(path)
        for command in commands(llama):
            assert forked(*command, seconds=20).code == 4
        path.unlink()
        aside.rename(path)


@pytest.mark.fault(31)
def test_31_duplicate_or_unindexed_tensor(llama: Path) -> None:
    shards = sorted((llama / "base").glob("*.safetensors"))
    first = load_file(shards[0])
    save_file({**first, "extra": torch.zeros(1)}, shards[0])
    refuse(llama, "extra is not in the index")
    double = next(iter(load_file(shards[1])))
    save_file({**first, double: torch.zeros(1)}, shards[0])
    refuse(llama, f"{double} is in {shards[0].name} and in {shards[1].name}")
    save_file(dict(list(first.items())[1:]), shards[0])
    refuse(llama, f"{next(iter(first))} is in no shard")


@pytest.mark.fault(32)
@pytest.mark.parametrize(
    "table",
    [
        {"hidden_size": 10**12},
        {"hidden_size": -32},
        {"hidden_size": 32.0},
        {"vocab_size": 2**31 - 1},
        {"num_hidden_layers": 10**7},
        {"intermediate_size": 10**9},
        {"intermediate_size": 2**62},
        {"num_attention_heads": 10**9},
        {"num_attention_heads": 0},
        {"num_key_value_heads": 3},
        {"head_dim": 10**9},
        {"max_position_embeddings": 10**12},
        {"max_position_embeddings": "many"},
        {"rms_norm_eps": "small"},
        {"hidden_act": "__import__"},
        {"layer_types": ["full_attention"] * 10**6},
        {"pad_token_id": 10**9},
    ],
)
def test_32_sizes_that_overflow(llama: Path, edit: Edit, table: dict[str, object]) -> None:
    edit(llama / "base/config.json", **table)
    for command in commands(llama)[0], commands(llama)[-1]:
        with untouched(llama):
            forked(*command, megabytes=700, seconds=15).refused(4, f"{llama}/base")


@pytest.mark.fault(32)
@pytest.mark.parametrize(
    ("part", "table"),
    [
        ("unet", {"block_out_channels": [10**9, 10**9]}),
        ("unet", {"block_out_channels": [32] * 10**5}),
        ("unet", {"layers_per_block": 10**7}),
        ("unet", {"transformer_layers_per_block": 10**7}),
        ("unet", {"cross_attention_dim": 2**40}),
        ("unet", {"sample_size": 10**9}),
        ("unet", {"attention_head_dim": 0}),
        ("unet", {"norm_num_groups": 0}),
        ("vae", {"block_out_channels": [2**40] * 3}),
        ("vae", {"layers_per_block": 10**7}),
        ("vae", {"latent_channels": 10**9}),
        ("vae", {"scaling_factor": "large"}),
        ("text_encoder", {"num_hidden_layers": 10**7}),
        ("text_encoder", {"vocab_size": 10**12}),
        ("text_encoder", {"max_position_embeddings": 10**10}),
        ("text_encoder", {"intermediate_size": 10**10}),
        ("scheduler", {"num_train_timesteps": 10**12}),
        ("scheduler", {"num_train_timesteps": -1}),
        ("scheduler", {"beta_schedule": "steep"}),
        ("scheduler", {"prediction_type": "sample"}),
    ],
)
def test_32_sizes_of_a_part_that_overflow(sd: Path, edit: Edit, part: str, table: dict[str, object]) -> None:
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    edit(sd / "base" / part / name, **table)
    for command in commands(sd)[0], commands(sd)[-1]:
        with untouched(sd):
            forked(*command, megabytes=700, seconds=15).refused(4, f"{sd}/base")


@pytest.mark.fault(32)
@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("source", [LOOPS, "{{ 'a' * 10 ** 10 }}", "{{ 9 ** (9 ** 9) }}", ""])
def test_32_a_chat_template_that_never_ends(llama: Path, source: str) -> None:
    (llama / "base/chat_template.jinja").write_text(source)
    skipping = ("train-llama", llama / "recipe.yaml", "--set", "data.on_bad=skip")
    others = (*(commands(llama)[i] for i in (2, -1)), skipping) if source in (LOOPS, "") else ()
    for command in (commands(llama)[0], *others):
        with untouched(llama):
            forked(*command, megabytes=700, seconds=50).refused(4, f"{llama}/base", "chat template")


@pytest.mark.fault(32)
@pytest.mark.usefixtures("impatient")
def test_32_a_tokenizer_that_never_ends(llama: Path, edit: Edit) -> None:
    """Its pattern takes each letter of a question millions of steps; in a decoder it is refused unused."""
    question = ("a" * 23 + "!") * 500
    (llama / "chats.jsonl").write_text(json.dumps({"prompt": question, "completion": "b"}) + "\n")
    path, pattern = llama / "base/tokenizer.json", {"Regex": "(a+)+$"}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    edit(path, pre_tokenizer=split)
    answering = ("generate", "--base", llama / "base", "--raw", "--prompt", question, "--max-new-tokens", "1")
    for command in (*(commands(llama)[i] for i in (0, 2)), answering):
        with untouched(llama):
            forked(*command, megabytes=1000, seconds=60).refused(4, f"{path}: the tokenizer took more than")
    edit(path, pre_tokenizer=None, decoder={"type": "Replace", "pattern": pattern, "content": "b"})
    lorakit(*answering).refused(4, f"{path}: its decoder")


@pytest.mark.fault(32)
def test_32_the_patterns_of_a_clip_tokenizer_are_clips_own(sd: Path, edit: Edit) -> None:
    pattern = {"Regex": "(a+)+$"}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    replaced = {"type": "Replace", "pattern": pattern, "content": "b"}
    edit(sd / "base/tokenizer/tokenizer.json", pre_tokenizer=split, normalizer=replaced)
    (sd / "pictures/0.txt").write_text(("a" * 23 + "!") * 500)
    assert forked("train-sd", sd / "recipe.yaml", megabytes=1000, seconds=60).code == 0


@pytest.mark.fault(33)
def test_33_a_tokenizer_of_another_vocabulary(llama: Path) -> None:
    path = llama / "base/tokenizer.json"
    table = json.loads(path.read_text())
    table["model"]["vocab"]["brandnew"] = 5000
    path.write_text(json.dumps(table))
    for command in [commands(llama)[i] for i in (0, 1, 2, -1)]:
        with untouched(llama):
            lorakit(*command).refused(4, f"{llama}/base", "token 5000", "embeddings")
    path.unlink()
    refuse(llama, f"{llama}/base", weights=True)


@pytest.mark.fault(33)
def test_33_a_clip_tokenizer_of_another_vocabulary(sd: Path) -> None:
    path = sd / "base/tokenizer/tokenizer.json"
    table = json.loads(path.read_text())
    table["model"]["vocab"] |= {f"brandnew{i}": 10_000 + i for i in range(3)}
    path.write_text(json.dumps(table))
    refuse(sd, f"{sd}/base", "tokens", weights=True)


@pytest.mark.fault(33)
@pytest.mark.parametrize("length", [10**30, 78, 0, None])
def test_33_a_clip_tokenizer_of_another_length(sd: Path, edit: Edit, length: int | None) -> None:
    edit(sd / "base/tokenizer/tokenizer_config.json", model_max_length=length)
    refuse(sd, f"{sd}/base", "tokens", "positions", weights=True)


def test_a_header_of_random_bytes(llama: Path) -> None:
    path = llama / "base" / SHARD
    whole = path.read_bytes()
    for head in (struct.pack("<Q", 2**63), struct.pack("<Q", 2**63 - 1), b"\xff" * 8, b"\0" * 8):
        path.write_bytes(head + whole[8:])
        forked(*commands(llama)[0], megabytes=200, seconds=10).refused(4, str(path))
