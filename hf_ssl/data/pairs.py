"""Labelled and unlabelled images as one dataset: 1 labelled row and `ratio` unlabelled ones at a time.

Both sides are functions of (seed, epoch, batch number), so a worker or a resumed run starts both at the same batch. An
epoch is one pass over the unlabelled images; the labelled ones, which are few, come round as often as it takes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch.utils.data

from hf_ssl.data.classes import UNLABELED, declared_names, names_of
from hf_ssl.data.collator import ViewCollator
from hf_ssl.data.shards import table_rows
from hf_ssl.data.sources import ImageSource
from hf_ssl.data.stream import RowStream, check_numbers, derive

LABELED_KEY = "pixel_values"  # the views of labelled images; all others are of unlabelled ones


class PairStream(torch.utils.data.IterableDataset):
    """Endless {"labeled": row, "unlabeled": [`ratio` rows]} for one rank; workers split them in whole batches.

    The labelled side is endless: one permutation of its rows per epoch, joined and cut into slices of
    batch_size * world_size, of which each rank takes its own part. So any number of labelled rows serves any batch,
    each as often as the others. The unlabelled side is a `RowStream` of ratio * batch_size rows a batch.

    Args:
        labeled: map-style with a `_label` column, as `draw_labeled` returns it.
        unlabeled: map-style or streamed; not read with ratio 0.
        batch_size: labelled rows per batch of this rank; the DataLoader that reads the stream must use the same.
        ratio: unlabelled rows per labelled one. With 0 an epoch is one pass over the labelled rows.
        rank, world_size, seed, shuffle_buffer, start_batch, shuffle: as of `RowStream`.

    Raises:
        ValueError: bad arguments, or fewer unlabelled rows than one batch over all ranks.
    """

    def __init__(
        self,
        labeled: ImageSource,
        unlabeled: ImageSource,
        batch_size: int,
        ratio: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle_buffer: int = 4096,
        start_batch: int = 0,
        shuffle: bool = True,
    ):
        names = labeled.dataset.column_names or ()
        if labeled.is_stream or "_label" not in names:
            raise ValueError(f"{labeled.name} is not what draw_labeled returns: map-style, with a _label column.")
        atleast = {"batch_size": (batch_size, 1), "unlabeled_ratio": (ratio, 0), "seed": (seed, 0)}
        check_numbers(rank, world_size, **atleast, start_batch=(start_batch, 0))
        rows = unlabeled.num_rows
        if ratio and rows is not None and rows < (needed := batch_size * ratio * world_size):
            raise ValueError(
                f"{unlabeled.name} (split {unlabeled.split}) has {rows} images, fewer than one batch: {batch_size} "
                f"labelled x unlabeled_ratio {ratio} x {world_size} process(es) = {needed}. Use a smaller batch size "
                "or ratio, or more images."
            )
        self.labeled, self.source, self.batch_size, self.ratio = labeled, unlabeled, batch_size, ratio
        self.rank, self.world_size, self.start_batch, self.shuffle = rank, world_size, start_batch, shuffle
        self.seed = derive(seed, "labeled order")
        self.steps_per_epoch: int | None = max(1, len(labeled) // (batch_size * world_size))
        self.unlabeled: RowStream | None = None
        if ratio:
            column = label_column(labeled, unlabeled)
            columns = () if column is None else (column,)
            self.unlabeled = RowStream(
                unlabeled, batch_size * ratio, rank, world_size, seed, shuffle, shuffle_buffer, start_batch, columns
            )
            self.steps_per_epoch = self.unlabeled.steps_per_epoch

    @property
    def num_images(self) -> int | None:
        """Distinct images of both sides, where that is known; labelled ones out of the same data count once."""
        if not self.ratio:
            return len(self.labeled)
        rows, same = self.source.num_rows, _identity(self.labeled) == _identity(self.source)
        return rows if rows is None or same else rows + len(self.labeled)

    @property
    def images_per_batch(self) -> int:
        return self.batch_size * (1 + self.ratio)

    def __iter__(self) -> Iterator[dict]:
        info = torch.utils.data.get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        labeled = self._labeled_rows(self.start_batch + worker, workers)
        if self.unlabeled is None:
            yield from ({"labeled": row, "unlabeled": []} for row in labeled)
            return
        self.unlabeled.start_batch = self.start_batch
        others = iter(self.unlabeled)
        for row in labeled:
            yield {"labeled": row, "unlabeled": list(itertools.islice(others, self.ratio))}

    def _labeled_rows(self, first_batch: int, step: int) -> Iterator[dict]:
        columns = [name for name in ("image", "_label", "_row") if name in self.labeled.dataset.column_names]
        dataset = self.labeled.dataset.select_columns(columns).with_format("arrow")
        rows = len(dataset)
        order, order_epoch = np.empty(0, np.int64), -1
        for batch in itertools.count(first_batch, step):
            start = (batch * self.world_size + self.rank) * self.batch_size
            places = []
            for epoch, offset in (divmod(position, rows) for position in range(start, start + self.batch_size)):
                if epoch != order_epoch:
                    order, order_epoch = self._order(rows, epoch), epoch
                places.append((epoch, int(order[offset])))
            for (epoch, index), row in zip(places, table_rows(dataset[[index for _, index in places]])):
                row["_epoch"], row["_index"] = epoch, row.get("_row", index)
                yield row

    def _order(self, rows: int, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(rows) if self.shuffle else np.arange(rows)


class PairCollator:
    """`PairStream`'s items to one batch of B labelled and `ratio` * B unlabelled images.

    - pixel_values (B, V, H, W, C) uint8 and labels (B,): the labelled images, by the processor's `pixel_values` views;
    - every other key of the processor (ratio * B, V, H, W, C) and unlabeled_index (ratio * B,), the row numbers in
      the unlabelled source;
    - unlabeled_labels (ratio * B,), for metrics only, where the unlabelled data has labels: true classes as the
      labelled set numbers them, -1 where there is none or the labelled set does not know the class.

    The two sides share no random number. A broken image is replaced within its own side, with its label and index.

    Args:
        labeled, unlabeled: decode and render the rows; `labeled` as `draw_labeled` returns it.
        processor: with `model_input_names`, `count_views(keys)` and `draw(images, rng, keys, out)`.
        seed: non-negative.
        ratio: as of the stream; with 0 there are only pixel_values and labels.

    Raises:
        ValueError: the processor has no views for one of the two sides.
    """

    def __init__(self, labeled: ImageSource, unlabeled: ImageSource, processor: Any, seed: int, ratio: int):
        others = [key for key in processor.model_input_names if key != LABELED_KEY]
        if len(others) == len(processor.model_input_names) or (ratio and not others):
            raise ValueError(
                f"{type(processor).__name__} makes {', '.join(processor.model_input_names)}; labelled images need "
                f"{LABELED_KEY!r} and unlabelled ones at least one other key."
            )
        self.ratio = ratio
        self.labeled = ViewCollator(labeled, processor, derive(seed, "labeled"), ("_label",), (LABELED_KEY,))
        self.column = label_column(labeled, unlabeled)
        kept = ("_index",) if self.column is None else ("_index", self.column)
        self.unlabeled = ViewCollator(unlabeled, processor, seed, kept, others)
        self._declared = declared_names(unlabeled, self.column)  # its numbers need not be the labelled ones
        self._names = declared_names(labeled, "_label") or ()
        self._ids = {name: i for i, name in enumerate(self._names)}

    def __call__(self, items: list[dict]) -> dict[str, Any]:
        batch = self.labeled([item["labeled"] for item in items])
        batch["labels"] = batch.pop("_label")
        batch["_rows"] = {"labeled_rows": batch["_rows"]["rows"]}
        if not self.ratio:
            return batch
        others = self.unlabeled([row for item in items for row in item["unlabeled"]])
        batch["_skipped"] += others.pop("_skipped")
        batch["_rows"] |= others.pop("_rows")
        batch["unlabeled_index"] = others.pop("_index")
        if self.column is not None:
            batch["unlabeled_labels"] = torch.tensor([self._label(value) for value in others.pop(self.column)])
        return {**batch, **others}

    def _label(self, value: Any) -> int:
        """The labelled set's number for an unlabelled row's class, found by name; -1 where there is none."""
        (name,) = names_of([value], self._declared, self._names)
        return UNLABELED if name is None else self._ids.get(name, UNLABELED)


def label_column(labeled: ImageSource, unlabeled: ImageSource) -> str | None:
    """The unlabelled source's column with the classes: the one the labelled rows use, else its first; None without."""
    wanted = labeled.labels[:1]
    return next((name for name in (*wanted, *unlabeled.labels) if name in unlabeled.labels), None)


def _identity(source: ImageSource) -> tuple[str, str]:
    return source.name, source.split
