"""What a LLaMA recipe would do, worked out without reading any weights."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from lorakit.adapters.outline import Outline
from lorakit.adapters.targets import Target, injection
from lorakit.data.cache import content_key, remembered, versions
from lorakit.data.chat_set import ChatSet
from lorakit.families.llama.base import (
    GROUPS,
    check_sample,
    check_trainable,
    find_base,
    head_has_an_adapter,
    read_chats,
)
from lorakit.families.place import Place
from lorakit.numerics.cross_entropy import CHUNK_NUMBERS, EXACT_NUMBERS
from lorakit.numerics.order import Layout
from lorakit.recipe.schema import Adapter, ChatData, LlamaBase, LlamaSample
from lorakit.storage.bases import BaseLocation, description

BITS = {"nf4": 4.13, "int8": 8.0}
"""bitsandbytes' bits a weight: NF4's doubly quantized scales add 0.13."""


@dataclass(frozen=True)
class LlamaPlan:
    modules: tuple[Target, ...]
    """The layers that get LoRA, with features in and out and rank."""
    total_parameters: int
    """Of the base."""
    trainable_parameters: int
    memory: dict[str, int]
    """Estimated bytes by component. ``gradients`` and the optimizer's state go by ``trainable_parameters``."""
    chats: ChatSet
    steps_per_epoch: float

    @property
    def examples(self) -> str:
        """What is learned from, in one line."""
        chats = self.chats
        share = f"{chats.label_share:.0%} of them learned"
        return f"{len(chats.train)} chats of {chats.tokens} tokens, {share}; {len(chats.held_out)} held out"

    @property
    def notes(self) -> Sequence[str]:
        """What a user should know about the data."""
        return self.chats.notes()


def plan(
    base: LlamaBase, adapter: Adapter, data: ChatData, sample: LlamaSample, layout: Layout, place: Place
) -> LlamaPlan:
    """Raises what ``load`` would raise, but for weights that cannot be read."""
    _, folder = find_base(base, place.dtype)
    config, outline = _known(folder)
    check_trainable(config)

    def tokenizer() -> Any:
        from lorakit.families.llama.library import load_fitting_tokenizer  # with transformers

        return load_fitting_tokenizer(folder, config)

    chats = read_chats(folder, config, data, layout.seed, tokenizer)
    check_sample(sample, chats)
    targets = injection(outline, adapter, GROUPS).targets
    if any(outline.layers[target.name].head for target in targets):
        raise head_has_an_adapter()
    trainable = sum(outline.layers[t.name].lora_parameters(t.rank, dora=adapter.dora) for t in targets)
    lengths = sorted((len(row.tokens) for row in chats.train), reverse=True)
    rows = layout.micro_batch
    tokens = sum(lengths[:rows]) if data.packing else lengths[0] * rows
    size = place.dtype.itemsize
    # DoRA keeps what each of its layers gives before the magnitude; with checkpointing those of one block.
    directions = sum(target.outputs for target in targets) * tokens * size * adapter.dora
    if place.gradient_checkpointing:
        directions //= config.num_hidden_layers
    # DoRA over a quantized base is PEFT's, whose layers keep their input in float32, in place of the base's own.
    kept = adapter.dora and base.quantization != "none"
    inputs = sum(target.inputs for target in targets) * tokens * (4 - size) * kept
    if place.gradient_checkpointing:
        inputs //= config.num_hidden_layers
    hidden = hidden_bytes(config, tokens, size, checkpointing=place.gradient_checkpointing)
    logits = min(CHUNK_NUMBERS, tokens * config.vocab_size)
    exact = 0 if size >= 4 else min(logits, EXACT_NUMBERS) if place.device.type == "cpu" else logits
    return LlamaPlan(
        targets,
        outline.parameters,
        trainable,
        {
            "base weights": _weight_bytes(outline, base.quantization, size),
            "adapter": 4 * trainable,
            "gradients": 4 * trainable,
            "activations": hidden + directions + inputs + logits * size + exact * 4,
        },
        chats,
        len(chats.train) / layout.batch_size,
    )


def _known(folder: BaseLocation) -> tuple[Any, Outline]:
    """A base's configuration and outline, as transformers makes them once for each base."""

    def make() -> dict[str, Any]:
        from lorakit.families.llama.skeleton import skeleton  # with transformers

        model: Any = skeleton(folder)["model"]
        config = json.loads(model.config.to_json_string(use_diff=False))
        return {"config": config, "model": Outline.of(model).as_table()}

    key = content_key("llama 1", description(folder), versions("torch", "transformers"))
    table = remembered("outlines", key, make)
    return SimpleNamespace(**table["config"]), Outline.from_table(table["model"])


def _weight_bytes(outline: Outline, quantization: str, size: int) -> int:
    """bitsandbytes takes the linear layers but the head; all else keeps the dtype."""
    if quantization == "none":
        return outline.parameters * size
    layers = outline.layers.items()
    linear = sum(layer.inputs * layer.outputs for name, layer in layers if not name.endswith("lm_head"))
    return int((outline.parameters - linear) * size + linear * BITS[quantization] / 8)


def hidden_bytes(config: Any, tokens: int, dtype_bytes: int, *, checkpointing: bool) -> int:
    """Rough bytes of activations kept for the backward pass of ``tokens`` tokens.

    A block keeps about 8 hidden vectors, 2 of the key-value heads and 4 of the MLP a token; with checkpointing one
    hidden vector, and a whole block while it is recomputed.
    """
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    narrow = head * config.num_key_value_heads
    block = (8 * config.hidden_size + 2 * narrow + 4 * config.intermediate_size) * tokens * dtype_bytes
    kept = config.hidden_size * tokens * dtype_bytes if checkpointing else block
    return int(config.num_hidden_layers * kept + (block if checkpointing else 0))
