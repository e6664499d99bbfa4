"""What drawing and answering share: what is asked for, where it goes, and how a signal stops it between two results."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from lorakit.errors import INTERRUPTED, TERMINATED, RecipeError, ResourceError, Stopped
from lorakit.families.place import Place
from lorakit.recipe.schema import Compute
from lorakit.storage.bases import BaseLocation
from lorakit.training.device import choose
from lorakit.training.stop import Beginning, StopSignals


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A base with adapters, each with its weight, and what to ask them."""

    location: BaseLocation
    adapters: list[tuple[Path, float]]
    prompts: list[str]
    out: Path | None
    device: str
    precision: str
    seed: int
    fuse: bool
    resume: bool
    beginning: Beginning

    def place(self) -> Place:
        """Where the base goes, and in which precision. RecipeError when that cannot be had here."""
        try:
            return Place(*choose(Compute.model_validate({"device": self.device, "precision": self.precision})))
        except RecipeError as error:
            error.where = error.where.replace("compute.", "--")
            raise

    def stoppable(self) -> StopSignals:
        """The end of ``beginning``: from now on a signal is noted, for ``check_stop``."""
        self.beginning.check()
        told = "stopping after this; a second signal stops at once"
        return StopSignals(lambda _: Console(stderr=True).print(told), world=1)


def check_stop(signals: StopSignals, kept: Path | None) -> None:
    """Raises Stopped after a signal. Between two pictures or pieces of text, since libraries swallow what is raised
    inside them."""
    if signals.received:
        name, code = ("SIGTERM", TERMINATED) if signals.sigterm else ("SIGINT", INTERRUPTED)
        hint = f"the same command with --resume goes on after what is in {kept}" if kept else ""
        raise Stopped(f"{name}: stopped", exit_code=code, hint=hint)


def make_folder(folder: Path, out: Path) -> None:
    """Make the folder that ``out`` is or goes into; ResourceError when there can be no such place."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            out.lstat()  # a name may be too long
    except OSError as error:
        reason = f"cannot be written: {error.strerror}"
        raise ResourceError(reason, where=str(out), hint="give another place with --out") from error
