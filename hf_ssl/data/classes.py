"""The classes of a task, one definition for every measure: a class is its name, however a dataset numbers it.

The value of a ClassLabel column stands for its name, any other value for its text: 3 and "3" are one class. Plain
whole numbers beside declared names are those names' numbers, unless a name is itself a number written out. None, NaN,
-1 and empty text are no class: the row is unlabelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_ssl.data.sources import ImageSource

UNLABELED = -1


def class_value(value: Any) -> Any:
    """What stands for the class in a row: whole numbers as int; None where it is unlabelled (None, NaN, -1 or "")."""
    if hasattr(value, "item") and not getattr(value, "ndim", 0):  # a NumPy number, a tensor
        value = value.item()
    if isinstance(value, float):
        value = None if value != value else int(value) if value.is_integer() else value
    return None if value in (None, UNLABELED, "", str(UNLABELED)) else value


def declared_names(source: ImageSource, column: str | None) -> tuple[str, ...] | None:
    """The names of a ClassLabel column, in the order of its numbers; None for any other."""
    names = getattr((getattr(source.dataset, "features", None) or {}).get(column), "names", None)
    return None if names is None else tuple(names)


def names_of(
    values: Sequence[Any], declared: Sequence[str] | None = None, order: Sequence[str] | None = None
) -> list[str | None]:
    """The class name of each value of a label column, None where it is unlabelled.

    declared: the column's own names. order: the classes that plain numbers may count instead, those of the model or of
    the other side; not where one of them is a number itself. ValueError: a number beyond the names, or a value that is
    no class, such as a list.
    """
    counted = None if declared is not None or order is None or any(map(_is_number, order)) else order
    return [_name(class_value(value), declared, counted) for value in values]


def _name(value: Any, declared: Sequence[str] | None, order: Sequence[str] | None) -> str | None:
    number = isinstance(value, int) and not isinstance(value, bool)
    if value is None:
        return None
    if isinstance(value, (list, dict, set)):
        raise ValueError(f"A label holds {str(value)[:60]!r} ({type(value).__name__}); a class is one text or number.")
    if number and declared is not None:
        if not 0 <= value < len(declared):
            raise ValueError(f"A label holds class number {value}, but there are {len(declared)} names.")
        return declared[value]
    return order[value] if number and order is not None and 0 <= value < len(order) else str(value)


def _is_number(name: str) -> bool:
    return name.removeprefix("-").isdecimal()


def in_order(names: Any) -> list[str]:
    """Class names, each once: numbers by their size, before all text."""
    return sorted(set(names), key=lambda name: (not _is_number(name), int(name) if _is_number(name) else 0, name))


def matching_column(labels: Sequence[str], wanted: str) -> str | None:
    """The label column with the classes of the other side's `wanted`: of that name, else the only one."""
    return wanted if wanted in labels else labels[0] if len(labels) == 1 else None


def task_labels(
    bank: Sequence[Any], bank_names: Sequence[str] | None, queries: Sequence[Any], query_names: Sequence[str] | None
) -> tuple[list[str | None], list[str | None]]:
    """The labels of both sides of a measure as class names; `*_names`: what each side declares."""
    return names_of(bank, bank_names, query_names), names_of(queries, query_names, bank_names)
