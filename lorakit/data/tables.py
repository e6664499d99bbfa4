"""Tables of pictures: a parquet file, a folder made by datasets.save_to_disk, a data set of the hub."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from lorakit.data.dataset_folder import Check, load_folder, load_hub, names_files, plain_rows
from lorakit.data.stamp import Stamp
from lorakit.errors import DataError, first_line
from lorakit.recipe.schema import PictureData

if TYPE_CHECKING:
    import datasets


def _check_columns(present: Sequence[str], wanted: Sequence[str], where: str) -> None:
    for column in wanted:
        if column not in present:
            hint = "set data.image_column and data.caption_column"
            raise DataError(f"no column {column!r}; it has {', '.join(map(repr, present))}", where=where, hint=hint)


class ParquetTable:
    """One parquet file, read a row group at a time. Raises: DataError when it is damaged or lacks a column."""

    def __init__(self, path: Path, image_column: str, caption_column: str) -> None:
        self.name = path.name
        self.roots: Sequence[Path] = (path.parent,)
        self._columns = (image_column, caption_column)
        self._path = path
        try:
            self._stamp = Stamp.of(path.stat())
            self._file = pq.ParquetFile(path, memory_map=False)  # a mapped file that is cut short kills its reader
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"not a sound parquet file: {first_line(error)}", where=str(path)) from error
        _check_columns(self._file.schema_arrow.names, self._columns, str(path))
        self._starts = [0]
        for group in range(self._file.num_row_groups):
            self._starts.append(self._starts[-1] + self._file.metadata.row_group(group).num_rows)
        self._group = lru_cache(maxsize=1)(self._read_group)

    def captions(self) -> Iterator[object]:
        for group in range(self._file.num_row_groups):
            yield from self._read(group, self._columns[1]).to_pylist()

    def image(self, row: int) -> object:
        group = next(g for g in range(len(self._starts)) if row < self._starts[g + 1])
        return self._group(group)[row - self._starts[group]].as_py()

    def _read_group(self, group: int) -> Any:
        return self._read(group, self._columns[0])

    def _read(self, group: int, column: str) -> Any:
        self._stamp.check(self._path.stat(), str(self._path))
        try:
            return self._file.read_row_group(group, columns=[column]).column(0)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"row group {group} is damaged: {first_line(error)}", where=self.name) from error


class DatasetTable:
    """A data set of the datasets library, its pictures left encoded."""

    def __init__(
        self, dataset: "datasets.Dataset", name: str, roots: Sequence[Path], data: PictureData, unchanged: Check
    ) -> None:
        import datasets

        _check_columns(dataset.column_names, (data.image_column, data.caption_column), name)
        if isinstance(dataset.features[data.image_column], datasets.Image):
            dataset = dataset.cast_column(data.image_column, datasets.Image(decode=False))
        elif names_files(dataset.features[data.image_column]):
            raise DataError(f"the column {data.image_column!r} holds no pictures", where=name)
        if names_files(dataset.features[data.caption_column]):
            raise DataError(f"the column {data.caption_column!r} holds no captions", where=name)
        self.name = name
        self.roots = roots
        self._images = dataset.select_columns([data.image_column])
        self._captions = dataset.select_columns([data.caption_column])
        self._columns = (data.image_column, data.caption_column)
        self._unchanged = unchanged

    def captions(self) -> Iterator[object]:
        for row in plain_rows(self._captions, self._unchanged):
            yield row[self._columns[1]]

    def image(self, row: int) -> object:
        self._unchanged()
        return self._images[row][self._columns[0]]


def load_datasets_folder(path: Path, data: PictureData) -> DatasetTable:
    """A folder written by ``datasets.save_to_disk``; ``data.split`` chooses when it has several."""
    dataset, unchanged = load_folder(path, data.split)
    return DatasetTable(dataset, path.name, (path,), data, unchanged)


def load_hub_table(data: PictureData) -> DatasetTable:
    """A data set of the hub at ``data.revision``."""
    loaded = load_hub(data.path, data.split, data.revision)
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    roots = (Path(datasets.config.HF_DATASETS_CACHE), Path(HF_HUB_CACHE))
    return DatasetTable(loaded, data.path, roots, data, lambda: None)
