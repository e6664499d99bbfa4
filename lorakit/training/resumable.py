"""Whether a run may go on: what has changed since it was started, and what of that changes what is learned."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from typing import Any

from lorakit.errors import ConflictError, DataError, ModelError, RecipeError, shown
from lorakit.storage.bases import split_base_id
from lorakit.storage.fingerprint import Fingerprint
from lorakit.storage.runs import RunFolder
from lorakit.training.checkpoint import Checkpoint, State

SAFE = (
    "sample.*",
    "output.*",
    "train.checkpoint_every",
    "train.checkpoint_minutes",
    "train.keep_checkpoints",
    "train.evaluate_every",
    "compute.device",
    "compute.precision",
    "compute.gradient_checkpointing",
    "base.model",
    "base.revision",
    "data.path",
    "data.train.*.path",
    "data.held_out.*.path",
    "data.on_bad",
)
"""Fields that do not change what is learned, beyond float32 rounding. Base and data may have moved: their hashes say
whether they are the same. What device and precision come to here, ``State.devices`` and ``State.dtype`` say."""
PLACES = ("base.model", "base.revision", "data.path", "data.train.*.path", "data.held_out.*.path", "output.folder")
"""Fields that may differ between the nodes of a run: what is found there has to be the same."""
SAFE_WITHOUT_DROPOUT = ("compute.gradient_accumulation", "compute.compile")
"""Dropout's masks are drawn a micro-batch, so they depend on how a batch is divided, and others when compiled."""

SAFE_WHEN_CONSTANT = ("train.steps", "train.epochs")
"""The run's length, where no learning rate follows from it."""

_PRECISIONS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def seen(state: State, found: Checkpoint | None) -> dict[str, Any]:
    """What a rank, which reads its own disk, found there, by what it is called."""
    return {
        "recipe": state.recipe,
        "base": split_base_id(state.base_id)[1],
        "base's files": dict(state.base_texts),
        "data": state.data_hash,
        "precision": state.dtype,
        "checkpoint": None if found is None else found.state.step,
    }


def check_alike(ranks: Sequence[Mapping[str, Any]]) -> None:
    """ConflictError when the ranks have not ``seen`` the same."""
    for rank, there in enumerate(ranks):
        for what in (name for name in there if there[name] != ranks[0][name]):
            if what == "recipe":
                fields = [field for field in changed_fields(ranks[0][what], there[what]) if not _fits(field, PLACES)]
                if not fields:
                    continue
                what = f"recipe ({', '.join(fields)})"
            hint = "all nodes need the same files, and one output.folder that they share"
            raise ConflictError(f"rank {rank} does not have the {what} of rank 0", hint=hint)


def check_resumable(old: State, new: State, *, allow: bool) -> None:
    """Refuse to go on with anything but the run that was started.

    RecipeError for changed fields and another precision: those that change what is learned never pass, others with
    ``allow``. ModelError for another base, or one whose configuration or vocabulary changed. ConflictError for another
    number of ranks, which with dropout never passes, without it only when allowed, and for other devices, which pass
    when allowed: a run whose machine is gone must not be lost.
    """
    if old.dtype != new.dtype:
        reason = f"{new.dtype} here, but the run was started in {old.dtype}"
        hint = f"--set compute.precision={_PRECISIONS[old.dtype]} --allow, or start a new run"
        raise RecipeError(reason, where="compute.precision", hint=hint)
    dropout = bool(old.recipe["adapter"]["dropout"] or new.recipe["adapter"]["dropout"])
    changed = changed_fields(old.recipe, new.recipe)
    safe = [*SAFE, *(() if dropout else SAFE_WITHOUT_DROPOUT)]
    safe += SAFE_WHEN_CONSTANT if _is_constant(old.recipe["optimizer"]) else ()
    unsafe = [field for field in changed if not _fits(field, safe)]
    if unsafe:
        hint = "put them back, or start a new run under another output.name"
        if set(unsafe) <= set(SAFE_WHEN_CONSTANT):
            hint = "the learning rate follows from it; to train on, merge the adapter and start from the result"
        raise RecipeError(f"changed since the run was started: {', '.join(unsafe)}", hint=hint)
    if changed and not allow:
        hint = "these do not change what is learned: go on with --allow"
        raise RecipeError(f"changed since the run was started: {', '.join(changed)}", hint=hint)
    if split_base_id(old.base_id)[1] != split_base_id(new.base_id)[1]:
        raise ModelError(f"the base is {new.base_id}, but the run was started with {old.base_id}")
    if altered := sorted(dict(old.base_texts.items() ^ new.base_texts.items())):
        hint = "put the base back, or start a new run under another output.name"
        raise ModelError(f"changed since the run was started: the base's {', '.join(map(shown, altered))}", hint=hint)
    if old.world != new.world and (dropout or not allow):
        reason = f"{new.world} rank{'s' * (new.world > 1)}, but the run was started with {old.world}, and "
        reason += "dropout's masks depend on that" if dropout else "gradients would be summed in another order"
        hint = f"resume with {old.world}" + ("" if dropout else ", or go on with --allow, equal up to float32 rounding")
        raise ConflictError(reason, where="--num-processes", hint=hint)
    if old.devices != new.devices and not allow:
        reason = f"this is {new.devices}, but the run was started on {old.devices}, where sums are rounded otherwise"
        reason += " and dropout draws other masks" if dropout else ""
        raise ConflictError(reason, where="compute.device", hint="go on there, or here with --allow")


def _fits(field: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(field, pattern) for pattern in patterns)


def _is_constant(optimizer: Mapping[str, Any]) -> bool:
    """Whether the rate of a step is the same however many follow: a warmup below 1 is a share of them."""
    return bool(optimizer["schedule"] == "constant" and (optimizer["warmup"] == 0 or optimizer["warmup"] >= 1))


def check_data(run: RunFolder, old: State, data: Fingerprint) -> None:
    """DataError, naming what changed, when ``data`` is not what ``run`` was started with.

    The names come from data.json; when that is not the one that belongs to the checkpoint, none are told.
    """
    if old.data_hash == data.digest:
        return
    reason = "the training data changed since the run was started"
    with suppress(OSError, ValueError, KeyError, TypeError):
        before = Fingerprint.read(run.data)
        if before.digest == old.data_hash:
            reason += f": {before.changes(data)}"
    raise DataError(reason, hint="put the data back, or start a new run under another output.name")


def changed_fields(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Dotted names of the fields that differ between two plain recipes, in order. A list of sections (``data.train``)
    is compared item by item under its index, any other list as a whole. A field that one of them has not, as it is
    newer than the run, is None there."""
    changed = []
    for key in dict.fromkeys([*old, *new]):
        before, after = _sections(old.get(key)), _sections(new.get(key))
        if before is not None and after is not None:
            changed += [f"{key}.{below}" for below in changed_fields(before, after)]
        elif old.get(key) != new.get(key):
            changed.append(key)
    return changed


def _sections(value: object) -> Mapping[str, Any] | None:
    if isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
        return {str(place): one for place, one in enumerate(value)}
    return value if isinstance(value, Mapping) else None
