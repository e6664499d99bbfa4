"""Where a family puts its model."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Place:
    """Device and dtype of the frozen base; the adapter stays float32."""

    device: torch.device
    dtype: torch.dtype
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
