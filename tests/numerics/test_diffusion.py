"""Diffusion arithmetic against the formulas in float64 and against diffusers' DDPMScheduler."""

import pytest
import torch
from diffusers import DDPMScheduler

from lorakit.numerics import diffusion

T = 1000


def schedule(**changes: object) -> DDPMScheduler:
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": T}
    return DDPMScheduler(**(settings | changes))


@pytest.fixture
def drawn() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 5, 4, 6, 8, generator=generator)
    return latents, noise, torch.tensor([0, 1, 499, 998, 999])


def test_add_noise_is_diffusers(drawn: tuple[torch.Tensor, ...]) -> None:
    latents, noise, steps = drawn
    reference = schedule()
    ours = diffusion.add_noise(latents, noise, reference.alphas_cumprod, steps)
    torch.testing.assert_close(ours, reference.add_noise(latents, noise, steps), rtol=0, atol=0)


def test_add_noise_keeps_variance_in_float64(drawn: tuple[torch.Tensor, ...]) -> None:
    latents, noise, steps = (x.double() if x.is_floating_point() else x for x in drawn)
    alphas = schedule().alphas_cumprod.double()
    a = alphas[steps][:, None, None, None]
    expected = a**0.5 * latents + (1 - a) ** 0.5 * noise
    torch.testing.assert_close(diffusion.add_noise(latents, noise, alphas, steps), expected, rtol=1e-15, atol=1e-15)


def test_targets(drawn: tuple[torch.Tensor, ...]) -> None:
    latents, noise, steps = drawn
    reference = schedule()
    alphas = reference.alphas_cumprod
    assert diffusion.target("epsilon", latents, noise, alphas, steps) is noise
    ours = diffusion.target("v_prediction", latents, noise, alphas, steps)
    torch.testing.assert_close(ours, reference.get_velocity(latents, noise, steps), rtol=0, atol=0)


def test_min_snr_weights_put_the_same_weight_on_the_error_in_x0(drawn: tuple[torch.Tensor, ...]) -> None:
    """A guess of x_0 implies one of epsilon and one of v: the weighted squared errors are min(snr, g) |dx0|^2."""
    latents, noise, steps = (x.double() if x.is_floating_point() else x for x in drawn)
    alphas, gamma = schedule().alphas_cumprod.double(), 5.0
    noisy = diffusion.add_noise(latents, noise, alphas, steps)
    guess = latents + 0.1 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    a = alphas[steps][:, None, None, None]
    guessed_noise = (noisy - a.sqrt() * guess) / (1 - a).sqrt()
    guessed_v = a.sqrt() * guessed_noise - (1 - a).sqrt() * guess
    snr = diffusion.signal_to_noise(alphas, steps)
    expected = torch.minimum(snr, torch.tensor(gamma)) * (guess - latents).square().mean((1, 2, 3))
    for kind, guessed in (("epsilon", guessed_noise), ("v_prediction", guessed_v)):
        error = (guessed - diffusion.target(kind, latents, noise, alphas, steps)).square().mean((1, 2, 3))
        torch.testing.assert_close(diffusion.min_snr_weights(kind, snr, gamma) * error, expected, rtol=1e-9, atol=1e-12)


def test_snr_of_stable_diffusion() -> None:
    snr = diffusion.signal_to_noise(schedule().alphas_cumprod, torch.arange(T))
    assert snr[0] == pytest.approx((1 - 0.00085) / 0.00085, rel=1e-4)
    assert bool((snr.diff() < 0).all())


def test_zero_terminal_snr_is_told() -> None:
    assert diffusion.has_zero_terminal_snr(schedule(rescale_betas_zero_snr=True).alphas_cumprod)
    assert not diffusion.has_zero_terminal_snr(schedule().alphas_cumprod)


def test_noise_offset_moves_whole_channels() -> None:
    noise, shift = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 1, 1)
    moved = diffusion.offset_noise(noise, shift, 0.1) - noise
    torch.testing.assert_close(moved, (0.1 * shift).expand(2, 4, 6, 8), rtol=1e-4, atol=1e-6)


def test_guidance() -> None:
    u, c = torch.randn(2, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(diffusion.guide(u, c, 1.0), c, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(diffusion.guide(u, c, 0.0), u, rtol=0, atol=0)
    torch.testing.assert_close(diffusion.guide(u, c, 7.5), 7.5 * c - 6.5 * u, rtol=1e-12, atol=1e-12)


def test_stratified_timesteps_fall_one_in_each_part() -> None:
    for offset in (0.0, 0.37, 0.999999):
        steps = diffusion.stratified_timesteps(8, T, offset)
        assert (steps // 125).tolist() == list(range(8))
