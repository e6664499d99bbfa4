"""The floors of the house: a file imports from its own floor and from floors below, and heavy libraries stay put."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lorakit

PACKAGE = Path(lorakit.__file__).parent
FLOORS = {
    "errors": 0,
    "paths": 0,
    "recipe": 1,
    "numerics": 2,
    "storage": 3,
    "adapters": 4,
    "data": 5,
    "families": 6,
    "training": 6,
    "commands": 7,
    "cli": 8,
    "__main__": 9,
    "__init__": 0,
}
# Who may import whom although the floors say otherwise: the loop's contract with a family.
ALLOWED = {("training", "lorakit.families.task")}
NEVER = {
    "errors": ("lorakit", "torch", "pydantic"),
    "recipe": ("torch", "numpy", "transformers", "diffusers", "peft"),
    "numerics": ("transformers", "diffusers", "peft", "accelerate", "safetensors", "PIL", "datasets"),
    "storage": ("transformers", "diffusers", "peft", "accelerate"),
    "data": ("transformers.models", "diffusers", "peft", "accelerate"),
    "families": ("lorakit.training",),
    "training": ("lorakit.data", "lorakit.adapters", "transformers", "diffusers", "peft"),
}
# A library, and the places that alone may import it.
ONLY_IN = {
    "typer": ("cli.py",),
    "accelerate": ("training/",),
    "peft": ("adapters/peft_lora.py",),
    "bitsandbytes": ("training/optim.py", "adapters/merging/nf4.py", "adapters/merging/four_bit.py"),
}


def imports(path: Path, package: str) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything a file imports, inside functions too; ``from a import b`` gives a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def is_under(name: str, *roots: str) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def faults(root: Path) -> list[str]:
    """Every import below ``root`` (a folder laid out as the package) that breaks a rule, as ``file:line: what``."""
    found = []
    for path in files(root):
        local = path.relative_to(root).as_posix()
        home = local.split("/")[0].removesuffix(".py")
        package = ".".join(["lorakit", *path.relative_to(root).parent.parts])
        for line, name in imports(path, package):
            told = f"{local}:{line}: {name}"
            if is_under(name, *NEVER.get(home, ())):
                found.append(f"{told} is never imported in {home}")
            for library, places in ONLY_IN.items():
                if is_under(name, library) and not local.startswith(places):
                    found.append(f"{told} is imported in {' and '.join(places)} only")
            target = name.split(".")[1] if is_under(name, "lorakit") and "." in name else None
            if target is None or target == "__version__" or any(home == h and is_under(name, n) for h, n in ALLOWED):
                continue
            neighbours = FLOORS[home] == FLOORS[target] and home != target
            if FLOORS[target] > FLOORS[home] or (neighbours and FLOORS[home] == 6):
                found.append(f"{told} runs up from floor {FLOORS[home]} to {target}")
    return found


def files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*.py") if "builtin" not in path.relative_to(root).parts)


def test_every_floor_has_files():
    homes = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in files(PACKAGE)}
    assert homes == set(FLOORS)
    assert len(files(PACKAGE)) > 30


def test_no_import_runs_up_and_every_library_stays_at_home():
    assert faults(PACKAGE) == []


@pytest.mark.parametrize(
    ("place", "code", "expected"),
    [
        ("numerics/a.py", "import transformers", "never imported in numerics"),
        ("numerics/a.py", "def f():\n    from peft.tuners import lora", "never imported in numerics"),
        ("recipe/a.py", "from torch import Tensor", "never imported in recipe"),
        ("storage/a.py", "from lorakit.data.records import Record", "runs up from floor 3 to data"),
        ("storage/a.py", "from lorakit import data", "runs up from floor 3 to data"),
        ("storage/a.py", "from ..data import records", "runs up from floor 3 to data"),
        ("families/sd/a.py", "import lorakit.training.loop", "never imported in families"),
        ("families/sd/a.py", "from ...training import loop", "never imported in families"),
        ("training/a.py", "from lorakit.families.sd.task import load", "runs up from floor 6 to families"),
        ("training/a.py", "from lorakit.families import sd", "runs up from floor 6 to families"),
        ("commands/a.py", "import typer", "imported in cli.py only"),
        ("families/sd/a.py", "from accelerate import Accelerator", "imported in training/ only"),
        ("families/sd/a.py", "import peft", "imported in adapters/peft_lora.py only"),
        ("training/loop.py", "import bitsandbytes as bnb", "training/optim.py"),
        ("errors.py", "from lorakit.recipe import schema", "never imported in errors"),
    ],
)
def test_the_walk_bites(tmp_path, place, code, expected):
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code)
    told = faults(tmp_path)
    assert told
    assert any(expected in line for line in told)
    assert all(line.startswith(f"{place}:{1 + code.count(chr(10))}: ") for line in told)


@pytest.mark.parametrize(
    ("place", "code"),
    [
        ("training/a.py", "from lorakit.families.task import Task"),
        ("training/a.py", "from lorakit.storage import atomic\nimport accelerate\nimport torch"),
        (
            "families/sd/a.py",
            "from lorakit.families.task import Task\nfrom lorakit.adapters import files\nimport diffusers",
        ),
        ("commands/a.py", "from lorakit.training import loop\nfrom lorakit.families.sd import task"),
        ("adapters/peft_lora.py", "import peft"),
    ],
)
def test_the_walk_lets_arrows_down_pass(tmp_path, place, code):
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code)
    assert faults(tmp_path) == []


def test_the_training_floor_knows_no_family():
    walked = files(PACKAGE / "training")
    assert walked
    for path in walked:
        assert not re.search(r"\b(sd|llama)\b", path.read_text(encoding="utf-8"), re.IGNORECASE), path


@pytest.mark.parametrize(
    "code",
    [
        "import lorakit.cli",
        "import lorakit.cli, lorakit.commands.init",
        "import lorakit.recipe.load, lorakit.recipe.template",
        "import sys; sys.argv = ['lorakit', '--help']; from lorakit.cli import main\n"
        "try: main()\nexcept SystemExit as stop: assert not stop.code, stop.code",
        "import sys; sys.argv = ['lorakit', 'train-sd', 'no.yaml']; from lorakit.cli import main\n"
        "try: main()\nexcept SystemExit as stop: assert stop.code == 2, stop.code",
    ],
)
def test_torch_is_not_imported_before_it_is_needed(code, tmp_path):
    heavy = "{'torch', 'transformers', 'diffusers', 'peft', 'accelerate', 'bitsandbytes'}"
    check = f"{code}\nimport sys; found = {heavy} & set(sys.modules); assert not found, found"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "module", ["lorakit.adapters.inject", "lorakit.adapters.merging.nf4", "lorakit.adapters.merging.four_bit"]
)
def test_no_compiler_is_imported_with_the_library_of_lora(module):
    check = f"import sys, {module}; there = sys.modules\n"
    check += "assert 'bitsandbytes' in there and 'torch._inductor.compile_fx' not in there"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
