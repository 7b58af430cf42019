"""From undecoded rows to batches of views, in DataLoader workers; broken images are replaced, counted and named."""

from __future__ import annotations

import atexit
import weakref
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hf_ssl.data import workers
from hf_ssl.data.decode import BadImageError, open_jpeg
from hf_ssl.data.ledger import BadImageLedger, TooManyBadImages
from hf_ssl.data.sources import ImageSource
from hf_ssl.data.stream import RowStream, derive

if TYPE_CHECKING:
    from hf_ssl.data.pairs import PairCollator, PairStream

RowInputs = Callable[[np.random.Generator, dict[str, np.ndarray]], dict[str, np.ndarray]]


class ViewCollator:
    """Rows to one batch: decode, render, draw the processor's views, stack; with `encode_text` the captions as well.

    The views and the text of a row depend on (`seed`, epoch, row number) alone, whichever worker or rank draws them. A
    broken image, or one without the caption that is wanted, gives its place to the next good one of the batch with all
    that belongs to it, so that shapes stay equal on every rank.

    Args:
        source: decodes and renders the rows.
        processor: anything with `count_views(keys)` and `draw(images, rng, keys, out) -> {key: array}`, which may
            write into `out`, the row's part of the batch (None for the first row). Images are arrays or a `Jpeg`.
        seed: non-negative.
        keep_columns: columns handed through: numbers as a tensor (B,), the rest as a list; also `_index`, `_epoch`.
        keys: draw only the views of these keys.
        encode_text: B texts -> {name: (B, ...) tensor}, which join the batch.
        row_inputs: (rng, a row's views) -> {name: array}, drawn after the views; they join the batch too.
    """

    def __init__(
        self,
        source: ImageSource,
        processor: Any,
        seed: int,
        keep_columns: Sequence[str] = (),
        keys: Sequence[str] | None = None,
        encode_text: Callable[[list[str]], dict[str, torch.Tensor]] | None = None,
        row_inputs: RowInputs | None = None,
    ):
        self.row_inputs = row_inputs
        self.source, self.processor, self.seed = source, processor, seed
        self.keep_columns, self.keys, self.encode_text = tuple(keep_columns), keys, encode_text
        self._text_seed = derive(seed, "text")  # the text must not change with the number of views, nor they with it
        self._spare: dict | None = None  # last good row, undecoded, for a batch with no good image at all

    def __call__(self, rows: list[dict]) -> dict[str, Any]:
        """`rows` as `RowStream` yields them -> {key: (B, ...) tensor}, the kept columns, `_skipped`: a list,
        and `_rows`: {"rows": the row numbers as bytes of int64}, which loaders hand on at no cost.

        Views are uint8 (B, V, H, W, C), as the workers draw them: `SSLImageProcessor.prepare` makes them floats.
        """
        batch: dict[str, Any] = {}
        skipped, good = {}, []
        texts = [""] * len(rows)
        drawn: list[dict[str, np.ndarray]] = [{}] * len(rows)
        for i, row in enumerate(rows):
            try:
                texts[i] = self._text(row, row)
                drawn[i] = self._draw(batch, i, len(rows), row, row)
                good.append(i)
            except BadImageError as error:
                skipped[i] = str(error)
        shown = list(rows)
        if good:
            self._spare = rows[good[-1]]
        for i in skipped:
            shown[i] = rows[good[bisect(good, i) % len(good)]] if good else self._spare
            if shown[i] is None:
                raise TooManyBadImages(f"No image of a whole batch can be decoded; {'; '.join(skipped.values())}.")
            texts[i] = self._text(shown[i], rows[i])
            drawn[i] = self._draw(batch, i, len(rows), shown[i], rows[i])
        for name in self.keep_columns:
            values = [row[name] for row in shown]
            numbers = all(isinstance(value, (int, float, np.number)) for value in values)
            batch[name] = torch.tensor(values) if numbers else values
        for name in drawn[0]:
            batch[name] = torch.from_numpy(np.stack([row[name] for row in drawn]))
        if self.encode_text is not None:
            batch.update(self.encode_text(texts))
        batch["_skipped"] = list(skipped.values())
        batch["_rows"] = {"rows": np.array([row["_index"] for row in shown], np.int64).tobytes()}
        return batch

    def _text(self, shown: dict, row: dict) -> str:
        if self.encode_text is None:
            return ""
        return self.source.caption(shown, np.random.default_rng((self._text_seed, row["_epoch"], row["_index"])))

    def _draw(
        self, batch: dict[str, torch.Tensor], i: int, count: int, shown: dict, row: dict
    ) -> dict[str, np.ndarray]:
        """Writes the views of the picture of `shown`, drawn with the numbers of `row`, to place i of the batch.

        Returns what else is drawn for it.
        """
        source = self.source
        picture: Any = None
        if source.render is None and not source.keep_alpha:  # the views say how small the file may be decoded
            picture = open_jpeg(source.content(shown), source.channels, source.where(shown))
        picture = source.decode(shown) if picture is None else picture
        rng = np.random.default_rng((self.seed, row["_epoch"], row["_index"]))
        views, render = self.processor.count_views(self.keys), source.render
        if render is not None and source.random_render:
            images = [render(picture, rng) for _ in range(views)]
        else:
            images = [picture if render is None else render(picture, rng)] * views
        out = {key: tensor.numpy()[i] for key, tensor in batch.items()} or None
        try:
            drawn = self.processor.draw(images, rng, self.keys, out)
        except BadImageError:
            raise
        except Exception as error:
            raise RuntimeError(
                f"The processor fails on {self.source.where(row)}, {picture.shape[1]} x {picture.shape[0]} pixels, "
                f"with {type(error).__name__}: {error}"
            ) from error
        if drawn is not out:
            self._store(batch, i, count, drawn)
        return {} if self.row_inputs is None else self.row_inputs(rng, drawn)

    @staticmethod
    def _store(batch: dict[str, torch.Tensor], i: int, count: int, views: dict[str, np.ndarray]) -> None:
        for key, value in views.items():
            value = np.asarray(value)
            if key not in batch:
                batch[key] = torch.from_numpy(np.empty((count, *value.shape), value.dtype))
                if torch.utils.data.get_worker_info() is not None:
                    workers.share(batch[key])  # before it is written: it is not copied later
            if batch[key].shape[1:] != value.shape:
                raise RuntimeError(
                    f"The image processor gave {key} of shape {value.shape} for one image and "
                    f"{tuple(batch[key].shape[1:])} for another; all views of a batch need one shape."
                )
            batch[key].numpy()[i] = value


class Batch(dict[str, Any]):
    """{key: tensor} as models take it, and what they do not: ``rows``, the bytes of the rows' numbers as int64.

    ``rows`` is {"rows": of the source}, with labelled images also {"labeled_rows": of the labelled one's}.
    """

    def __init__(self, tensors: Mapping[str, Any], rows: dict[str, bytes] | None = None):
        super().__init__(tensors)
        self.rows = rows or {}

    def row_numbers(self) -> dict[str, list[int]]:
        return {name: np.frombuffer(numbers, np.int64).tolist() for name, numbers in self.rows.items()}


class BatchLoader:
    """Batches of views, one epoch per iteration, from one endless stream that goes on where the last iteration ended.

    `len()` is the number of batches per epoch; a stream of unknown length has none (TypeError) and its iteration never
    ends. `position` counts the batches handed out since the start of the run; `seek` moves it. `ledger` holds what was
    left out. Workers ignore the first SIGTERM and Ctrl-C, which go to the whole process group: the training process
    decides, so it can still save.
    """

    def __init__(
        self,
        stream: RowStream | PairStream,
        collator: ViewCollator | PairCollator,
        num_workers: int,
        pin_memory: bool,
        prefetch: int,
    ):
        self.dataset, self.collator, self.batch_size = stream, collator, stream.batch_size
        self.num_workers, self.pin_memory, self.prefetch = num_workers, pin_memory, prefetch
        self.steps_per_epoch = stream.steps_per_epoch
        self.position = stream.start_batch
        self.ledger = BadImageLedger(stream.num_images)
        self.ended: Callable[[], bool] = lambda: False  # whether to give up a wait for the workers
        self._batches: Iterator[dict] | None = None
        atexit.register(
            _close, weakref.ref(self)
        )  # before Python ends: workers that ignore SIGTERM are told otherwise

    def __len__(self) -> int:
        if self.steps_per_epoch is None:
            raise TypeError(f"{self.dataset.source.name} is a stream of unknown length: set max_steps.")
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The rest of the current epoch: all of it, unless `seek` or an early break left the position inside one."""
        steps = self.steps_per_epoch
        end = None if steps is None else (self.position // steps + 1) * steps
        while end is None or self.position < end:
            yield self._next()

    def seek(self, batch: int) -> None:
        """Make number `batch` of the run the next one; nothing before it is decoded."""
        if batch < 0:
            raise ValueError(f"Batch {batch} cannot be sought; batches count from 0.")
        if batch != self.position:
            self.close()
            self.position = batch

    def close(self) -> None:
        """Stop the workers. The next iteration starts them again at the same position."""
        batches, self._batches = self._batches, None
        if batches is not None:
            workers.stop(batches)

    def _next(self) -> dict[str, Any]:
        if self._batches is None:
            self.ledger.update(self.dataset.source.missing, 0)
            self.dataset.start_batch = self.position
            self._batches = workers.start(self._loader())
        try:
            batch = workers.next_batch(self._batches, self.ended, f" at batch {self.position}")
        except BaseException:
            self.close()  # the next iteration starts anew, at the same position
            raise
        self.ledger.update(batch.pop("_skipped"), self.dataset.images_per_batch)
        rows = batch.pop("_rows")
        self.position += 1
        return Batch(batch, rows)

    def _loader(self) -> torch.utils.data.DataLoader:
        count = self.num_workers
        return torch.utils.data.DataLoader(
            self.dataset,
            batch_size=self.batch_size,
            collate_fn=workers.Shared(self.collator),
            num_workers=count,
            pin_memory=self.pin_memory,
            prefetch_factor=self.prefetch if count else None,
            worker_init_fn=workers.prepare if count else None,
            timeout=workers.poll(count),
            generator=torch.Generator(),  # its own: a restart must not draw from the generator that training uses
        )


def build_dataloader(
    source: ImageSource,
    processor: Any,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    num_workers: int = 0,
    start_batch: int = 0,
    shuffle: bool = True,
    shuffle_buffer: int = 4096,
    keep_columns: Sequence[str] = (),
    pin_memory: bool | None = None,
    prefetch: int = 2,
    labeled: ImageSource | None = None,
    ratio: int = 0,
    encode_text: Callable[[list[str]], dict[str, torch.Tensor]] | None = None,
    row_inputs: RowInputs | None = None,
) -> BatchLoader:
    """Batches of `batch_size` images' views for this rank, from batch `start_batch` of the run on.

    A run that was stopped after k batches and one started with `start_batch=k` give the same batches from k on, for a
    streamed source with the same number of workers. `pin_memory` is on with CUDA; `prefetch` is batches per worker.

    With `labeled` (see `draw_labeled`) a batch holds `batch_size` of its rows and `ratio` times as many of `source`:
    see `PairCollator`. With `encode_text` it also holds the source's captions, encoded; with `row_inputs` what is
    drawn for each row beside its views.

    Raises:
        ValueError: bad arguments, or fewer rows than one batch over all ranks.
        SourceError: captions are wanted and there are none.
    """
    pin = torch.cuda.is_available() if pin_memory is None else pin_memory
    if labeled is not None:
        from hf_ssl.data.pairs import PairCollator, PairStream

        if keep_columns or encode_text is not None or row_inputs is not None:
            raise ValueError(
                "keep_columns, encode_text and row_inputs are for one stream, not for labelled and unlabelled images."
            )
        pairs = PairStream(
            labeled, source, batch_size, ratio, rank, world_size, seed, shuffle_buffer, start_batch, shuffle
        )
        return BatchLoader(pairs, PairCollator(labeled, source, processor, seed, ratio), num_workers, pin, prefetch)
    columns = [name for name in keep_columns if not name.startswith("_")]
    if encode_text is not None:
        source.require_captions()
        columns += source.caption_columns
    stream = RowStream(source, batch_size, rank, world_size, seed, shuffle, shuffle_buffer, start_batch, columns)
    collator = ViewCollator(source, processor, seed, keep_columns, encode_text=encode_text, row_inputs=row_inputs)
    return BatchLoader(stream, collator, num_workers, pin, prefetch)


def _close(loader: weakref.ref) -> None:
    if (alive := loader()) is not None:
        alive.close()
