"""The one training loop, for every family, on one process or many."""

import dataclasses
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorakit.errors import DataError, NonFiniteError, ResourceError, first_line, is_out_of_memory
from lorakit.families.task import Batch, Task
from lorakit.numerics.order import mix
from lorakit.recipe.schema import Compute, Optimizer, Train
from lorakit.storage import atomic
from lorakit.storage.runs import RunFolder
from lorakit.training import checkpoint, device, measure, optim, resumable
from lorakit.training.checkpoint import State
from lorakit.training.flat import FlatParameters
from lorakit.training.launch import Session
from lorakit.training.metrics import Metrics, Progress, Silent
from lorakit.training.prefetch import Prefetch
from lorakit.training.stop import StopSignals, stopped

LEAST_SCALE = 2.0**-14
"""Down to which fp16's loss scale may fall: the loss is a sum over tokens, whose gradient may need one below 1."""

log = logging.getLogger("lorakit")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the loop needs to know beside the task: the recipe's sections, and how it was called."""

    train: Train
    optimizer: Optimizer
    compute: Compute
    sample_every: int
    """Samples every so many steps, and before the first and after the last; 0: only those two."""
    track: Sequence[str]
    recipe: Mapping[str, Any]
    """The whole resolved recipe as plain JSON, for checkpoints, trackers and the adapter's metadata."""
    recipe_text: str
    """The same for people, as it stands in the run folder."""
    resume: bool = False
    allow: bool = False
    """Resume though fields changed that do not change what is learned."""
    resume_command: str = ""
    """What the user types to go on after a stop."""


@dataclass(frozen=True)
class Outcome:
    """A finished run. Held-out losses are None when there is no held-out data."""

    steps: int
    first_held_out: float | None
    last_held_out: float | None
    examples: int
    count: int
    """Labelled tokens or images that the loss was summed over."""
    seconds: float
    """Time in updates, over all resumes."""


@dataclass(frozen=True)
class Update:
    """One update: its mean loss, the gradient's norm before clipping (infinite when fp16 overflowed and the update was
    left out), the items summed over on all ranks, and what the ranks were asked for meanwhile."""

    loss: float
    gradient_norm: float
    learning_rate: float
    count: int
    sigterm: bool
    sigint: bool
    save_is_due: bool


def train(task: Task, session: Session, plan: Plan, run: RunFolder, progress: Progress) -> Outcome:
    """Train ``task`` to its last step, from the newest checkpoint of ``run`` when ``plan.resume`` is set, and save it.

    Stopped after a signal, with a checkpoint; NonFiniteError at the first loss or gradient that is not finite, with
    nothing saved; ResourceError when memory or disk is short; CheckpointError, RecipeError, DataError, ModelError or
    ConflictError when the run cannot be resumed; RankError when another rank is lost.
    """
    told = progress if session.is_main else Silent()
    with _memory_errors(), StopSignals(told.stage, world=session.world) as signals:
        loop = _Loop(task, session, plan, run, told, signals)
        try:
            return loop.run()
        finally:
            loop.batches.close()


class _Loop:
    def __init__(
        self, task: Task, session: Session, plan: Plan, run: RunFolder, progress: Progress, signals: StopSignals
    ) -> None:
        self.task, self.session, self.plan, self.folder = task, session, plan, run
        self.progress, self.signals = progress, signals
        self.total = optim.total_steps(plan.train, task.steps_per_epoch)
        self.state = State(
            base_id=task.base_id,
            base_texts=task.base_texts,
            data_hash=task.fingerprint.digest,
            recipe=plan.recipe,
            world=session.world,
            devices=", ".join(dict.fromkeys(session.gather(device.name(session.device)))),
            dtype=str(session.dtype).removeprefix("torch."),
        )
        found = checkpoint.newest(run) if plan.resume else None
        resumable.check_alike(session.gather(resumable.seen(self.state, found)))
        if found is None:
            session.on_main(self.write_down)
        else:
            resumable.check_resumable(found.state, self.state, allow=plan.allow)
            resumable.check_data(run, found.state, task.fingerprint)
            here = {name: getattr(self.state, name) for name in ("world", "devices", "recipe")}
            self.state = dataclasses.replace(found.state, **here)
            task.load_adapter_state(found.adapter)
            if plan.recipe != found.state.recipe:
                session.on_main(self.write_down)
        self.flat = FlatParameters(task.parameter_groups(), numbers=5)
        self.optimizer, self.scheduler = optim.build(self.flat.groups, plan.optimizer, self.total, self.state.step)
        self.scaler = session.accelerator.scaler
        if found is not None:
            checkpoint.load_optimizer(found, self.optimizer)
            if session.is_main:  # the run may have been killed before it could
                checkpoint.prune(run, found.state.step, keep=plan.train.keep_checkpoints)
            if self.scaler is not None:
                self.scaler.load_state_dict(dict(found.state.scaler))
        if plan.compute.compile:
            task.model.compile()
        session.track(plan.track, run.tracking, run.root.name, plan.recipe)
        self.metrics = Metrics(run, session, step=self.state.step, evaluated=self.state.evaluated)
        self.saved_step = self.state.step if found else -1
        self.saved_time = time.monotonic()
        self.strict = torch.are_deterministic_algorithms_enabled()
        self.batches = self.coming_batches()

    def write_down(self) -> None:
        """What the run is made from, beside its checkpoints."""
        atomic.write_text(self.folder.recipe, self.plan.recipe_text)
        self.task.fingerprint.write(self.folder.data)

    def coming_batches(self) -> Prefetch[Batch]:
        return Prefetch(self.task.batches("train", self.state.step))

    def run(self) -> Outcome:
        self.progress.start(self.total, self.state.step)
        self.task.model.train()
        self.measure()
        while self.state.step < self.total:
            began = time.monotonic()
            update = self.exact_update()
            self.record(update, time.monotonic() - began)
            stopping = update.sigterm or update.sigint
            if update.save_is_due or stopping or self.is_due(self.plan.train.checkpoint_every):
                self.save()
            if stopping:
                self.stop(update.sigterm)
            self.measure()
        self.progress.stage("saving the adapter")
        self.session.on_main(lambda: self.task.save(self.folder.root, self.folder.root.name, self.plan.recipe))
        self.metrics.draw()
        state = self.state
        held_out = state.first_held_out, state.last_held_out
        return Outcome(state.step, *held_out, state.examples, state.count, state.seconds)

    def exact_update(self) -> Update:
        """``update`` by CUDA's kernels that sum in one order; from the first operation on that has none, by others."""
        if self.strict:
            try:
                with device.strictly_deterministic():
                    return self.update()
            except RuntimeError as error:
                if not device.is_nondeterministic(error):
                    raise
                log.warning("a resumed run will not be bit-equal: %s", first_line(error))
            self.strict = False
            self.batches.close()
            self.batches = self.coming_batches()
        return self.update()

    def update(self) -> Update:
        """One update from ``batch_size`` examples: the gradient of their summed loss, divided by their total count."""
        task, session, flat, step = self.task, self.session, self.flat, self.state.step
        parts: list[tuple[Batch, Tensor]] = []
        flat.sums.zero_()
        for micro in range(self.plan.compute.gradient_accumulation):
            batch = next(self.batches).to(session.device)
            # Dropout's masks follow from the step, so that a resumed run draws the same ones.
            torch.manual_seed(mix(self.plan.train.seed, 4, step, micro, session.rank))
            loss = task.loss(batch)
            if batch.count:
                (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            parts.append((batch, loss.detach()))
            del loss  # what bitsandbytes' int8 layers keep lives as long as it does

        asked = (self.signals.sigterm, self.signals.sigint, self.save_is_due())
        flat.put(torch.stack([loss for _, loss in parts]).sum(), [sum(batch.count for batch, _ in parts), *asked])
        finite_here = flat.gradient.isfinite().all()
        session.all_sum(flat.sums)
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        loss_sum, count, sigterm, sigint, due, norm = flat.read()

        if not math.isfinite(loss_sum) or (not math.isfinite(norm) and not self.may_overflow()):
            raise self.not_finite(parts, bool(finite_here))
        if not count:
            raise DataError(f"step {step + 1} has nothing to learn from: no item of its examples is labelled")
        norm, clip = norm / count, self.plan.optimizer.clip
        flat.gradient.mul_((min(1.0, clip / (norm + 1e-6)) if clip else 1.0) / count)
        rate = self.optimizer.param_groups[0]["lr"]
        optim.step(self.optimizer, self.scheduler, self.scaler)
        return Update(loss_sum / count, norm, rate, int(count), bool(sigterm), bool(sigint), bool(due))

    def may_overflow(self) -> bool:
        """Whether an infinite gradient is fp16's loss scale trying how far it can go: the update is then left out."""
        return self.scaler is not None and self.scaler.get_scale() > LEAST_SCALE

    def not_finite(self, parts: list[tuple[Batch, Tensor]], finite_here: bool) -> NonFiniteError:
        """The error that all ranks raise alike, naming those whose loss, or else whose gradient, is not finite."""
        bad = [name for batch, loss in parts if not loss.isfinite() for name in batch.ids]
        everything = [name for batch, _ in parts for name in batch.ids]
        told = self.session.gather((bad, [] if finite_here else everything))
        what = "loss" if any(loss for loss, _ in told) else "gradient"
        places = []
        for rank, found in enumerate(told):
            if names := found[0 if what == "loss" else 1]:
                places.append(f"rank {rank}: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}")
        hint = "lower optimizer.learning_rate, look at these samples, or use compute.precision bf16 or fp32"
        reason = f"the {what} of step {self.state.step + 1} is not finite ({'; '.join(places) or 'the sum overflowed'})"
        return NonFiniteError(reason, hint=hint)

    def record(self, update: Update, seconds: float) -> None:
        state, size = self.state, self.plan.train.batch_size
        self.state = dataclasses.replace(
            state,
            step=state.step + 1,
            examples=state.examples + size,
            count=state.count + update.count,
            seconds=state.seconds + seconds,
        )
        values = {"loss": update.loss, "learning_rate": update.learning_rate, "grad_norm": update.gradient_norm}
        values |= {"examples_per_second": size / seconds, "count_per_second": update.count / seconds}
        values |= {"seconds": self.state.seconds}
        self.metrics.write(self.state.step, {k: v for k, v in values.items() if math.isfinite(v)})
        self.progress.step(self.state.step, update.loss)

    def is_due(self, every: int) -> bool:
        return self.state.step in (0, self.total) or (every > 0 and self.state.step % every == 0)

    def measure(self) -> None:
        """Held-out loss and samples, where they are due and not yet made; a signal meanwhile stops the run here."""
        step = self.state.step
        evaluating = self.is_due(self.plan.train.evaluate_every) and self.state.evaluated < step
        sampling = self.is_due(self.plan.sample_every) and self.state.sampled < step
        if evaluating:
            self.progress.stage("measuring the held-out loss")
            self.evaluate()
        if sampling:
            self.progress.stage("making samples")
            measure.sample(self.task, self.session, self.folder.samples(step))
            self.state = dataclasses.replace(self.state, sampled=step)
        if evaluating or sampling:
            asked = torch.tensor([self.signals.sigterm, self.signals.sigint], device=self.session.device).int()
            sigterm, sigint = self.session.all_sum(asked).tolist()
            if sigterm or sigint:
                self.save()
                self.stop(bool(sigterm))
            if 0 < step < self.total:
                self.metrics.draw()

    def evaluate(self) -> None:
        step, loss = self.state.step, measure.held_out_loss(self.task, self.session)
        if loss is not None:
            if not math.isfinite(loss):
                raise NonFiniteError(f"the held-out loss after step {step} is not finite")
            more = self.task.metrics(loss)
            self.metrics.write(step, {"held_out_loss": loss, **more})
            self.progress.held_out(step, loss, more)
        first = loss if self.state.first_held_out is None else self.state.first_held_out
        self.state = dataclasses.replace(self.state, evaluated=step, first_held_out=first, last_held_out=loss)

    def save_is_due(self) -> bool:
        minutes = self.plan.train.checkpoint_minutes
        return self.session.is_main and 0 < minutes <= (time.monotonic() - self.saved_time) / 60

    def save(self) -> None:
        """Write a checkpoint on rank 0, unless this step has one. Raises NonFiniteError for an adapter that overflowed,
        which the losses before it do not show."""
        if self.saved_step == self.state.step:
            return
        self.progress.stage("saving a checkpoint")
        scale = {} if self.scaler is None else self.scaler.state_dict()
        state, keep = dataclasses.replace(self.state, scaler=scale), self.plan.train.keep_checkpoints

        def write() -> None:
            adapter = self.task.adapter_state()
            if broken := [name for name, tensor in adapter.items() if not tensor.isfinite().all()]:
                reason = f"the adapter after step {state.step} is not finite ({broken[0]}), and is not saved"
                raise NonFiniteError(reason, hint="lower optimizer.learning_rate")
            checkpoint.save(self.folder, state, adapter, self.optimizer, keep=keep)

        self.session.on_main(write)
        self.saved_step, self.saved_time = self.state.step, time.monotonic()

    def stop(self, by_sigterm: bool) -> None:
        self.metrics.draw()
        raise stopped(by_sigterm=by_sigterm, step=self.state.step, resume_command=self.plan.resume_command)


@contextmanager
def _memory_errors() -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        hint = "raise compute.gradient_accumulation, set compute.gradient_checkpointing, or make the examples smaller"
        raise ResourceError("out of memory in training", hint=hint) from error
