"""The pieces a streamed source is read in, and Arrow tables to rows.

A reader has `count` shards, their `lengths` (None when only reading tells), and `tables(i)`: shard i as small tables.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from hf_ssl.data import remote
from hf_ssl.data.files import check_regular, printable

logger = logging.getLogger("hf_ssl.data")

CHUNK = 256  # rows converted at a time: little to throw away on a seek, and cheap per row
_UNKNOWN_SHARD = 1 << 32  # row numbers of one shard, where lengths are unknown


class SourceError(ValueError):
    """A dataset cannot be found or read as asked; the message says what is there and what to do."""


class ParquetShards:
    """The row groups of local parquet files, in order: lengths are known, any of them opens without the others."""

    def __init__(self, files: Sequence[str], image_column: str = "image"):
        import pyarrow.parquet as pq

        self.image_column = image_column
        self.groups: list[tuple[str, int]] = []
        self.lengths: list[int] = []
        self.columns: dict[str, list[str]] = {}  # of each file that has rows
        for file in files:
            try:
                check_regular(file)
                metadata = pq.read_metadata(file)
            except (pa.ArrowException, OSError) as error:
                raise SourceError(f"{printable(file)} is not a parquet file that can be read: {error}") from error
            if metadata.num_rows:
                self.columns[file] = metadata.schema.to_arrow_schema().names
            for group in range(metadata.num_row_groups):
                if rows := metadata.row_group(group).num_rows:
                    self.groups.append((file, group))
                    self.lengths.append(rows)
        self.offsets = np.cumsum([0, *self.lengths]).tolist()

    @property
    def count(self) -> int:
        return len(self.groups)

    def use(self, image_column: str) -> None:
        """Hand out this column as `image`. SourceError names a file without it; other gaps are logged."""
        self.image_column = image_column
        for name in dict.fromkeys(name for names in self.columns.values() for name in names):
            if not (without := [file for file, names in self.columns.items() if name not in names]):
                continue
            place = printable(without[0]) + (f" (and {len(without) - 1} more)" if without[1:] else "")
            if name == image_column:
                raise SourceError(
                    f"{place} has no column {name!r}, which holds the images of the other files; its columns are "
                    f"{', '.join(self.columns[without[0]])}. Take it out of the data set, or rename its column."
                )
            logger.warning("%s has no column %r, which other files have: its rows hold nothing there.", place, name)

    def odd_one(self) -> str | None:
        """In words, the first file whose columns are not those of the first one."""
        (first, expected), *others = self.columns.items()
        for file, names in others:
            if set(names) != set(expected):
                has = f"{printable(file)} has the columns {', '.join(names)}"
                return f"{has}, and {printable(first)} has {', '.join(expected)}"
        return None

    def tables(self, shard: int, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        import pyarrow.parquet as pq

        file, group = self.groups[shard]
        if columns is not None:
            columns = [self.image_column if name == "image" else name for name in columns]
        missing = [name for name in columns or () if name not in self.columns[file]]
        try:
            with pq.ParquetFile(file) as parquet:
                # no Arrow threads: this runs in forked DataLoader workers
                for batch in parquet.iter_batches(CHUNK, row_groups=[group], columns=columns, use_threads=False):
                    table = pa.Table.from_batches([batch])
                    for name in missing:
                        table = table.append_column(name, pa.nulls(len(table)))
                    names = ["image" if name == self.image_column else name for name in table.column_names]
                    yield table.rename_columns(names)
        except (pa.ArrowException, OSError) as error:
            raise SourceError(f"{printable(file)}, row group {group} cannot be read: {error}") from error

    def index(self, shard: int, row: int) -> int:
        """The number of a row over all files."""
        return self.offsets[shard] + row

    def locate(self, index: int, name: str) -> str:
        """The file and the row in it, in words."""
        shard = bisect_right(self.offsets, index) - 1
        file = self.groups[shard][0]
        first = next(i for i, (path, _) in enumerate(self.groups) if path == file)
        return f"row {index - self.offsets[first]} of {printable(file)}"

    def name(self, shard: int) -> str:
        """The shard in words."""
        file, group = self.groups[shard]
        return f"{printable(file)}, row group {group}"


class DatasetShards:
    """The shards of any `datasets.IterableDataset`: its lengths are known only after they were read."""

    lengths = None

    def __init__(self, dataset: Any):
        self.dataset = dataset
        self.count = dataset.num_shards

    def tables(self, shard: int, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        part = self.dataset.shard(self.count, shard) if self.count > 1 else self.dataset
        if columns is not None:
            part = part.select_columns(list(columns))
        # .iter(), not iter(): the latter would split a second time, by DataLoader worker, and leave workers idle
        rows = remote.resumed(lambda: part.with_format("arrow").iter(batch_size=CHUNK), f"shard {shard}")
        try:
            yield from rows
        except (SourceError, remote.RemoteError):
            raise
        except (pa.ArrowException, OSError, ValueError, TypeError, EOFError) as error:
            words = " ".join(str(error).split())[:300]
            raise SourceError(f"{self.name(shard)} cannot be read: {type(error).__name__}: {words}.") from error

    def index(self, shard: int, row: int) -> int:
        return shard * _UNKNOWN_SHARD + row

    def locate(self, index: int, name: str) -> str:
        shard, row = divmod(index, _UNKNOWN_SHARD)
        return f"row {row} in shard {shard} of {name}"

    def name(self, shard: int) -> str:
        """The shard in words."""
        return f"shard {shard}"


def table_rows(table: pa.Table) -> list[dict]:
    """An Arrow table as row dicts; nested lists under `image` come as arrays of the dtype they are stored in."""
    columns = {}
    for name, column in zip(table.column_names, table.columns):
        array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        array = array.storage if isinstance(array, pa.ExtensionArray) else array
        columns[name] = _arrays(array) if name == "image" and _is_list(array.type) else _values(array)
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def _values(array: pa.Array) -> list:
    """The values; text that is not UTF-8, such as the name of a file, with surrogates, as Python has such names."""
    try:
        return array.to_pylist()
    except UnicodeDecodeError:
        pass
    if pa.types.is_struct(array.type):
        fields = [_values(array.field(i)) for i in range(array.type.num_fields)]
        names = [field.name for field in array.type]
        rows = [dict(zip(names, values)) for values in zip(*fields)]
        return [row if valid else None for row, valid in zip(rows, array.is_valid().to_pylist())]
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        stored = array.cast(pa.large_binary() if pa.types.is_large_string(array.type) else pa.binary()).to_pylist()
        return [None if value is None else value.decode("utf-8", "surrogateescape") for value in stored]
    return [_values(array.slice(i, 1).flatten()) if array[i].is_valid else None for i in range(len(array))]


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _arrays(column: pa.Array) -> list[np.ndarray | None]:
    """Each nested list as an array, without a Python object per pixel; None where it is null or ragged."""
    arrays: list[np.ndarray | None] = []
    for row in range(len(column)):
        values, sizes = column.slice(row, 1), [1]
        while _is_list(values.type):
            values = values.flatten()
            sizes.append(len(values))
        if 0 in sizes or any(after % before for before, after in pairwise(sizes)):
            arrays.append(None)
        else:
            shape = [after // before for before, after in pairwise(sizes)]
            arrays.append(values.to_numpy(zero_copy_only=False).reshape(shape))
    return arrays
