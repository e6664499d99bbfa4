"""Tiny real models made on the spot: a LLaMA of hidden width 32 and a Stable Diffusion of channels (32, 64).

Every function writes a safetensors folder in the layout of transformers or diffusers and gives its path back.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LINES = (
    "What does the function sorted do? It returns a new list with all items of the iterable in ascending order.",
    "The quick brown fox jumps over the lazy dog, 0123456789 times!",
    "system user assistant You are a helpful assistant. Hello, how are you? I am fine, thank you.",
    "a red apple on a white table, a photo of a cat, an emoji of a rocket, the style of a drawing",
)


def tiny_tokenizer(size: int = 400) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most ``size`` pieces with chatml's marks; BOS ``<s>`` is not added by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "<|im_start|>", "<|im_end|>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        chat_template=CHATML,
        model_max_length=512,
    )


def tiny_llama(
    folder: Path,
    *,
    tied: bool = True,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    seed: int = 0,
) -> Path:
    """A LlamaForCausalLM of 2 layers, 4 heads, 2 key-value heads, with its tokenizer; several shards when small."""
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_clip_tokenizer() -> CLIPTokenizer:
    """CLIP's lower-casing BPE with word ends, its marks the last pieces, trained on a few lines; 77 tokens at most."""
    vocabulary, merges = _clip_pieces()
    return CLIPTokenizer(vocab=dict(vocabulary), merges=list(merges), model_max_length=77)


@cache
def _clip_pieces() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges, which come out otherwise each time they are trained."""
    rules = CLIPTokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = rules.normalizer, rules.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    pieces = {piece: (number - 2) % len(model["vocab"]) for piece, number in model["vocab"].items()}
    return pieces, [tuple(pair) for pair in model["merges"]]


def _tiny_vae(groups: int = 8, **options: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(2 * groups, 4 * groups, 4 * groups),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=groups,
        sample_size=64,
        **options,
    )


def _tiny_text_config(tokenizer: CLIPTokenizer, width: int = 32, heads: int = 4, **options: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=heads,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )


def tiny_sd_unet(width: int = 32, heads: int = 4, groups: int = 8) -> UNet2DConditionModel:
    """SD 1.5's UNet in small: two levels of one resnet, attention in the upper one; texts of ``width``."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=heads,
        norm_num_groups=groups,
    )


def tiny_sd(
    folder: Path,
    prediction_type: str = "epsilon",
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    packable: bool = False,
) -> Path:
    """A StableDiffusionPipeline with SD 1.5's betas: VAE of factor 4, text model of width 32, 16x16 latents.

    ``packable``: the text model is of width 64, and heads and groups are as readers of single files take for granted.
    """
    tokenizer = tiny_clip_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = _tiny_vae(*((32,) if packable else ()))
        text_encoder = CLIPTextModel(_tiny_text_config(tokenizer, *((64, 1) if packable else ())))
        unet = tiny_sd_unet(*((64, 8, 32) if packable else ()))
    scheduler = PNDMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    pipeline = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipeline.to(dtype=dtype).save_pretrained(folder)
    return folder


def tiny_sdxl_unet() -> UNet2DConditionModel:
    """SDXL's UNet in small: three levels of two resnets, heads of 64 in the lower two, two text encoders' states."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 64),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        cross_attention_dim=64 + 128,
        attention_head_dim=(1, 1, 1),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 128,
    )


def tiny_sdxl(folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, zeros: bool = True) -> Path:
    """A StableDiffusionXLPipeline of SDXL's shape; ``zeros``: an empty negative prompt is all zeros, as in SDXL 1.0."""
    first, second = tiny_clip_tokenizer(), tiny_clip_tokenizer()
    second.pad_token = "!"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = _tiny_vae(32, scaling_factor=0.13025)
        text_encoder = CLIPTextModel(_tiny_text_config(first, 64, 1, hidden_act="quick_gelu"))
        wide = _tiny_text_config(second, 128, 2, hidden_act="gelu", projection_dim=128)
        text_encoder_2 = CLIPTextModelWithProjection(wide)
        unet = tiny_sdxl_unet()
    scheduler = EulerDiscreteScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
    )
    pipeline = StableDiffusionXLPipeline(
        vae,
        text_encoder,
        text_encoder_2,
        first,
        second,
        unet,
        scheduler,
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    )
    pipeline.to(dtype=dtype).save_pretrained(folder)
    return folder


def _permute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's order of the rows of q and k: rotary pairs side by side instead of half a head apart."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def tiny_gguf(path: Path, seed: int = 0, model: Path | None = None) -> Path:
    """``tiny_llama``, or the one in ``model``, and its tokenizer as a float32 GGUF file, laid out as llama.cpp's
    converter does."""
    from gguf import GGUFWriter, TokenType

    folder = model or tiny_llama(path.parent / f"{path.stem}-folder", seed=seed)
    lm = LlamaForCausalLM.from_pretrained(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    pieces = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    special = {token["content"] for token in tokenizer["added_tokens"]}
    writer, config = GGUFWriter(path, "llama"), lm.config
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(pieces))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(pieces)
    writer.add_token_types([TokenType.CONTROL if piece in special else TokenType.NORMAL for piece in pieces])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_pad_token_id(config.pad_token_id)
    writer.add_chat_template(CHATML)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    writer.add_tensor("token_embd.weight", lm.model.embed_tokens.weight.detach().numpy())
    if not config.tie_word_embeddings:
        writer.add_tensor("output.weight", lm.lm_head.weight.detach().numpy())
    writer.add_tensor("output_norm.weight", lm.model.norm.weight.detach().numpy())
    for number, layer in enumerate(lm.model.layers):
        for ours, theirs in names.items():
            weight = layer.get_submodule(ours).weight.detach()
            if theirs in ("attn_q", "attn_k"):
                heads = config.num_attention_heads if theirs == "attn_q" else config.num_key_value_heads
                weight = _permute(weight, heads)
            writer.add_tensor(f"blk.{number}.{theirs}.weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
