"""A run folder read back: its log and card, and an album of pictures with their features before and after training."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_ssl.data.classes import declared_names, names_of
from hf_ssl.data.files import local_path, printable
from hf_ssl.data.same import same_data
from hf_ssl.documents import DocumentError, read_json
from hf_ssl.evaluation.evaluate import EMOJI_PAIRING
from hf_ssl.evaluation.features import Prepare, extract_features, load_backbone, untrained
from hf_ssl.evaluation.thumbnails import rgb, thumbnail

if TYPE_CHECKING:
    from hf_ssl.data.sources import ImageSource

logger = logging.getLogger(__name__)

_NAME_COLUMNS = ("name", "file_name", "filename", "title", "__key__")


class Missing(Exception):
    """A part of the report cannot be made; the message is the sentence that stands in its place."""


class NotApplicable(Missing):
    """A part of the report that this model or its pictures cannot have: the page does without it."""


@dataclass
class Run:
    """A run folder: `card` is run.json, `log` the trainer's history, `problems` tell which files could not be read."""

    folder: Path
    card: dict[str, Any]
    log: list[dict[str, Any]]
    problems: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """Raises FileNotFoundError where `folder` is none or holds nothing that a run leaves."""
        folder = Path(folder)
        states = [folder / "trainer_state.json", *folder.glob("checkpoint-*/trainer_state.json")]
        states = [path for path in states if path.is_file()]
        if not states and not any((folder / name).is_file() for name in ("run.json", "config.json")):
            raise FileNotFoundError(
                f"{folder} holds no run: there is no run.json, trainer_state.json or config.json. Give the "
                "--output_dir of a finished `hf-ssl train`."
            )
        run = cls(folder, {}, [])
        run.card = run._read(folder / "run.json")
        # an interrupted run has its log in the checkpoints only: the longest one is the newest
        logs = [run._read(path).get("log_history") for path in states]
        run.log = max((log for log in logs if isinstance(log, list)), key=len, default=[])
        run.log = [entry for entry in run.log if isinstance(entry, dict)]
        return run

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            found = read_json(path)
        except DocumentError as error:
            why = f"cannot be read: {str(error).removeprefix(f'{path}: ')}" if path.exists() else "is missing"
            self.problems.append(f"{path.name} {why}.")
        else:
            if isinstance(found, dict):
                return found
            self.problems.append(f"{path.name} holds a {type(found).__name__} instead of an object.")
        return {}

    def part(self, name: str) -> dict[str, Any]:
        """An object of run.json, {} where it is absent or something else."""
        value = self.card.get(name)
        return value if isinstance(value, dict) else {}

    def class_names(self) -> list[str]:
        """The exported classifier's class names in the order of its outputs; [] where there are none."""
        path = self.folder / "config.json"
        found = self._read(path).get("id2label") if path.is_file() else None
        return list(map(str, found.values())) if isinstance(found, dict) else []

    @cached_property
    def composite(self) -> dict[str, Any]:
        """The method's own config, as ssl/config.json has it; {} without one."""
        path = self.folder / "ssl" / "config.json"
        return self._read(path) if path.is_file() else {}

    def source(self, dataset: str | None = None) -> ImageSource:
        """The pictures to look at: those of the run's dataset that it is tested on, or all where there are none."""
        from hf_ssl.data.sources import SourceError, load_source
        from hf_ssl.data.splits import recorded_division

        division = None if dataset else recorded_division(self.card)
        if division is not None and division.tests:
            return division.tests[0][1]

        name, arguments = dataset or self.card.get("dataset"), self.part("arguments")
        if not isinstance(name, str):
            raise Missing("run.json names no dataset; pass one to see pictures.")
        columns: dict[str, Any] = (
            {} if dataset else {key: arguments.get(key) for key in ("image_column", "label_column")}
        )
        columns["allow_outside_files"] = bool(arguments.get("allow_outside_files"))
        try:
            return load_source(name, split="test", **columns)
        except SourceError:
            return load_source(name, split="train", **columns)


@dataclass
class Album:
    """Pictures with their features before and after training; all lists and tensors run over the same N pictures."""

    model: torch.nn.Module
    processor: Any
    source: ImageSource
    thumbnails: list[np.ndarray]  # (S, S, 3) uint8
    names: list[str]
    labels: dict[str, list[str | None]]
    rows: Tensor  # (N,) positions in the source
    after: Tensor  # (N, D), unit length
    before: Tensor | None
    before_name: str
    before_model: torch.nn.Module | None
    items: list | None  # what is shown twice, in different styles (emoji: the code point)
    skipped: list[str]
    seen: str = "which training did not see"  # of the first label, in words

    @property
    def label(self) -> str | None:
        return next(iter(self.labels), None)

    def values(self) -> list[str | None]:
        """The first label of each picture; None = unlabelled."""
        return self.labels[self.label] if self.label else [None] * len(self.names)

    def pixels(self, chosen: list[int]) -> Tensor:
        """Model inputs (len(chosen), C, H, W) of those pictures."""
        wanted = [int(self.rows[i]) for i in chosen]
        pictures = {row: picture for row, _, picture in _pictures(self.source, wanted)}
        return Prepare(self.processor)([pictures[row] for row in wanted])

    def shown(self, pixel_values: Tensor) -> np.ndarray:
        """Normalised (B, C, H, W) -> (B, H, W, 3) uint8."""
        values = pixel_values.detach().float().cpu()
        mean, std = (getattr(self.processor, name, None) for name in ("image_mean", "image_std"))
        if mean is not None and std is not None:
            values = values * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
        return np.stack([rgb(x) for x in (values * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()])


def load_album(run: Run, dataset: str | None = None, max_images: int = 1500, progress: bool = True) -> Album:
    """The run's model, what it was before training, and at most `max_images` pictures with both models' features."""
    if not (run.folder / "config.json").is_file():
        raise Missing(f"There is no exported model (config.json) in {run.folder}.")
    model, processor = load_backbone(str(run.folder))
    source = run.source(dataset).with_channels(Prepare(processor).channels)
    options: dict[str, Any] = {"max_images": max_images, "progress": progress, "batch_size": 128}
    found = extract_features(model, source, processor, columns=(EMOJI_PAIRING.item,), **options)
    before_model, before_name = before_training(run, model, processor)
    before = None
    if before_model is not None:
        try:
            before = F.normalize(extract_features(before_model, source, processor, **options).embeddings, dim=1)
        except ValueError as error:  # a fresh network may overflow
            before_name = f"{before_name} (no features: {error})"
    thumbnails: list[np.ndarray] = []
    names: list[str] = []
    for _, row, picture in _pictures(source, found.index.tolist()):
        thumbnails.append(thumbnail(picture))
        names.append(name_of(row, source, len(names)))
    items = found.labels.get(EMOJI_PAIRING.item)
    items = items if items and None not in items else None
    labels = {name: _label_names(source, name, found.labels[name]) for name in source.labels}
    labels = {name: values for name, values in labels.items() if any(value is not None for value in values)}
    after = F.normalize(found.embeddings, dim=1)
    return Album(
        model, processor, source, thumbnails, names, labels, found.index, after, before, before_name, before_model,
        items, found.skipped, labels_seen(run.part("labeled"), source, next(iter(labels), None), found.index.tolist()),
    )  # fmt: skip


def labels_seen(labeled: dict[str, Any], source: ImageSource, column: str | None, rows: list[int]) -> str:
    """What training saw of the labels in `column` at those positions of `source`; `labeled`: run.json's record."""
    if not labeled or labeled.get("column") != column:
        return "which training did not see"
    split = source.split if source.part is None else source.part.of[1]
    count = 0
    if same_data(str(labeled.get("dataset")), source.name) and labeled.get("split") == split:
        known = set(labeled.get("rows") or ())
        count = sum(source.number(row) in known for row in rows)
    if not count:
        return f"which training saw of {len(labeled.get('rows') or ())} other pictures and of none of these"
    return f"which training saw of {count} of these {len(rows)} pictures"


def before_training(run: Run, model, processor) -> tuple[torch.nn.Module | None, str]:
    """(what training started from, its name): the warm start's checkpoint, else the network with fresh weights."""
    start = run.part("init").get("from_pretrained")
    if isinstance(start, str) and start:
        try:
            loaded, _ = load_backbone(start, processor)
            return loaded.eval(), f"before ({start})"
        except Exception as error:
            logger.warning("The run started from %s, which does not load: %s", start, error)
    seed = run.card.get("seed")
    device = next(model.parameters()).device
    name = f"untrained (the run's start, {start}, does not load)" if start else "untrained"
    return untrained(model, seed if isinstance(seed, int) else 0).to(device), name


def _pictures(source: ImageSource, rows: list[int]):
    """(position, row, picture) of the rows, in order; a stream is read once up to the last of them."""
    if source.is_stream:
        wanted = set(rows)
        for position, row in enumerate(source.dataset):
            if position > max(wanted):
                return
            if position in wanted:
                yield position, row, source.image(row, position)
        return
    for position in rows:
        row = source.dataset[position]
        yield position, row, source.image(row, position)


def name_of(row: dict, source: ImageSource, number: int) -> str:
    """What a reader calls the picture: a name column, the file's name, or its number."""
    named = next((row[column] for column in _NAME_COLUMNS if isinstance(row.get(column), str) and row[column]), None)
    image = row.get("image")
    path = image.get("path") if isinstance(image, dict) else image if isinstance(image, str) else None
    return named or (printable(Path(local_path(path)).name) if path else f"picture {number}")


def _label_names(source: ImageSource, column: str, values: list) -> list[str | None]:
    return names_of(values, declared_names(source, column))
