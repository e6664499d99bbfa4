"""What is looked at between updates: the held-out loss and the samples, with the training's state left as it was."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lorakit.families.task import Task
from lorakit.storage import atomic
from lorakit.training.launch import Session


@contextmanager
def evaluation_mode(task: Task, session: Session) -> Iterator[None]:
    """No dropout and no gradients; afterwards torch's random state is what it was, and the model trains again."""
    devices = [session.device] if session.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        task.model.eval()
        try:
            yield
        finally:
            task.model.train()


def held_out_loss(task: Task, session: Session) -> float | None:
    """Mean loss over the held-out items of all ranks; None when there are none."""
    sums = torch.zeros(2, dtype=torch.float64, device=session.device)
    with evaluation_mode(task, session):
        for batch in task.batches("held_out", 0):
            moved = batch.to(session.device)
            sums[0] += task.loss(moved)
            sums[1] += moved.count
    loss_sum, count = session.all_sum(sums).tolist()
    return loss_sum / count if count else None


def sample(task: Task, session: Session, final: Path) -> None:
    """Have rank 0 write samples to the folder ``final``, which stays absent when the task has none to make."""

    def write() -> None:
        with atomic.new_folder(final, manifest=False, replace=True) as folder:
            task.sample(folder)
        if not any(final.iterdir()):
            final.rmdir()

    with evaluation_mode(task, session):
        session.on_main(write)
