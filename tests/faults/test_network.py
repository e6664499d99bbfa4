"""Nothing is fetched unless a hub id is named: no command on local input opens a socket of the internet.

The kernel ends the process that does, whichever library it is in.
"""

from pathlib import Path

import pytest

from tests.faults.harness import Told, forked
from tests.torture import trace
from tests.torture.refuse import DEATH

pytestmark = pytest.mark.skipif(not trace.supported(), reason="no system call filter here: it takes Linux on x86-64")


def at_home(*words: object) -> Told:
    return forked(*words, seconds=120, refused={"a socket of the internet": DEATH})


def test_the_watch_sees_a_hub_id(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="died"):
        at_home("generate", "--base", "owner/no-such-model", "--prompt", "a", "--out", tmp_path / "out")


def test_llama_commands_stay_at_home(llama: Path) -> None:
    recipe, run, base = llama / "recipe.yaml", llama / "runs/chats", llama / "base"
    for words in (
        ("data", recipe),
        ("train-llama", recipe, "--dry-run"),
        ("train-llama", recipe),
        ("train-llama", recipe, "--resume"),
        ("verify", recipe),
        ("inspect", run),
        ("merge", base, run, llama / "merged"),
        ("extract", base, llama / "merged", llama / "extracted", "--rank", "2"),
        ("resize", run, llama / "resized", "--rank", "2"),
        ("generate", "--base", base, "--adapter", run, "--prompt", "a", "--max-new-tokens", "2"),
        ("convert", run, llama / "lora.gguf", "--to", "gguf", "--base", base),
        ("doctor",),
    ):
        assert at_home(*words).code == 0, words


def test_stable_diffusion_commands_stay_at_home(sd: Path) -> None:
    recipe, run, base = sd / "recipe.yaml", sd / "runs/colours", sd / "base"
    for words in (
        ("data", recipe),
        ("train-sd", recipe, "--dry-run"),
        ("train-sd", recipe),
        ("verify", recipe),
        ("merge", base, run, sd / "merged"),
        ("generate", "--base", base, "--adapter", run, "--prompt", "a", "--out", sd / "out", "--steps", "2"),
        ("convert", run, sd / "lora.safetensors", "--to", "kohya", "--base", base),
    ):
        assert at_home(*words).code == 0, words


def test_what_is_broken_stays_at_home_too(llama: Path) -> None:
    """A missing tokenizer or shard makes some libraries look for it on the hub."""
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"):
        aside = llama / "aside"
        (llama / "base" / name).rename(aside)
        at_home("generate", "--base", llama / "base", "--prompt", "a", "--max-new-tokens", "2")
        aside.rename(llama / "base" / name)
