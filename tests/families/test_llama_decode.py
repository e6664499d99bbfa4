"""The decoder for blocks of the plain Llama kind against transformers' own forward pass and generate."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lorakit.families.llama.decode import AnyModel, PlainLlama, decoder

SIZE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 700,
    "initializer_range": 0.2,
    "attn_implementation": "eager",
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 175}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
"""The weights are float64, but transformers takes norms and rotary angles in float32."""
PLAIN = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZE)),
    "untied, wide heads": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, head_dim=12, tie_word_embeddings=False)),
    "biases": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, attention_bias=True, mlp_bias=True)),
    "llama3 rope": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, rope_parameters=LLAMA3)),
    "yarn rope": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, rope_parameters=YARN)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZE, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZE)),
}
OTHER = {
    "dynamic rope": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, rope_parameters=DYNAMIC)),
    "gelu": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, hidden_act="gelu")),
    "window": lambda: MistralForCausalLM(MistralConfig(**SIZE, sliding_window=8)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZE)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SIZE, logits_scaling=3.0, residual_multiplier=0.5)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SIZE, logit_scale=0.3)),
}


def built(make, *, dtype=torch.float64, lora=True, **options):
    """Two calls give equal models, biases and LoRA's B not zero."""
    torch.manual_seed(0)
    model = make().to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    if lora:
        targets = ["q_proj", "v_proj", "o_proj", "down_proj"]
        config = LoraConfig(r=3, target_modules=targets, init_lora_weights=False, **options)
        inject_adapter_in_model(config, model)
    return model.eval()


def logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0, -1]


def draw(count, seed):
    return torch.randint(3, 97, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("kind", [*PLAIN, *OTHER])
def test_logits_are_the_models_own(kind, lora):
    model, ours = (built((PLAIN | OTHER)[kind], lora=lora) for _ in range(2))
    ours = decoder(ours)
    assert type(ours) is (PlainLlama if kind in PLAIN else AnyModel)
    text, rest = draw(20, 1), draw(12, 2)
    torch.testing.assert_close(ours.start(0, text), logits(model, text), **CLOSE)
    for token in rest:
        text.append(token)
        torch.testing.assert_close(ours.step([token])[0], logits(model, text), **CLOSE)


def test_rows_of_any_length_do_not_see_each_other():
    model, ours = (built(PLAIN["llama"]) for _ in range(2))
    ours = decoder(ours)
    texts = [draw(count, count) for count in (5, 1, 300, 19)]
    for row, text in enumerate(texts):
        torch.testing.assert_close(ours.start(row, text), logits(model, text), **CLOSE)
        assert len(ours._blocks[0].keys) == (1, 2, 4, 4)[row]  # on a GPU room that nobody needs is memory all the same
    for number in range(6):
        if number == 3:  # the longest row ends, the last takes its place, and is then short of a new one
            ours.move(3, 2)
            texts[2] = texts.pop()
            texts.append(draw(2, 9))
            ours.start(3, texts[3])
        tokens = draw(4, 100 + number)
        for text, token, after in zip(texts, tokens, ours.step(tokens), strict=True):
            text.append(token)
            torch.testing.assert_close(after, logits(model, text), **CLOSE)


def test_a_cache_that_grows_keeps_what_it_holds():
    model, ours = (built(PLAIN["qwen2"]) for _ in range(2))
    ours, text = decoder(ours), draw(3, 3)
    ours.start(0, text)
    for token in draw(280, 4):
        text.append(token)
        last = ours.step([token])[0]
    torch.testing.assert_close(last, logits(model, text), **CLOSE)


def test_dora_is_left_to_peft():
    model, ours = (built(PLAIN["llama"], use_dora=True) for _ in range(2))
    ours = decoder(ours)
    assert type(ours) is AnyModel
    text = draw(7, 5)
    torch.testing.assert_close(ours.start(0, text), logits(model, text), **CLOSE)
