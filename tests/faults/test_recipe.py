"""Faults 1 to 10: the recipe. Every one is told before torch is imported, by each command that reads a recipe."""

import os
import sys
from pathlib import Path

import pytest

from tests.faults.harness import Told, lorakit, process, untouched

DATA = "data:\n  path: pictures\n"
COMMANDS = ("train-sd", "data")


def refuse(folder: Path, text: str | bytes, *words: str) -> Told:
    """Run the commands that read a recipe on ``text``; each refuses with exit code 2 and leaves everything as it is."""
    path = folder / "r.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    for command in COMMANDS:
        with untouched(folder):
            told = lorakit(command, path).refused(2, str(path), *words)
        assert len(told.err.splitlines()) <= 2
    return told


@pytest.mark.fault(1)
def test_01_syntax_error(tmp_path: Path) -> None:
    refuse(tmp_path, DATA + "train: {steps: 3\noutput: {}\n", "r.yaml:4:7", "not YAML")


@pytest.mark.fault(2)
def test_02_unknown_key(tmp_path: Path) -> None:
    refuse(tmp_path, DATA + "train:\n  batchsize: 3\n", "r.yaml:4:3 train.batchsize", "did you mean batch_size?")
    refuse(tmp_path, DATA + "learning_rate: 3\n", "r.yaml:3:1 learning_rate", "belongs in optimizer")


@pytest.mark.fault(3)
def test_03_duplicate_key(tmp_path: Path) -> None:
    refuse(tmp_path, DATA + "train:\n  steps: 3\n  steps: 4\n", "r.yaml:5:3 steps", "r.yaml:4:3", "duplicate key")


@pytest.mark.fault(4)
@pytest.mark.parametrize("tag", ["!!python/object/apply:pathlib.Path.touch", "!!python/name:os.system", "!include"])
def test_04_python_tag(tmp_path: Path, tag: str) -> None:
    canary = tmp_path / "canary"
    refuse(tmp_path, f"{DATA}sample:\n  prompts: {tag} ['{canary}']\n", "r.yaml:4:12", "the tag", "is refused")
    assert not canary.exists()


@pytest.mark.fault(5)
def test_05_alias_bomb_depth_and_size(tmp_path: Path) -> None:
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    refuse(tmp_path, "\n".join(rows), "more than 20000 values")
    refuse(tmp_path, "a: " + "[" * 51 + "]" * 51, "deeper than 50")
    refuse(tmp_path, DATA + "#" * 2**20, "larger than 1 MiB")
    (tmp_path / "r.yaml").write_text("a: " + "[" * 500_000)
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_AS, (400 * 2**20,) * 2)"
    process("train-sd", tmp_path / "r.yaml", prelude=limit, seconds=20).refused(2, "deeper than 50")


@pytest.mark.fault(6)
def test_06_scalars_are_read_as_their_fields_want(tmp_path: Path, sd: Path) -> None:
    """``1e-4`` is text in YAML 1.1 and ``no`` is false in it; the resolved recipe says what was understood."""
    recipe = sd / "recipe.yaml"
    text = recipe.read_text().replace("steps: 2", "steps: 1e0")
    recipe.write_text(text + "optimizer: {learning_rate: 1e-4}\nsample: {prompts: [no]}\n")
    assert lorakit("train-sd", recipe, "--set", "data.flip=no").code == 0
    resolved = (tmp_path / "runs/colours/recipe.yaml").read_text()
    for line in ("steps: 1", "learning_rate: 0.0001", "flip: false", '- "no"'):
        assert f"{line}\n" in resolved


@pytest.mark.fault(7)
@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("optimizer.learning_rate", ".nan", "must be a finite number"),
        ("optimizer.learning_rate", "-.inf", "must be a finite number"),
        ("optimizer.learning_rate", "1e999", "must be a finite number"),
        ("optimizer.learning_rate", "-1e-4", "must be greater than 0"),
        ("adapter.rank", "0", "must be greater than 0"),
        ("adapter.alpha", "nan", "must be a finite number"),
        ("data.held_out", "1", "must be less than 1"),
    ],
)
def test_07_numbers_out_of_bounds(tmp_path: Path, field: str, value: str, reason: str) -> None:
    section, key = field.split(".")
    text = DATA + f"  {key}: {value}\n" if section == "data" else DATA + f"{section}:\n  {key}: {value}\n"
    refuse(tmp_path, text, f":{5 + len(key)} {field}: ", reason, value)
    (tmp_path / "r.yaml").write_text(DATA)
    lorakit("train-sd", tmp_path / "r.yaml", "--set", f"{field}={value}").refused(2, f"--set {field}", reason)


@pytest.mark.fault(8)
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"data:\n  path: caf\xe9\n", "r.yaml:2:12: is not UTF-8"),
        (b"data:\n  path: a\0b\n", "r.yaml:2:10: a NUL character"),
        (b"", "r.yaml: is empty"),
        (b"# nothing\n", "r.yaml: is empty"),
        (b"- data\n", "r.yaml:1:1: must hold sections"),
        (b"data\n", "r.yaml:1:1: must hold sections"),
        ("data: {path: a}".encode("utf-16"), "r.yaml:1:1: is not UTF-8"),
    ],
)
def test_08_what_is_no_recipe(tmp_path: Path, content: bytes, told: str) -> None:
    refuse(tmp_path, content, told)


@pytest.mark.fault(8)
def test_08_a_recipe_that_cannot_be_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    for name, told in (("none.yaml", "no such file"), (".", "not a file"), ("pipe.yaml", "not a file")):
        process("train-sd", tmp_path / name, seconds=20).refused(2, told)
    process("train-sd", "/dev/zero", seconds=20).refused(2, "not a file")


@pytest.mark.fault(9)
def test_09_run_folder_inside_base_or_data(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "other").symlink_to("pictures")
    for folder in ("pictures", "pictures/deep/er", "other"):
        text = f"data:\n  path: {tmp_path}/pictures\noutput:\n  folder: {tmp_path}/{folder}\n"
        refuse(tmp_path, text, "r.yaml:4:11 output.folder", "inside data.path")
    base = f"base: {{model: {tmp_path}/pictures}}\n{DATA}output: {{folder: {tmp_path}/pictures}}\n"
    refuse(tmp_path, base, "output.folder", "inside base.model")


@pytest.mark.fault(9)
def test_09_loop_of_links(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    refuse(tmp_path, f"data:\n  path: {tmp_path}/a\n", "r.yaml:2:9 data.path", "leads to itself")
    refuse(tmp_path, f"{DATA}output:\n  folder: {tmp_path}/a/runs\n", "r.yaml:4:11 output.folder", "leads to itself")


@pytest.mark.fault(10)
def test_10_environment_variables_stay_literal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PICTURES", str(tmp_path))
    (tmp_path / "r.yaml").write_text("data: {path: '${PICTURES}'}\n")
    lorakit("data", tmp_path / "r.yaml").refused(3, "${PICTURES}")


def test_names_that_are_too_long_are_names_of_nothing(llama: Path) -> None:
    long, recipe = "n" * 300, llama / "recipe.yaml"
    lorakit("train-llama", recipe, "--set", f"base.model={long}").refused(4, "no such folder or file")
    lorakit("train-llama", recipe, "--set", f"data.train=[{{path: {long}}}]").refused(3, "no such file")
    lorakit("merge", llama / "base", long, llama / "out").refused(2, "there is no such adapter")
    (llama / "sd.yaml").write_text(f"data: {{path: {long}}}")
    lorakit("data", llama / "sd.yaml").refused(3, "no such file or folder")


def test_torch_is_not_imported_for_a_fault_of_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("data: {path: a}\ntrain: {steps: 0}\n")
    watch = (
        "import atexit\n"
        "atexit.register(lambda: print(sorted({'torch', 'transformers', 'datasets', 'PIL'} & set(sys.modules))))"
    )
    for command in ("train-sd", "train-llama", "data"):
        told = process(command, tmp_path / "r.yaml", prelude=watch).refused(2)
        assert told.out.strip() == "[]", command
    assert "torch" in sys.modules
