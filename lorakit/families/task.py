"""The contract between the training loop and a model family."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from lorakit.storage.fingerprint import Fingerprint


class Batch(Protocol):
    """One micro-batch of one rank."""

    count: int
    """What the loss is summed over: labelled tokens, or images."""
    ids: tuple[str, ...]
    """Names of its samples (file:line or picture), for error messages."""

    def to(self, device: torch.device) -> Self:
        """The batch on ``device``, without waiting for what the device is at."""


class Task(Protocol):
    """A frozen base with its adapter, and the data it trains on."""

    model: nn.Module
    steps_per_epoch: float
    """Updates in one pass over the training data: examples / batch_size."""
    base_id: str
    """What the adapter was made for: the base as the recipe names it, and a hash of its weights."""
    base_texts: Mapping[str, str]
    """Hashes of the base's configurations and vocabularies, by name."""
    fingerprint: Fingerprint
    """What the examples are made of, so that a resumed run notices changed data."""
    generate_options: Sequence[str]
    """What `lorakit generate` takes, beside base and adapter, to be asked as the training asks."""

    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """Trainable parameters and their peak learning rates."""
        ...

    def batches(self, split: str, start: int) -> Iterator[Batch]:
        """Micro-batches of this rank.

        ``"train"``: endless, from optimizer step ``start`` on, ``gradient_accumulation`` of them a step.
        ``"held_out"``: each held-out example once over all ranks; every rank yields equally many (a batch may have
        ``count`` 0, its loss is then 0); nothing when there is no held-out data.
        """
        ...

    def loss(self, batch: Batch) -> Tensor:
        """float32 SUM of the loss over ``batch.count`` items."""
        ...

    def plain_loss(self, batch: Batch, dtype: torch.dtype) -> Tensor:
        """``loss`` by plain means, to hold the fast path against: no function of lorakit's own takes part.

        ``dtype`` is that of base and matmuls; when it is not the model's own, the model, its adapter with it, is
        converted for good.
        """
        ...

    def metrics(self, held_out_loss: float) -> Mapping[str, float]:
        """What a mean held-out loss means to the family's users: perplexity, say."""
        ...

    def sample(self, out: Path) -> None:
        """Write pictures or answers for the recipe's fixed prompts and seeds into the folder ``out``."""
        ...

    def adapter_state(self) -> dict[str, Tensor]:
        """The trainable tensors by stable name, as a checkpoint keeps them."""
        ...

    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what ``adapter_state`` gave; ModelError on a missing, unexpected or misshapen tensor."""
        ...

    def save(self, out: Path, name: str, recipe: Mapping[str, Any] | None = None) -> None:
        """Write the finished adapter below the run folder ``out``: ``adapter/``, and for SD ``NAME.safetensors``.

        ``recipe``, as plain JSON, goes into the files' metadata.
        """
        ...


def origin(name: str, base_id: str, recipe: Mapping[str, Any] | None) -> dict[str, str]:
    """An adapter's metadata: its run, its base, and the recipe, which ``lorakit inspect --recipe`` reads."""
    made_by = {} if recipe is None else {"lorakit_recipe": json.dumps(recipe)}
    return {"lorakit_name": name, "lorakit_base": base_id, **made_by}
