"""Rows of figures as aligned plain text or Markdown. No dependency, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TextIO

_MISSING = "-"


def format_table(rows: Sequence[Mapping], columns: Sequence[str] | None = None) -> str:
    """`rows` as aligned text, one line each under a header. `columns`: by default every key that holds no list."""
    columns = _columns(rows, columns)
    cells = [[_cell(row.get(name)) for name in columns] for row in rows]
    widths = [max(len(line[i]) for line in [columns, *cells]) for i in range(len(columns))]
    numeric = [all(_is_number(row.get(name)) for row in rows) for name in columns]
    lines = [
        "  ".join(c.rjust(w) if right else c.ljust(w) for c, w, right in zip(line, widths, numeric, strict=True))
        for line in [columns, *cells]
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(line.rstrip() for line in lines)


def print_table(rows: Sequence[Mapping], columns: Sequence[str] | None = None, file: TextIO | None = None) -> None:
    """Print `format_table(rows, columns)`."""
    print(format_table(rows, columns), file=file)


def markdown_table(rows: Sequence[Mapping], columns: Sequence[str] | None = None) -> str:
    """`rows` as a Markdown table, figures aligned right."""
    columns = _columns(rows, columns)
    numeric = [all(_is_number(row.get(name)) for row in rows) for name in columns]
    lines = [list(columns), ["---:" if right else "---" for right in numeric]]
    lines += [[_cell(row.get(name)).replace("|", "\\|") for name in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _columns(rows: Sequence[Mapping], columns: Sequence[str] | None) -> list[str]:
    if columns is not None:
        return list(columns)
    names = dict.fromkeys(name for row in rows for name in row)
    # a confusion matrix is for run.json and the report
    return [name for name in names if not any(isinstance(row.get(name), (list, dict)) for row in rows)]


def _is_number(value) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _cell(value) -> str:
    if value is None:
        return _MISSING
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return str(value)
