"""A GGUF base unpacked to a folder, beside the folder that the file was made from."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lorakit.errors import ModelError
from lorakit.families.llama.base import as_folder
from lorakit.storage.bases import resolve, texts
from tests.raw_gguf import U32, Entry, RawGguf, array, number, real, string
from tests.tiny import LINES, tiny_gguf, tiny_llama

TEXTS = (*LINES, "<|im_start|>user\nHi, 거꾸로 🙂<|im_end|>", "one <s> and two <|endoftext|>  ")


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The folder, and what its GGUF file is unpacked to."""
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    path = tiny_gguf(tmp_path / "base.gguf")
    return tmp_path / "base-folder", as_folder(resolve(str(path)), torch.float32).path


def test_the_weights_and_tokens_are_those_that_the_file_was_made_from(made: tuple[Path, Path]) -> None:
    folder, unpacked = made
    weights, expected = (load_file(path / "model.safetensors") for path in (unpacked, folder))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    tokenizer, original = (AutoTokenizer.from_pretrained(path) for path in (unpacked, folder))
    assert tokenizer.get_vocab() == original.get_vocab()  # transformers alone adds <|endoftext|>, without an embedding
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == original(text)["input_ids"]
    for token in ("bos_token", "eos_token", "pad_token", "chat_template"):
        assert getattr(tokenizer, token) == getattr(original, token)


@pytest.mark.parametrize("lost", ["model.safetensors", "config.json", ""])
def test_a_damaged_one_is_made_anew(made: tuple[Path, Path], lost: str) -> None:
    _, unpacked = made
    before = (unpacked / "model.safetensors").read_bytes()
    if lost:
        (unpacked / lost).unlink()
    else:
        (unpacked / "model.safetensors").write_bytes(before[:-1])
    again = as_folder(resolve(str(unpacked.parents[2] / "base.gguf")), torch.float32).path
    assert again == unpacked
    assert (again / "model.safetensors").read_bytes() == before
    assert (again / "config.json").is_file()


LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"rope_theta": 500000.0, "original_max_position_embeddings": 8192}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}


def scaled(folder: Path, rope: dict[str, Any]) -> Path:
    """``tiny_gguf`` with what llama.cpp's converter writes of scaled positions; ``folder`` becomes the same model."""
    table = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(table | {"rope_parameters": rope}))
    raw, kind = RawGguf.read(tiny_gguf(folder.parent / "scaled.gguf", model=folder)), rope["rope_type"]
    keys: dict[str, bytes] = {"llama.rope.freq_base": real(rope["rope_theta"])}
    if kind == "llama3":  # by transformers' own frequencies
        plain, _ = ROPE_INIT_FUNCTIONS["llama3"](AutoConfig.from_pretrained(folder), torch.device("cpu"))
        count = len(plain)
        base = rope["rope_theta"] ** -(torch.arange(count) / count)
        raw.tensors.append((b"rope_freqs.weight", Entry([count], 0, len(raw.data))))
        raw.data += (base / plain).float().numpy().tobytes().ljust(32, b"\0")
    else:
        keys |= {"llama.rope.scaling.type": string(kind), "llama.rope.scaling.factor": real(rope["factor"])}
    if kind == "yarn":
        keys["llama.rope.scaling.original_context_length"] = number(rope["original_max_position_embeddings"], U32)
    for key, value in keys.items():
        raw.set(key, value)
    return raw.write(folder.parent / "scaled.gguf")


@pytest.mark.parametrize("rope", [LLAMA3, YARN, {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}])
def test_scaled_positions_are_those_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rope: dict[str, Any]
) -> None:
    """transformers reads neither llama.cpp's keys nor its tensor of them."""
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    folder = tiny_llama(tmp_path / "folder")
    ids = torch.arange(3, 60)[None]
    unscaled = LlamaForCausalLM.from_pretrained(folder)(ids).logits
    path = scaled(folder, rope)
    expected = LlamaForCausalLM.from_pretrained(folder)(ids).logits
    assert texts(resolve(str(path)))  # for a run that was started before they were read
    unpacked = as_folder(resolve(str(path)), torch.float32).path
    found = LlamaForCausalLM.from_pretrained(unpacked)(ids).logits
    assert float((expected - unscaled).detach().abs().max()) > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    # Where transformers before 5, and mlx-lm, look for them.
    config = json.loads((unpacked / "config.json").read_text())
    assert (config["rope_theta"], config["torch_dtype"]) == (rope["rope_theta"], "float32")
    assert {**config["rope_scaling"], "rope_theta": rope["rope_theta"]} == pytest.approx(rope)
    assert json.loads((unpacked / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("llama.rope.scaling.type", string("longrope"), "'longrope' is not known"),
        ("llama.rope.scaling.yarn_attn_factor", real(0.5), "YaRN with 0.5 is not known"),
    ],
)
def test_another_scaling_is_refused(tmp_path: Path, key: str, value: bytes, told: str) -> None:
    path = scaled(tiny_llama(tmp_path / "folder"), YARN)
    RawGguf.read(path).set(key, value).write(path)
    with pytest.raises(ModelError, match=told):
        resolve(str(path))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.rope.freq_base", real(0.0)),
        ("llama.rope.freq_base", real(-2.0)),
        ("llama.rope.freq_base", array(0, 0)),
        ("llama.rope.scaling.factor", real(-4.0)),
        ("llama.rope.scaling.factor", string("2")),
        ("llama.rope.scaling.type", array(0, 0)),
        ("llama.rope.scaling.original_context_length", string("long")),
        ("llama.rope.scaling.yarn_beta_fast", string("fast")),
    ],
)
@pytest.mark.parametrize("rope", [LLAMA3, YARN], ids=["llama3", "yarn"])
def test_hostile_positions_are_refused(tmp_path: Path, rope: dict[str, Any], key: str, value: bytes) -> None:
    path = scaled(tiny_llama(tmp_path / "folder"), rope)
    RawGguf.read(path).set(key, value).write(path)
    with pytest.raises(ModelError, match=rf"{key}|rope_freqs\.weight: beside"):
        resolve(str(path))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_hostile_frequencies_are_refused(tmp_path: Path, value: float) -> None:
    path = scaled(tiny_llama(tmp_path / "folder"), LLAMA3)
    raw = RawGguf.read(path)
    place = raw.tensor("rope_freqs.weight").offset
    raw.data = raw.data[:place] + np.full(4, value, np.float32).tobytes() + raw.data[place + 16 :]
    raw.write(path)
    with pytest.raises(ModelError, match=r"rope_freqs\.weight"):
        resolve(str(path))


def test_frequencies_that_are_not_llama_3s_are_refused(tmp_path: Path) -> None:
    path = scaled(tiny_llama(tmp_path / "folder"), LLAMA3 | {"low_freq_factor": 0.5})
    with pytest.raises(ModelError, match=r"rope_freqs\.weight: not Llama 3's scaling"):
        resolve(str(path))
