"""Nothing is fetched unless a hub id is named: no command on local input tries to reach anything."""

import socket
from pathlib import Path

import pytest

from tests.faults.harness import lorakit


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every address that anything tries to reach or to look up."""
    tried: list[object] = []

    def refuse(*where: object, **_: object) -> None:
        tried.append(where[-1])
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    return tried


def test_the_watch_sees_a_hub_id(tmp_path: Path, asked: list[object]) -> None:
    told = lorakit("generate", "--base", "owner/no-such-model", "--prompt", "a", "--out", tmp_path / "out")
    told.refused(4, "owner/no-such-model")
    assert asked


def test_llama_commands_stay_at_home(llama: Path, asked: list[object]) -> None:
    run, base = llama / "runs/chats", llama / "base"
    for words in (
        ("data", llama / "recipe.yaml"),
        ("train-llama", llama / "recipe.yaml", "--dry-run"),
        ("train-llama", llama / "recipe.yaml"),
        ("train-llama", llama / "recipe.yaml", "--resume"),
        ("merge", base, run, llama / "merged"),
        ("generate", "--base", base, "--adapter", run, "--prompt", "a", "--max-new-tokens", "2"),
        ("convert", run, llama / "lora.gguf", "--to", "gguf", "--base", base),
    ):
        told = lorakit(*words)
        assert told.code == 0, told.err
        assert asked == [], words


def test_stable_diffusion_commands_stay_at_home(sd: Path, asked: list[object]) -> None:
    run, base = sd / "runs/colours", sd / "base"
    for words in (
        ("data", sd / "recipe.yaml"),
        ("train-sd", sd / "recipe.yaml", "--dry-run"),
        ("train-sd", sd / "recipe.yaml"),
        ("merge", base, run, sd / "merged"),
        ("generate", "--base", base, "--adapter", run, "--prompt", "a", "--out", sd / "out", "--steps", "2"),
        ("convert", run, sd / "lora.safetensors", "--to", "kohya", "--base", base),
    ):
        told = lorakit(*words)
        assert told.code == 0, told.err
        assert asked == [], words


def test_what_is_broken_stays_at_home_too(llama: Path, asked: list[object]) -> None:
    """A missing tokenizer or shard makes some libraries look for it on the hub."""
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"):
        aside = llama / "aside"
        (llama / "base" / name).rename(aside)
        lorakit("generate", "--base", llama / "base", "--prompt", "a", "--max-new-tokens", "2")
        aside.rename(llama / "base" / name)
        assert asked == [], name
