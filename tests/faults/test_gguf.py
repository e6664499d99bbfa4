"""Faults of bases and adapters in GGUF files: refused before a library that reads GGUF opens them."""

import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from tests.faults.harness import forked, lorakit, untouched
from tests.raw_gguf import ARRAY, TEXT, U32, Entry, RawGguf, array, number, string, text, typed
from tests.tiny import tiny_gguf

UP = "blk.1.ffn_up.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf(tmp_path_factory.mktemp("gguf") / "base.gguf")


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA on one layer, by the gguf package."""
    path = tmp_path_factory.mktemp("lora") / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    writer.add_tensor("blk.0.ffn_up.weight.lora_a", np.full((8, 32), 0.1, np.float32))
    writer.add_tensor("blk.0.ffn_up.weight.lora_b", np.full((64, 8), 0.1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def counts(raw: RawGguf, *, keys: int | None = None, tensors: int | None = None) -> RawGguf:
    raw.key_count, raw.tensor_count = keys, tensors
    return raw


def entry(raw: RawGguf, name: str, **changes: object) -> RawGguf:
    for key, value in changes.items():
        setattr(raw.tensor(name), key, value)
    return raw


def first(raw: RawGguf) -> str:
    return raw.tensors[0][0].decode()


def last(raw: RawGguf) -> str:
    return raw.tensors[-1][0].decode()


def cut(raw: RawGguf, data: bytes) -> RawGguf:
    raw.data = data
    return raw


def versioned(raw: RawGguf, version: int) -> RawGguf:
    raw.version = version
    return raw


HOSTILE: dict[str, tuple[Callable[[RawGguf], RawGguf], str]] = {
    "no magic": (lambda r: RawGguf(r.keys, r.tensors, r.data, b"GGML"), "not a little-endian GGUF"),
    "version": (lambda r: versioned(r, 4), "of version 2 or 3"),
    "big-endian": (lambda r: versioned(r, 3 << 24), "little-endian"),
    "2^63 keys": (lambda r: counts(r, keys=2**63), f"{2**63} keys, more than"),
    "one key too many": (lambda r: counts(r, keys=len(r.keys) + 1), "broken GGUF header"),
    "2^63 tensors": (lambda r: counts(r, tensors=2**63), f"{2**63} tensors, more than"),
    "one tensor too many": (lambda r: counts(r, tensors=len(r.tensors) + 1), "broken GGUF header"),
    "one tensor too few": (lambda r: counts(r, tensors=len(r.tensors) - 1), "overlong"),
    "array of 2^63": (lambda r: r.set("x.list", array(U32, 2**63)), "x.list: an array of 9223372036854775808 items"),
    "array of 10^9": (lambda r: r.set("x.list", array(0, 10**9)), "x.list: an array of 1000000000 items"),
    "array past the end": (lambda r: r.set("x.list", array(U32, 10**6)), "x.list: 4000000 bytes are claimed"),
    "strings past the end": (lambda r: r.set("x.list", array(TEXT, 10**6)), "x.list: "),
    "arrays in arrays": (
        lambda r: r.set("x.list", typed(ARRAY, struct.pack("<IQ", ARRAY, 1) * 900)),
        "x.list: an array of arrays",
    ),
    "array of nothing known": (lambda r: r.set("x.list", array(77, 3)), "x.list: no type has the number 77"),
    "value of nothing known": (lambda r: r.set("x.value", typed(13, bytes(8))), "x.value: no type has the number 13"),
    "string of 2^63": (lambda r: r.set("x.text", typed(TEXT, struct.pack("<Q", 2**63))), "x.text: a string of"),
    "string past the end": (lambda r: r.set("x.text", typed(TEXT, struct.pack("<Q", 10**6))), "x.text: 1000000 bytes"),
    "string of 2 MB": (lambda r: r.set("x.text", string(b"a" * 2_000_000)), "x.text: a string of 2000000 bytes"),
    "piece of 3 kB": (lambda r: r.set("x.list", array(TEXT, 1, text("a" * 3000))), "x.list: a string of 3000 bytes"),
    "no UTF-8": (lambda r: r.set("x.text", string(b"\xff\xfe")), "x.text: "),
    "not finite": (lambda r: r.set("x.value", typed(6, struct.pack("<f", float("inf")))), "x.value: inf is not"),
    "long key": (lambda r: r.set("x" * 300, string("a")), "a string of 300 bytes"),
    "key twice": (lambda r: RawGguf([*r.keys, r.keys[-1]], r.tensors, r.data), "there twice"),
    "tensor twice": (lambda r: RawGguf(r.keys, [*r.tensors, r.tensors[0]], r.data), ": there twice"),
    "alignment 0": (lambda r: r.set("general.alignment", number(0, U32)), "general.alignment: 0"),
    "alignment 2^31": (lambda r: r.set("general.alignment", number(2**31, U32)), "general.alignment"),
    "alignment in words": (lambda r: r.set("general.alignment", string("32")), "general.alignment"),
    "2^32 dimensions": (
        lambda r: cut(RawGguf(r.keys, [(b"x", Entry([], 0, 0))]), b"").set("y", string("z")),
        "x: 0 dimensions",
    ),
    "5 dimensions": (lambda r: entry(r, first(r), sizes=[1] * 5), "5 dimensions"),
    "a size of 0": (lambda r: entry(r, first(r), sizes=[0, 4]), "is no shape"),
    "sizes that overflow": (lambda r: entry(r, first(r), sizes=[2**30, 2**30, 16]), "is no shape"),
    "a size of 2^63": (lambda r: entry(r, first(r), sizes=[2**63, 2]), "is no shape"),
    "no such type": (lambda r: entry(r, first(r), kind=4), "no tensor type has the number 4"),
    "blocks that do not fit": (lambda r: entry(r, first(r), kind=14, sizes=[33]), "Q6_K [33] is no shape"),
    "overlap": (lambda r: entry(r, last(r), offset=0), "overlaps"),
    "not aligned": (lambda r: entry(r, last(r), offset=r.tensor(last(r)).offset + 4), "aligned to 32"),
    "offset of 2^63": (lambda r: entry(r, last(r), offset=2**63), "overlaps"),
    "truncated data": (lambda r: cut(r, r.data[:-1]), "truncated or overlong"),
    "no data": (lambda r: cut(r, b""), "truncated or overlong"),
    "overlong": (lambda r: cut(r, r.data + bytes(64)), "truncated or overlong"),
}


def refuse(path: Path, told: str, base: Path | None = None) -> None:
    """Each command that opens the file, a base or (with ``base``) an adapter, refuses it in little time and memory."""
    generate = ("generate", "--prompt", "a", "--max-new-tokens", "1", "--base", base or path)
    commands: list[tuple[object, ...]] = [generate, ("merge", path, path.parent / "none", path.parent / "out")]
    if base is not None:
        commands = [(*generate, "--adapter", path), ("inspect", path)]
    for command in commands:
        with untouched(path.parent):
            forked(*command, megabytes=200, seconds=15).refused(4, str(path), told)


@pytest.mark.fault(40)
@pytest.mark.parametrize("name", HOSTILE)
def test_40_hostile_header_of_a_base(tmp_path: Path, whole: Path, name: str) -> None:
    change, told = HOSTILE[name]
    refuse(change(RawGguf.read(whole)).write(tmp_path / "x.gguf"), told)


@pytest.mark.fault(40)
@pytest.mark.parametrize("name", HOSTILE)
def test_40_hostile_header_of_an_adapter(tmp_path: Path, whole: Path, lora: Path, name: str) -> None:
    change, told = HOSTILE[name]
    base = whole.parent / "base-folder"
    refuse(change(RawGguf.read(lora)).write(tmp_path / "x.gguf"), told, base)


@pytest.mark.fault(25)
def test_25_truncated_anywhere(tmp_path: Path, whole: Path) -> None:
    data, path = whole.read_bytes(), tmp_path / "x.gguf"
    for size in (*range(64), *range(64, len(data), 9973), len(data) - 1):
        path.write_bytes(data[:size])
        lorakit("generate", "--base", path, "--prompt", "a").refused(4, str(path), "broken GGUF header")


@pytest.mark.fault(24)
@pytest.mark.parametrize("name", [UP, "output_norm.weight", "blk.0.attn_q.weight"])
def test_24_a_tensor_that_a_gguf_file_lacks(tmp_path: Path, whole: Path, name: str) -> None:
    """transformers would fill it with random numbers and say so in a log."""
    path = RawGguf.read(whole).without(name).write(tmp_path / "x.gguf")
    lorakit("generate", "--base", path, "--prompt", "a").refused(4, str(path), "the weights lack")


@pytest.mark.fault(27)
@pytest.mark.parametrize("value", [string("bert"), number(3)])
def test_27_another_architecture_of_a_gguf_file(tmp_path: Path, whole: Path, value: bytes) -> None:
    refuse(RawGguf.read(whole).set("general.architecture", value).write(tmp_path / "x.gguf"), "general.architecture")


@pytest.mark.fault(27)
def test_27_an_adapter_as_the_base_and_a_base_as_the_adapter(whole: Path, lora: Path) -> None:
    lorakit("generate", "--base", lora, "--prompt", "a").refused(4, str(lora), "general.type", "adapter")
    folder = whole.parent / "base-folder"
    lorakit("generate", "--base", folder, "--adapter", whole, "--prompt", "a").refused(4, str(whole), "not a LoRA")


@pytest.mark.fault(32)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.block_count", 10**9),
        ("llama.block_count", 1),
        ("llama.embedding_length", 2**40),
        ("llama.embedding_length", 64),
        ("llama.feed_forward_length", 10**9),
        ("llama.context_length", 2**60),
        ("llama.attention.head_count", 10**9),
        ("llama.attention.head_count", 0),
        ("llama.attention.head_count_kv", 0),
        ("llama.rope.dimension_count", 10**9),
        ("llama.vocab_size", 2**31 - 1),
        ("tokenizer.ggml.bos_token_id", 2**40),
        ("tokenizer.ggml.tokens", 1),
    ],
)
def test_32_sizes_of_a_gguf_file_that_overflow(tmp_path: Path, whole: Path, key: str, value: int) -> None:
    refuse(RawGguf.read(whole).set(key, number(value)).write(tmp_path / "x.gguf"), key)


@pytest.mark.fault(33)
def test_33_a_vocabulary_longer_than_the_embeddings(tmp_path: Path, whole: Path) -> None:
    pieces = b"".join(text(str(i)) for i in range(100_000))
    refuse(
        RawGguf.read(whole).set("tokenizer.ggml.tokens", array(TEXT, 100_000, pieces)).write(tmp_path / "x.gguf"),
        "tokenizer.ggml.tokens: more than the",
    )


@pytest.mark.fault(35)
@pytest.mark.parametrize("key", ["adapter.lora.alpha", "general.architecture", "adapter.type"])
def test_35_an_adapter_without_its_keys(tmp_path: Path, whole: Path, lora: Path, key: str) -> None:
    raw = RawGguf.read(lora).set(key, number(7) if key != "adapter.lora.alpha" else string("much"))
    refuse(raw.write(tmp_path / "x.gguf"), str(tmp_path), whole.parent / "base-folder")
