"""Stable Diffusion 1.x, 2.x and XL."""

from lorakit.families.sd.plan import SDPlan, plan
from lorakit.families.sd.task import Learning, SDTask, load

__all__ = ["Learning", "SDPlan", "SDTask", "load", "plan"]
