"""Which device and which precision a recipe gets on this machine."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lorakit.errors import RecipeError, first_line, is_out_of_memory
from lorakit.recipe.schema import Compute

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

log = logging.getLogger("lorakit")


def choose(compute: Compute) -> tuple[torch.device, torch.dtype]:
    """The device, and the dtype of the base's weights and matmuls. RecipeError when ``compute`` cannot be had here."""
    on_cpu = compute.device == "cpu" or not torch.cuda.is_available()
    if compute.device != "cpu" and on_cpu and torch.cuda.device_count():
        reason = "there is a GPU, but CUDA does not start: its driver may be too old for this PyTorch"
        if compute.device == "cuda":
            raise RecipeError(reason, where="compute.device", hint="update the driver, or set it to cpu")
        log.warning("%s; taking the CPU", reason)
    if compute.device == "cuda" and on_cpu:
        raise RecipeError("there is no CUDA device", where="compute.device", hint="set it to auto or cpu")
    other = torch.accelerator.current_accelerator(check_available=True)
    if on_cpu and compute.device == "auto" and other is not None and other.type != "cuda":
        log.warning("this machine's %s is not used: lorakit trains on CUDA, ROCm or the CPU", other.type)
    _multiply_in_full()
    if not on_cpu:
        check_kernels(torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))))  # no rank takes another's memory
    return torch.device("cpu" if on_cpu else "cuda"), _dtype(compute.precision, on_cpu)


def check_kernels(device: torch.device) -> None:
    """RecipeError for a GPU that this PyTorch was not built for, which it tells at its first operation alone."""
    try:
        torch.ones(1, device=device).add_(1)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        hint = f"install a PyTorch {torch.__version__.partition('+')[0]} for an older CUDA, or set it to cpu"
        raise RecipeError(
            f"{name(device)} does not compute: {first_line(error)}", where="compute.device", hint=hint
        ) from error


def name(device: torch.device) -> str:
    """``cpu``, or ``cuda`` with the GPU's model: dropout draws other masks on one with more multiprocessors."""
    return f"cuda {torch.cuda.get_device_name(device)}" if device.type == "cuda" else device.type


def make_deterministic() -> None:
    """Have PyTorch's CUDA kernels sum in one order where they can. From PyTorch's notes on reproducibility."""
    if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in (":4096:8", ":16:8"):  # with others its sums have no order
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextmanager
def strictly_deterministic() -> Iterator[None]:
    """An operation that has no such kernel raises RuntimeError in the block (``is_nondeterministic``). Attention's
    backward pass takes the one it has, which it does not where PyTorch only warns. After ``make_deterministic``."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


def is_nondeterministic(error: RuntimeError) -> bool:
    """Whether PyTorch says that an operation has no kernel that sums in one order."""
    words = ("does not have a deterministic implementation", "this operation is not deterministic")
    return any(text in str(error) for text in words)


def _multiply_in_full() -> None:
    """float32 in CUDA's convolutions and products has 23 bits, not TF32's 10 (PyTorch lets convolutions have those),
    and partial sums of a bf16 or fp16 product are float32. cuDNN's attention, which PyTorch prefers on the newest GPUs,
    is left out: it takes time to plan each new shape, of which decoding has one a token, and sums in any order."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def _dtype(precision: str, on_cpu: bool) -> torch.dtype:
    fast = _multiplies_bf16(on_cpu)
    if precision == "auto":
        if not (fast or on_cpu):
            log.warning("this GPU has no bf16, so fp32 is taken: fp16 is faster, in half the memory")
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
