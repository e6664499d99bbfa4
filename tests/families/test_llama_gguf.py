"""A GGUF base unpacked to a folder, beside the folder that the file was made from."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from lorakit.families.llama.base import as_folder
from lorakit.storage.bases import resolve
from tests.tiny import LINES, tiny_gguf

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
