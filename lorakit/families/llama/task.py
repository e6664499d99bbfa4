"""A LLaMA-type model as a task of the training loop: load, loss, held-out loss, sample answers, save."""

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lorakit.adapters.inject import adapter_parameters, adapter_state, inject, load_adapter_state
from lorakit.adapters.linear import plain_layers
from lorakit.adapters.pieces import TEMPLATE_KEY
from lorakit.adapters.targets import Injection
from lorakit.adapters.write import write_peft
from lorakit.data.chat import Message
from lorakit.data.chat_set import ChatSet
from lorakit.data.templates import named_source
from lorakit.data.tokens import Renderer
from lorakit.families.llama import packed
from lorakit.families.llama.base import (
    GROUPS,
    check_sample,
    check_trainable,
    find_base,
    head_has_an_adapter,
    logit_factor,
    most_positions,
    read_chats,
)
from lorakit.families.llama.batch import ChatBatch, held_out_batches, train_batches
from lorakit.families.llama.generate import Chat, Settings
from lorakit.families.llama.library import Quantization, load_config, load_fitting_tokenizer, load_model
from lorakit.families.place import Place
from lorakit.families.task import Batch, origin
from lorakit.numerics.order import Layout, mix
from lorakit.recipe.schema import Adapter, ChatData, LlamaBase, LlamaSample
from lorakit.storage.atomic import new_folder, write_text
from lorakit.storage.bases import BaseLocation, base_id, texts

log = logging.getLogger("lorakit")


@dataclass(frozen=True)
class Loaded:
    """What ``load`` made: the model with its adapter, the data, and how to render it."""

    location: BaseLocation
    lm: Any
    injection: Injection
    chats: ChatSet
    renderer: Renderer
    template: str | None
    """Source of the chat template that the recipe names."""
    logit_factor: float
    checkpointing: bool
    quantization: Quantization


class LlamaTask:
    """A causal language model with LoRA, and the chats it trains on (``families.task.Task``)."""

    def __init__(self, loaded: Loaded, sampling: LlamaSample, layout: Layout, *, learning_rate: float, packing: bool):
        self.model: nn.Module = packed.PackedLM(loaded.lm, loaded.logit_factor, checkpointing=loaded.checkpointing)
        self.steps_per_epoch = len(loaded.chats.train) / layout.batch_size
        self.base_id = base_id(loaded.location)
        self.base_texts = texts(loaded.location)
        self.fingerprint = loaded.chats.fingerprint()
        self.chats = loaded.chats
        self.generate_options: Sequence[str] = (
            *(["--raw"] if loaded.chats.raw else []),
            *(["--quantization", loaded.quantization] if loaded.quantization != "none" else []),
        )
        self._loaded = loaded
        self._sampling = sampling
        self._layout = layout
        self._packing = packing
        self._rate = learning_rate

    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        return [(list(adapter_parameters(self._loaded.lm).values()), self._rate)]

    def batches(self, split: str, start: int) -> Iterator[Batch]:
        if split == "train":
            # One dropout mask over tokens that several chats share would not be one a chat.
            sharing = not self._loaded.injection.adapter.dropout
            return train_batches(self.chats.train, self._layout, start, packing=self._packing, sharing=sharing)
        return held_out_batches(self.chats.held_out, self._layout, packing=self._packing)

    def loss(self, batch: Batch) -> Tensor:
        """Sum over labelled tokens of -log p(token | the tokens before it in its chat)."""
        chats = cast(ChatBatch, batch)
        return cast(Tensor, self.model(chats.tokens, chats.positions, chats.documents, chats.rows, chats.targets))

    def plain_loss(self, batch: Batch, dtype: torch.dtype) -> Tensor:
        """transformers' model with PEFT's layers and eager attention, a chat at a time, and all its logits."""
        chats, lm = cast(ChatBatch, batch), self._loaded.lm
        if lm.dtype != dtype:
            lm.to(dtype)
        shared, own = chats.documents or (0, (chats.tokens.shape[1],) * len(chats.tokens))
        losses, start, row = [], shared, chats.tokens.flatten()
        lm.set_attn_implementation("eager")
        try:
            with plain_layers(lm):
                for length in own:
                    tokens = torch.cat([row[:shared], row[start : start + length]])
                    logits = lm(input_ids=tokens[None], use_cache=False).logits[0]
                    first = 0 if start == shared else start  # what is learned in the shared part counts once
                    here = (chats.rows >= first) & (chats.rows < start + length)
                    places = torch.where(chats.rows < shared, chats.rows, chats.rows - start + shared)[here]
                    logits = logits[places].to(torch.promote_types(dtype, torch.float32))
                    losses.append(functional.cross_entropy(logits, chats.targets[here], reduction="sum"))
                    start += length
        finally:
            lm.set_attn_implementation(packed.NAME)
        return torch.stack(losses).sum()

    def metrics(self, held_out_loss: float) -> Mapping[str, float]:
        return {"perplexity": math.exp(min(held_out_loss, 700.0))}

    def sample(self, out: Path) -> None:
        """An answer a prompt: answers.jsonl, and answers.md for people."""
        sampling, lm = self._sampling, self._loaded.lm
        if not sampling.prompts:
            return
        settings = Settings(
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
        )
        system = [] if sampling.system is None else [Message("system", sampling.system)]
        chat, training = Chat(lm, self._loaded.renderer), lm.training
        lm.eval()
        lm.set_attn_implementation("sdpa")
        try:
            raw = self.chats.raw
            answers = [chat.answer(p if raw else [*system, Message("user", p)], settings) for p in sampling.prompts]
        finally:
            lm.set_attn_implementation(packed.NAME)
            lm.train(training)
        pairs = list(zip(sampling.prompts, answers, strict=True))
        lines = [json.dumps({"prompt": p, "answer": a}, ensure_ascii=False) + "\n" for p, a in pairs]
        write_text(out / "answers.jsonl", "".join(lines))
        write_text(out / "answers.md", "".join(f"**{p}**\n\n{a}\n\n" for p, a in pairs))

    def adapter_state(self) -> dict[str, Tensor]:
        return adapter_state(self._loaded.lm)

    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        load_adapter_state(self._loaded.lm, state)

    def save(self, out: Path, name: str, recipe: Mapping[str, Any] | None = None) -> None:
        """``adapter/`` as PEFT has it: config and safetensors, and the chat template that the recipe names."""
        metadata = origin(name, self.base_id, recipe)
        if self._loaded.template is not None:
            metadata[TEMPLATE_KEY] = self._loaded.template
        with new_folder(out / "adapter", manifest=False, replace=True) as folder:
            write_peft(
                folder,
                self.adapter_state(),
                self._loaded.injection,
                base_name=self._loaded.location.name,
                task="CAUSAL_LM",
                metadata=metadata,
            )


def load(
    base: LlamaBase,
    adapter: Adapter,
    data: ChatData,
    sample: LlamaSample,
    layout: Layout,
    place: Place,
    *,
    learning_rate: float,
) -> LlamaTask:
    """A finished task from a recipe's sections: base found and loaded, LoRA put in, chats read and encoded.

    Raises ModelError, RecipeError or DataError as the parts say; what a user should know is logged as a warning.
    """
    location, folder = find_base(base, place.dtype)
    config = load_config(folder)
    check_trainable(config)
    tokenizer = load_fitting_tokenizer(folder, config)
    chats = read_chats(folder, config, data, layout.seed, lambda: tokenizer)
    check_sample(sample, chats)
    for note in chats.notes():
        log.warning("%s", note)
    if base.quantization == "int8" and place.gradient_checkpointing:
        log.warning("compute.gradient_checkpointing saves little over int8, whose layers keep their inputs: take nf4")
    lm = load_model(folder, place, base.quantization)
    _without_dropout(lm)
    injection = inject(lm, adapter, GROUPS, seed=mix(layout.seed, 6))
    if not packed.head_is_frozen(lm):
        raise head_has_an_adapter()
    renderer = Renderer(tokenizer, data.chat_template, most_positions(config))
    template, factor = named_source(data.chat_template), logit_factor(config)
    how = place.gradient_checkpointing, base.quantization
    loaded = Loaded(location, lm, injection, chats, renderer, template, factor, *how)
    return LlamaTask(loaded, sample, layout, learning_rate=learning_rate, packing=data.packing)


def _without_dropout(lm: Any) -> None:
    """The base's own dropout, of attention and of what a block adds, was for training it; LoRA has its own, and chats
    that share their beginning would share its masks."""
    for part in (lm.config, *lm.modules()):
        for name, value in vars(part).items():
            if name.endswith("dropout") and isinstance(value, float):
                setattr(part, name, 0.0)
