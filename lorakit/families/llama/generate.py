"""Answers from a LLaMA-type base with any number of adapters: sampling, streaming, stop at the chat's end."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import DynamicCache

from lorakit.adapters.files import read_adapter
from lorakit.adapters.inject import apply, fold
from lorakit.data.chat import Message
from lorakit.data.tokens import Renderer
from lorakit.errors import ModelError, NonFiniteError
from lorakit.families.llama.base import as_folder, check_tokenizer, load_model, load_tokenizer
from lorakit.families.place import Place
from lorakit.storage.bases import BaseLocation


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the next token is chosen. The same seed and prompt give the same answer."""

    max_new_tokens: int = 256
    temperature: float = 0.7
    """0: the likeliest token each time."""
    top_p: float = 1.0
    """The likeliest tokens that together reach this probability."""
    min_p: float = 0.0
    """Only tokens with at least this share of the likeliest one's probability."""
    seed: int = 0


def choose(logits: Tensor, settings: Settings, generator: torch.Generator) -> int:
    """The next token from logits [V]. Raises NonFiniteError."""
    logits = logits.float().cpu()
    if not torch.isfinite(logits).all():
        raise NonFiniteError("the model's logits are not finite")
    if settings.temperature == 0:
        return int(logits.argmax())
    ranked, order = (logits / settings.temperature).softmax(-1).sort(descending=True)
    before = ranked.cumsum(-1) - ranked
    kept = (before < settings.top_p) & (ranked >= settings.min_p * ranked[0])
    kept[0] = True
    return int(order[torch.multinomial(ranked * kept, 1, generator=generator)])


class Chat:
    """A model ready to answer; ``renderer`` is the one that training uses."""

    def __init__(self, model: Any, renderer: Renderer) -> None:
        self.model = model
        self.renderer = renderer

    def answer(self, prompt: str | Sequence[Message], settings: Settings) -> str:
        """The whole answer. ``prompt`` is raw text to continue, or messages for the chat template."""
        return "".join(self.stream(prompt, settings))

    def stream(self, prompt: str | Sequence[Message], settings: Settings) -> Iterator[str]:
        """The answer in pieces as they come, the stop token left out.

        Raises ModelError when the prompt leaves no room for an answer, NonFiniteError, and DataError when the chat
        template refuses the messages.
        """
        tokenizer = self.renderer.tokenizer
        decoder = DecodeStream(skip_special_tokens=True)
        for token in self._tokens(self.renderer.prompt(prompt), self._stops(prompt), settings):
            piece = decoder.step(tokenizer.backend_tokenizer, token)
            if piece:
                yield piece

    def _stops(self, prompt: str | Sequence[Message]) -> frozenset[int]:
        own = self.model.generation_config.eos_token_id
        ends = [own] if isinstance(own, int) else own or []
        return self.renderer.stops(chat=not isinstance(prompt, str)) | frozenset(ends)

    def _tokens(self, prompt: list[int], stops: frozenset[int], settings: Settings) -> Iterator[int]:
        room = int(self.model.config.max_position_embeddings) - len(prompt)
        if room < 1 or not prompt:
            raise ModelError(
                f"the prompt has {len(prompt)} tokens, the model takes 1 to {room + len(prompt) - 1}", where="prompt"
            )
        generator = torch.Generator().manual_seed(settings.seed)
        cache = DynamicCache(config=self.model.config)
        tokens = torch.tensor([prompt], device=self.model.device)
        for _ in range(min(room, settings.max_new_tokens)):
            with torch.inference_mode():
                out: Any = self.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = choose(out.logits[0, -1], settings, generator)
            if token in stops:
                return
            yield token
            tokens = torch.tensor([[token]], device=self.model.device)


def open_chat(
    location: BaseLocation,
    adapters: Sequence[tuple[Path, float]],
    place: Place,
    *,
    chat_template: str | None = None,
    fuse: bool = False,
) -> Chat:
    """Load a base with adapters on it, each taken ``weight`` times; ``fuse`` adds them to the weights, in their dtype.

    Raises ModelError when base or adapter cannot be read or do not fit.
    """
    folder = as_folder(location, place.dtype)
    model = load_model(folder, place, "none", attention="sdpa")
    tokenizer = load_tokenizer(folder)
    check_tokenizer(tokenizer, model.config, location)
    for number, (path, weight) in enumerate(adapters):
        saved = read_adapter(path, {"model": model})
        if saved.family != "llama":
            raise ModelError("an adapter for Stable Diffusion, not for a language model", where=str(path))
        apply(model, saved.components["model"], weight=weight, name=f"adapter{number}")
    if fuse:
        fold(model)
    return Chat(model, Renderer(tokenizer, chat_template, int(model.config.max_position_embeddings)))
