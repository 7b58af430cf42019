"""The texts that belong to a picture: where they are, all of them, or one drawn for training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_ssl.data.files import read_text

NAMES = (
    "caption", "captions", "text", "texts", "txt", "sentence", "sentences", "description", "descriptions", "alt",
    "alt_text",
)  # fmt: skip
FILE_COLUMN = "caption_file"


@dataclass(frozen=True)
class Captions:
    """Texts in a column of strings or of lists of strings, or in one `field` of a column of records."""

    column: str
    field: str | None = None

    @property
    def name(self) -> str:
        return self.column if self.field is None else f"{self.column}.{self.field}"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that have to be read."""
        return (self.column,)

    def texts(self, row: dict) -> list[str]:
        """All texts of a row, the canonical one first; empty ones are left out."""
        value = row.get(self.column)
        if self.field is not None:
            value = (value or {}).get(self.field)
        values = value if isinstance(value, (list, tuple, np.ndarray)) else [value]
        return [text.strip() for text in values if isinstance(text, str) and text.strip()]

    def draw(self, row: dict, rng: np.random.Generator) -> str:
        """One text for training, all equally likely. The row must have one."""
        texts = self.texts(row)
        return texts[rng.integers(len(texts))]


class FileCaptions(Captions):
    """Texts in files, whose paths the column holds: each line that is not empty is one."""

    def texts(self, row: dict) -> list[str]:
        try:
            lines = read_text(row[self.column], "utf-8-sig").splitlines() if row.get(self.column) else []
        except (OSError, UnicodeDecodeError):
            return []
        return [line.strip() for line in lines if line.strip()]


def find_captions(features: Any, asked: str | None = None, labels: tuple[str, ...] = ()) -> Captions | None:
    """Where the texts are: `asked` ("column" or "column.field"), or the first of `NAMES` that holds text and no label.

    Raises:
        ValueError: `asked` is no column, or holds no text; the message goes after the dataset's name.
    """
    if asked is not None:
        column, _, field = (asked, "", "") if asked in features else asked.partition(".")
        kind = features.get(column)
        kind = kind.get(field) if field and isinstance(kind, dict) else None if field else kind
        if kind is None:
            raise ValueError(f"has no column {asked!r}; its columns are {', '.join(features)}.")
        if not _is_text(kind):
            raise ValueError(f"has no text in column {asked!r}: captions are strings or lists of strings.")
        return FileCaptions(column) if column == FILE_COLUMN else Captions(column, field or None)
    for name in NAMES:
        if name in features and name not in labels and _is_text(features[name]):
            return Captions(name)
    for name in NAMES:
        for column, kind in features.items():
            if isinstance(kind, dict) and name in kind and _is_text(kind[name]):
                return Captions(column, name)
    return FileCaptions(FILE_COLUMN) if FILE_COLUMN in features else None


def _is_text(kind: Any) -> bool:
    """Whether a feature holds strings; "null" stands for what a stream does not declare."""
    if isinstance(kind, list):
        return len(kind) == 1 and _is_text(kind[0])
    if hasattr(kind, "feature"):
        return _is_text(kind.feature)
    return getattr(kind, "dtype", None) in ("string", "large_string", "string_view", "null") and not hasattr(
        kind, "names"
    )
