"""The packed loss against transformers' own, and the batches it runs on."""

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from lorakit.adapters.inject import adapter_parameters, inject
from lorakit.data.tokens import Encoded
from lorakit.errors import ModelError
from lorakit.families.llama import packed
from lorakit.families.llama.base import (
    GROUPS,
    OWN_ATTENTION,
    check_trainable,
    has_windows,
    logit_factor,
    most_positions,
)
from lorakit.families.llama.batch import collate, empty_batch, held_out_batches, train_batches
from lorakit.numerics.order import Layout
from lorakit.recipe.schema import Adapter
from lorakit.storage.checks import LLAMA_ARCHITECTURES

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
KINDS = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "olmo2": {},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0},
    "cohere": {"logit_scale": 0.25},
    "gemma": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 64},
    "smollm3": {"pad_token_id": 0},
    "helium": {"head_dim": 8},
    "seed_oss": {"head_dim": 16, "attention_dropout": 0.0, "residual_dropout": 0.0},
}


def build(kind="llama", **more):
    config = AutoConfig.for_model(kind, **SIZES | KINDS[kind] | more)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return AutoModelForCausalLM.from_config(config, attn_implementation=packed.NAME).double().requires_grad_(False)


def rows(*lengths, seed=0, alike=0):
    """Token rows of random tokens and labels; the last token but one is labelled at least. The first ``alike`` tokens
    are the same in all."""
    draw = np.random.default_rng(seed)
    made = []
    for number, length in enumerate(lengths):
        labels = draw.random(length) < 0.5
        labels[-2] = True
        tokens = draw.integers(3, 61, length).astype(np.int32)
        tokens[:alike] = 7
        made.append(Encoded(tokens, labels, f"f:{number}"))
    return made


def run(view, batch):
    return view(batch.tokens, batch.positions, batch.documents, batch.rows, batch.targets)


def transformers_loss(lm, examples):
    """Each row by itself through the model's own forward and loss, eager attention, summed."""
    lm.set_attn_implementation("eager")
    total = torch.zeros((), dtype=torch.float64)
    for example in examples:
        tokens = torch.from_numpy(example.tokens.astype(np.int64))[None]
        labels = tokens.masked_fill(~torch.from_numpy(example.labels)[None], -100)
        total = total + lm(input_ids=tokens, labels=labels).loss * example.count
    lm.set_attn_implementation(packed.NAME)
    return total


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alike", [0, 2])
@pytest.mark.parametrize("adapter", [Adapter(rank=4), Adapter(rank=3, dora=True, targets="attention+mlp")])
def test_packed_and_padded_losses_and_gradients_equal_transformers_own(kind, alike, adapter):
    lm = build(kind)
    inject(lm, adapter, GROUPS, seed=1)
    parameters = list(adapter_parameters(lm).values())
    for parameter in parameters:
        parameter.data = (
            torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parameter))).double() / 8
        )
    examples, view = rows(9, 17, 5, 30, alike=alike), packed.PackedLM(lm, logit_factor(lm.config))
    assert view.plain == (kind in ("llama", "mistral", "qwen2"))
    assert packed.head_is_frozen(lm)
    losses, gradients = [], []
    for loss in (
        run(view, collate(examples, packing=True)),
        run(view, collate(examples, packing=False)),
        transformers_loss(lm, examples),
    ):
        losses.append(loss.item())
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    assert losses[2] > 1
    # transformers computes norms, softmax and its loss in float32 whatever the model's dtype.
    for loss, gradient in zip(losses[:2], gradients[:2], strict=True):
        assert loss == pytest.approx(losses[2], rel=1e-6)
        assert (gradient - gradients[2]).norm() <= 2e-5 * gradients[2].norm()


WINDOWS = {
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
}


def test_a_window_that_the_config_names_and_the_model_has_not():
    lm, examples = build("llama", sliding_window=8), rows(15, 30)
    loss = run(packed.PackedLM(lm), collate(examples, packing=True))
    assert loss.item() == pytest.approx(transformers_loss(lm, examples).item(), rel=1e-6)


@pytest.mark.parametrize("kind", WINDOWS)
@pytest.mark.parametrize("alike", [0, 3, 12])
def test_documents_longer_than_a_window(kind, alike):
    lm = build(kind, **WINDOWS[kind])
    inject(lm, Adapter(rank=4), GROUPS, seed=1)
    parameters = list(adapter_parameters(lm).values())
    for parameter in parameters:
        draw = torch.Generator().manual_seed(len(parameter))
        parameter.data = torch.randn(parameter.shape, generator=draw).double() / 8
    examples, view = rows(15, 30, 14, 19, alike=alike), packed.PackedLM(lm, logit_factor(lm.config))
    assert has_windows(lm.config)
    assert view.plain == (kind != "gemma3_text")
    expected = transformers_loss(lm, examples)
    gradients = torch.autograd.grad(expected, parameters)
    for packing in (True, False):
        loss = run(view, collate(examples, packing=packing))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        for got, want in zip(torch.autograd.grad(loss, parameters), gradients, strict=True):
            assert (got - want).norm() <= 2e-5 * want.norm()


def saved(view, batch):
    """Numbers kept for the backward pass."""
    counts = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: counts.append(x.numel()) or x, lambda x: x):
        run(view, batch)
    return sum(counts)


@pytest.mark.parametrize("kind", ["llama", "granite"])
def test_gradient_checkpointing_changes_nothing(kind):
    lm = build(kind, num_hidden_layers=6)
    inject(lm, Adapter(rank=4), GROUPS, seed=1)
    parameters, batch = list(adapter_parameters(lm).values()), collate(rows(9, 17), packing=True)
    view = packed.PackedLM(lm).train()
    plain, numbers = torch.autograd.grad(run(view, batch), parameters), saved(view, batch)
    view = packed.PackedLM(lm, checkpointing=True).train()
    assert saved(view, batch) < numbers / 2
    for got, want in zip(torch.autograd.grad(run(view, batch), parameters), plain, strict=True):
        assert torch.equal(got, want)


def test_a_document_does_not_see_another():
    view, (first, second) = packed.PackedLM(build()), rows(8, 12)
    with torch.no_grad():
        apart = run(view, collate([first], packing=True)) + run(view, collate([second], packing=True))
        together = run(view, collate([first, second], packing=True))
        changed = Encoded((first.tokens + 7) % 61, first.labels, "f")
        other = run(view, collate([changed, second], packing=True)) - run(view, collate([changed], packing=True))
    assert together.item() == pytest.approx(apart.item(), rel=1e-6)
    assert other.item() == pytest.approx(run(view, collate([second], packing=True)).item(), rel=1e-6)


def test_what_documents_begin_with_stands_in_the_row_once():
    examples = rows(8, 12, 9, alike=5)
    batch, apart = collate(examples, packing=True), collate(examples, packing=True, sharing=False)
    shared, own = batch.documents
    assert shared >= 5
    assert batch.tokens.shape[1] == apart.tokens.shape[1] - 2 * shared
    assert [length + shared for length in own] == list(apart.documents[1])
    assert apart.documents[0] == 0
    assert (batch.count, batch.targets.tolist()) == (apart.count, apart.targets.tolist())
    view = packed.PackedLM(build())
    assert run(view, batch).item() == pytest.approx(run(view, apart).item(), rel=1e-6)
    same = collate([examples[0]] * 2, packing=True)
    assert min(same.documents[1]) == 1
    assert run(view, same).item() == pytest.approx(2 * run(view, collate(examples[:1], packing=True)).item(), rel=1e-6)


@pytest.mark.parametrize("kind", ["llama", "granite"])
def test_an_empty_batch_has_no_loss(kind):
    lm, batch = build(kind), empty_batch()
    inject(lm, Adapter(rank=4, targets="attention+mlp"), GROUPS, seed=1)
    assert batch.count == 0
    loss = run(packed.PackedLM(lm), batch)
    assert loss.item() == 0
    assert all(not g.any() for g in torch.autograd.grad(loss, list(adapter_parameters(lm).values())))


def test_masks_caches_and_probability_dropout_are_refused():
    lm = build(attention_dropout=0.5).train()
    with pytest.raises(ModelError, match="drops"):
        lm(input_ids=torch.ones(1, 4, dtype=torch.int64))
    with pytest.raises(ModelError, match="no cache"):
        packed.attend(lm, *(torch.ones(1, 2, n, 4) for n in (1, 5, 5)), None, 1.0)


def test_capped_logits_and_windows_are_known():
    with pytest.raises(ModelError, match="gemma2 caps"):
        check_trainable(AutoConfig.for_model("gemma2", **SIZES))
    assert has_windows(AutoConfig.for_model("mistral", **SIZES, sliding_window=16))
    assert not has_windows(AutoConfig.for_model("mistral", **SIZES, sliding_window=64))
    assert not has_windows(AutoConfig.for_model("qwen2", **SIZES, sliding_window=16))


@pytest.mark.parametrize(
    ("rope", "most"),
    [
        ({}, 64),
        ({"rope_type": "linear", "factor": 4.0}, 256),
        ({"rope_type": "dynamic", "factor": 2.0}, 64),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8}, 64),
    ],
)  # fmt: skip
def test_scaled_positions_are_more(rope, most):
    config = AutoConfig.for_model("llama", **SIZES, rope_parameters={"rope_theta": 10000.0, **rope})
    assert most_positions(config) == most


@pytest.mark.parametrize(("named", "kind"), LLAMA_ARCHITECTURES.items())
def test_every_architecture_takes_our_attention_or_is_refused(named, kind):
    takes = getattr(transformers, named)._supports_attention_backend
    assert takes == (kind not in OWN_ATTENTION)
    assert not takes or kind in KINDS or kind == "gemma2"
    if not takes:
        with pytest.raises(ModelError, match="an attention of its own"):
            check_trainable(AutoConfig.for_model(kind))


def test_targets_are_the_labelled_tokens_and_the_tail_is_left_out():
    example = Encoded(np.array([5, 6, 7, 8, 9], np.int32), np.array([1, 0, 1, 1, 0], bool), "f")
    batch = collate([example, example], packing=True)
    assert batch.tokens.tolist() == [[5, 6, 7, 7]]
    assert batch.positions.tolist() == [[0, 1, 2, 2]]
    assert batch.documents == (2, (1, 1))
    assert (batch.rows.tolist(), batch.targets.tolist()) == ([1, 2, 1, 3], [7, 8, 7, 8])
    assert batch.count == 2 * example.count == 4


@pytest.mark.parametrize("packing", [True, False])
def test_every_held_out_row_comes_once_over_all_ranks(packing):
    examples = rows(*range(5, 16))
    by_rank = [list(held_out_batches(examples, Layout(0, 8, 1, rank, 4), packing=packing)) for rank in range(4)]
    assert {len(batches) for batches in by_rank} == {2}
    names = [name for batches in by_rank for batch in batches for name in batch.ids]
    assert sorted(names) == sorted(example.where for example in examples)
    assert sum(b.count for batches in by_rank for b in batches) == sum(example.count for example in examples)
    assert list(held_out_batches([], Layout(0, 8), packing=packing)) == []


def test_training_batches_do_not_depend_on_the_layout_and_start_anywhere():
    examples = rows(*range(5, 37))

    def names(layout, start, count):
        stream = train_batches(examples, layout, start, packing=True)
        return [set(next(stream).ids) for _ in range(count)]

    whole = names(Layout(1, 8), 0, 4)
    parts = [names(Layout(1, 8, 2, rank, 2), 0, 8) for rank in range(2)]
    assert [parts[0][2 * s] | parts[0][2 * s + 1] | parts[1][2 * s] | parts[1][2 * s + 1] for s in range(4)] == whole
    assert names(Layout(1, 8), 2, 2) == whole[2:]
