"""The arithmetic of training and guiding a latent diffusion model, as pure functions.

Legend: B batch, C latent channels, H and W latent height and width, T training timesteps.
The forward process is x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e with a = alphas_cumprod [T] (Ho et al. 2020,
arXiv:2006.11239). Its signal-to-noise ratio is a_t / (1 - a_t).
"""

from typing import Literal

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction"]


def _coefficients(alphas_cumprod: Tensor, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(a_t) and sqrt(1 - a_t), each [B, 1, ..., 1] with the rank and dtype of ``like``."""
    chosen = alphas_cumprod.to(like.device)[timesteps].reshape(-1, *[1] * (like.ndim - 1))
    return chosen.sqrt().to(like.dtype), (1 - chosen).sqrt().to(like.dtype)


def add_noise(latents: Tensor, noise: Tensor, alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e. ``latents``, ``noise`` [B, C, H, W]; ``timesteps`` int64 [B]."""
    signal, deviation = _coefficients(alphas_cumprod, timesteps, latents)
    return signal * latents + deviation * noise


def target(kind: PredictionType, latents: Tensor, noise: Tensor, alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """What the UNet learns to predict, [B, C, H, W].

    epsilon: the noise e. v_prediction: sqrt(a_t) e - sqrt(1 - a_t) x_0 (Salimans and Ho 2022, arXiv:2202.00512).
    """
    if kind == "epsilon":
        return noise
    signal, deviation = _coefficients(alphas_cumprod, timesteps, latents)
    return signal * noise - deviation * latents


def offset_noise(noise: Tensor, shift: Tensor, strength: float) -> Tensor:
    """Noise whose every channel is moved by a random constant, so that brightness is learnt too.

    ``noise`` [B, C, H, W]; ``shift`` [B, C, 1, 1], standard normal; ``strength`` some 0.05 to 0.1 (crosslabs.org 2023).
    """
    return noise + strength * shift


def signal_to_noise(alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """a_t / (1 - a_t), [B]."""
    chosen = alphas_cumprod[timesteps]
    return chosen / (1 - chosen)


def min_snr_weights(kind: PredictionType, snr: Tensor, gamma: float) -> Tensor:
    """Loss weights that clamp the SNR at ``gamma`` (Hang et al. 2023, arXiv:2303.09556), same shape as ``snr``.

    The weight on the error in x_0 is min(snr, gamma). A squared error in epsilon is snr times that in x_0, one in v
    is (snr + 1) times it; hence min(snr, gamma) / snr and min(snr, gamma) / (snr + 1).
    """
    return snr.clamp(max=gamma) / (snr if kind == "epsilon" else snr + 1)


def has_zero_terminal_snr(alphas_cumprod: Tensor) -> bool:
    """Whether the last timestep holds no signal (Lin et al. 2023, arXiv:2305.08891).

    There epsilon tells nothing about the picture, so such a schedule needs v-prediction.
    Some schedulers write 2^-24 in place of 0 to keep divisions finite; that counts as zero.
    """
    return bool(alphas_cumprod[-1] <= 2.0**-24)


def guide(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598): u + scale (c - u). Scale 1 gives ``c``."""
    return unconditional + scale * (conditional - unconditional)


def stratified_timesteps(count: int, total: int, offset: float) -> Tensor:
    """``count`` timesteps, one in each of as many equal parts of 0..``total``, at ``offset`` (0 to 1) of its part."""
    places = (torch.arange(count, dtype=torch.float64) + offset) * total / count
    return places.floor().to(torch.int64).clamp(max=total - 1)
