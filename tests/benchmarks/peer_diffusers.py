"""The peer for Stable Diffusion: the loop that diffusers' users know, with nothing cached.

    python -m tests.benchmarks.peer_diffusers WORK OUT

Every step reads its pictures, encodes them with the VAE and their captions with the text encoder, noises the latents
and trains the UNet's PEFT adapter on the mean squared error. Noise, posterior sample and timesteps are the comparison's
own, so that the losses can be compared step by step.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

from tests.benchmarks import peer_common
from tests.benchmarks.plan import Plan, steps


def pixels(paths: list[str]) -> torch.Tensor:
    """float32 [B, 3, H, W] in -1 .. 1."""
    pictures = []
    for path in paths:
        with Image.open(path) as picture:
            pictures.append(torch.from_numpy(np.array(picture.convert("RGB"))))
    return torch.stack(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


class Base:
    """The frozen parts in the comparison's precision."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        vae: Any = AutoencoderKL
        unet: Any = UNet2DConditionModel
        schedule: Any = DDPMScheduler
        self.dtype = dtype
        self.vae = vae.from_pretrained(folder / "vae", torch_dtype=dtype).requires_grad_(False)
        self.unet = unet.from_pretrained(folder / "unet", torch_dtype=dtype).requires_grad_(False)
        text: Any = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=dtype)
        self.text_encoder = text.requires_grad_(False).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.schedule = schedule.from_pretrained(folder / "scheduler")

    def latents(self, paths: list[str], sample: torch.Tensor) -> torch.Tensor:
        """The VAE's posterior, drawn with ``sample`` and scaled."""
        posterior = self.vae.encode(pixels(paths).to(self.dtype)).latent_dist
        drawn: torch.Tensor = posterior.mean + posterior.std * sample.to(self.dtype)
        return drawn * float(self.vae.config.scaling_factor)

    def states(self, captions: list[str]) -> torch.Tensor:
        """The text encoder's last layer."""
        length = self.tokenizer.model_max_length
        ids = self.tokenizer(captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        states: torch.Tensor = self.text_encoder(ids.input_ids)[0]
        return states


def main() -> None:
    given = peer_common.arguments()
    plan = Plan.load(given.work)
    base = Base(given.work / "base", peer_common.DTYPES[plan.precision])
    names = ["to_q", "to_k", "to_v", "to_out.0"]
    base.unet.add_adapter(LoraConfig(r=plan.rank, lora_alpha=plan.rank, target_modules=names))
    base.unet.train()
    parameters = peer_common.start_adapter(base.unet, plan, given.work)
    optimizer = peer_common.optimizer(parameters, plan)
    drawn = load_file(given.work / "steps.safetensors")
    log = peer_common.StepLog(given.out)
    for number, rows in enumerate(steps(given.work)):
        noise, timesteps = drawn["noise"][number].to(base.dtype), drawn["timesteps"][number]
        with peer_common.autocast(plan):
            latents = base.latents([path for path, _ in rows], drawn["sample"][number])
            states = base.states([caption for _, caption in rows])
            noisy = base.schedule.add_noise(latents, noise, timesteps)
            predicted = base.unet(noisy, timesteps, states, return_dict=False)[0]
            loss = torch.nn.functional.mse_loss(predicted.float(), noise.float())
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, plan.clip)
        optimizer.step()
        optimizer.zero_grad()
        log.end(float(loss.detach()), len(rows), len(rows))


if __name__ == "__main__":
    main()
