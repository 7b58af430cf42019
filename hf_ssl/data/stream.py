"""An endless, sharded, shuffled stream of undecoded rows that can start again at any batch.

Every order is a pure function of (seed, epoch), so nothing has to be saved: to resume is to compute where batch k is.

- Map-style source: batch j of all ranks is one slice of the epoch's permutation. The order does not depend on the
  number of workers, the incomplete last batch of an epoch is dropped, and a seek costs nothing.
- Streamed source: an epoch deals its shards out to ranks x workers; each reads its own and goes on with its next epoch
  by itself, so every rank always has a next batch and none waits. With too few shards to go round everyone reads all
  rows, undecoded, and keeps its share of them, so that no worker is idle. Rows are shuffled in blocks of
  `shuffle_buffer`; to seek is to skip what is known to lie before (parquet: whole row groups) and to read the rest
  undecoded. Here the order does depend on the number of workers: resume with the same.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch.utils.data

from hf_ssl.data.shards import DatasetShards, ParquetShards, SourceError, table_rows
from hf_ssl.data.sources import ImageSource

logger = logging.getLogger("hf_ssl.data")


def derive(seed: int, purpose: str) -> int:
    """A seed of its own for `purpose`, so that what is drawn for it shares no random number with what `seed` draws."""
    words = np.random.SeedSequence((seed, *purpose.encode())).generate_state(2)
    return int(words[0]) << 32 | int(words[1])


def check_numbers(rank: int, world_size: int, **values: tuple[int, int]) -> None:
    """ValueError for the first `name=(value, lowest)` that is below its lowest, and for a rank that does not exist."""
    for name, (value, low) in values.items():
        if value < low:
            raise ValueError(f"{name} is {value}; it must be at least {low}.")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}, but with world_size {world_size} it lies between 0 and {world_size - 1}.")


class RowStream(torch.utils.data.IterableDataset):
    """Endless undecoded rows for one rank; DataLoader workers split them in whole batches.

    Each row is the source's dict plus `_epoch` (pass over the data) and `_index` (position of the row in the source).

    Args:
        source: what to read.
        batch_size: rows per batch of this rank; the DataLoader that reads the stream must use the same.
        rank, world_size: this process and how many there are.
        seed: non-negative; equal on all ranks.
        shuffle: False reads in the source's order.
        shuffle_buffer: streamed sources only: undecoded rows held and permuted at a time, in every worker.
        start_batch: the first batch delivered is number `start_batch` of the run that was never stopped.
        columns: columns read beside `image`; None reads all.

    Raises:
        ValueError: bad arguments, or a map-style source with fewer rows than one batch over all ranks.
    """

    def __init__(
        self,
        source: ImageSource,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        shuffle_buffer: int = 4096,
        start_batch: int = 0,
        columns: Sequence[str] | None = None,
    ):
        atleast = {"batch_size": (batch_size, 1), "shuffle_buffer": (shuffle_buffer, 1), "seed": (seed, 0)}
        check_numbers(rank, world_size, **atleast, start_batch=(start_batch, 0))
        self.source, self.batch_size, self.rank, self.world_size = source, batch_size, rank, world_size
        self.seed, self.shuffle, self.shuffle_buffer, self.start_batch = seed, shuffle, shuffle_buffer, start_batch
        self.columns = None if columns is None else ["image", *(name for name in columns if name != "image")]
        missing = [name for name in self.columns or () if name not in (source.dataset.column_names or [name])]
        if missing:
            raise ValueError(
                f"{source.name} has no column {', '.join(missing)}; it has {', '.join(source.dataset.column_names)}."
            )
        self.steps_per_epoch: int | None = None
        if (rows := source.num_rows) is not None:
            self.steps_per_epoch = rows // (batch_size * world_size)
            if self.steps_per_epoch == 0:
                raise ValueError(
                    f"{source.name} (split {source.split}) has {rows} images, fewer than one batch of {batch_size} on "
                    f"each of {world_size} process(es). Use a smaller batch size or more images."
                )

    @property
    def num_images(self) -> int | None:
        """Distinct images of the data, where that is known."""
        return self.source.num_rows

    @property
    def images_per_batch(self) -> int:
        return self.batch_size

    def __iter__(self) -> Iterator[dict]:
        info = torch.utils.data.get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        if self.source.is_stream:
            # DataLoader asks worker 0 first, so after a restart it plays whoever delivered batch `start_batch`
            return self._streamed_rows((worker + self.start_batch) % workers, workers)
        return self._mapped_rows(self.start_batch + worker, workers)

    def _mapped_rows(self, first_batch: int, step: int) -> Iterator[dict]:
        dataset = self.source.dataset
        dataset = (dataset if self.columns is None else dataset.select_columns(self.columns)).with_format("arrow")
        steps = self.steps_per_epoch or 1  # known, and at least 1, where any row can be asked for
        order, order_epoch = np.empty(0, np.int64), -1
        for batch in itertools.count(first_batch, step):
            epoch, position = divmod(batch, steps)
            if epoch != order_epoch:
                order, order_epoch = self._order(len(dataset), epoch), epoch
            start = (position * self.world_size + self.rank) * self.batch_size
            indices = order[start : start + self.batch_size].tolist()
            for index, row in zip(indices, table_rows(dataset[indices])):
                row["_epoch"], row["_index"] = epoch, index
                yield row

    def _streamed_rows(self, worker: int, workers: int) -> Iterator[dict]:
        shards = self.source.shards
        share, shares = worker * self.world_size + self.rank, workers * self.world_size
        if shards.count < shares and share == 0:
            logger.warning(
                "%s has %d shard(s) for %d reader(s) (processes x workers): each reads all rows, undecoded, and "
                "keeps its share. More shards, or fewer workers, read faster.", self.source.name, shards.count, shares
            )  # fmt: skip
        lengths = dict(enumerate(shards.lengths or ()))
        skip = len(range(worker, self.start_batch, workers)) * self.batch_size
        empty = 0
        for epoch in itertools.count():
            part = _Pass(shards, self._order(shards.count, epoch).tolist(), share, shares, lengths)
            total = part.length()
            if total is not None and skip >= total > 0:
                skip -= total
                continue
            # the block that holds the next row; where lengths are unknown the pass is read from its start
            block = 0 if total is None else skip // self.shuffle_buffer
            skip -= block * self.shuffle_buffer
            seen = 0
            rows: Iterator[Any] = part.rows(block * self.shuffle_buffer, self.columns)
            while held := list(itertools.islice(rows, self.shuffle_buffer)):
                seen += len(held)
                for i in self._order(len(held), epoch, share, block)[skip:].tolist():
                    row, held[i] = held[i], None
                    row["_epoch"] = epoch
                    yield row
                skip = max(0, skip - len(held))
                block += 1
            empty = 0 if seen else empty + 1
            if empty > shards.count:
                raise SourceError(f"{self.source.name} (split {self.source.split}) holds no rows.")

    def _order(self, count: int, *key: int) -> np.ndarray:
        return np.random.default_rng((self.seed, *key)).permutation(count) if self.shuffle else np.arange(count)


class _Pass:
    """One reader's rows of one pass over a streamed source: its own shards, or every `shares`-th row of all."""

    def __init__(
        self,
        shards: ParquetShards | DatasetShards,
        order: list[int],
        share: int,
        shares: int,
        lengths: dict[int, int],
    ):
        split_rows = shards.count < shares
        self.shards, self.lengths = shards, lengths  # lengths: what is known so far, filled in while reading
        self.order = order if split_rows else order[share::shares]
        self.first, self.step = (share, shares) if split_rows else (0, 1)

    def length(self) -> int | None:
        if any(shard not in self.lengths for shard in self.order):
            return None
        return len(range(self.first, sum(self.lengths[shard] for shard in self.order), self.step))

    def rows(self, start: int, columns: Sequence[str] | None) -> Iterator[dict]:
        """The rows from the reader's `start`-th on. Only what is handed out is turned from Arrow into Python."""
        wanted, position = self.first + start * self.step, 0  # both count all rows of the shards in `order`
        for shard in self.order:
            if position + self.lengths.get(shard, 0) <= wanted and shard in self.lengths:
                position += self.lengths[shard]
                continue
            begin = position
            for table in self.shards.tables(shard, columns):
                if "image" not in table.column_names:
                    raise SourceError(f"{self.shards.name(shard)} has no column with images.")
                count = table.num_rows
                picked = range(wanted - position, count, self.step)
                if len(picked) < count:
                    table = table.take(list(picked)) if picked else table.slice(0, 0)
                for offset, row in zip(picked, table_rows(table)):
                    row["_index"] = self.shards.index(shard, position - begin + offset)
                    yield row
                wanted += len(picked) * self.step
                position += count
            self._compare(shard, position - begin)

    def _compare(self, shard: int, read: int) -> None:
        """SourceError where a shard gave another number of rows than it promised, or than it gave before."""
        promised = self.lengths.setdefault(shard, read)
        if read != promised:
            raise SourceError(
                f"{self.shards.name(shard)} gave {read:,} rows where {promised:,} are promised: was it changed while "
                "it was read, or damaged? Put the whole one back, then go on from the checkpoint."
            )
