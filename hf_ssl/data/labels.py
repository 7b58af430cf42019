"""Which rows are labelled: a class-balanced subset drawn once from the seed, the same on every process and resume."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hf_ssl.data.classes import UNLABELED, class_value, declared_names
from hf_ssl.data.shards import SourceError
from hf_ssl.data.sources import ImageSource
from hf_ssl.documents import MAX_JSON_BYTES, DocumentError, parse_json, read_text

MAX_HELD_ROWS = 200_000  # undecoded rows of a stream that are held in memory as the labelled set


@dataclass(frozen=True)
class LabeledRows:
    """The labelled rows of a run: which dataset, by which rule, and for each row its number and class.

    `rows` ascend and count from 0 in the order the dataset is stored in, over all of its shards and over the rows that
    are kept to validate or test on as well; `labels` index `names`.
    """

    dataset: str
    split: str
    column: str
    rule: str
    seed: int
    names: tuple[str, ...]
    rows: tuple[int, ...]
    labels: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> LabeledRows:
        """From `to_dict`'s result. ValueError names a field that is missing."""
        if missing := [name for name in cls.__dataclass_fields__ if name not in state]:
            raise ValueError(f"The record of the labelled rows lacks {', '.join(missing)}.")
        fields: dict[str, Any] = {name: state[name] for name in cls.__dataclass_fields__}
        return cls(**{**fields, **{name: tuple(fields[name]) for name in ("names", "rows", "labels")}})

    def check_same(self, other: LabeledRows) -> None:
        """Raise ValueError in words when `other`, of a resumed run or another process, is another subset."""
        advice = (
            "A run keeps one labelled subset: use the same dataset, seed and rule on every process and when it is "
            "resumed, or start a new run."
        )
        if self.names != other.names:
            raise ValueError(f"The classes differ: {_list(self.names)} here and {_list(other.names)} there. {advice}")
        mine, theirs = (list(zip(each.rows, each.labels)) for each in (self, other))
        if mine == theirs:
            return
        first = next((i for i, (a, b) in enumerate(zip(mine, theirs)) if a != b), min(len(mine), len(theirs)))
        here, there = (
            f"row {pairs[first][0]} ({self.names[pairs[first][1]]})" if first < len(pairs) else "none"
            for pairs in (mine, theirs)
        )
        raise ValueError(
            f"The labelled rows differ: {len(mine)} rows here ({self.rule}, seed {self.seed}) and {len(theirs)} there "
            f"({other.rule}, seed {other.seed}); the first that differs is number {first}: {here} here, {there} "
            f"there. {advice}"
        )


def label_names(source: ImageSource, column: str | None = None) -> list[str]:
    """The classes of a label column (by default the first): ClassLabel names, else its sorted distinct values as text.

    Reads that column alone, and nothing where the dataset declares names. SourceError: no such column.
    """
    column = _column(source, column)
    declared = declared_names(source, column)
    return list(declared) if declared is not None else _encode(source, column)[0]


@dataclass(frozen=True)
class LabeledImages:
    """Labelled images to train on beside unlabelled ones: ``source`` and ``rows`` as ``draw_labeled`` returns them.

    unlabeled_ratio: how many unlabelled images a batch has for each labelled one; 0: none.
    """

    source: ImageSource
    rows: LabeledRows
    unlabeled_ratio: int = 7


def draw_labeled(
    source: ImageSource,
    column: str | None = None,
    per_class: int | None = None,
    fraction: float | None = None,
    ids: Sequence[int] | str | Path | None = None,
    seed: int = 0,
) -> tuple[ImageSource, LabeledRows]:
    """Keep labels for some rows only. At most one rule; without one, every row that has a label.

    The draw depends on the labels, their order and `seed` alone, not on processes, workers or shards. Of one seed, a
    smaller `per_class` is part of a larger one. Rows with None or -1 as label are unlabelled and never taken.

    Args:
        source: map-style or streamed; of a stream the label column is read once, undecoded.
        column: the label column; by default the source's first.
        per_class: exactly this many rows of each class.
        fraction: of the rows that have a label, in (0, 1]: round(fraction * rows), halves up, rows in total. A class
            gets its exact share rounded down, but at least 1; what is then missing goes one by one to the class
            furthest below its share, and what is too much is taken from the one furthest above (ties: the earlier).
        ids: row numbers, or a file of them: one a line, a JSON list, or the labeled_rows.json of a run.
        seed: non-negative.

    Returns:
        A map-style source of the chosen rows, whose dataset also has `_label` (class id, a ClassLabel) and `_row` (the
        number by which batches and messages of `source` call the row), and the record of the choice.

    Raises:
        SourceError: no label column, too few rows of a class, bad ids, or too many rows of a stream to hold in memory.
    """
    given = {"per_class": per_class, "fraction": fraction, "ids": ids}
    if len(rules := [name for name, value in given.items() if value is not None]) > 1:
        raise SourceError(f"{' and '.join(rules)} are both given; the labelled rows are chosen by one rule.")
    column = _column(source, column)
    names, labels, numbers = _encode(source, column)
    what = f"{source.name} (split {source.split})"
    part = None if source.part is None else source.part.numbers
    if part is not None:
        numbers, what = part, f"{what} without the rows kept to validate or test on"
    if not (labels != UNLABELED).any():
        raise SourceError(f"{what} has no row with a label in column {column!r}.")
    if ids is not None:
        rows, rule = _by_ids(source, ids, names, labels)
    elif per_class is not None:
        rows, rule = _per_class(what, per_class, names, labels, seed), f"{per_class} per class"
    elif fraction is not None:
        rows, rule = _by_fraction(what, fraction, labels, seed), f"fraction {fraction:g}"
    else:
        rows, rule = np.flatnonzero(labels != UNLABELED), "every row that has a label"
    chosen = tuple(labels[rows].tolist())
    known = rows if part is None else part[rows]
    record = LabeledRows(source.name, source.split, column, rule, seed, tuple(names), tuple(known.tolist()), chosen)
    dataset = _held(source, rows) if source.is_stream else source.dataset
    dataset = _with_labels(dataset, names, labels, numbers, rows)
    chosen_part = None if source.part is None else replace(source.part, numbers=known)
    return replace(source, dataset=dataset, labels=(column,), part=chosen_part), record


# --- reading the labels -------------------------------------------------------------------------------------------


def _column(source: ImageSource, asked: str | None) -> str:
    columns = source.dataset.column_names
    if asked is None:
        if source.labels:
            return source.labels[0]
        shown = f"; its columns are {', '.join(columns)}" if columns else ""
        raise SourceError(
            f"{source.name} (split {source.split}) has no label column{shown}. Name the one that holds the classes "
            "with --label_column (label_column=...), or use a dataset with labels."
        )
    if columns is not None and asked not in columns:
        raise SourceError(f"{source.name} has no column {asked!r} for labels; its columns are {', '.join(columns)}.")
    return asked


def _tables(source: ImageSource, columns: list[str]) -> Iterator[tuple[int | None, pa.Table]]:
    """(shard, its rows) in the order they are stored; a map-style source is one table."""
    if not source.is_stream:
        yield None, source.dataset.select_columns(columns).with_format("arrow")[:]
        return
    for shard in range(source.shards.count):
        for table in source.shards.tables(shard, columns):
            yield shard, table


def _encode(source: ImageSource, column: str) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Class names, (N,) class ids, -1 where there is none, and (N,) the numbers by which a stream calls its rows."""
    values: list[Any] = []
    numbers: list[np.ndarray] = []
    before, read = None, 0
    for shard, table in _tables(source, [column]):
        start, read = (read if shard == before else 0), (read if shard == before else 0) + table.num_rows
        before = shard
        first = source.shards.index(shard, start) if shard is not None else 0
        numbers.append(np.arange(first, first + table.num_rows))
        values += table[column].to_pylist()
    where = f"{source.name} (split {source.split}), column {column!r}"
    values = [_plain(value, where, row) for row, value in enumerate(values)]
    known = {value for value in values if value is not None}
    declared = declared_names(source, column)
    if declared is not None:
        names = list(declared)
        if bad := [row for row, value in enumerate(values) if value is not None and not 0 <= value < len(names)]:
            raise SourceError(f"{where}: row {bad[0]} has class {values[bad[0]]}, but there are {len(names)} names.")
        ids = {i: i for i in range(len(names))}
    else:
        if len({isinstance(value, str) for value in known}) > 1:
            raise SourceError(f"{where} mixes text and numbers; store the classes as one or the other.")
        ordered = sorted(known)
        ids, names = {value: i for i, value in enumerate(ordered)}, [str(value) for value in ordered]
    labels = np.array([UNLABELED if value is None else ids[value] for value in values], np.int64)
    return names, labels, np.concatenate(numbers) if numbers else np.empty(0, np.int64)


def _plain(value: Any, where: str, row: int) -> Any:
    """A class as str, bool or int; None for a row without one."""
    value = class_value(value)
    if value is None or isinstance(value, (str, int)):
        return value
    raise SourceError(
        f"{where}: row {row} holds {str(value)[:60]!r} ({type(value).__name__}); a class is one text or whole number."
    )


# --- choosing the rows --------------------------------------------------------------------------------------------


def _per_class(what: str, count: int, names: list[str], labels: np.ndarray, seed: int) -> np.ndarray:
    if count < 1:
        raise SourceError(f"per_class is {count}; it is at least 1.")
    have = np.bincount(labels[labels != UNLABELED], minlength=len(names))
    if (have < count).any():
        short = int(np.argmax(have == 0 if not have.all() else have < count))
        advice = "Ask for fewer, or for a fraction"
        if not have[short]:  # asking for fewer does not help
            advice = (
                "The class is declared but has no rows, so ask for a fraction (label_fraction) or name the rows "
                "(label_ids), which take the other classes, or add its images"
            )
        raise SourceError(
            f"{what} has {have[short]} labelled row(s) of class {names[short]!r}, fewer than the {count} per class "
            f"asked for{_others(names, have, count, short)}. {advice}."
        )
    return _take(labels, dict.fromkeys(range(len(names)), count), seed)


def _others(names: list[str], have: np.ndarray, count: int, first: int) -> str:
    more = [f"{names[c]!r} ({have[c]})" for c in np.flatnonzero(have < count).tolist() if c != first]
    return f" (also too few: {_list(more)})" if more else ""


def _by_fraction(what: str, fraction: float, labels: np.ndarray, seed: int) -> np.ndarray:
    if not 0 < fraction <= 1:
        raise SourceError(f"fraction is {fraction}; it lies above 0 and is at most 1.")
    classes, have = np.unique(labels[labels != UNLABELED], return_counts=True)
    rows = int(have.sum())
    total = int(fraction * rows + 0.5)
    if total < len(classes):
        raise SourceError(
            f"fraction {fraction:g} of the {rows} labelled rows of {what} is {total} row(s), fewer than one for each "
            f"of {len(classes)} classes. Use at least {len(classes) / rows:.6g}, or ids."
        )
    take = np.maximum(1, total * have // rows)
    while (missing := total - int(take.sum())) != 0:
        above = take * rows - total * have  # in units of 1 / rows of a row, exact
        if missing > 0:
            take[np.argmin(np.where(take < have, above, np.iinfo(np.int64).max))] += 1
        else:
            take[np.argmax(np.where(take > 1, above, np.iinfo(np.int64).min))] -= 1
    return _take(labels, dict(zip(classes.tolist(), take.tolist())), seed)


def _take(labels: np.ndarray, counts: dict[int, int], seed: int) -> np.ndarray:
    """`counts[c]` random rows of each class c, ascending. Every class has a generator of its own."""
    parts = []
    for label, count in counts.items():
        rows = np.flatnonzero(labels == label)
        parts.append(np.random.default_rng((seed, 0x1ABE1, label)).permutation(rows)[:count])
    return np.sort(np.concatenate(parts))


def _by_ids(
    source: ImageSource, ids: Sequence[int] | str | Path, names: list[str], labels: np.ndarray
) -> tuple[np.ndarray, str]:
    """Positions in `source` of the rows with those numbers; of a part they count over the whole dataset."""
    what = f"{source.name} (split {source.split})"
    expected: dict[int, str] = {}
    if isinstance(ids, (str, Path)):
        listed, expected = _read_ids(Path(ids))
        rule = f"ids of {ids}"
    else:
        listed, rule = [(f"ids, item {i}", value) for i, value in enumerate(ids)], "ids"
    total, position = len(labels), None
    if source.part is not None and source.part.numbers is not None:
        total = source.part.of[2]
        position = {number: i for i, number in enumerate(source.part.numbers.tolist())}
    seen: dict[int, str] = {}
    for place, value in listed:
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise SourceError(f"{place}: {str(value)[:60]!r} is no row number; rows count from 0.")
        if not 0 <= value < total:
            raise SourceError(f"{place}: there is no row {value}; {what} has {total} rows, 0 to {total - 1}.")
        if value in seen:
            raise SourceError(f"{place}: row {value} was named before, at {seen[int(value)]}; name each row once.")
        if position is not None and value not in position:
            raise SourceError(
                f"{place}: row {value} of {what} is kept to validate or test on, so its label cannot be trained on. "
                "Name another row, or test on other images (--eval_dataset, or --no_evaluation)."
            )
        at = int(value) if position is None else position[int(value)]
        if labels[at] == UNLABELED:
            raise SourceError(f"{place}: row {value} of {what} has no label.")
        if expected.get(int(value), names[labels[at]]) != names[labels[at]]:
            raise SourceError(
                f"{place}: row {value} was of class {expected[int(value)]!r} when the file was written, and is of "
                f"class {names[labels[at]]!r} in {what}: the file belongs to another dataset or split."
            )
        seen[int(value)] = place
    if not seen:
        raise SourceError(f"{rule}: no row number is given.")
    numbers = sorted(seen)
    return np.array(numbers if position is None else [position[number] for number in numbers], np.int64), rule


def _read_ids(path: Path) -> tuple[list[tuple[str, Any]], dict[int, str]]:
    """[(place in words, value)] and, from a run's record, the class each row had."""
    try:
        text = read_text(path, MAX_JSON_BYTES)
    except DocumentError as error:
        raise SourceError(f"The file of row numbers {path} cannot be read: {error}.") from error
    if not text.lstrip().startswith(("[", "{")):
        listed: list[tuple[str, Any]] = []
        for line, word in enumerate(text.splitlines(), start=1):
            if word := word.strip():
                number = word.isascii() and word.isdigit() and len(word) < 20
                listed.append((f"{path}, line {line}", int(word) if number else word[:80]))
        return listed, {}
    try:
        content = parse_json(text)
    except DocumentError as error:
        raise SourceError(f"{path}: {error}.") from error
    if isinstance(content, list):
        return [(f"{path}, item {i}", value) for i, value in enumerate(content)], {}
    try:
        record = LabeledRows.from_dict(content)
        expected = {row: record.names[label] for row, label in zip(record.rows, record.labels)}
    except (ValueError, TypeError, IndexError) as error:
        raise SourceError(f"{path} is no list of row numbers and no labeled_rows.json of a run: {error}") from error
    return [(f"{path}, rows item {i}", value) for i, value in enumerate(record.rows)], expected


def _list(values: Iterable[str]) -> str:
    values = list(values)
    return ", ".join(values[:10]) + (f" and {len(values) - 10} more" if len(values) > 10 else "")


# --- the chosen rows as a map-style dataset -----------------------------------------------------------------------


def _held(source: ImageSource, rows: np.ndarray) -> Any:
    """The chosen rows of a stream, undecoded, in memory."""
    import datasets

    if len(rows) > MAX_HELD_ROWS:
        raise SourceError(
            f"{len(rows):,} labelled rows of the stream {source.name} would have to be held in memory, more than "
            f"{MAX_HELD_ROWS:,}. Choose fewer (per_class, fraction or ids), or read the dataset without streaming."
        )
    lengths = source.shards.lengths
    parts, position = [], 0
    for shard in range(source.shards.count):
        if position > rows[-1]:
            break
        end = position + lengths[shard] if lengths is not None else None
        if end is not None and np.searchsorted(rows, position) == np.searchsorted(rows, end):
            position = end  # nothing of this one is wanted, so its pictures are not read
            continue
        for table in source.shards.tables(shard, source.dataset.column_names):
            low, high = np.searchsorted(rows, (position, position + table.num_rows))
            if high > low:
                parts.append(table.take(rows[low:high] - position))
            position += table.num_rows
    table = pa.concat_tables(parts, promote_options="permissive")
    features = source.dataset.features
    if features is not None:
        table = datasets.table.table_cast(table.select(list(features)), features.arrow_schema)
    return datasets.Dataset(datasets.table.InMemoryTable(table), info=datasets.DatasetInfo(features=features))


def _with_labels(dataset: Any, names: list[str], labels: np.ndarray, numbers: np.ndarray, rows: np.ndarray) -> Any:
    """The chosen rows with `_label` and `_row`. `dataset` is all rows or, from a stream, the chosen ones."""
    import datasets

    whole, stored = len(dataset) == len(labels), rows
    if whole and dataset._indices is not None:
        # itself a selection: the columns go to the table below it, or add_column would copy every picture
        places = dataset._indices.column(0).to_numpy()
        stored, total = places[rows], dataset.data.num_rows
        dataset = datasets.Dataset(dataset.data, info=dataset.info.copy(), split=dataset.split)
        labels, numbers = (_scattered(values, places, total) for values in (labels, numbers))
    if "_row" in dataset.column_names:  # drawn from a drawn subset: messages go on naming rows of the whole
        numbers = np.asarray(dataset.with_format("numpy", columns=["_row"])["_row"])
        dataset = dataset.remove_columns(["_label", "_row"])
    for name, values in (("_label", labels), ("_row", numbers)):
        kind = datasets.ClassLabel(names=names) if name == "_label" else datasets.Value("int64")
        # before select(): on selected rows add_column would copy every picture
        dataset = dataset.add_column(name, values if whole else values[rows], feature=kind)
    return dataset.select(stored) if whole else dataset


def _scattered(values: np.ndarray, places: np.ndarray, total: int) -> np.ndarray:
    spread = np.full(total, UNLABELED, np.int64)
    spread[places] = values
    return spread
