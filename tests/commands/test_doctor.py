"""``lorakit doctor`` tells the truth about this machine, and the project's pins keep to its minimum versions."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from lorakit.commands import doctor
from lorakit.commands.doctor import MINIMUM, Minimum, examine, run, versions

ROOT = Path(__file__).parent.parent.parent


def test_the_pins_of_the_project_keep_to_the_minimum_versions():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    requirements = {Requirement(line).name.lower(): Requirement(line).specifier for line in listed}
    for name, minimum in MINIMUM.items():
        (bound,) = requirements[name]
        assert bound.operator == ">="
        assert Version(bound.version) == Version(minimum.version), f"{name} {bound}, the doctor says {minimum}"


def test_the_tested_set_keeps_to_the_minimum_versions():
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    pinned = {name.lower(): version for name, version in pinned.items()}
    for name, minimum in MINIMUM.items():
        assert minimum.allows(pinned[name]), name


FIXED_IN = {
    "torch": ("2.10", "CVE-2025-32434", "CVE-2026-24747"),
    "diffusers": ("0.42.1", "CVE-2026-44513", "GHSA-4prv-5hj7-c2xr"),
    "transformers": ("5.2.1", "CVE-2026-5241"),
    "pillow": ("12.3", "CVE-2026-40192"),
    "jinja2": ("3.1.6", "CVE-2025-27516"),
    "bitsandbytes": ("0.50.0",),
}
"""By library: the first version without the advisories that follow (bitsandbytes: with the 8-bit kernels)."""


@pytest.mark.parametrize("name", FIXED_IN)
def test_no_version_with_a_known_advisory_will_do(name):
    fixed, *advisories = FIXED_IN[name]
    release = [int(part) for part in fixed.split(".")]
    before = ".".join(
        map(str, [*release[:-1], release[-1] - 1] if release[-1] else [*release[:-2], release[-2] - 1, 99])
    )
    assert Version(MINIMUM[name].version) >= Version(fixed)
    assert not MINIMUM[name].allows(before)
    assert all(advisory in MINIMUM[name].why for advisory in advisories)


@pytest.mark.parametrize(
    ("minimum", "installed", "allowed"),
    [
        (Minimum("2.10", ""), "2.10.0+cpu", True),
        (Minimum("2.10", ""), "2.9.1", False),
        (Minimum("2.10", ""), "2.10.0rc1", False),
        (Minimum("12.3", ""), "12.10", True),
    ],
)
def test_versions_are_compared_as_versions(minimum, installed, allowed):
    assert minimum.allows(installed) is allowed


def test_an_old_or_missing_library_is_broken(monkeypatch):
    monkeypatch.setitem(MINIMUM, "torch", Minimum("99", "CVE-0000-0000"))
    monkeypatch.setitem(MINIMUM, "no-such-library-here", Minimum("1", ""))
    found = {finding.subject: finding for finding in versions()}
    assert found["torch"].verdict == "broken"
    assert "CVE-0000-0000" in found["torch"].meaning
    assert (found["no-such-library-here"].found, found["no-such-library-here"].verdict) == ("missing", "broken")
    assert (found["peft"].found, found["peft"].verdict) == (metadata.version("peft"), "works")


def test_it_finds_what_is_here():
    found = {finding.subject: finding for finding in examine()}
    assert found["8-bit optimizers"].found == "uint8 state after a real step"
    assert "device" in found or "GPU 0" in found
    assert {"precision", "builtin:mini-sd", "builtin:smollm2-135m", "disk free", "memory free"} <= set(found)
    assert not [finding for finding in found.values() if finding.verdict == "broken"]
    mini_sd = (ROOT / "lorakit" / "builtin" / "mini-sd" / "model_index.json").is_file()
    assert (found["builtin:mini-sd"].verdict == "works") is mini_sd


def test_an_optimizer_without_8_bit_state_is_broken(monkeypatch):
    import torch

    from lorakit.training import optim

    monkeypatch.setattr(optim, "build", lambda groups, *_: (torch.optim.AdamW(groups[0][0], lr=0.01), None))
    finding = doctor._eight_bit_step("cpu")
    assert (finding.found, finding.verdict) == ("no uint8 state", "broken")
    assert "adamw" in finding.meaning


def test_it_prints_a_table_and_gives_the_exit_code(monkeypatch, capsys):
    assert run() == 0
    told = capsys.readouterr().out
    assert "lorakit works here" in told
    assert "bitsandbytes" in told
    monkeypatch.setitem(MINIMUM, "torch", Minimum("99", "too old"))
    assert run() == 4
    assert "put right: torch" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("place", ["lorakit.training.launch.open_session", "lorakit.training.optim.build"])
def test_what_a_driver_raises_is_a_finding(monkeypatch, capsys, place):
    said = "CUDA error: devices are busy; see [/usr/lib/x86_64-linux-gnu] or [bold]"

    def busy(*_):
        raise RuntimeError(said)

    monkeypatch.setattr(place, busy)
    monkeypatch.setenv("COLUMNS", "300")
    assert run() == 4
    assert re.search(rf"broken +[^\n]*{re.escape(said)}", capsys.readouterr().out)
