"""What the UNet is told beside latents and timestep: the caption and, for SDXL, the picture's sizes.

Legend: B captions, E text encoders, L tokens, W width of the states, P width of the pooled text.
Which kind a base has is chosen once, when it is loaded; nothing else asks.
"""

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from lorakit.errors import ModelError

Text = dict[str, Tensor]
"""Captions encoded: ``states`` [B, L, W], and SDXL's ``pooled`` [B, P]; or not yet: ``ids`` int64 [B, E, L]."""

_TOKENIZING = threading.Lock()
"""A tokenizer is set anew for each call, and both the loop and the thread that makes its batches call it."""


class Conditioning(Protocol):
    """The text encoders of a base, and how the UNet takes what they say."""

    @property
    def tokenizers(self) -> Sequence[CLIPTokenizer]: ...

    @property
    def encoders(self) -> Mapping[str, nn.Module]:
        """By component name, in the order of the tokenizers."""
        ...

    @property
    def kind(self) -> str:
        """Two with the same weights and the same kind encode alike."""
        ...

    def encode(self, ids: Tensor) -> Text:
        """Captions [B, E, L] to what the UNet reads."""
        ...

    def arguments(self, text: Text, frames: Tensor, dtype: torch.dtype) -> dict[str, Any]:
        """The UNet's keyword arguments for encoded captions.

        ``frames`` float32 [B, 6]: height and width of the picture before it was scaled, top and left of what was cut
        out of the scaled one, height and width of that, all in pixels (Podell et al. 2023, arXiv:2307.01952).
        """
        ...


def ids_of(conditioning: Conditioning, captions: Sequence[str]) -> Tensor:
    """int64 [B, E, L]: every caption padded or cut to the tokenizers' length L."""
    rows = []
    for tokenizer in conditioning.tokenizers:
        found = _called(tokenizer, list(captions), padding="max_length", truncation=True, return_tensors="pt")
        rows.append(cast(Tensor, found["input_ids"]))
    return torch.stack(rows, 1)


def cut_captions(conditioning: Conditioning, captions: Sequence[str]) -> int:
    """How many captions ``ids_of`` cuts."""
    different, cut = list(dict.fromkeys(captions)), set()
    for tokenizer in conditioning.tokenizers:
        found = _called(tokenizer, different, truncation=True, return_overflowing_tokens=True)
        pieces = Counter(found["overflow_to_sample_mapping"])
        cut |= {different[place] for place, count in pieces.items() if count > 1}
    return sum(caption in cut for caption in captions)


def unread(conditioning: Conditioning, caption: str) -> str:
    """What the first tokenizer cuts off; empty for a caption that is read whole."""
    tokenizer = conditioning.tokenizers[0]
    ids = _called(tokenizer, caption, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    return str(tokenizer.decode(ids[tokenizer.model_max_length - 2 :])).strip()


def _called(tokenizer: CLIPTokenizer, text: str | list[str], **how: Any) -> Mapping[str, Any]:
    with _TOKENIZING:
        found: Mapping[str, Any] = tokenizer(text, max_length=tokenizer.model_max_length, **how)
        return found


def conditioning_of(
    tokenizers: Sequence[CLIPTokenizer], encoders: Mapping[str, nn.Module], *, zeros: bool
) -> Conditioning:
    """The kind that has as many text encoders. ``zeros``: see ``TwoEncoders``."""
    return OneEncoder(tokenizers, encoders) if len(encoders) == 1 else TwoEncoders(tokenizers, encoders, zeros)


@dataclass(frozen=True)
class OneEncoder:
    """SD 1.x and 2.x: the last layer of one text encoder, and no sizes."""

    tokenizers: Sequence[CLIPTokenizer]
    encoders: Mapping[str, nn.Module]
    kind: ClassVar[str] = "one encoder"

    def encode(self, ids: Tensor) -> Text:
        return {"states": self.encoders["text_encoder"](ids[:, 0])[0]}

    def arguments(self, text: Text, frames: Tensor, dtype: torch.dtype) -> dict[str, Any]:  # noqa: ARG002
        return {"encoder_hidden_states": text["states"].to(dtype)}


@dataclass(frozen=True)
class TwoEncoders:
    """SDXL: the last layer but one of two text encoders side by side, the second one's pooled text, and the sizes."""

    tokenizers: Sequence[CLIPTokenizer]
    encoders: Mapping[str, nn.Module]
    zeros: bool
    """The base knows an empty caption as zeros (``force_zeros_for_empty_prompt``)."""

    @property
    def kind(self) -> str:
        return f"two encoders, {'zeros' if self.zeros else 'words'} for nothing"

    def encode(self, ids: Tensor) -> Text:
        first = self.encoders["text_encoder"](ids[:, 0], output_hidden_states=True)
        second = self.encoders["text_encoder_2"](ids[:, 1], output_hidden_states=True)
        states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        pooled = second.text_embeds
        if self.zeros:
            said = (ids[:, 0, 1] != self.tokenizers[0].eos_token_id).to(states.dtype)
            states, pooled = states * said[:, None, None], pooled * said[:, None]
        return {"states": states, "pooled": pooled}

    def arguments(self, text: Text, frames: Tensor, dtype: torch.dtype) -> dict[str, Any]:
        added = {"text_embeds": text["pooled"].to(dtype), "time_ids": frames}
        return {"encoder_hidden_states": text["states"].to(dtype), "added_cond_kwargs": added}


def check_widths(conditioning: Conditioning, unet: nn.Module, where: str) -> None:
    """Raises: ModelError when text encoders, tokenizers and UNet do not fit each other."""
    config = cast(Any, unet).config
    encoders = [cast(Any, encoder).config for encoder in conditioning.encoders.values()]
    width = sum(encoder.hidden_size for encoder in encoders)
    if width != config.cross_attention_dim:
        told = "the text encoder is" if len(encoders) == 1 else "the text encoders together are"
        raise ModelError(f"{told} {width} wide, the UNet expects {config.cross_attention_dim}", where=where)
    if len(encoders) > 1:
        width = encoders[-1].projection_dim + 6 * config.addition_time_embed_dim
        if width != config.projection_class_embeddings_input_dim:
            expected = config.projection_class_embeddings_input_dim
            raise ModelError(f"pooled text and sizes are {width} wide, the UNet expects {expected}", where=where)
    for tokenizer, encoder in zip(conditioning.tokenizers, encoders, strict=True):
        if len(tokenizer) > encoder.vocab_size:
            reason = f"the tokenizer has {len(tokenizer)} tokens, the text encoder {encoder.vocab_size}"
            raise ModelError(reason, where=where)
        length, positions = tokenizer.model_max_length, encoder.max_position_embeddings
        if not 0 < length <= positions:
            reason = f"the tokenizer gives {length:.4g} tokens a caption, the text encoder has {positions} positions"
            raise ModelError(reason, where=where)
