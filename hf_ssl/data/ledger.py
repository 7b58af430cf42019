"""Which pictures a run had to leave out, and when they are too many."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

logger = logging.getLogger("hf_ssl.data")


class TooManyBadImages(RuntimeError):
    """More images are broken than a run may leave out."""


class BadImageLedger:
    """Which images were left out, over the whole run. A file met again in a later epoch counts once.

    Args:
        total: images in the dataset, where that is known.
    """

    MAX_NAMES = 1000  # listed and logged; all are counted

    def __init__(self, total: int | None = None):
        self.total = total
        self.silent = False  # whether to count without logging, where another process or ledger logs
        self.seen = 0
        self.skipped = 0  # occasions, over all epochs
        self._known: dict[str, None] = {}  # "where: reason" of each broken image, in the order met

    @property
    def names(self) -> list[str]:
        """The first `MAX_NAMES` broken images, as "where: reason"."""
        return list(self._known)[: self.MAX_NAMES]

    @property
    def distinct(self) -> int:
        return len(self._known)

    def update(self, skipped: Sequence[str], seen: int) -> None:
        """Count one batch of `seen` images; a broken image is logged when it is met first."""
        self.seen += seen
        self.skipped += len(skipped)
        for name in skipped:
            if name not in self._known:
                self._known[name] = None
                if self.distinct <= self.MAX_NAMES and not self.silent:
                    logger.warning("image left out: %s", name)

    def check(self, max_fraction: float = 0.01, minimum_seen: int = 1000) -> None:
        """Raise TooManyBadImages when more than `max_fraction` of the dataset's images turned out broken.

        Where the dataset's length is unknown: of the images seen so far, or of `minimum_seen` while those are fewer.
        """
        of = self.total if self.total is not None else max(self.seen, minimum_seen)
        if self.distinct <= max_fraction * of:
            return
        shown = "; ".join(self.names[:5]) + (f"; and {self.distinct - 5} more" if self.distinct > 5 else "")
        raise TooManyBadImages(
            f"{self.distinct} images cannot be decoded, more than {max_fraction:.2%} of {of:,}, so the run stops: "
            f"{shown}. Repair or remove them, or raise max_bad_fraction."
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that was counted, as JSON types."""
        return {"seen": self.seen, "skipped": self.skipped, "names": list(self._known)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen, self.skipped = state["seen"], state["skipped"]
        self._known = dict.fromkeys(state["names"])

    @classmethod
    def merged(cls, states: Sequence[dict[str, Any]], total: int | None = None) -> BadImageLedger:
        """The ledger of all ranks from their `state_dict`s; every rank that checks it comes to the same answer."""
        ledger = cls(total)
        ledger.seen, ledger.skipped = sum(s["seen"] for s in states), sum(s["skipped"] for s in states)
        ledger._known = dict.fromkeys(name for state in states for name in state["names"])
        return ledger
