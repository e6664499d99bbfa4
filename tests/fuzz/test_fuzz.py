"""Recipes, chats, captions, adapters and base folders, broken at random. ``make fuzz`` runs the same for long."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.faults.conftest import LLAMA, SD, row
from tests.faults.harness import Told
from tests.fuzz.conftest import CASES
from tests.fuzz.targets import (
    CUTS,
    ODD,
    TREE,
    Cut,
    emptied,
    fresh,
    halved,
    removed,
    run,
    set_gguf,
    set_header,
    set_key,
    spoil,
)
from tests.raw_gguf import RawGguf, text
from tests.tiny import tiny_gguf, tiny_sd

FACTOR = float(os.environ.get("LORAKIT_FUZZ", "1"))
"""How many times the cases of CI."""


def cases(count: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Settings for ``count`` cases in CI: the same ones each time; new ones under ``make fuzz``."""
    return settings(
        max_examples=max(1, int(count * FACTOR)),
        deadline=None,
        database=None,
        derandomize=FACTOR == 1,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def llama_recipe(place: Path, whole_llama: Path) -> Path:
    (place / "chats.jsonl").write_text("".join(row(i) for i in range(4)))
    text = LLAMA.format(folder=place).replace(f"{place}/base", str(whole_llama))
    (place / "llama.yaml").write_text(text)
    return place / "llama.yaml"


@pytest.fixture(scope="module")
def adapter(place: Path, llama_recipe: Path) -> Path:
    run("train-llama", llama_recipe, "--set", "train.steps=1")
    return place / "runs/chats/adapter"


@cases(20)
@given(cuts=CUTS)
def test_recipes(place: Path, llama_recipe: Path, cuts: list[Cut]) -> None:
    CASES["recipes"] += 1
    path = place / "fuzzed.yaml"
    path.write_bytes(llama_recipe.read_bytes())
    spoil(path, cuts)
    run("data", path)


@cases(20)
@given(rows=st.lists(TREE, max_size=2), calls=TREE, tools=TREE, cuts=CUTS, sound=st.booleans())
def test_chats(
    place: Path, llama_recipe: Path, rows: list[object], calls: object, tools: object, cuts: list[Cut], sound: bool
) -> None:
    CASES["chats"] += 1
    path = place / "chats.jsonl"
    asked = {"role": "user", "content": "a"}
    called = {"role": "assistant", "content": "b", "tool_calls": calls}
    extra = [{"messages": item} for item in rows] + [{"messages": [asked, called], "tools": tools}]
    lines = [row(i) for i in range(4)] + [json.dumps(item) + "\n" for item in extra]
    path.write_text("".join(lines))
    if not sound:
        spoil(path, cuts)
    run("data", llama_recipe, "--set", "data.on_bad=skip")
    path.write_text("".join(row(i) for i in range(4)))


@cases(10)
@given(caption=st.binary(max_size=60), cuts=CUTS)
def test_captions_and_pictures(place: Path, whole_sd: Path, caption: bytes, cuts: list[Cut]) -> None:
    from PIL import Image

    CASES["captions and pictures"] += 1
    pictures = place / "pictures"
    pictures.mkdir(exist_ok=True)
    for i in range(2):
        Image.new("RGB", (16, 16), (i, 9, 9)).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text("a")
    (pictures / "0.txt").write_bytes(caption)
    spoil(pictures / "1.png", cuts)
    (place / "sd.yaml").write_text(SD.format(folder=place).replace(f"{place}/base", str(whole_sd)))
    run("data", place / "sd.yaml", "--set", "data.on_bad=skip")


FIELDS = st.sampled_from(["dtype", "shape", "data_offsets", "name"])


@cases(30)
@given(kind=st.integers(0, 2), cuts=CUTS, number=st.integers(0, 100), field=FIELDS, value=TREE)
def test_adapters(
    place: Path, adapter: Path, whole_llama: Path, kind: int, cuts: list[Cut], number: int, field: str, value: object
) -> None:
    CASES["adapters"] += 1
    copy = fresh(adapter, place / "adapter")
    if kind == 0:
        spoil(copy / "adapter_model.safetensors", cuts, head=2000)
    elif kind == 1:
        set_header(copy / "adapter_model.safetensors", number, field, value)
    else:
        set_key(copy / "adapter_config.json", number, value)
    run("generate", "--base", whole_llama, "--adapter", copy, "--prompt", "a", "--max-new-tokens", "1")


LLAMA_FILES = st.sampled_from(
    ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json", "generation_config.json"]
)
BREAK = st.sampled_from([removed, emptied, halved])


@cases(30)
@given(kind=st.integers(0, 2), name=LLAMA_FILES, key=st.integers(0, 100), value=ODD, cuts=CUTS, how=BREAK)
def test_llama_bases(
    place: Path, whole_llama: Path, kind: int, name: str, key: int, value: object, cuts: list[Cut], how: object
) -> None:
    CASES["LLaMA bases"] += 1
    base = fresh(whole_llama, place / "base")
    if kind == 0:
        set_key(base / name, key, value)
    elif kind == 1:
        spoil(base / name, cuts)
    else:
        how(sorted(base.iterdir())[key % len(list(base.iterdir()))])  # type: ignore[operator]
    run("generate", "--base", base, "--prompt", "a", "--max-new-tokens", "1")


@pytest.fixture(scope="module")
def gguf_base(place: Path) -> Path:
    """A GGUF file that answers; GPT-2's tokenizer would add its end of text to a vocabulary without it."""
    raw = RawGguf.read(tiny_gguf(place / "sound.gguf"))
    tokens = dict(raw.keys)[b"tokenizer.ggml.tokens"].replace(text("<pad>"), text("<|endoftext|>"))
    path = raw.set("tokenizer.ggml.tokens", tokens).write(place / "sound.gguf")
    assert run("generate", "--base", path, "--prompt", "a", "--max-new-tokens", "1").code == 0
    return path


@pytest.fixture(scope="module")
def gguf_adapter(place: Path, adapter: Path, whole_llama: Path) -> Path:
    assert run("convert", adapter, place / "sound-lora.gguf", "--to", "gguf", "--base", whole_llama).code == 0
    return place / "sound-lora.gguf"


ENTRIES = st.sampled_from(["key", "value", "value", "value", "name", "sizes", "kind", "offset"])
NUMBERS = st.one_of(st.integers(0, 64), st.integers(0, 2**64 - 1))


@cases(20)
@given(spoiled=st.booleans(), cuts=CUTS, number=st.integers(0, 100), field=ENTRIES, value=NUMBERS, content=st.binary())
def test_gguf_bases(
    place: Path, gguf_base: Path, spoiled: bool, cuts: list[Cut], number: int, field: str, value: int, content: bytes
) -> None:
    CASES["GGUF bases"] += 1
    path = Path(shutil.copy(gguf_base, place / "fuzzed.gguf"))
    spoil(path, cuts, head=9000) if spoiled else set_gguf(path, number, field, value, content)
    run("generate", "--base", path, "--prompt", "a", "--max-new-tokens", "1")


@cases(20)
@given(spoiled=st.booleans(), cuts=CUTS, number=st.integers(0, 100), field=ENTRIES, value=NUMBERS, content=st.binary())
def test_gguf_adapters(
    place: Path, gguf_adapter: Path, whole_llama: Path, spoiled: bool, cuts: list[Cut], number: int, field: str,
    value: int, content: bytes,
) -> None:  # fmt: skip
    CASES["GGUF adapters"] += 1
    path = Path(shutil.copy(gguf_adapter, place / "fuzzed-lora.gguf"))
    spoil(path, cuts, head=1500) if spoiled else set_gguf(path, number, field, value, content)
    run("generate", "--base", whole_llama, "--adapter", path, "--prompt", "a", "--max-new-tokens", "1")


PIECES = st.sampled_from([
    "{% for a in range(99999) %}", "{% endfor %}", "{{ messages }}", "{{ a * 9 ** 9 }}",
    "{% macro f() %}{{ f() }}{{ f() }}",
    "{% endmacro %}", "{{ f() }}", "{% set a = a ~ a %}", "{{ a.x.y }}", "{% if a %}", "{% endif %}",
    "{{ 'x' * 10 ** 9 }}",
    "{{ a | center(10 ** 9) }}", "{{", "}}", "{%", "{% generation %}", "{% set a %}", "{% endset %}", "a",
])  # fmt: skip


@cases(10)
@given(pieces=st.lists(PIECES, max_size=12))
def test_chat_templates(place: Path, llama_recipe: Path, pieces: list[str]) -> None:
    CASES["chat templates"] += 1
    path = place / "fuzzed.jinja"
    path.write_text("".join(pieces))
    run("data", llama_recipe, "--set", f"data.chat_template={path}")


SD_FILES = st.sampled_from(
    ["model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json",
     "scheduler/scheduler_config.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"]
)  # fmt: skip


@cases(15)
@given(kind=st.integers(0, 2), name=SD_FILES, key=st.integers(0, 100), value=ODD, cuts=CUTS, how=BREAK)
def test_stable_diffusion_bases(
    place: Path, whole_sd: Path, kind: int, name: str, key: int, value: object, cuts: list[Cut], how: object
) -> None:
    CASES["Stable Diffusion bases"] += 1
    base = fresh(whole_sd, place / "sdbase")
    files = sorted(path for path in base.rglob("*") if path.is_file())
    if kind == 0:
        set_key(base / name, key, value)
    elif kind == 1:
        spoil(base / name, cuts)
    else:
        how(files[key % len(files)])  # type: ignore[operator]
    out = place / "drawn"
    run("generate", "--base", base, "--prompt", "a", "--out", out, "--width=32", "--height=32", "--steps=1")


@pytest.fixture(scope="module")
def trained_sd(place: Path) -> Path:
    """A base, the run folder of an adapter trained on it in both formats, and the two merged into a single file."""
    from PIL import Image

    folder = place / "trained"
    tiny_sd(folder / "base", packable=True)
    (folder / "pictures").mkdir()
    for i in range(2):
        Image.new("RGB", (32, 32), (i * 90, 9, 9)).save(folder / f"pictures/{i}.png")
        (folder / f"pictures/{i}.txt").write_text("a")
    (folder / "recipe.yaml").write_text(SD.format(folder=folder))
    for words in (
        ("train-sd", folder / "recipe.yaml", "--set", "train.steps=1"),
        ("merge", folder / "base", folder / "runs/colours", folder / "merged.safetensors", "--no-verify"),
    ):
        assert run(*words).code == 0, words
    for beside in (folder, place):  # a single file has no tokenizer
        shutil.copytree(folder / "base/tokenizer", beside / "tokenizer")
    sound = ("--adapter", folder / "runs/colours/colours.safetensors")
    assert draw(folder / "base", place, *sound).code == draw(folder / "merged.safetensors", place).code == 0
    return folder


def draw(base: Path, place: Path, *words: object) -> Told:
    out = place / "drawn-with"
    shutil.rmtree(out, ignore_errors=True)
    sizes = ("--width", 32, "--height", 32, "--steps", 1)
    return run("generate", "--base", base, *words, "--prompt", "a", "--out", out, *sizes)


@cases(20)
@given(kind=st.integers(0, 4), cuts=CUTS, number=st.integers(0, 100), field=FIELDS, value=TREE)
def test_stable_diffusion_adapters(
    place: Path, trained_sd: Path, kind: int, cuts: list[Cut], number: int, field: str, value: object
) -> None:
    """kohya's file, and PEFT's folder."""
    CASES["Stable Diffusion adapters"] += 1
    path = Path(shutil.copy(trained_sd / "runs/colours/colours.safetensors", place / "fuzzed-kohya.safetensors"))
    if kind > 1:
        path = fresh(trained_sd / "runs/colours/adapter", place / "sdadapter")
    weights = path if kind < 2 else sorted(path.rglob("adapter_model.safetensors"))[0]
    if kind == 4:
        set_key(weights.with_name("adapter_config.json"), number, value)
    elif kind % 2:
        set_header(weights, number, field, value)
    else:
        spoil(weights, cuts, head=3000)
    draw(trained_sd / "base", place, "--adapter", path)


@cases(15)
@given(spoiled=st.booleans(), cuts=CUTS, number=st.integers(0, 1000), field=FIELDS, value=TREE)
def test_single_files(
    place: Path, trained_sd: Path, spoiled: bool, cuts: list[Cut], number: int, field: str, value: object
) -> None:
    CASES["single-file checkpoints"] += 1
    path = Path(shutil.copy(trained_sd / "merged.safetensors", place / "fuzzed-single.safetensors"))
    spoil(path, cuts, head=20_000) if spoiled else set_header(path, number, field, value)
    draw(path, place)
