"""The next token's logits, from a key-value cache: for blocks of the plain Llama kind, and for any model.

Shapes: ``R`` rows, ``T`` tokens, ``H`` query heads in ``K`` groups, ``D`` head dim, ``V`` vocabulary.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache

from lorakit.adapters.inference import Stacked, stackable
from lorakit.families.llama.base import has_windows, most_positions
from lorakit.families.llama.blocks import of_llama_kind
from lorakit.numerics.attention import causal_attention
from lorakit.numerics.elementwise import signed

ROPES = ("default", "linear", "llama3", "yarn")
"""Rotary frequencies that do not depend on the length of the text."""
GROWTH = 256
"""The cache grows by as many tokens at least."""


class Decoder(Protocol):
    """Rows of text, each with its cache."""

    rows: int
    """As many are decoded at once."""
    limit: int
    """Positions that the model knows."""
    ends: frozenset[int]
    """Tokens that the model's own settings end a text with."""

    def start(self, row: int, prompt: Sequence[int]) -> Tensor:
        """Put a prompt into a row in place of what was there; logits [V] of the token after it."""

    def step(self, tokens: Sequence[int]) -> Tensor:
        """One more token for each of the first rows; logits [R, V] of those that follow."""

    def move(self, row: int, to: int) -> None:
        """Put a row's text in place of another's."""


class AnyModel:
    """One row by transformers' own forward pass; the model stays as it is."""

    rows = 1

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache: Any = None
        self.limit, self.ends = most_positions(model.config), _ends(model)

    def start(self, row: int, prompt: Sequence[int]) -> Tensor:  # noqa: ARG002 (there is but one)
        self._cache = DynamicCache(config=self._model.config)
        return self._next(prompt)[0]

    def step(self, tokens: Sequence[int]) -> Tensor:
        return self._next(tokens)

    def move(self, row: int, to: int) -> None:
        """Never called with one row."""

    @torch.inference_mode()
    def _next(self, tokens: Sequence[int]) -> Tensor:
        ids = torch.tensor([tokens], device=self._model.device)
        out: Any = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = out.logits[:, -1]
        return logits


def decoder(model: Any) -> Decoder:
    """The fastest decoder that computes this model; it takes the model's layers, so that the model is of no use after.

    The logits are the model's own up to rounding.
    """
    return PlainLlama(model) if _is_plain(model) else AnyModel(model)


def _is_plain(model: Any) -> bool:
    config = model.config
    if not of_llama_kind(model.get_decoder()) or model.training:
        return False
    rotary = model.model.rotary_emb
    if rotary.rope_type not in ROPES or 2 * len(rotary.inv_freq) != model.model.layers[0].self_attn.head_dim:
        return False
    return not has_windows(config) and all(map(stackable, _linear(model)))


def _linear(model: Any) -> list[nn.Module]:
    found = [model.lm_head]
    for layer in model.model.layers:
        a, m = layer.self_attn, layer.mlp
        found += [a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj]
    return found


def _ends(model: Any) -> frozenset[int]:
    own = model.generation_config.eos_token_id
    return frozenset([own] if isinstance(own, int) else own or [])


class PlainLlama:
    """Several rows at once through blocks of the Llama kind, with stacked weights and without what costs a token more
    time than its arithmetic: masks, cache objects, one kernel a projection and two a LoRA."""

    rows = 8

    def __init__(self, model: Any) -> None:
        self.limit, self.ends = most_positions(model.config), _ends(model)
        inner = model.model
        self._embed, self._norm, self._rotary = inner.embed_tokens, _Norm(inner.norm), inner.rotary_emb
        self._head = Stacked([model.lm_head])
        self._blocks = []
        for number, layer in enumerate(inner.layers):
            self._blocks.append(_Block(layer))
            inner.layers[number] = nn.Identity()  # lets go of the weights: there is never more than one layer twice
        self._device, self._dtype, self._groups = model.device, model.dtype, self._blocks[0].groups
        self._lengths = [0] * self.rows
        self._held = self._room = 0

    @torch.inference_mode()
    def start(self, row: int, prompt: Sequence[int]) -> Tensor:
        count = len(prompt)
        self._reserve(row + 1, count)
        self._lengths[row] = count
        here = (slice(row, row + 1), slice(None), slice(count))
        place = _Place(1, here, here, self._cos[:count], self._sin[:count])
        return self._forward(prompt, place)[-1]

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        count = len(tokens)
        before = self._lengths[:count]
        longest = max(before) + 1
        self._reserve(count, longest)
        self._lengths[:count] = [length + 1 for length in before]
        read = (slice(count), slice(None), slice(longest))
        if min(before) == max(before):
            new = slice(longest - 1, longest)
            place = _Place(count, (slice(count), slice(None), new), read, self._cos[new], self._sin[new])
        else:
            row, group, at = (torch.tensor(x, device=self._device) for x in (range(count), range(self._groups), before))
            mask = torch.zeros(count, longest, dtype=self._dtype, device=self._device)
            mask.masked_fill_(torch.arange(longest, device=self._device) > at[:, None], -torch.inf)
            write = (row[:, None, None], group[:, None], at[:, None, None])
            place = _Place(count, write, read, self._cos[at, None], self._sin[at, None], mask[:, None, None])
        return self._forward(tokens, place)

    @torch.inference_mode()
    def move(self, row: int, to: int) -> None:
        length = self._lengths[to] = self._lengths[row]
        for block in self._blocks:
            block.keys[to, :, :length] = block.keys[row, :, :length]
            block.values[to, :, :length] = block.values[row, :, :length]

    def _forward(self, tokens: Sequence[int], place: "_Place") -> Tensor:
        """Logits [R, V] of each row's last token; ``tokens`` are the rows' one after the other, R * T of them."""
        hidden = self._embed(torch.tensor(tokens, device=self._device))
        for block in self._blocks:
            hidden = block(hidden, place)
        return self._head(self._norm(hidden.view(place.rows, -1, hidden.shape[-1])[:, -1]))

    def _reserve(self, rows: int, length: int) -> None:
        """Room for so many tokens in each of so many rows, and their rotary angles [T, 1, D]."""
        if rows <= self._held and length <= self._room:
            return
        if rows > self._held:
            self._held = min(self.rows, max(rows, 2 * self._held))
        if length > self._room:
            self._room = min(self.limit, max(length + GROWTH, 2 * self._room))
        at = torch.arange(self._room, device=self._device)[None]
        cos, sin = self._rotary(torch.empty(0, dtype=self._dtype, device=self._device), at)
        self._cos, self._sin = cos[0, :, None], signed(sin[0, :, None])
        for block in self._blocks:
            block.reserve(self._held, self._room, self._dtype, self._device)


class _Place:
    """Where the tokens of a forward pass stand: in how many rows, all with as many; ``write`` and ``read`` index the
    cache [R, K, T, D] for the new tokens and for all that they attend to; their rotary angles; and a mask when rows are
    of different lengths."""

    def __init__(self, rows: int, write: Any, read: Any, cos: Tensor, sin: Tensor, mask: Tensor | None = None) -> None:
        self.rows, self.write, self.read, self.cos, self.sin, self.mask = rows, write, read, cos, sin, mask


class _Norm:
    """RMSNorm [..., W] -> [..., W] in four kernels, six unless in float32: x w sqrt(W) / hypot(|x|, sqrt(W eps))."""

    def __init__(self, norm: Any) -> None:
        weight: Tensor = norm.weight
        self._weight = weight.to(torch.promote_types(weight.dtype, torch.float32)) * len(weight) ** 0.5
        self._least = self._weight.new_tensor((len(weight) * norm.variance_epsilon) ** 0.5)

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.to(self._weight.dtype)
        length: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        out: Tensor = (wide * self._weight).div_(torch.hypot(length, self._least))
        return out.to(x.dtype)


class _Block:
    """One decoder layer and its part of the cache, keys and values [R, K, T, D]."""

    keys: Tensor
    values: Tensor

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.norm, self.second_norm = _Norm(layer.input_layernorm), _Norm(layer.post_attention_layernorm)
        self.qkv = Stacked([attention.q_proj, attention.k_proj, attention.v_proj])
        self.o, self.down = Stacked([attention.o_proj]), Stacked([mlp.down_proj])
        self.gate_up = Stacked([mlp.gate_proj, mlp.up_proj])
        self.width, self.scale = attention.head_dim, attention.scaling
        self.groups = attention.v_proj.out_features // self.width
        self.keys = self.values = torch.empty(0, self.groups, 0, self.width)

    def reserve(self, rows: int, room: int, dtype: torch.dtype, device: torch.device) -> None:
        old_rows, _, old_room, _ = self.keys.shape
        for name in ("keys", "values"):
            old: Tensor = getattr(self, name)
            new = torch.zeros(rows, self.groups, room, self.width, dtype=dtype, device=device)
            new[:old_rows, :, :old_room] = old
            setattr(self, name, new)

    def __call__(self, hidden: Tensor, place: _Place) -> Tensor:
        hidden = self.o(self._attend(self.qkv(self.norm(hidden)), place)).add_(hidden)
        gate, up = self.gate_up(self.second_norm(hidden)).chunk(2, -1)
        return self.down(functional.silu(gate).mul_(up)).add_(hidden)

    def _attend(self, qkv: Tensor, place: _Place) -> Tensor:
        """Queries, keys and values side by side [R T, (H + 2 K) D] -> [R T, H D]; the cache takes in the new ones."""
        tokens = len(qkv) // place.rows
        heads = qkv.view(place.rows, tokens, -1, self.width)
        turned = heads[:, :, : -self.groups]
        turned = (turned * place.cos).addcmul_(turned.roll(self.width // 2, -1), place.sin)
        q, k, v = turned[:, :, : -self.groups], turned[:, :, -self.groups :], heads[:, :, -self.groups :]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        self.keys[place.write], self.values[place.write] = k, v
        k, v = self.keys[place.read], self.values[place.read]
        if tokens > 1:
            return causal_attention(q, k, v, self.scale).transpose(1, 2).flatten(2).flatten(0, 1)
        folded = q.reshape(place.rows, self.groups, -1, self.width)  # the queries of a group as rows of one matrix
        out = functional.scaled_dot_product_attention(folded, k, v, attn_mask=place.mask, scale=self.scale)
        return out.reshape(place.rows, -1)
