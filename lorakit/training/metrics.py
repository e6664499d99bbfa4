"""What a run measures: metrics.jsonl, the loss curve as a picture, trackers, and the progress a caller may show."""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from lorakit.errors import DataError, first_line
from lorakit.storage import atomic, disk
from lorakit.storage.runs import RunFolder
from lorakit.training.launch import Session

log = logging.getLogger("lorakit")

SMOOTHING = 0.95


class Progress(Protocol):
    """Told by the loop on rank 0 how far it is; it may print, the loop does not."""

    def start(self, total: int, done: int) -> None:
        """Training begins: ``total`` updates, of which ``done`` were made before a resume."""
        ...

    def step(self, step: int, loss: float) -> None:
        """Update ``step`` (counted from 1) was made; ``loss`` is its mean before the update."""
        ...

    def held_out(self, step: int, loss: float, metrics: Mapping[str, float]) -> None:
        """The held-out loss after ``step`` updates, and what the family makes of it (perplexity, say)."""
        ...

    def stage(self, text: str) -> None:
        """What is being done now, beside the steps: evaluating, saving."""
        ...


class Silent:
    """A Progress that shows nothing: for ranks other than 0."""

    def start(self, total: int, done: int) -> None: ...

    def step(self, step: int, loss: float) -> None: ...

    def held_out(self, step: int, loss: float, metrics: Mapping[str, float]) -> None: ...

    def stage(self, text: str) -> None: ...


class Metrics:
    """The writer of metrics.jsonl on rank 0; on other ranks ``write`` does nothing.

    A line is one JSON object with ``step`` and either ``loss`` or ``held_out_loss``. On a resume the lines that the
    interrupted run wrote after its checkpoint are cut off, so that no step is there twice.
    """

    def __init__(self, run: RunFolder, session: Session, *, step: int, evaluated: int) -> None:
        self._run = run
        self._session = session
        self._path = run.metrics if session.is_main else None
        if self._path is not None:
            cut(self._path, step=step, evaluated=evaluated)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line and hand the values to the trackers. ResourceError when the disk refuses."""
        if self._path is None:
            return
        with disk.disk_errors(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        self._session.accelerator.log(dict(values), step=step)

    def draw(self) -> None:
        """Draw loss.png from what metrics.jsonl holds. What keeps it from that is a warning: the run is saved."""
        if self._path is not None:
            try:
                draw(read(self._path), self._run.loss_png)
            except Exception as error:
                log.warning("%s cannot be drawn: %s", self._run.loss_png.name, first_line(error))


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that a killed process left unfinished is passed over.

    DataError naming the line when another one is no JSON object with a step.
    """
    return list(_rows(path))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
            yield {**row, "step": int(row["step"])}
        except (ValueError, TypeError, KeyError) as error:
            raise DataError("not a line of metrics", where=f"{path}:{number}") from error


def cut(path: Path, *, step: int, evaluated: int) -> None:
    """Keep the training lines up to ``step`` and the held-out lines up to ``evaluated``.

    Lines that a power cut spoilt can only come after those of ``step``, which were flushed; DataError for others.
    """
    rows: list[dict[str, Any]] = []
    try:
        rows.extend(_rows(path))
    except DataError:
        if step and not any(row["step"] == step and "loss" in row for row in rows):
            raise
    kept = [row for row in rows if row["step"] <= (evaluated if "held_out_loss" in row else step)]
    atomic.write_text(path, "".join(json.dumps(row) + "\n" for row in kept))


def smooth(losses: list[float]) -> list[float]:
    """Exponential moving average without the pull of its start: sum of b^k l / sum of b^k, b = 0.95."""
    smoothed, total, weight = [], 0.0, 0.0
    for loss in losses:
        total, weight = SMOOTHING * total + loss, SMOOTHING * weight + 1
        smoothed.append(total / weight)
    return smoothed


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Training loss, its moving average, and held-out loss over the steps, as a PNG."""
    import io

    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5))
    axes = figure.add_axes((0.1, 0.12, 0.87, 0.85))
    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    held_out = [(row["step"], row["held_out_loss"]) for row in rows if "held_out_loss" in row]
    if train:
        steps, losses = (list(column) for column in zip(*train, strict=True))
        axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="training")
        axes.plot(steps, smooth(losses), color="tab:blue", label="training, smoothed")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="tab:orange", marker="o", markersize=4, label="held out")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    if train or held_out:
        axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    atomic.write_bytes(path, picture.getvalue())
