"""lorakit: fine-tune Stable Diffusion and LLaMA with LoRA, merge the result, and generate with it."""

__version__ = "0.1.0"
