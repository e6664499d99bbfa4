import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorakit.errors import CheckpointError, ConflictError, ModelError, RecipeError
from lorakit.recipe.schema import LlamaRecipe, Optimizer
from lorakit.storage import atomic, manifest
from lorakit.storage.runs import RunFolder
from lorakit.training import checkpoint, optim, resumable
from lorakit.training.checkpoint import State
from lorakit.training.resumable import changed_fields, check_resumable


def recipe(**sections: Any) -> dict[str, Any]:
    given = {"data": {"train": [{"path": "chats.jsonl"}]}, **sections}
    return LlamaRecipe.model_validate(given).model_dump(mode="json")


def state(**fields: Any) -> State:
    sound = {"base_id": "b", "base_texts": {}, "data_hash": "d", "recipe": recipe(), "world": 1}
    return State(**{**sound, "devices": "cpu", "dtype": "float32", **fields})


def trained(step: int = 1) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    parameter = nn.Parameter(torch.randn(16, 32, generator=torch.Generator().manual_seed(step)))
    optimizer, _ = optim.build([([parameter], 1e-2)], Optimizer(name="adamw"), 9)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return parameter, optimizer


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    parameter, optimizer = trained()
    written = state(step=3, count=10**12, seconds=0.1 + 0.2, first_held_out=1 / 3)
    checkpoint.save(run, written, {"w": parameter}, optimizer, keep=2)
    found = checkpoint.newest(run)
    assert found is not None
    assert found.state == written
    assert torch.equal(found.adapter["w"], parameter)
    other, fresh = trained(2)
    checkpoint.load_optimizer(found, fresh)
    assert torch.equal(fresh.state[other]["exp_avg_sq"], optimizer.state[parameter]["exp_avg_sq"])
    assert sorted(path.name for path in found.folder.iterdir()) == [
        "adapter.safetensors",
        "manifest.json",
        "optimizer.safetensors",
        "state.json",
    ]


@pytest.mark.fault(46)
def test_old_ones_go_only_after_the_new_one_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, (parameter, optimizer) = RunFolder(tmp_path), trained()
    for step in (1, 2):
        checkpoint.save(run, state(step=step), {"w": parameter}, optimizer, keep=2)
    before = {path: path.read_bytes() for path in run.checkpoints.rglob("*") if path.is_file()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(Exception, match="No space left"):
        checkpoint.save(run, state(step=3), {"w": parameter}, optimizer, keep=1)
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in run.checkpoints.rglob("*") if path.is_file()} == before
    checkpoint.save(run, state(step=3), {"w": parameter}, optimizer, keep=1)
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-000003"]


@pytest.mark.fault(46)
def test_old_ones_stay_when_the_new_one_is_not_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that changes a byte between writing and reading back."""
    run, (parameter, optimizer) = RunFolder(tmp_path), trained()
    for step in (1, 2):
        checkpoint.save(run, state(step=step), {"w": parameter}, optimizer, keep=2)
    rename = atomic.os.rename

    def flipped(source: Path, target: Path, **more: object) -> None:
        rename(source, target, **more)
        path = Path(target) / "optimizer.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(bytes(data))

    monkeypatch.setattr(atomic.os, "rename", flipped)
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors"):
        checkpoint.save(run, state(step=3), {"w": parameter}, optimizer, keep=1)
    monkeypatch.undo()
    assert [step for step, _ in run.saved()][:2] == [1, 2]
    found = checkpoint.newest(run)
    assert found is not None
    assert found.state.step == 2


@pytest.mark.fault(52)
def test_order_is_by_step(tmp_path: Path) -> None:
    run, (parameter, optimizer) = RunFolder(tmp_path), trained()
    for step in (999_999, 1_000_000, 7):
        checkpoint.save(run, state(step=step), {"w": parameter}, optimizer, keep=9)
    found = checkpoint.newest(run)
    assert found is not None
    assert found.state.step == 1_000_000


def test_none_and_only_spoilt_ones_are_told_apart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, (parameter, optimizer) = RunFolder(tmp_path), trained()
    assert checkpoint.newest(run) is None
    assert "before its first checkpoint" in caplog.text
    checkpoint.save(run, state(step=1), {"w": parameter}, optimizer, keep=1)
    path = run.checkpoint(1) / "state.json"
    path.write_bytes(path.read_bytes().replace(b'"step": 1', b'"step": 2'))
    with pytest.raises(CheckpointError, match="no checkpoint is intact"):
        checkpoint.newest(run)


def test_changed_fields_of_real_recipes() -> None:
    old = recipe()
    new = recipe(train={"seed": 1, "checkpoint_every": 7}, adapter={"targets": ["q_proj"], "rank_pattern": {"q": 4}})
    assert changed_fields(old, old) == []
    assert changed_fields(old, new) == [
        "adapter.targets",
        "adapter.rank_pattern.q",
        "train.seed",
        "train.checkpoint_every",
    ]
    assert changed_fields({"a": {"b": 1}}, {"a": 2}) == ["a"]
    assert changed_fields({"a": 0}, {}) == ["a"]
    # A field that is newer than the run, and that nobody gave.
    assert (
        changed_fields({"data": {"train": [{"path": "a"}]}}, {"data": {"train": [{"path": "a", "config": None}]}}) == []
    )


@pytest.mark.parametrize(
    "sections",
    [
        {"sample": {"prompts": ["hi"], "every": 3}},
        {"output": {"track": ["tensorboard"], "folder": "elsewhere"}},
        {"train": {"evaluate_every": 5, "keep_checkpoints": 9}},
        {"compute": {"gradient_accumulation": 2, "compile": True, "device": "cpu", "precision": "fp32"}},
        {"base": {"model": "moved"}, "data": {"train": [{"path": "moved.jsonl"}]}},
    ],
)
@pytest.mark.fault(54)
def test_safe_changes_need_allow(sections: dict[str, Any]) -> None:
    changed = state(recipe=recipe(**sections))
    with pytest.raises(RecipeError, match="changed since the run was started") as caught:
        check_resumable(state(), changed, allow=False)
    assert "--allow" in caught.value.hint
    check_resumable(state(), changed, allow=True)


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"train": {"seed": 4}}, "train.seed"),
        ({"train": {"steps": 10}}, "train.steps"),
        ({"adapter": {"rank": 4}}, "adapter.rank"),
        ({"base": {"quantization": "nf4"}}, "base.quantization"),
        ({"data": {"train": [{"path": "a.jsonl", "weight": 2}]}}, "data.train.0.weight"),
        ({"data": {"train": [{"path": "a.jsonl"}, {"path": "b.jsonl"}]}}, "data.train.1"),
    ],
)
@pytest.mark.fault(54)
def test_what_changes_learning_never_passes(sections: dict[str, Any], named: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check_resumable(state(), state(recipe=recipe(**sections)), allow=True)
    assert caught.value.reason.endswith(f": {named}")


@pytest.mark.fault(54)
def test_a_base_that_moved_is_told_by_its_hash() -> None:
    old = state(base_id="here sha256:1")
    check_resumable(old, replace(old, base_id="there sha256:1"), allow=True)
    with pytest.raises(ModelError, match="the base is there sha256:2"):
        check_resumable(old, replace(old, base_id="there sha256:2"), allow=True)


@pytest.mark.fault(54)
def test_what_a_base_is_set_to_is_part_of_it() -> None:
    old = state(base_texts={"config.json": "1", "tokenizer.json": "2", "vocab.json": "3"})
    check_resumable(old, replace(old, base_texts=dict(old.base_texts)), allow=False)
    changed = {"config.json": "9", "tokenizer.json": "2", "added_tokens.json": "4"}
    with pytest.raises(ModelError, match=r"changed since .*: the base's added_tokens.json, config.json, vocab.json$"):
        check_resumable(old, replace(old, base_texts=changed), allow=True)


@pytest.mark.fault(56)
def test_dropout_ties_a_run_to_its_layout() -> None:
    dropping = {"adapter": {"dropout": 0.1}}
    old = state(recipe=recipe(**dropping))
    with pytest.raises(ConflictError, match="2 ranks, but the run was started with 1, and dropout"):
        check_resumable(old, replace(old, world=2), allow=True)
    other = recipe(**dropping, compute={"gradient_accumulation": 2, "compile": True})
    with pytest.raises(RecipeError, match=r"compute.gradient_accumulation, compute.compile$"):
        check_resumable(old, state(recipe=other), allow=True)
    with pytest.raises(ConflictError, match=r"2 ranks, .* summed in another order"):
        check_resumable(state(), state(world=2), allow=False)
    check_resumable(state(), state(world=2), allow=True)


@pytest.mark.fault(54)
def test_precision_is_what_it_came_to() -> None:
    """``auto`` may come to something else on the machine that a run goes on on."""
    with pytest.raises(RecipeError, match=r"^compute.precision: float32 here, .* in bfloat16$") as caught:
        check_resumable(state(dtype="bfloat16"), state(recipe=recipe(compute={"precision": "fp32"})), allow=True)
    assert "--set compute.precision=bf16 --allow" in caught.value.hint
    given = recipe(compute={"precision": "bf16"})
    check_resumable(state(dtype="bfloat16"), state(dtype="bfloat16", recipe=given), allow=True)


@pytest.mark.parametrize(("dropout", "end"), [(0.0, "otherwise$"), (0.1, "dropout draws other masks$")])
@pytest.mark.fault(54)
def test_another_device_needs_allow(dropout: float, end: str) -> None:
    here = state(recipe=recipe(adapter={"dropout": dropout}))
    with pytest.raises(ConflictError, match=f"this is cpu, but the run was started on cuda A, cuda B, .*{end}"):
        check_resumable(replace(here, devices="cuda A, cuda B"), here, allow=False)
    check_resumable(replace(here, devices="cuda A, cuda B"), here, allow=True)


@pytest.mark.parametrize(
    ("optimizer", "passes"),
    [
        ({"schedule": "constant", "warmup": 0}, True),
        ({"schedule": "constant", "warmup": 20}, True),
        ({"schedule": "constant", "warmup": 0.1}, False),
        ({"schedule": "cosine", "warmup": 0}, False),
    ],
)
@pytest.mark.fault(54)
def test_a_run_may_become_longer_where_no_rate_follows_from_its_length(optimizer: dict[str, Any], passes: bool) -> None:
    shorter, longer = (state(recipe=recipe(optimizer=optimizer, train={"steps": steps})) for steps in (10, 20))
    with pytest.raises(RecipeError, match=r"changed since .*: train.steps$") as caught:
        check_resumable(shorter, longer, allow=not passes)
    assert ("--allow" if passes else "merge the adapter") in caught.value.hint
    if passes:
        check_resumable(shorter, longer, allow=True)


@pytest.mark.parametrize("change", [{"new": 1}, {"world": None}])
@pytest.mark.fault(47)
def test_a_checkpoint_of_another_version_is_not_called_damaged(
    tmp_path: Path, change: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path)
    parameter, optimizer = trained()
    checkpoint.save(run, state(step=3), {"w": parameter}, optimizer, keep=2)
    path = run.checkpoint(3) / "state.json"
    table = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({key: value for key, value in table.items() if value is not None or key != "world"}))
    monkeypatch.setattr(manifest, "check_manifest", lambda _: None)  # that version's own held
    with pytest.raises(CheckpointError):
        checkpoint.newest(run)
    assert "step-000003: written by another version of lorakit" in caplog.text


def test_ranks_need_one_recipe_though_its_files_may_lie_elsewhere() -> None:
    one = recipe()
    other = json.loads(json.dumps(one))
    other["base"]["model"], other["output"]["folder"] = "there", "elsewhere"
    alike = [resumable.seen(state(recipe=each), None) for each in (one, other)]
    resumable.check_alike(alike)
    other["optimizer"]["learning_rate"] *= 2
    alike[1] = resumable.seen(state(recipe=other), None)
    with pytest.raises(ConflictError, match=r"rank 1 does not have the recipe \(optimizer.learning_rate\) of rank 0"):
        resumable.check_alike(alike)
