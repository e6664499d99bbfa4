"""Answers from a LLaMA-type base with any number of adapters: sampling, streaming, stop at the chat's end."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor, nn

from lorakit.adapters.files import read_adapter
from lorakit.adapters.inject import apply, fold
from lorakit.adapters.pieces import TEMPLATE_KEY, trained_template
from lorakit.adapters.vocabulary import larger_vocabulary
from lorakit.data.chat import Message
from lorakit.data.templates import ChatTemplate
from lorakit.data.tokens import Renderer
from lorakit.errors import DataError, ModelError, NonFiniteError
from lorakit.families.llama.base import as_folder, most_positions
from lorakit.families.llama.decode import AnyModel, Decoder, decoder
from lorakit.families.llama.library import Quantization, fitted_tokenizer, load_model, load_tokenizer
from lorakit.families.place import Place
from lorakit.storage.bases import BaseLocation


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the next token is chosen. The same seed and prompt give the same answer, whatever is answered beside it, but
    for a choice so close that the rounding of another number of rows turns it."""

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
    shares = ((logits - logits.max()).double() / settings.temperature).softmax(-1).float()
    # All tokens below the second bound together have less than 1 - top_p: sorting starts without them.
    least = max(settings.min_p * float(shares.max()), (1 - settings.top_p) / len(shares))
    tokens = (shares >= least).nonzero()[:, 0]
    ranked, order = shares[tokens].sort(descending=True)
    count = max(1, int((ranked.cumsum(-1) - ranked < settings.top_p).sum()))
    # One number drawn, laid on the tokens in their own order: where rounding swaps two ranks, the choice stays.
    kept = tokens[order[:count]].sort().values
    sums = shares[kept].double().cumsum(-1)
    place = torch.rand(1, generator=generator, dtype=torch.float64) * sums[-1]
    return int(kept[min(int(torch.searchsorted(sums, place, right=True)), count - 1)])


SHOWN = 60
"""Characters of a prompt that an error tells it by."""

Prompt = str | Sequence[Message]
"""Raw text to continue, or messages for the chat template."""


@dataclass
class _Answer:
    """One that is being written: ``left`` tokens may follow ``token``."""

    number: int
    left: int
    stops: frozenset[int]
    generator: torch.Generator
    token: int = 0

    def take(self, logits: Tensor, settings: Settings) -> bool:
        """Choose the next token; whether it belongs to the answer."""
        self.token = choose(logits, settings, self.generator)
        self.left -= 1
        return self.token not in self.stops


class Chat:
    """A decoder ready to answer; ``renderer`` is the one that training uses."""

    def __init__(self, model: Any, renderer: Renderer) -> None:
        self.decoder: Decoder = AnyModel(model) if isinstance(model, nn.Module) else model
        self.renderer = renderer

    def answer(self, prompt: Prompt, settings: Settings) -> str:
        """The whole answer."""
        return "".join(self.stream(prompt, settings))

    def stream(self, prompt: Prompt, settings: Settings) -> Iterator[str]:
        """The answer in pieces as they come, the stop token left out. Raises as ``answers``."""
        return (piece for _, piece in self.answers([prompt], settings))

    def answers(self, prompts: Sequence[Prompt], settings: Settings) -> Iterator[tuple[int, str]]:
        """The prompts' answers in their order, each as pieces with the prompt's number: those of the first unfinished
        prompt as they come, while the decoder writes at the next ones. Each answer ends with an empty piece.

        Raises ModelError when a prompt leaves no room for an answer, NonFiniteError, and DataError when the chat
        template refuses the messages.
        """
        backend = self.renderer.tokenizer.backend_tokenizer
        decoders = [DecodeStream(skip_special_tokens=True) for _ in prompts]
        tokens: list[list[int]] = [[] for _ in prompts]
        lengths = [0] * len(prompts)
        written: list[list[str]] = [[] for _ in prompts]
        turn = 0
        for number, token in self._tokens(prompts, settings):
            if token is None:  # the stream holds back the bytes of a character that is not whole
                rest = backend.decode(tokens[number], skip_special_tokens=True)[lengths[number] :]
                written[number] += [rest, ""] if rest else [""]
            else:
                tokens[number].append(token)
                if piece := decoders[number].step(backend, token):
                    lengths[number] += len(piece)
                    written[number].append(piece)
            while turn < len(prompts) and written[turn]:
                piece = written[turn].pop(0)
                yield turn, piece
                turn += not piece

    def _stops(self, prompt: Prompt) -> frozenset[int]:
        return self.renderer.stops(chat=not isinstance(prompt, str)) | self.decoder.ends

    def _tokens(self, prompts: Sequence[Prompt], settings: Settings) -> Iterator[tuple[int, int | None]]:
        """(number of the prompt, token), and (number, None) at its answer's end, of all rows of the decoder in turn."""
        decoder = self.decoder
        stops = [self._stops(prompt) for prompt in prompts]  # first, since a template may be no good at all
        waiting = deque(self._encoded(prompts))
        active: list[_Answer] = []
        while waiting or active:
            if waiting and len(active) < decoder.rows:
                tokens = waiting.popleft()
                number = len(prompts) - len(waiting) - 1
                left = min(decoder.limit - len(tokens), settings.max_new_tokens)
                generator = torch.Generator().manual_seed(settings.seed)
                active.append(_Answer(number, left, stops[number], generator))
                rows, logits = [len(active) - 1], [decoder.start(len(active) - 1, tokens)]
            else:
                rows, logits = list(range(len(active))), list(decoder.step([answer.token for answer in active]).cpu())
            for row, after in reversed(list(zip(rows, logits, strict=True))):
                answer = active[row]
                if more := answer.take(after, settings):
                    yield answer.number, answer.token
                if not more or answer.left == 0:
                    yield answer.number, None
                    last = active.pop()
                    if last is not answer:
                        decoder.move(len(active), row)
                        active[row] = last

    def _encoded(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        limit = self.decoder.limit
        encoded = []
        for prompt in prompts:
            where = f"prompt {_beginning(prompt)!r}"
            try:
                tokens = self.renderer.prompt(prompt)
            except DataError as error:
                error.where = ": ".join([where, *([error.where] if error.where else [])])
                raise
            if not 0 < len(tokens) < limit:
                reason = f"the prompt has {len(tokens)} tokens, the model takes 1 to {limit - 1}"
                raise ModelError(reason, where=where)
            encoded.append(tokens)
        return encoded


def _beginning(prompt: Prompt) -> str:
    text = prompt if isinstance(prompt, str) else prompt[-1].content
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def open_chat(
    location: BaseLocation,
    adapters: Sequence[tuple[Path, float]],
    place: Place,
    *,
    quantization: Quantization = "none",
    chat_template: str | None = None,
    fuse: bool = False,
) -> Chat:
    """Load a base with adapters on it, each taken ``weight`` times; ``fuse`` adds them to the weights, in their dtype,
    which those of a quantized base cannot be.

    ``chat_template`` is a name or a file; without it that of the adapters' training is taken, or else the tokenizer's.
    Raises ModelError when base or adapter cannot be read or do not fit.
    """
    folder = as_folder(location, place.dtype)
    model = load_model(folder, place, quantization, attention=None)
    larger = larger_vocabulary([path for path, _ in adapters], folder.path)
    tokenizer = load_tokenizer(folder if larger is None else replace(folder, path=larger))
    tokenizer = fitted_tokenizer(tokenizer, model.config, location, trained=larger is not None)
    trained = []
    for number, (path, weight) in enumerate(adapters):
        saved = read_adapter(path, {"model": model})
        apply(model, saved.components["model"], weight=weight, name=f"adapter{number}")
        trained.append(saved.metadata)
    if fuse:
        fold(model)
    template: str | ChatTemplate | None = chat_template
    if chat_template is None and (source := trained_template(trained)) is not None:
        path = next(path for (path, _), own in zip(adapters, trained, strict=True) if TEMPLATE_KEY in own)
        template = ChatTemplate(tokenizer, source, f"the chat template of {path}")
    limit = most_positions(model.config)
    return Chat(decoder(model), Renderer(tokenizer, template, limit, setting="--chat-template"))
