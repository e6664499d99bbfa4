"""``lorakit doctor``: what this machine and installation can do, found by trying it."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.version import Version

from lorakit.errors import LorakitError, ModelError, first_line
from lorakit.paths import free_bytes

LITTLE_DISK = 5 * 10**9
LITTLE_MEMORY = 3 * 10**9
Verdict = Literal["works", "notice", "broken"]


@dataclass(frozen=True)
class Minimum:
    """The oldest version that will do, and why."""

    version: str
    why: str

    def allows(self, installed: str) -> bool:
        return Version(installed) >= Version(self.version)

    def __str__(self) -> str:
        return f">= {self.version}"


MINIMUM = {
    "torch": Minimum("2.10", "CVE-2025-32434 and CVE-2026-24747: code through loading with weights_only"),
    "diffusers": Minimum("0.42.1", "CVE-2026-44513 and GHSA-4prv-5hj7-c2xr: code through model_index.json"),
    "transformers": Minimum("5.23", "the oldest tested; 5.2.0: CVE-2026-5241, trust_remote_code by config.json"),
    "pillow": Minimum("12.3", "CVE-2026-40192: decompression bombs"),
    "jinja2": Minimum("3.1.6", "CVE-2025-27516: a chat template leaves the sandbox"),
    "bitsandbytes": Minimum("0.50.0", "the first with 8-bit kernels for the CPU"),
    "peft": Minimum("0.21", "the oldest that is tested"),
    "accelerate": Minimum("1.15", "the oldest that is tested"),
    "datasets": Minimum("5.2", "the oldest that is tested"),
}


@dataclass(frozen=True)
class Finding:
    """One thing looked at: what was found, whether it works, and what that means for the reader."""

    subject: str
    found: str
    verdict: Verdict
    meaning: str = ""


def examine() -> list[Finding]:
    """Everything worth knowing before a run whose output goes below the current folder. Never raises."""
    return [*versions(), *_compute(), *_bases(), _disk(Path()), _memory()]


def run() -> int:
    """Print the findings; 0 when everything that lorakit needs works, else ModelError's exit code."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    findings = examine()
    table = Table("", "found", "", "what it means", box=None, header_style="bold")
    colours = {"works": "green", "notice": "yellow", "broken": "red"}
    for finding in findings:
        colour = colours[finding.verdict]
        table.add_row(
            finding.subject, escape(finding.found), f"[{colour}]{finding.verdict}[/]", escape(finding.meaning)
        )
    console = Console()
    console.print(table)
    broken = [finding.subject for finding in findings if finding.verdict == "broken"]
    if broken:
        console.print(f"\n[red]lorakit will not work rightly here until this is put right:[/] {', '.join(broken)}")
        return ModelError.exit_code
    console.print("\n[green]lorakit works here.[/]")
    return 0


def versions() -> Iterator[Finding]:
    """Each library against the oldest version that will do."""
    for name, minimum in MINIMUM.items():
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding(name, "missing", "broken", f'pip install "{name}{str(minimum).replace(" ", "")}"')
            continue
        if minimum.allows(installed):
            yield Finding(name, installed, "works", f"{minimum}")
        else:
            yield Finding(name, installed, "broken", f"must be {minimum} ({minimum.why})")


def _compute() -> Iterator[Finding]:
    """Device and precision that a run takes with everything on auto, and a real 8-bit optimizer step on it."""
    try:
        import torch

        from lorakit.recipe.schema import Compute
        from lorakit.training.launch import open_session

        session = open_session(Compute())
    except Exception as error:  # whatever libraries and drivers raise is what a doctor is asked about
        yield Finding("device", "none", "broken", f"training cannot start: {first_line(error)}")
        return
    try:
        device, dtype = session.device, session.dtype
        if device.type == "cuda":
            yield from map(_gpu, range(torch.cuda.device_count()))
        else:
            meaning = "no CUDA device: training runs on the CPU, which suits small models"
            yield Finding("device", f"CPU, {os.cpu_count()} cores", "works", meaning)
        if dtype == torch.bfloat16:
            yield Finding("precision", "bf16 in hardware", "works", "precision auto is bf16")
        else:
            yield Finding("precision", "no bf16 in hardware", "notice", "precision auto is fp32; bf16 would be slow")
        yield _eight_bit_step(device.type)
    finally:
        session.close()


def _gpu(index: int) -> Finding:
    import torch

    from lorakit.training.device import check_kernels

    try:
        about = torch.cuda.get_device_properties(index)
        check_kernels(torch.device("cuda", index))
    except Exception as error:
        return Finding(f"GPU {index}", "fails", "broken", first_line(error))
    return Finding(f"GPU {index}", f"{about.name}, {_gigabytes(about.total_memory)}", "works", "trains here")


def _eight_bit_step(device: str) -> Finding:
    """One step of adamw_8bit on a small matrix: its state must be uint8, and the weights must have moved."""
    subject = "8-bit optimizers"
    try:
        import torch

        from lorakit.recipe.schema import Optimizer
        from lorakit.training import optim

        weight = torch.nn.Parameter(torch.ones(64, 64, device=device))
        optimizer, _ = optim.build([([weight], 1e-2)], Optimizer(name="adamw_8bit", warmup=0), 1)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        kinds = [item.dtype for item in optimizer.state[weight].values() if isinstance(item, torch.Tensor)]
        stepped = bool(torch.isfinite(weight).all()) and bool((weight < 1).all())
    except Exception as error:
        return Finding(subject, "fail", "broken", f"use optimizer.name=adamw: {first_line(error)}")
    if torch.uint8 in kinds and stepped:
        return Finding(subject, "uint8 state after a real step", "works", f"adamw_8bit and lion_8bit run on {device}")
    return Finding(subject, "no uint8 state" if stepped else "no step", "broken", "use optimizer.name=adamw")


def _bases() -> Iterator[Finding]:
    from lorakit.storage import bases

    for name in ("builtin:mini-sd", "builtin:smollm2-135m"):
        try:
            bases.resolve(name)
        except LorakitError as error:
            yield Finding(name, "not there", "notice", error.hint or error.reason)
        else:
            yield Finding(name, "present", "works", "trains without a download")


def _disk(folder: Path) -> Finding:
    free = free_bytes(folder)
    if free is None:
        return Finding("disk free", "not known", "notice", "the file system does not say")
    if free < LITTLE_DISK:
        return Finding("disk free", _gigabytes(free), "notice", "little: checkpoints and merged models may not fit")
    return Finding("disk free", _gigabytes(free), "works")


def _memory() -> Finding:
    import psutil

    free = psutil.virtual_memory().available
    if free < LITTLE_MEMORY:
        return Finding("memory free", _gigabytes(free), "notice", "little: the built-in bases fit, larger ones may not")
    return Finding("memory free", _gigabytes(free), "works")


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
