"""Which device and which precision a recipe gets on this machine."""

import logging
import os

import torch

from lorakit.errors import RecipeError
from lorakit.recipe.schema import Compute

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

log = logging.getLogger("lorakit")


def choose(compute: Compute) -> tuple[torch.device, torch.dtype]:
    """The device, and the dtype of the base's weights and matmuls. RecipeError when ``compute`` cannot be had here."""
    on_cpu = compute.device == "cpu" or not torch.cuda.is_available()
    if compute.device == "cuda" and on_cpu:
        raise RecipeError("there is no CUDA device", where="compute.device", hint="set it to auto or cpu")
    return torch.device("cpu" if on_cpu else "cuda"), _dtype(compute.precision, on_cpu)


def make_deterministic() -> None:
    """Have PyTorch's CUDA kernels sum in one order, so that a resumed run is bit-equal; an operation that has no such
    kernel says so in a warning. From PyTorch's notes on reproducibility."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _dtype(precision: str, on_cpu: bool) -> torch.dtype:
    fast = _multiplies_bf16(on_cpu)
    if precision == "auto":
        return torch.bfloat16 if fast else torch.float32
    if precision == "fp16" and on_cpu:
        raise RecipeError("fp16 needs a GPU", where="compute.precision", hint="set it to auto, bf16 or fp32")
    if precision == "bf16" and not fast:
        log.warning("this device has no bf16 instructions: bf16 will be much slower than fp32")
    return _DTYPES[precision]


def _multiplies_bf16(on_cpu: bool) -> bool:
    if not on_cpu:
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    can = torch.cpu.get_capabilities()
    return bool(can.get("avx512_bf16") or can.get("amx_bf16") or can.get("bf16"))
