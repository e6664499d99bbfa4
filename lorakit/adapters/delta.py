"""What an adapter is in memory, whatever file it came from: low-rank changes of a model's weights, by module path.

Shapes: ``r`` rank, ``in`` and ``out`` the module's features or channels, ``kh, kw`` a convolution's kernel.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Delta:
    """The change of one weight: W + scale * B A (Hu et al. 2021, arXiv:2106.09685)."""

    A: Tensor
    """[r, in], or [r, in, kh, kw] for a convolution."""
    B: Tensor
    """[out, r], or [out, r, 1, 1]."""
    scale: float
    """alpha / r, or alpha / sqrt(r) with rslora."""
    magnitude: Tensor | None = None
    """DoRA's row norms [out] (Liu et al. 2024, arXiv:2402.09353)."""

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape: [out, in] or [out, in, kh, kw]."""
        return (self.B.shape[0], *self.A.shape[1:])


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter as read from a file, or about to be written to one."""

    family: Literal["sd", "llama"]
    components: dict[str, dict[str, Delta]]
    """``model`` for LLaMA; ``unet``, ``text_encoder`` and ``text_encoder_2``, what there is, for SD: path -> change."""
    format: Literal["peft", "kohya", "diffusers", "gguf"]
    metadata: dict[str, str]
    """The file's own strings; for PEFT those of its safetensors header and ``base_model_name_or_path``."""

    def all_deltas(self) -> dict[tuple[str, str], Delta]:
        """Every change by component and module path."""
        return {(component, path): d for component, deltas in self.components.items() for path, d in deltas.items()}


def told_as(component: str, path: str) -> str:
    """How a module is told: a language model is its only component."""
    return path if component == "model" else f"{component}.{path}"


def rescaled(delta: Delta, scale: float) -> Delta:
    """The same change written with another scale: B takes the quotient, rounded once to its dtype."""
    if scale == delta.scale:
        return delta
    return replace(delta, B=(delta.B.double() * (delta.scale / scale)).to(delta.B.dtype), scale=scale)


def cast(delta: Delta, dtype: torch.dtype) -> Delta:
    """The same change with all tensors in ``dtype``."""
    magnitude = None if delta.magnitude is None else delta.magnitude.to(dtype)
    return replace(delta, A=delta.A.to(dtype), B=delta.B.to(dtype), magnitude=magnitude)


def product(delta: Delta) -> Tensor:
    """scale * B A, float32, in the weight's shape."""
    flat = delta.B.float().flatten(1) @ delta.A.float().flatten(1)
    return (flat * delta.scale).reshape(delta.shape)
