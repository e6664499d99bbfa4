"""No reader opens a pickle: one that would leave a canary, under each name that a reader might take it by."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from lorakit.storage.manifest import sha256
from tests.faults.harness import lorakit

Canary = Callable[[Path], Path]


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "state.json"])
def test_in_a_checkpoint_with_its_manifest_made_to_fit(llama: Path, canary: Canary, name: str) -> None:
    assert lorakit("train-llama", llama / "recipe.yaml").code == 0
    folder = llama / "runs/chats/checkpoints/step-000002"
    left = canary(folder / name)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"sha256": sha256(folder / name), "size": (folder / name).stat().st_size}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for step in folder.parent.iterdir():
        if step != folder:
            for path in step.iterdir():
                path.unlink()
            step.rmdir()
    lorakit("train-llama", llama / "recipe.yaml", "--resume").refused(9)
    assert not left.exists()


def test_beside_the_weights_of_a_base(llama: Path, canary: Canary) -> None:
    """Pickles that lie beside safetensors, as on many hubs, are passed by."""
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth", "scheduler.pt"):
        left = canary(llama / "base" / name)
    assert lorakit("train-llama", llama / "recipe.yaml").code == 0
    words = ("merge", llama / "base", llama / "runs/chats", llama / "merged")
    assert lorakit(*words).code == 0
    assert not [path for path in (llama / "merged").iterdir() if path.suffix in (".bin", ".pt", ".pth")]
    assert not left.exists()


def test_in_the_parts_of_a_stable_diffusion(sd: Path, canary: Canary) -> None:
    for part in ("unet", "vae", "text_encoder"):
        for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin", "model.bin"):
            left = canary(sd / "base" / part / name)
    assert lorakit("train-sd", sd / "recipe.yaml").code == 0
    assert not left.exists()


def test_in_the_data(llama: Path, canary: Canary) -> None:
    rows = [json.loads(line) for line in (llama / "chats.jsonl").read_text().splitlines()]
    datasets.Dataset.from_list(rows).save_to_disk(llama / "set")
    left = canary(llama / "set/data-00000-of-00001.arrow")
    for name in ("chats.parquet", "chats.json", "chats.csv", "other.jsonl"):
        canary(llama / name)
    for source in ("set", "chats.parquet", "chats.json", "chats.csv", "other.jsonl"):
        lorakit("data", llama / "recipe.yaml", "--set", f"data.train.0.path={llama / source}").refused(3, source)
    assert not left.exists()


def test_in_parquets_own_metadata(llama: Path, canary: Canary) -> None:
    """Arrow's old Python extension types were pickles in a column's metadata (CVE-2023-47248)."""
    left = canary(llama / "x.pt")
    payload = pickle.dumps(_Open(left))
    kind = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": payload}
    field = pyarrow.field("text", pyarrow.string(), metadata=kind)
    table = pyarrow.table([["a"] * 8], schema=pyarrow.schema([field]))
    parquet.write_table(table, llama / "x.parquet")
    told = lorakit("data", llama / "recipe.yaml", "--set", f"data.train.0.path={llama}/x.parquet")
    assert told.code in (0, 3), told.err
    assert not left.exists()


class _Open:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return open, (str(self.path), "w")
