"""What the figures were measured on: processor, its instruction sets, memory, and the versions of the packages."""

import os
import platform
import subprocess
from pathlib import Path

import psutil

PACKAGES = ("torch", "transformers", "peft", "diffusers", "accelerate", "trl", "litgpt")
SETS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_bf16", "asimd", "bf16", "sve")
"""Instruction sets that decide how fast a matmul is, as Linux names them."""


def processor() -> tuple[str, tuple[str, ...]]:
    """The processor's name and those of ``SETS`` that it has; what the platform says where there is no /proc."""
    info = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    for line in info.read_text().splitlines() if info.exists() else []:
        name, _, value = line.partition(":")
        fields[name.strip()] = value.strip()
    name = fields["model name"] if "model name" in fields else platform.processor() or platform.machine()
    flags = (fields["flags"] if "flags" in fields else fields.get("Features", "")).split()
    return name, tuple(one for one in SETS if one in flags)


def describe() -> str:
    """One line: processor, instruction sets, cores, threads in use, memory, system."""
    name, sets = processor()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"{name} ({', '.join(sets) or 'no known vector sets'}), {cores} cores (threads: {threads}), "
        f"{memory:.0f} GiB, {platform.system()} {platform.machine()}"
    )


def versions(python: str) -> str:
    """The versions of ``PACKAGES`` as the interpreter ``python`` sees them, on one line."""
    code = (
        "import platform, importlib.metadata as m\n"
        "print('Python', platform.python_version(), end='')\n"
        f"for p in {PACKAGES!r}:\n"
        "    try: print(',', p, m.version(p), end='')\n"
        "    except m.PackageNotFoundError: pass\n"
    )
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout


def has_package(python: str, package: str) -> bool:
    """Whether the interpreter ``python`` can import ``package``."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    return subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0
