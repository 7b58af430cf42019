"""Going on where a checkpoint stands: the loader that seeks."""

from collections.abc import Iterator
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
