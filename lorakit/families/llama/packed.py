"""A causal language model that gives its loss on packed rows, by lorakit's own attention and cross-entropy.

Shapes: ``B`` rows, ``T`` tokens a row, ``H`` heads, ``D`` head dim, ``N`` labelled tokens.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from lorakit.errors import ModelError
from lorakit.numerics.attention import packed_attention
from lorakit.numerics.cross_entropy import linear_cross_entropy

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

    ``document_lengths`` among the options says where the documents of a packed row end; without it each row is one.
    Raises ModelError for what training never has: a mask, a cache, or dropout of probabilities.
    """
    batch, heads, tokens, width = query.shape
    if attention_mask is not None or key.shape[2] != tokens:
        raise ModelError("packed attention takes no mask and no cache")
    if options.get("dropout"):
        raise ModelError("the base drops attention probabilities out, which packed attention does not do")
    lengths = options.get("document_lengths") or [tokens] * batch
    q, k, v = (x.transpose(0, 1).flatten(1, 2) for x in (query, key, value))
    out = packed_attention(q, k, v, lengths, scaling)
    return out.transpose(0, 1).reshape(batch, tokens, heads, width), None


def no_mask(**_: Any) -> None:
    """transformers' mask interface: nothing is built, document lengths say it all."""


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, no_mask)


class PackedLM(nn.Module):
    """The training view of a causal language model: tokens and labels in, the summed loss out.

    ``logit_factor``: what the model multiplies its logits with.
    """

    def __init__(self, lm: PreTrainedModel, logit_factor: float = 1.0) -> None:
        super().__init__()
        self.lm: Any = lm
        self.logit_factor = logit_factor

    def forward(
        self, tokens: Tensor, positions: Tensor, lengths: Sequence[int] | None, rows: Tensor, targets: Tensor
    ) -> Tensor:
        """float32 sum of the cross-entropy at the labelled places.

        Args:
            tokens, positions: int64 [B, T]; positions count from 0 in each document.
            lengths: tokens of each document when B is 1 and the row is packed; None: a row is one document, padded
                behind, where no label and no real token looks.
            rows: int64 [N], places b * T + t whose next token is learned.
            targets: int64 [N], those next tokens.
        """
        states = self.lm.get_decoder()(
            input_ids=tokens, position_ids=positions, use_cache=False, document_lengths=lengths
        ).last_hidden_state
        hidden = states.flatten(0, 1).index_select(0, rows)
        if self.logit_factor != 1:
            hidden = hidden * self.logit_factor
        return linear_cross_entropy(hidden, self.lm.get_output_embeddings().weight, targets)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """torch.compile what does not change shape but in its tokens: each block's MLP and norms."""
        for name, module in self.lm.named_modules():
            if name.endswith((".mlp", "layernorm", "norm")):
                module.compile(*args, dynamic=True, **kwargs)


def checkpoint_activations(lm: Any) -> None:
    """Recompute each block's activations in the backward pass."""
    lm.activation_checkpointing_enable({"use_reentrant": False})


def head_is_frozen(lm: Any) -> bool:
    """Whether the head has no adapter and asks for no gradient, as the loss takes it."""
    head = lm.get_output_embeddings()
    return type(head) is nn.Linear and not head.weight.requires_grad
