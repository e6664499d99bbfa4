"""How pictures are drawn: settings, and what is wrong with them. Nothing here needs diffusers."""

from dataclasses import dataclass
from typing import Any

from lorakit.data.images import Size
from lorakit.errors import RecipeError
from lorakit.recipe.schema import SDSample

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "heun": ("HeunDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_trailing": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpm++2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {"clip_sample": False}),
}
"""Scheduler names: diffusers' class, and what is set beside the ``NOISE`` of the base's own. ``euler_trailing`` and
``lcm`` are for models and adapters that draw in a few steps (Turbo, Lightning, LCM)."""
NOISE = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
    "timestep_spacing", "steps_offset", "set_alpha_to_one", "rescale_betas_zero_snr",
)  # fmt: skip
"""What a named scheduler takes of the base's: the noise and its timesteps. How another solver would go is its own."""
UNSCALED = ("pndm", "heun")
"""Those that diffusers cannot give a schedule without signal at its end (zero terminal SNR)."""
LCM_STEPS = 50
"""That consistency models are distilled at, of which ``lcm`` takes some."""

SIDE_CAP = 2048
STEPS_CAP = 500
"""Some of diffusers' schedulers fail with as many steps as timesteps were trained, a thousand as a rule."""
COUNT_CAP = 1000


@dataclass(frozen=True)
class DrawSettings:
    """How pictures are drawn. Sizes in pixels; None takes the base's own."""

    negative_prompt: str = ""
    steps: int = 25
    guidance_scale: float = 7.5
    """u + scale (c - u); 1 or less draws from the prompt alone, as in diffusers."""
    width: int | None = None
    height: int | None = None
    seed: int = 0
    """Of the first picture; each further picture of a prompt takes the next one."""
    count: int = 1
    """Pictures a prompt."""
    scheduler: str | None = None
    """A name from SCHEDULERS; None takes the base's own."""

    @classmethod
    def from_recipe(cls, sample: SDSample) -> "DrawSettings":
        return cls(
            negative_prompt=sample.negative_prompt,
            steps=sample.steps,
            guidance_scale=sample.guidance_scale,
            width=sample.width,
            height=sample.height,
            seed=sample.seed,
        )

    def size(self, native: Size) -> Size:
        """Width and height, the base's own where not given."""
        return self.width or native[0], self.height or native[1]

    def check(self, native: Size, factor: int, where: str = "") -> None:
        """Raises: RecipeError for what a base of this own size, and so many pixels a latent's side, cannot draw, and
        for what is over a cap; ``where`` goes before the fields' names."""
        for name, side in zip(("width", "height"), self.size(native), strict=True):
            if side % factor or not 0 < side <= SIDE_CAP:
                hint = f"try {max(1, min(side, SIDE_CAP) // factor) * factor}"
                reason = f"{side} is not a multiple of {factor} up to {SIDE_CAP} pixels"
                raise RecipeError(reason, where=where + name, hint=hint)
        for name, value, cap in (("steps", self.steps, STEPS_CAP), ("count", self.count, COUNT_CAP)):
            if not 1 <= value <= cap:
                raise RecipeError(f"{value} is not within 1 to {cap}", where=where + name)
        if not 0 <= self.guidance_scale < float("inf"):
            raise RecipeError(f"{self.guidance_scale} is not a finite number from 0 on", where=where + "guidance_scale")
        if self.scheduler is not None and self.scheduler not in SCHEDULERS:
            raise RecipeError(
                f"no scheduler {self.scheduler!r}", where=where + "scheduler", hint=f"one of {', '.join(SCHEDULERS)}"
            )
        if self.scheduler == "lcm" and self.steps > LCM_STEPS:
            raise RecipeError(f"lcm takes at most {LCM_STEPS}, as a rule 4 to 8", where=where + "steps")
