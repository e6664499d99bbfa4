"""The kinds of single-file checkpoints: SD 1.x, 2.x and XL, and what their readers take for granted of each."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import ModelError
from lorakit.families.sd.encoders import Clip, OpenClip, TextEncoder
from lorakit.storage.headers import read_header

UNET, VAE = "model.diffusion_model.", "first_stage_model."


@dataclass(frozen=True)
class Kind:
    """What the single files of one generation of Stable Diffusion have in common."""

    encoders: Mapping[str, TextEncoder]
    """By component."""
    linear: bool
    """Attention's projections are linear layers and its heads 64 wide, instead of convolutions and eight heads."""
    sides: Mapping[str, int]
    """Of the latents that it was trained at, by what the UNet predicts."""
    scaling_factor: float
    """Of the VAE."""
    schedule: Mapping[str, Any]
    pipeline: str
    """diffusers' class."""
    options: Mapping[str, Any]
    """Of the pipeline, beside its parts."""
    architecture: Mapping[str, str]
    """In modelspec's words, by what the UNet predicts."""
    told: bool
    """The file tells by a tensor ``v_pred`` that the UNet predicts v, and by ``ztsnr`` that the schedule ends without
    any signal."""
    guess: str | None
    """What a UNet predicts where nothing tells."""

    @property
    def prefixes(self) -> dict[str, str]:
        """How the names of each component's tensors begin."""
        return {"unet": UNET, "vae": VAE, **{name: encoder.prefix for name, encoder in self.encoders.items()}}


_SCHEDULE = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
_ONE_ENCODER: dict[str, Any] = {
    "sides": {"epsilon": 64, "v_prediction": 96},
    "scaling_factor": 0.18215,
    "schedule": _SCHEDULE,
    "pipeline": "StableDiffusionPipeline",
    "options": {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    "told": False,
}
KINDS = (
    Kind(
        encoders={"text_encoder": Clip("cond_stage_model.transformer.")},
        linear=False,
        architecture=dict.fromkeys(("epsilon", "v_prediction"), "stable-diffusion-v1"),
        guess="epsilon",
        **_ONE_ENCODER,
    ),
    Kind(
        encoders={"text_encoder": OpenClip("cond_stage_model.model.", spare=1)},
        linear=True,
        architecture={"epsilon": "stable-diffusion-v2-512", "v_prediction": "stable-diffusion-v2-768-v"},
        guess=None,
        **_ONE_ENCODER,
    ),
    Kind(
        encoders={
            "text_encoder": Clip("conditioner.embedders.0.transformer."),
            "text_encoder_2": OpenClip("conditioner.embedders.1.model.", spare=0),
        },
        linear=True,
        sides=dict.fromkeys(("epsilon", "v_prediction"), 128),
        scaling_factor=0.13025,
        schedule={
            "_class_name": "EulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "timestep_spacing": "leading",
            "steps_offset": 1,
        },
        pipeline="StableDiffusionXLPipeline",
        options={"force_zeros_for_empty_prompt": True, "add_watermarker": False},
        architecture=dict.fromkeys(("epsilon", "v_prediction"), "stable-diffusion-xl-v1-base"),
        told=True,
        guess="epsilon",
    ),
)
"""All that lorakit knows: SD 1.x, 2.x and XL."""


def kind_of(path: Path) -> Kind:
    """Which kind a checked single file is, by its text encoders. Raises: ModelError for none."""
    names = read_header(path).tensors
    for kind in KINDS:
        if all(any(name.startswith(encoder.prefix) for name in names) for encoder in kind.encoders.values()):
            return kind
    raise ModelError("not laid out like SD 1.x, 2.x or XL: no text encoder under its original names", where=str(path))
