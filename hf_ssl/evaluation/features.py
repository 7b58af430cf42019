"""From pictures to one feature vector each: any native transformers vision model, raw pixels, or an untrained twin."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm

from hf_ssl.data import workers
from hf_ssl.data.classes import declared_names
from hf_ssl.data.shards import table_rows
from hf_ssl.data.sources import ImageSource, load_source
from hf_ssl.evaluation.knn import as_features
from hf_ssl.evaluation.natives import image_features, image_processor
from hf_ssl.loading import load_pretrained
from hf_ssl.untouched import untouched

logger = logging.getLogger(__name__)

CAPTIONS = "_captions"  # the key of each picture's texts among `Features.labels`


@dataclass
class Features:
    """What `extract_features` and `raw_pixels` return; rows of all fields correspond."""

    embeddings: Tensor  # (N, D) float32 on the CPU
    labels: dict[str, list] = field(default_factory=dict)  # column name -> N values
    index: Tensor = field(
        default_factory=lambda: torch.zeros(0, dtype=torch.long)
    )  # (N,) position of the row in the source
    skipped: list[str] = field(default_factory=list)  # "where: reason" of each picture left out
    classes: dict[str, tuple[str, ...]] = field(default_factory=dict)  # column name -> the names its numbers stand for

    def __len__(self) -> int:
        return len(self.embeddings)

    def select(self, keep: Sequence[int] | Tensor) -> Features:
        """The rows `keep` (numbers or a boolean mask), in that order."""
        keep = torch.as_tensor(keep)
        rows = keep.nonzero()[:, 0] if keep.dtype == torch.bool else keep.long()
        labels = {name: [values[i] for i in rows.tolist()] for name, values in self.labels.items()}
        index = self.index[rows] if len(self.index) else self.index
        return Features(self.embeddings[rows], labels, index, self.skipped, self.classes)


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """`model` in eval mode, without gradients or autocast; afterwards it and the global generators are as before."""
    device = next(model.parameters()).device.type
    with untouched(model), torch.no_grad(), torch.autocast(device, enabled=False):
        yield model.eval()


@untouched()
def load_backbone(model: str | Path | nn.Module, processor=None, device: str | torch.device | None = None):
    """(model, processor) ready for evaluation. A folder or Hub id is loaded in float32 with its own image processor.

    `processor` may be a native (image) processor, an SSLImageProcessor (its evaluation twin is used), a folder, or
    None for the one beside the model. A classifier's folder gives its body, without the head. Raises ValueError when a
    model object comes without a processor.
    """
    from transformers import AutoImageProcessor, AutoModel

    if processor is None:
        if isinstance(model, nn.Module):
            raise ValueError("A model object needs `processor=`: the image processor its features were trained with.")
        processor = load_pretrained(AutoImageProcessor, model)
    elif isinstance(processor, (str, Path)):
        processor = load_pretrained(AutoImageProcessor, processor)
    processor = image_processor(processor)
    if isinstance(model, nn.Module):
        return model, processor
    # checkpoints saved in bf16 would otherwise be evaluated in bf16 without a word
    loaded = load_pretrained(AutoModel, model, dtype=torch.float32)
    return loaded.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), processor


def untrained(model_or_config, seed: int = 0) -> nn.Module:
    """The same architecture with fresh random weights, in eval mode; the global random state is left as it was."""
    from transformers import AutoConfig, PreTrainedModel

    from hf_ssl.backbones import build

    if isinstance(model_or_config, (str, Path)):
        model_or_config = load_pretrained(AutoConfig, model_or_config)
    with untouched():
        torch.manual_seed(seed)
        if isinstance(model_or_config, PreTrainedModel):
            twin = type(model_or_config)._from_config(copy.deepcopy(model_or_config.config), dtype=torch.float32)
        else:
            twin = build(copy.deepcopy(model_or_config)).float()
    return twin.eval()


def extract_features(
    model,
    source: Any,
    processor=None,
    batch_size: int = 256,
    device: str | torch.device | None = None,
    num_workers: int = 0,
    progress: bool = True,
    max_images: int | None = None,
    columns: Sequence[str] = (),
    captions: bool = False,
) -> Features:
    """Frozen features of every picture of `source`, by `hf_ssl.backbones.features` (ViT: class token, else mean
    pooling); of an image-text model, its image embedding.

    `model`: any native transformers vision model, or a folder / Hub id. `source`: anything that `load_source` reads.
    `processor`: see `load_backbone`. `device`:
    where to run (the model returns to its own device afterwards); None = where it is. `num_workers`: decoding
    processes (a stream uses at most one). `max_images`: a fixed random subset of that many rows (a stream: its first
    rows). `columns`: row columns kept beside `source.labels`; `captions`: keep `source.captions(row)` as well, under
    CAPTIONS. Pictures that cannot be decoded are left out and named in `.skipped`. Runs in the model's own precision;
    a model in half precision is reported. Raises ValueError if nothing is left or a feature is not finite.
    """
    source = load_source(source)
    model, processor = load_backbone(model, processor, device)
    collect = Collect(source, Prepare(processor), (*columns, CAPTIONS) if captions else columns)
    outputs = run_over(model, image_features, collect, batch_size, device, num_workers, progress, max_images)
    return collect.finish(outputs, type(model).__name__)


def run_over(
    model,
    function: Callable[[Any, Tensor], Tensor],
    collect: Collect,
    batch_size: int = 256,
    device: str | torch.device | None = None,
    num_workers: int = 0,
    progress: bool = True,
    max_images: int | None = None,
    what: str = "features",
) -> Tensor:
    """`function(model, pixel_values)` of every picture of `collect`'s source: (N, ...), in float32 on the CPU."""
    parameter = next(model.parameters())
    home, dtype = parameter.device, parameter.dtype
    if dtype != torch.float32:
        logger.warning("The %s are computed in %s, the model's own precision; model.float() avoids it.", what, dtype)
    batches = batches_of(collect, batch_size, num_workers, progress, max_images, what)
    try:
        model.to(device or home)
        with frozen(model):
            return _stack((function(model, batch.to(device or home, dtype)) for batch in batches), collect.source)
    finally:
        model.to(home)


def _stack(parts: Iterator[Tensor], source: ImageSource) -> Tensor:
    """The parts as one float32 tensor on the CPU, filled as they come: a bank of gigabytes is never held twice."""
    rows, count = torch.empty(0), 0
    for part in parts:
        if count + len(part) > len(rows):
            larger = torch.empty(max(source.num_rows or 0, 2 * (count + len(part))), *part.shape[1:])
            if count:
                larger[:count] = rows[:count]
            rows = larger
        rows[count : count + len(part)] = part
        count += len(part)
    return rows[:count]


def raw_pixels(
    source: Any,
    size: int = 32,
    batch_size: int = 256,
    num_workers: int = 0,
    progress: bool = True,
    max_images: int | None = None,
    columns: Sequence[str] = (),
) -> Features:
    """The baseline without a network: each picture at (size, size), flattened, in [-1, 1]; D = size^2 C."""
    source = load_source(source)
    collect = Collect(source, _Resize(size), columns)
    batches = batches_of(collect, batch_size, num_workers, progress, max_images, "raw pixels")
    return collect.finish(_stack(batches, source), "raw pixels")


class Prepare:
    """Pictures (H, W, C) uint8 -> the model's input (B, C, h, w), by a native image processor."""

    def __init__(self, processor):
        self.processor = processor
        self.channels = len(getattr(processor, "image_mean", None) or ())

    def __call__(self, pictures: list[np.ndarray], **overrides: Any) -> Tensor:
        channels = pictures[0].shape[-1]
        if channels != 3 and channels == self.channels:
            overrides.setdefault("do_convert_rgb", False)  # the model takes these channels as they are
        pictures = [
            np.require(picture, requirements="W") for picture in pictures
        ]  # torch warns about read-only memory
        # said aloud: a 13-channel picture, or one 3 pixels high, defeats the processor's guess
        batch = self.processor(pictures, return_tensors="pt", input_data_format="channels_last", **overrides)
        return batch["pixel_values"]


class _Resize:
    def __init__(self, size: int):
        self.size = size

    def __call__(self, pictures: list[np.ndarray]) -> Tensor:
        import cv2

        small = [cv2.resize(p, (self.size, self.size), interpolation=cv2.INTER_AREA).reshape(-1) for p in pictures]
        return torch.from_numpy(np.stack(small)).float() / 127.5 - 1  # in [0, 1] the cosine sees little but brightness


class Collect:
    """DataLoader collate function (runs in the worker) and, in the main process, the ledger of what came through."""

    def __init__(self, source: ImageSource, prepare, columns: Sequence[str]):
        self.source, self.prepare = source.with_channels(getattr(prepare, "channels", 0)), prepare
        self.columns = tuple(dict.fromkeys([*source.labels, *columns]))
        self.labels: dict[str, list] = {name: [] for name in self.columns}
        self.index: list[int] = []
        self.skipped: list[str] = []

    def __call__(self, items: list[tuple[int, dict]]):
        from hf_ssl.data.decode import BadImageError

        pictures, kept, skipped = [], [], []
        for index, row in items:
            try:
                pictures.append(self.source.image({**row, "_index": index}, index))
                kept.append((index, self.cells(row)))
            except BadImageError as error:
                skipped.append(str(error))
        return (self.prepare(pictures) if pictures else None), kept, skipped

    def cells(self, row: dict) -> list:
        """What is kept of a row, in the order of `columns`."""
        return [self._captions(row) if name == CAPTIONS else row.get(name) for name in self.columns]

    def _captions(self, row: dict) -> list[str]:
        from hf_ssl.data.decode import BadImageError

        try:
            return self.source.captions(row)
        except BadImageError:  # a picture without a text is still a picture
            return []

    def record(self, kept: list[tuple[int, list]], skipped: list[str]) -> None:
        for index, values in kept:
            self.index.append(index)
            for name, value in zip(self.columns, values, strict=True):
                self.labels[name].append(value)
        for sentence in skipped:
            if sentence not in self.source.said:
                self.source.said.add(sentence)
                logger.warning("image left out: %s", sentence)
        self.skipped += skipped

    def finish(self, outputs: Tensor, what: str) -> Features:
        """The outputs, one row a picture, and what came with them. Raises ValueError where no picture was read."""
        if not len(outputs):
            raise ValueError(
                f"No picture of {self.source.name} ({self.source.split}) could be read: {self.skipped[:3]}"
            )
        embeddings = as_features(outputs, f"{what} features of {self.source.name}")
        index = torch.tensor(self.index, dtype=torch.long)
        declared = {name: declared_names(self.source, name) for name in self.columns}
        classes = {name: names for name, names in declared.items() if names is not None}
        return Features(embeddings, self.labels, index, self.skipped, classes)


class _Rows(torch.utils.data.Dataset):
    """(position, row) of a map-style dataset, fetched a batch at a time."""

    def __init__(self, dataset, positions: np.ndarray):
        self.dataset, self.positions = dataset, positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, i: int) -> tuple[int, dict]:
        return self.__getitems__([i])[0]

    def __getitems__(self, batch: list[int]) -> list[tuple[int, dict]]:
        positions = [int(self.positions[i]) for i in batch]
        try:
            columns = self.dataset[positions]
        except UnicodeDecodeError:  # a text that is not UTF-8, such as a path
            return list(zip(positions, table_rows(self.dataset.with_format("arrow")[positions])))
        return [(p, {name: values[i] for name, values in columns.items()}) for i, p in enumerate(positions)]


class _Stream(IterableDataset):
    def __init__(self, dataset, max_images: int | None):
        self.dataset, self.max_images = dataset, max_images

    def __iter__(self) -> Iterator[tuple[int, dict]]:
        for position, row in enumerate(self.dataset):
            if self.max_images is not None and position >= self.max_images:
                return
            yield position, row


def _chosen_rows(total: int, max_images: int | None) -> np.ndarray:
    if max_images is None or max_images >= total:
        return np.arange(total)
    # random, not the first ones: folders come sorted by class
    return np.sort(np.random.default_rng(0).permutation(total)[:max_images])


def batches_of(
    collect: Collect,
    batch_size: int,
    num_workers: int,
    progress: bool,
    max_images: int | None,
    what: str,
) -> Iterator[Tensor]:
    """The inputs `collect` prepares, batch by batch; what each row carried is in `collect` afterwards."""
    source = collect.source
    positions = None if source.is_stream else _chosen_rows(len(source), max_images)
    rows: torch.utils.data.Dataset
    if positions is None:
        rows, num_workers, total = _Stream(source.dataset, max_images), min(num_workers, 1), max_images
    else:
        rows, total = _Rows(source.dataset, positions), len(positions)
    # a generator of its own: a loader draws a seed for its workers, even where it has none
    loader = DataLoader(
        rows,
        batch_size,
        num_workers=num_workers,
        collate_fn=workers.Shared(collect),
        generator=torch.Generator(),
        timeout=workers.poll(num_workers),
    )
    with tqdm(total=total, desc=f"{what}: {source.name} {source.split}", unit="img", disable=not progress) as bar:
        for batch, kept, skipped in workers.iterate(loader):
            collect.record(kept, skipped)
            bar.update(len(kept) + len(skipped))
            if batch is not None:
                yield batch
