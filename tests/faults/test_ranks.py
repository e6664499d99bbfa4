"""What all ranks fail with is told once (two real ranks by Accelerate's launcher)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorakit.data.cache import default_folder
from tests.faults.harness import lorakit, process
from tests.tiny import tiny_gguf


@pytest.mark.fault(56)
def test_56_another_number_of_ranks_is_one_line(llama: Path) -> None:
    words = ("train-llama", llama / "recipe.yaml", "--set", "adapter.dropout=0.1")
    assert lorakit(*words).code == 0
    told = process(*words, "--resume", "--num-processes", "2", seconds=300).refused(7)
    assert told.error.startswith("lorakit: error: --num-processes: 2 ranks, but the run was started with 1")
    assert "resume with 1" in told.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("change", "code", "told"),
    [
        ("data.train.0.path={folder}/bad.jsonl", 3, "{folder}/bad.jsonl:1: bad JSON"),
        ("compute.device=cuda", 2, "compute.device"),
    ],
)
def test_what_no_rank_can_take_is_one_line(llama: Path, change: str, code: int, told: str) -> None:
    (llama / "bad.jsonl").write_text("{\n")
    words = ("train-llama", llama / "recipe.yaml", "--num-processes", "2", "--set", change.format(folder=llama))
    assert process(*words, seconds=300).refused(code).error.startswith(f"lorakit: error: {told.format(folder=llama)}")


def test_ranks_that_unpack_a_gguf_base_at_the_same_time(llama: Path) -> None:
    path = tiny_gguf(llama / "base.gguf")
    words = ("train-llama", llama / "recipe.yaml", "--set", f"base.model={path}")
    told = process(*words, "--num-processes", "2", seconds=300)
    assert told.code == 0, told.err
    (unpacked,) = [path for path in default_folder().glob("unpacked/*") if path.is_dir()]
    assert (unpacked / "model.safetensors").is_file()
    assert told.err.count("is unpacked once") <= 1  # by rank 0, or in silence
    (unpacked / "model.safetensors").unlink()
    told = lorakit(*words, "--set", "output.name=healed")
    assert told.code == 0, told.err
    runs = llama / "runs"
    one, two = (load_file(runs / name / "adapter/adapter_model.safetensors") for name in ("chats", "healed"))
    assert all(torch.allclose(one[key], two[key], atol=1e-5) for key in one)
