"""Going on where a checkpoint stands: the loader that seeks, and which checkpoint is whole."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset
from transformers.trainer_utils import has_length

from ..data.collator import BatchLoader


class EpochLoader:
    """What Trainer sees of a ``BatchLoader``: a resume that seeks, where Trainer would decode and throw away.

    Trainer skips the batches it has already trained on through Accelerate's ``skip_first_batches``; ``dataset`` hands
    that placeholders instead of real batches.
    """

    # How skip_first_batches must wrap ``dataset``: one item is one batch, made in this process.
    batch_size, drop_last, num_workers, prefetch_factor = None, False, 0, None

    def __init__(self, batches: BatchLoader):
        self.batches = batches
        self.placeholders = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.batches)

    def resume(self, epochs: int, skipped: int) -> None:
        """Continue after ``epochs`` whole epochs and ``skipped`` batches of the next."""
        length = len(self) if has_length(self) else 0
        self.batches.seek(epochs * length + skipped)
        self.placeholders = skipped

    @property
    def dataset(self) -> IterableDataset:
        return _Placeholders(self)


class _Placeholders(IterableDataset):
    def __init__(self, loader: EpochLoader):
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.loader.placeholders):
            yield 0
        yield from self.loader


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint whose state file, written last, can be read; a run killed while saving leaves others."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    for folder in sorted(folders, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        try:
            json.loads((folder / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        return str(folder)
    return None
