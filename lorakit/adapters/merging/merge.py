"""An adapter added to its base for good: W + scale * B A in float32, rounded once, written a few rows at a time.

The result is a folder that plain transformers or diffusers loads, or a single file in its original names. Tensors that
the adapter does not touch keep their bytes, shards and index keep their layout, configs and tokenizer come along.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lorakit.adapters.merging.carry import write_indexes
from lorakit.adapters.merging.out import check_out, check_space
from lorakit.adapters.merging.parallel import Crew
from lorakit.adapters.merging.plan import MergePlan
from lorakit.adapters.merging.receipt import other_base, receipt, receipt_path
from lorakit.adapters.merging.stream import OutFile, Tally, write_file
from lorakit.adapters.merging.verify import Checked, Proof, verify_file
from lorakit.storage.atomic import new_file, new_folder, sweep_killed, write_text
from lorakit.storage.bases import resolve
from lorakit.storage.direct import ROOMS

Compare = Callable[[Path], dict[str, Any]]
"""Compares what a merged model at a path computes with base + adapter; ModelError when it is too far off."""
Progress = Callable[[int, int], None]
"""Told from any thread how many bytes are written, or written and verified, of how many."""


@dataclass(frozen=True)
class MergeReport:
    """What a merge did."""

    out: Path
    changed: int
    """Tensors that the adapters changed."""
    size: int
    """Bytes of the weights written."""
    dtype: str
    """Of the changed tensors: ``float16``, or several with commas."""
    rounding: float
    """Largest absolute difference between a float32 sum and what was written."""
    lost: float
    """Share of the change that rounding took: norm(written - sum) / norm(sum - W), over all changed tensors."""
    checked: Checked | None
    compared: dict[str, Any] | None
    """What ``compare`` found."""
    warnings: tuple[str, ...]


def merge(
    plan: MergePlan,
    *,
    overwrite: bool = False,
    verify: bool = True,
    compare: Compare | None = None,
    progress: Progress | None = None,
) -> MergeReport:
    """Write what ``plan`` says, with a receipt; its ``out`` is absent or complete whatever happens.

    ``verify`` recomputes every changed tensor and reads all back; ``compare`` compares what the model computes.

    Raises ConflictError when ``out`` exists (unless ``overwrite``), or is the base or an adapter; ResourceError when
    the space does not suffice or the disk refuses; ModelError when a sum is not finite in its dtype, or the result does
    not verify.
    """
    check_out(plan, overwrite)
    sweep_killed(plan.out)  # before the space is measured
    check_space(plan)
    with _place(plan, overwrite) as place:
        tally, written, checked = _write(plan, place, verify, progress)
        ROOMS.release()
        resolve(str(place))
        compared = None if compare is None else compare(place)
        report = MergeReport(
            plan.out,
            plan.changed,
            plan.size,
            ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in tally.dtypes)),
            tally.rounding,
            tally.lost,
            checked,
            compared,
            tuple(filter(None, (other_base(adapter, plan.base) for adapter in plan.adapters))),
        )
        text = receipt(plan, place, written, _outcome(plan, report))
        if "" not in plan.files:
            receipt_path(place).write_text(text)
    if "" in plan.files:
        write_text(receipt_path(plan.out), text)
    return report


@contextmanager
def _place(plan: MergePlan, overwrite: bool) -> Iterator[Path]:
    """Where to write: a file, or a folder that has all but the weights and becomes ``plan.out`` in the end."""
    if "" in plan.files:
        with new_file(plan.out, replace=overwrite) as file:
            yield file
            receipt_path(plan.out).unlink(missing_ok=True)  # an older file's
        return
    with new_folder(plan.out, manifest=False, replace=overwrite) as folder:
        plan.write_rest(folder)
        write_indexes(folder, plan.files)
        yield folder


def _write(
    plan: MergePlan, place: Path, verify: bool, progress: Progress | None
) -> tuple[Tally, dict[str, str], Checked | None]:
    """Write the weight files, proved and read back; their SHA-256."""
    crew = Crew(plan.size * (1 + verify), progress)

    def write(path: Path, file: OutFile, cores: Executor) -> tuple[Tally, str, Checked]:
        path.parent.mkdir(exist_ok=True)
        tally, proof = Tally(), Proof()
        digest = write_file(path, file, tally, crew.go_on, cores, proof if verify else None)
        if verify:
            verify_file(path, file, digest, crew.go_on)
        return tally, digest, proof.checked

    paths = {name: place / name if name else place for name in plan.files}
    results = crew.run([partial(write, paths[name], file) for name, file in plan.files.items()])
    total = Tally()
    for tally, _, _ in results:
        total.add(tally)
    found = [one for _, _, one in results]
    checked = Checked(sum(one.changed for one in found), max((one.worst for one in found), default=0.0))
    written = {name: digest for name, (_, digest, _) in zip(plan.files, results, strict=True)}
    return total, written, checked if verify else None


def _outcome(plan: MergePlan, report: MergeReport) -> dict[str, Any]:
    checked = report.checked
    return {
        "changed_tensors": report.changed,
        "dtype": report.dtype,
        "quant_base": plan.settings.quant_base,
        "untied": plan.untied,
        "largest_rounding": report.rounding,
        "delta_lost_to_dtype": report.lost,
        "verified": {
            "tensors": None if checked is None else {"recomputed": checked.changed, "worst_of_allowed": checked.worst},
            "outputs": report.compared,
        },
    }
