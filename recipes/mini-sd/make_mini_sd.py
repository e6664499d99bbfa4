"""Make builtin:mini-sd, a 64 px Stable Diffusion, from named Noto emoji pictures.

    python recipes/mini-sd/make_mini_sd.py PICTURES WORK OUT

PICTURES is the unpacked npm package emoji-datasource-google (emoji.json and img/google/64).
WORK keeps checkpoints: the same command goes on from the newest one after an interruption.
OUT receives a folder in diffusers' layout, float16, that StableDiffusionPipeline loads.

Stages: a byte-pair tokenizer from the pictures' names; an AutoencoderKL on all pictures (L1 + MSE +
gradient + KL loss); a UNet2DConditionModel and a CLIPTextModel trained jointly on the pictures of
concrete things, predicting epsilon on SD 1.5's noise schedule with min-SNR weights (Hang et al. 2023,
arXiv:2303.09556) and a tenth of the captions empty, so that classifier-free guidance works.

Legend: B batch, latents [B, 4, 16, 16], pictures [B, 3, 64, 64] in -1..1.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TOKENS = 16
CONCRETE = {
    word
    for line in (Path(__file__).parent / "concrete.txt").read_text().splitlines()
    if not line.startswith("#")
    for word in line.split()
}


def captions_of(entry: dict, taken: set[str]) -> list[str]:
    """The Unicode name first, then each short name that is nobody else's Unicode name."""
    name = entry["name"].lower().replace("black heart suit", "heart suit")
    short = [s.replace("_", " ").replace("-", " ") for s in entry["short_names"][:2] if not any(c.isdigit() for c in s)]
    return [name] + [s for s in short if s != name and s not in taken]


def load_pictures(folder: Path) -> tuple[Tensor, list[list[str]], list[bool]]:
    """All pictures but flags and skin tones: uint8 [N, 3, 64, 64] on white, captions, and which are concrete things."""
    entries = [
        e
        for e in json.loads((folder / "emoji.json").read_text())
        if e["has_img_google"] and e["category"] not in ("Flags", "Component")
    ]
    taken = {e["name"].lower() for e in entries}
    pixels, captions, concrete = [], [], []
    for entry in entries:
        picture = (
            Image.open(folder / "img/google/64" / entry["image"])
            .convert("RGBA")
            .resize((64, 64), Image.Resampling.LANCZOS)
        )
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        pixels.append(np.asarray(Image.alpha_composite(white, picture).convert("RGB")))
        captions.append(captions_of(entry, taken))
        concrete.append(entry["short_name"] in CONCRETE)
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), captions, concrete


def train_tokenizer(captions: list[list[str]]) -> CLIPTokenizer:
    """A 2,000-piece byte-pair vocabulary with CLIP's own splitting rules."""
    rules = CLIPTokenizer()
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    tokenizer.normalizer = rules.backend_tokenizer.normalizer
    tokenizer.pre_tokenizer = rules.backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
    )
    tokenizer.train_from_iterator(
        [c for names in captions for c in names] + ["a picture of a photo an emoji the style"] * 20, trainer
    )
    model = json.loads(tokenizer.to_str())["model"]
    return CLIPTokenizer(vocab=model["vocab"], merges=[tuple(m) for m in model["merges"]], model_max_length=TOKENS)


def image_gradient(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def save_state(path: Path, step: int, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> None:
    """Weights, moments and step in one safetensors file, renamed into place."""
    tensors = {f"{name}/{k}": v.contiguous().clone() for name, m in modules.items() for k, v in m.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{k}": v.contiguous() for k, v in state.items()}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"step": str(step)})
    partial.replace(path)


def load_state(path: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> int:
    """Restore what ``save_state`` wrote; the number of finished steps, 0 where there is no file."""
    if not path.exists():
        return 0
    tensors = load_file(path)
    for name, module in modules.items():
        module.load_state_dict({k.split("/", 1)[1]: v for k, v in tensors.items() if k.startswith(name + "/")})
    states: dict[int, dict[str, Tensor]] = {}
    for key in (k for k in tensors if k.startswith("optimizer/")):
        _, index, name = key.split("/")
        states.setdefault(int(index), {})[name] = tensors[key]
    optimizer.load_state_dict(optimizer.state_dict() | {"state": states})
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])


def learning_rate(step: int, steps: int, peak: float, decay: float) -> float:
    """Linear warmup over 100 steps, constant, then linear to zero over the last ``decay`` share of the run."""
    return peak * min(1.0, (step + 1) / 100, max(1, steps - step) / max(1, decay * steps))


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        sample_size=64,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )


def train_vae(pixels: Tensor, work: Path, steps: int) -> AutoencoderKL:
    torch.manual_seed(0)
    vae = new_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)
    step = load_state(work / "vae.safetensors", {"vae": vae}, optimizer)
    started, first = time.monotonic(), step
    while step < steps:
        torch.manual_seed(1_000_000 + step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 2e-3, 0.7)
        x = pixels[torch.randint(len(pixels), (16,))].float() / 127.5 - 1
        x = torch.where(torch.rand(16, 1, 1, 1) < 0.5, x.flip(-1), x)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        gradient = sum((a - b).abs().mean() for a, b in zip(image_gradient(x), image_gradient(y), strict=True))
        mse = F.mse_loss(y, x)
        loss = F.l1_loss(y, x) + mse + gradient + 1e-3 * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            rate = (step - first) / (time.monotonic() - started)
            psnr = 10 * np.log10(4 / mse.item())
            print(
                f"vae {step}/{steps} loss {loss.item():.4f} psnr {psnr:.1f} dB {rate:.2f} steps/s",
                flush=True,
            )
        if step % 500 == 0 or step == steps:
            save_state(work / "vae.safetensors", step, {"vae": vae}, optimizer)
    return vae.eval()


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(64, 96, 160),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def new_text_encoder(vocabulary: int) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            hidden_act="quick_gelu",
            projection_dim=128,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def pick_caption(captions: list[str], generator: torch.Generator) -> str:
    """Empty for one in ten; else one of the picture's names, now and then inside a phrase."""
    u = torch.rand(3, generator=generator).tolist()
    if u[0] < 0.1:
        return ""
    name = captions[int(u[1] * len(captions))]
    return name if u[2] < 0.8 else f"a picture of a {name}" if u[2] < 0.9 else f"{name} emoji"


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Scaled mean latents, [N, 4, 16, 16]; sets ``scaling_factor`` so that their standard deviation is 1."""
    means = torch.cat([vae.encode(p.float() / 127.5 - 1).latent_dist.mean for p in pixels.split(64)])
    vae.register_to_config(scaling_factor=round(1.0 / means.std().item(), 5))
    return means * vae.config.scaling_factor


def train_unet(
    latents: Tensor,
    captions: list[list[str]],
    tokenizer: CLIPTokenizer,
    work: Path,
    steps: int,
    batch: int = 32,
    peak: float = 1e-3,
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Joint training of UNet and text model; returns their exponential moving averages (decay 0.999)."""
    torch.manual_seed(1)
    trained = nn.ModuleDict({"unet": new_unet(), "text": new_text_encoder(len(tokenizer))})
    average = nn.ModuleDict({"unet": new_unet(), "text": new_text_encoder(len(tokenizer))}).requires_grad_(False)
    average.load_state_dict(trained.state_dict())
    trained.to(memory_format=torch.channels_last)  # a quarter faster on the CPU
    average.to(memory_format=torch.channels_last)
    schedule = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000
    )
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=peak, weight_decay=0.01, betas=(0.9, 0.99))
    modules = {"trained": trained, "average": average}
    step = load_state(work / "unet.safetensors", modules, optimizer)
    generator = torch.Generator()
    started, first, running = time.monotonic(), step, 0.0
    trained.train()
    while step < steps:
        generator.manual_seed(2_000_000 + step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak, 0.4)
        chosen = torch.randint(len(latents), (batch,), generator=generator)
        texts = [pick_caption(captions[i], generator) for i in chosen.tolist()]
        tokens = tokenizer(
            texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        ).input_ids
        t = torch.randint(1000, (batch,), generator=generator)
        noise = torch.randn(latents[chosen].shape, generator=generator)
        noisy = schedule.add_noise(latents[chosen], noise, t)
        predicted = trained["unet"](noisy, t, trained["text"](tokens).last_hidden_state).sample
        error = (predicted - noise).square().mean((1, 2, 3))
        loss = (error * snr[t].clamp(max=5) / snr[t]).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        decay = min(0.999, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(trained.parameters()), 1 - decay)
        step += 1
        running += error.mean().item()
        if step % 50 == 0:
            rate = batch * (step - first) / (time.monotonic() - started)
            print(f"unet {step}/{steps} loss {running / 50:.4f} {rate:.1f} samples/s", flush=True)
            running = 0.0
        if step % 250 == 0 or step == steps:
            save_state(work / "unet.safetensors", step, modules, optimizer)
    return average["unet"].eval(), average["text"].eval()


def export(
    out: Path, tokenizer: CLIPTokenizer, vae: AutoencoderKL, unet: UNet2DConditionModel, text: CLIPTextModel
) -> None:
    """Write the float16 folder that ``StableDiffusionPipeline.from_pretrained`` reads."""
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        skip_prk_steps=True,
        steps_offset=1,
        set_alpha_to_one=False,
        prediction_type="epsilon",
    )
    pipeline = StableDiffusionPipeline(vae, text, tokenizer, unet, scheduler, None, None, requires_safety_checker=False)
    pipeline.to(torch.float16).save_pretrained(out, safe_serialization=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, help="the unpacked npm package emoji-datasource-google")
    parser.add_argument("work", type=Path, help="checkpoints, for going on after an interruption")
    parser.add_argument("out", type=Path, help="the finished model, a diffusers folder")
    parser.add_argument("--vae-steps", type=int, default=3000)
    parser.add_argument("--unet-steps", type=int, default=3200)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    pixels, captions, concrete = load_pictures(arguments.pictures)
    tokenizer = train_tokenizer(captions)
    vae = train_vae(pixels, arguments.work, arguments.vae_steps)
    chosen = [i for i, wanted in enumerate(concrete) if wanted]
    latents = encode(vae, pixels[chosen]).contiguous(memory_format=torch.channels_last)
    unet, text = train_unet(latents, [captions[i] for i in chosen], tokenizer, arguments.work, arguments.unet_steps)
    export(arguments.out, tokenizer, vae, unet, text)


if __name__ == "__main__":
    main()
