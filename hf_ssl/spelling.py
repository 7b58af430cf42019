"""What somebody most likely meant by a name that is not there."""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that ``name`` most likely means: spelt alike, containing it as words, or with its initials.

    >>> nearest("lr", ("patch_size", "learning_rate"))
    'learning_rate'
    """

    def score(other: str) -> float:
        ratio = difflib.SequenceMatcher(None, name, other).ratio()
        if f"_{name}_" in f"_{other}_":
            return 0.93  # a batch_size is meant for per_device_train_batch_size, not for patch_size
        return max(ratio, 0.94 * (name == "".join(word[0] for word in other.split("_") if word)))

    best = max(known, key=score, default=None)
    return best if best is not None and score(best) >= 0.5 else None


def hint(name: str, known: Iterable[str]) -> str:
    """``; the nearest is X``, or ``; there are A, B`` where nothing is near; empty where nothing is known."""
    known = list(known)
    near = nearest(name, known)
    return f"; the nearest is {near}" if near else f"; there are {', '.join(known)}" if known else ""


def presets(name: str, known: Iterable[str]) -> str:
    """A sentence that points from a misspelt preset to the nearest, or to all where nothing is near."""
    known = list(known)
    near = nearest(name, known)
    return f"The nearest preset is {near}." if near else f"Presets: {', '.join(known)}."


def nearest_path(path: str | Path) -> Path | None:
    """The folder or file beside a missing ``path`` whose name is most like it; None where nothing is like it."""
    path = Path(path)
    try:
        beside = os.listdir(path.parent)[:10_000]
    except OSError:
        return None
    near = nearest(path.name, [name for name in beside if not name.startswith(".")])
    return path.parent / near if near else None
