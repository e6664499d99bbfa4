"""A causal language model that gives its loss on packed rows, by lorakit's own attention and cross-entropy.

Shapes: ``B`` rows, ``T`` tokens a row, ``H`` heads, ``D`` head dim, ``N`` labelled tokens.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from lorakit.errors import ModelError
from lorakit.families.llama import blocks
from lorakit.numerics.cross_entropy import linear_cross_entropy
from lorakit.numerics.packed_attention import packed_attention
from lorakit.numerics.packing import Packing

NAME = "lorakit_packed"
"""This attention's name in transformers."""


def attend(
    module: nn.Module,  # noqa: ARG001 (transformers' signature)
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [B, H, T, D], key and value [B, K, T, D] -> [B, T, H, D].

    ``packing`` among the options says where the documents are; without it each row is one. ``sliding_window``: tokens
    that one sees, itself among them.
    Raises ModelError for what training never has: a mask, a cache, or dropout of probabilities.
    """
    batch, _, tokens, _ = query.shape
    if attention_mask is not None or key.shape[2] != tokens:
        raise ModelError("packed attention takes no mask and no cache")
    if options.get("dropout"):
        raise ModelError("the base drops attention probabilities out, which packed attention does not do")
    packing = options.get("packing") or Packing.of([tokens] * batch, device=query.device)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    window = options.get("sliding_window")
    return packed_attention(q, k, v, packing, scaling, window).view(batch, tokens, query.shape[1], -1), None


def no_mask(**_: Any) -> None:
    """transformers' mask interface: nothing is built, the packing says it all."""


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, no_mask)


class PackedLM(nn.Module):
    """The training view of a causal language model: tokens and labels in, the summed loss out.

    ``logit_factor``: what the model multiplies its logits with. ``checkpointing``: recompute each block's activations
    in the backward pass.
    """

    def __init__(self, lm: Any, logit_factor: float = 1.0, *, checkpointing: bool = False) -> None:
        super().__init__()
        self.lm = lm
        self.logit_factor = logit_factor
        self.checkpointing = checkpointing
        self.plain = True
        """Whether the walk through the blocks is ours, not transformers'."""
        if not blocks.are_plain(lm.get_decoder()):
            self._walk_by_transformers()

    def _walk_by_transformers(self) -> None:
        self.plain = False
        if self.checkpointing:
            self.lm.activation_checkpointing_enable({"use_reentrant": False})

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        documents: tuple[int, Sequence[int]] | None,
        rows: Tensor,
        targets: Tensor,
    ) -> Tensor:
        """float32 sum of the cross-entropy at the labelled places.

        Args:
            tokens, positions: int64 [B, T]; positions count from 0 in each document.
            documents: of a packed row (B is 1) the tokens at its start that begin each document, and each document's
                own ones; None: a row is one document, padded behind, where no label and no real token looks.
            rows: int64 [N], places b * T + t whose next token is learned.
            targets: int64 [N], those next tokens.
        """
        shared, lengths = documents or (0, [tokens.shape[1]] * len(tokens))
        packing = Packing.of(lengths, shared, tokens.device)
        decoder: Any = self.lm.get_decoder()
        if self.plain:
            places = tokens.flatten(), positions.flatten(), packing, rows
            hidden = blocks.hidden_states(decoder, *places, checkpointing=self.checkpointing and self.training)
        else:
            states = decoder(input_ids=tokens, position_ids=positions, use_cache=False, packing=packing)
            hidden = states.last_hidden_state.flatten(0, 1).index_select(0, rows)
        if self.logit_factor != 1:
            hidden = hidden * self.logit_factor
        return linear_cross_entropy(hidden, self.lm.get_output_embeddings().weight, targets)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """torch.compile what does not change shape but in its tokens: each block's MLP and norms, walked through by
        transformers, whose many small operations are what there is to fuse."""
        self._walk_by_transformers()
        for name, module in self.lm.named_modules():
            if name.endswith((".mlp", "layernorm", "norm")):
                module.compile(*args, dynamic=True, **kwargs)


def head_is_frozen(lm: Any) -> bool:
    """Whether the head has no adapter and asks for no gradient, as the loss takes it."""
    head = lm.get_output_embeddings()
    return type(head) is nn.Linear and not head.weight.requires_grad
