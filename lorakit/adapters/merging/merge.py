"""An adapter added to its base for good: W + scale * B A in float32, rounded once, written a few rows at a time.

The result is a folder that plain transformers or diffusers loads, or a single file in its original names. Tensors that
the adapter does not touch keep their bytes, shards and index keep their layout, configs and tokenizer come along.
"""

from collections.abc import Callable, Iterator, Mapping
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
from lorakit.adapters.merging.source import Source
from lorakit.adapters.merging.stream import OutFile, Tally, Written, write_file
from lorakit.adapters.merging.verify import Checked, Proof, ReadBack
from lorakit.storage.atomic import new_file, new_folder, sweep_killed, write_text
from lorakit.storage.bases import resolve
from lorakit.storage.direct import ROOMS

Compare = Callable[[Path, Mapping[str, Source], Crew], dict[str, Any]]
"""Compares what a merged model at a path computes with base + adapter, its files read through these sources, by path;
ModelError when it is too far off."""
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
    """Largest absolute difference between a sum and what was written."""
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

    ``verify`` recomputes every changed tensor and reads all back, by ``compare`` what it needs.

    Raises ConflictError when ``out`` exists (unless ``overwrite``), or is the base or an adapter; ResourceError when
    the space does not suffice or the disk refuses; ModelError when a sum is not finite in its dtype, or the result does
    not verify.
    """
    check_out(plan, overwrite)
    sweep_killed(plan.out)  # before the space is measured
    check_space(plan)
    rounds = 1 + verify + (verify and compare is not None)  # written, read back, the base read once more beside it
    crew = Crew(plan.size * rounds, progress)
    with _place(plan, overwrite) as place:
        tally, written, checked = _write(plan, place, verify, crew)
        ROOMS.release()
        resolve(str(place))
        compared = _read_back(plan, place, written, compare, crew) if verify else None
        report = MergeReport(
            plan.out,
            plan.changed,
            plan.size,
            ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in tally.dtypes)),
            tally.rounding,
            tally.lost,
            checked if verify else None,
            compared,
            tuple(filter(None, (other_base(adapter, plan.base) for adapter in plan.adapters))),
        )
        digests = {name: file.sha256 for name, file in written.items()}
        text = receipt(plan, place, digests, _outcome(plan, report))
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
            yield file  # an older receipt stays until the new one: its SHA-256 tells that it is not the new file's
        return
    with new_folder(plan.out, manifest=False, replace=overwrite) as folder:
        plan.write_rest(folder)
        write_indexes(folder, plan.files, plan.base.path, untied=plan.untied)
        yield folder


def _write(plan: MergePlan, place: Path, verify: bool, crew: Crew) -> tuple[Tally, dict[str, Written], Checked]:
    """Write the weight files, with ``verify`` proved."""

    def write(path: Path, file: OutFile, cores: Executor) -> tuple[Tally, Written, Checked]:
        path.parent.mkdir(exist_ok=True)
        tally, proof = Tally(), Proof()
        written = write_file(path, file, tally, crew.go_on, cores, proof if verify else None)
        return tally, written, proof.checked

    results = crew.run([partial(write, place / name, file) for name, file in plan.files.items()])
    total = Tally()
    for tally, _, _ in results:
        total.add(tally)
    found = [one for _, _, one in results]
    checked = Checked(sum(one.changed for one in found), max((one.worst for one in found), default=0.0))
    return total, {name: file for name, (_, file, _) in zip(plan.files, results, strict=True)}, checked


def _read_back(
    plan: MergePlan, place: Path, written: Mapping[str, Written], compare: Compare | None, crew: Crew
) -> dict[str, Any] | None:
    """Read all weight files from the disk, in the order in which ``compare`` needs them, then the rest."""
    files = {
        name or place.name: ReadBack(place / name, file, written[name], crew.go_on) for name, file in plan.files.items()
    }
    compared = None if compare is None else compare(place, files, crew)
    crew.run([file.finish for file in files.values()])
    return compared


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
