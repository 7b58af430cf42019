"""Which rows train, which validate and which test: settled in one place, before anything is drawn from them.

`divide` serves training, evaluation, pseudo-labels and the report alike. Its draws are fixed, so a row that is kept to
test on is nowhere trained on, neither with its label nor without. The splits that one dataset declares are taken as
they are; other sources are compared byte for byte, and a picture that is scored leaves those that are trained on.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from hf_ssl.data.local import is_test, usual_split
from hf_ssl.data.same import canonical, copies, placed, shared
from hf_ssl.data.shards import SourceError
from hf_ssl.data.sources import ImageSource, Part, load_source

logger = logging.getLogger("hf_ssl.data")

TEST_SHARE = 0.2
FEWEST = 10  # rows; fewer are not divided

Pair = tuple[ImageSource, ImageSource]  # what a measure may look at (its bank), what it scores (its queries)


@dataclass(frozen=True)
class Division:
    """What `divide` returns: no picture of `train` is among those that `validation` or `tests` are scored on.

    tests: (bank, queries) of each dataset that is tested on; a bank holds every row that is not scored, those that
    validate included. said: how it came about, in sentences. whole: rows of the training split before it was divided,
    None where they are not counted. request: the arguments of `divide`, by which the same division is found again.
    """

    train: ImageSource
    validation: ImageSource | None
    tests: tuple[Pair, ...]
    said: tuple[str, ...] = ()
    whole: int | None = None
    request: dict[str, Any] = field(default_factory=dict)

    @property
    def online(self) -> tuple[ImageSource | None, ImageSource | None]:
        """(bank, queries) of what is measured while training."""
        if self.validation is not None:
            return self.train, self.validation
        return self.tests[0] if self.tests else (None, None)

    @property
    def held(self) -> tuple[ImageSource, ...]:
        """The sources that are scored, whose pictures must not be trained on."""
        kept = tuple(queries for _, queries in self.tests)
        return kept if self.validation is None else (self.validation, *kept)

    def record(self) -> dict[str, Any]:
        """For run.json and the card: how many rows train, validate and test, and by which rule."""
        return {
            "train": self.train.num_rows,
            "validation": 0 if self.validation is None else self.validation.num_rows,
            "test": max((queries.num_rows or 0 for _, queries in self.tests), default=0),
            "of": self.whole,
            "rule": " ".join(self.said) or "The splits are the dataset's own.",
            "request": self.request,
        }


def divide(
    dataset: str | os.PathLike,
    split: str = "train",
    tests: Sequence[str] = (),
    eval_split: str = "test",
    explicit: bool = False,
    validation_split: str | None = None,
    validation_fraction: float | None = None,
    validation_dataset: str | None = None,
    texts: bool = False,
    **options: Any,
) -> Division:
    """The rows of `dataset` that train, those that validate, and (bank, queries) of each of `tests`.

    Args:
        dataset, split: what is trained on.
        tests: the datasets to test on; one without labels (with `texts`: and without captions) is left out.
        eval_split: the split that is scored. Where there is none (and it was not asked for by name: `explicit`), and
            where it is the very split that is trained on, a fixed fifth of its rows is kept; copies of one picture
            stay together.
        validation_split: of `validation_dataset` (default: `dataset`).
        validation_fraction: instead: this share of the rows that would train otherwise, a fixed draw.
        options: as of `load_source`.

    Raises:
        SourceError: as `load_source`; rows to validate on that are trained on; nothing left to train on.
    """
    dataset = os.fspath(dataset)
    request = {
        "dataset": placed(dataset), "split": split, "tests": [placed(spec) for spec in tests],
        "eval_split": eval_split, "explicit": explicit,
        "validation_split": validation_split, "validation_fraction": validation_fraction,
        "validation_dataset": validation_dataset and placed(validation_dataset), "texts": texts, **options,
    }  # fmt: skip
    whole = whole_of(load_source(dataset, split, **options), "train")
    said: list[str] = []
    pairs: list[Pair] = []
    for spec in sorted(tests, key=lambda spec: spec != dataset):
        bank = whole if spec == dataset else whole_of(load_source(spec, split, **options), "train")
        if bank.labels or (texts and bank.has_captions):
            queries = _queries(bank, spec, eval_split, explicit, options, said)
            pairs += [] if queries is None else [(without(bank, queries), queries)]
    train = free([queries for _, queries in pairs], whole, said)
    validation = None
    if validation_fraction is not None:
        train, validation = _fraction(train, validation_fraction, said)
    elif validation_split is not None:
        found = load_source(validation_dataset or dataset, validation_split, **options)
        train, validation = _validated(train, whole_of(found, "validation"), pairs, said)
    if not pairs and not said:
        said.append("No picture is kept to test on.")
    return Division(train, validation, tuple(pairs), tuple(dict.fromkeys(said)), whole.num_rows, request)


def _queries(
    bank: ImageSource, spec: str, eval_split: str, explicit: bool, options: dict[str, Any], said: list[str]
) -> ImageSource | None:
    """The pictures to score: a split of their own, else a fixed fifth of `bank`; None where it cannot be divided."""
    why = f"{bank.name} is to be tested on its split {bank.split} as well"
    if _usual(eval_split) != _usual(bank.split):
        why = f"{bank.name} has no split to test on"
        try:
            return whole_of(load_source(spec, eval_split, **options), "test")
        except SourceError:
            if explicit:
                raise
    rows = draw(bank, TEST_SHARE)
    if rows is None:
        how = "a stream cannot be divided"
        if not bank.is_stream:
            how = f"its {len(bank)} pictures are too few, or too much alike, to be divided"
        said.append(f"{why}, and {how}, so there is no table of accuracies.")
        return None
    said.append(f"{why}: {len(rows)} of its {len(bank)} pictures, a fixed draw, are kept for it.")
    return part(bank, rows, "test")


def _usual(split: str) -> str:
    return usual_split(split) or split


def _fraction(train: ImageSource, share: float, said: list[str]) -> Pair:
    rows = draw(train, share)
    if rows is None:
        what = "is a stream: drop --streaming" if train.is_stream else f"has {len(train)} pictures, too few"
        raise SourceError(f"--validation_fraction divides a set whose rows can be counted; {train.name} {what}.")
    said.append(f"{len(rows)} of the {len(train)} pictures to train on, a fixed draw, are kept to validate on.")
    rest = np.setdiff1d(np.arange(len(train)), rows, assume_unique=True)
    return part(train, rest, "train"), part(train, rows, "validation")


def _validated(train: ImageSource, found: ImageSource, pairs: Sequence[Pair], said: list[str]) -> Pair:
    """(what trains, less what validates; what validates), from a split that was asked for by name."""
    assert found.part is not None and train.part is not None
    if found.part.of == train.part.of:
        raise SourceError(
            f"{found.name}, split {found.split}, is trained on, so nothing can be validated on it: name another "
            "--validation_split, or give --validation_fraction."
        )
    if any(queries.part is not None and queries.part.of == found.part.of for _, queries in pairs):
        found = replace(found, part=replace(found.part, role="test"))  # it may be watched, but choose nothing
    return without(train, found, said), found


# --- parts of a source --------------------------------------------------------------------------------------------


def whole_of(source: ImageSource, role: str) -> ImageSource:
    """`source`, marked as all that the dataset of its name has in its split."""
    return replace(source, part=Part(role, (canonical(source.name), _usual(source.split), source.num_rows)))


def marked(source: ImageSource, role: str) -> ImageSource:
    """`source`, for that `role`; the whole that it is a part of is not known."""
    known = source.part or Part(role, _unknown(source))
    return replace(source, part=replace(known, role=role))


def _unknown(source: ImageSource) -> tuple[Any, ...]:
    return f"{source.name} at {id(source.dataset)}", source.split, source.num_rows


def part(source: ImageSource, rows: np.ndarray, role: str) -> ImageSource:
    """The rows of a map-style `source` at those positions (ascending), which know their numbers in the whole."""
    of = _unknown(source) if source.part is None else source.part.of
    numbers = rows if source.part is None or source.part.numbers is None else source.part.numbers[rows]
    split = source.split if role == "train" else f"{source.split} (held out)"
    chosen = Part(role, of, np.asarray(numbers, np.int64))
    return replace(source, dataset=source.dataset.select(rows), split=split, part=chosen)


def draw(source: ImageSource, share: float) -> np.ndarray | None:
    """Positions, ascending, of a fixed random `share` of the rows, at least one; None where it cannot be divided.

    Copies of one picture are drawn together or not at all, so the share may come out smaller.
    """
    if source.is_stream or len(source) < FEWEST:
        return None
    order = np.random.default_rng(0).permutation(len(source))
    cut = min(max(round(share * len(order)), 1), len(order) - 1)
    alike = copies(source)
    if alike is None:
        return np.sort(order[:cut])
    count, chosen = np.bincount(alike), []
    for picture in dict.fromkeys(alike[order].tolist()):
        if count[picture] <= cut:
            chosen.append(picture)
            cut -= count[picture]
    return np.flatnonzero(np.isin(alike, chosen)) if chosen else None


def without(source: ImageSource, held: ImageSource, said: list[str] | None = None) -> ImageSource:
    """`source` less the pictures that are also in `held`; what there is to say goes to `said`.

    SourceError: no other picture is left.
    """
    said = [] if said is None else said
    rows = shared(source, held)
    purpose = "validated on" if held.part is not None and held.part.role == "validation" else "tested on"
    if rows is None:
        said.append(
            f"{source.name} was not searched for the pictures of {held.name}, split {held.split}, that are {purpose}: "
            "streams and very large sets are not compared."
        )
        return source
    if len(rows) == len(source):
        raise SourceError(
            f"All pictures of {source.name} (split {source.split}) are {purpose}, as {held.name}, split {held.split}, "
            "so none is left to train on: test on other pictures."
        )
    if not len(rows):
        return source
    if source.part is None or held.part is None or source.part.of != held.part.of:
        said.append(
            f"{len(rows)} of the {len(source)} pictures of {source.name} are also in {held.name}, split {held.split}, "
            f"which is {purpose}: they are not trained on."
        )
    role = "train" if source.part is None else source.part.role
    return part(source, np.setdiff1d(np.arange(len(source)), rows, assume_unique=True), role)


def for_testing(source: ImageSource) -> bool:
    """Whether `source` is there to test on, so that nothing may be chosen by it."""
    return is_test(source.split) or (source.part is not None and source.part.role == "test")


def trained_queries(queries: ImageSource | None, *trained: ImageSource | None, bank: ImageSource | None = None) -> int:
    """How many pictures of `queries` are also among those trained on.

    The log warns of them, and of those that are in `bank`, where each finds itself. What cannot be compared (streams,
    very large sets of different datasets) counts as none.
    """
    if queries is None or queries.is_stream:
        return 0
    known = [source.dataset for source in trained if source is not None]  # the source itself may be a copy by now
    itself = None if bank is None or any(bank.dataset is each for each in known) else shared(queries, bank)
    if itself is not None and len(itself):
        logger.warning(
            "%d of the %d pictures of %s, split %s, that are measured on are in the bank as well, where each finds "
            "itself: the figures on them say nothing of others.",
            len(itself), len(queries), queries.name, queries.split,
        )  # fmt: skip
    found = [rows for source in trained if source is not None and (rows := shared(queries, source)) is not None]
    count = len(np.unique(np.concatenate(found))) if found else 0
    if count:
        logger.warning(
            "%d of the %d pictures of %s, split %s, that are measured on are trained on as well: the figures on them "
            "say nothing of others.", count, len(queries), queries.name, queries.split
        )  # fmt: skip
    return count


# --- what an earlier run trained on -------------------------------------------------------------------------------


def recorded_division(run: Mapping[str, Any]) -> Division | None:
    """The division that a run recorded in its run.json (`Division.record`), found again; None where it cannot be."""
    record = run.get("division")
    request = record.get("request") if isinstance(record, dict) else None
    if not isinstance(request, dict) or not isinstance(request.get("dataset"), str):
        return None
    try:
        found = divide(**request)
    except (SourceError, OSError, TypeError):
        return None
    return found if isinstance(record, dict) and found.record()["of"] == record.get("of") else None


def trained(run: Mapping[str, Any]) -> list[ImageSource]:
    """What the run of that run.json trained on; [] where it cannot be told. SourceError, OSError: its data is gone.

    A run of the time before rows were set apart trained on all rows of its split.
    """
    record, dataset = run.get("division"), run.get("dataset")
    if record is None:
        return (
            [whole_of(load_source(dataset, run.get("split") or "train"), "train")] if isinstance(dataset, str) else []
        )
    earlier = recorded_division(run)
    if earlier is None:
        return []
    other, train = record.get("unlabeled"), earlier.train
    if not other:
        return [train]
    numbers = np.arange(len(train)) if train.part is None or train.part.numbers is None else train.part.numbers
    labeled = part(train, np.flatnonzero(np.isin(numbers, (run.get("labeled") or {}).get("rows", ()))), "train")
    return [labeled, free(earlier.held, whole_of(load_source(other["dataset"], other["split"]), "train"))]


def free(held: Sequence[ImageSource], other: ImageSource, said: list[str] | None = None) -> ImageSource:
    """`other` without the pictures of all `held`; see `without`."""
    for source in held:
        other = without(other, source, said)
    return other


def trained_on(run: Mapping[str, Any], queries: ImageSource) -> tuple[int, str]:
    """(how many pictures of `queries` that run trained on, a sentence on it or "" where there is nothing to say)."""
    try:
        sources = trained(run)
    except (SourceError, OSError, TypeError):
        sources = []
    mine = isinstance(run.get("dataset"), str) and queries.part is not None and canonical(run["dataset"])
    if not sources and mine and queries.part is not None and queries.part.of[0] == mine:
        return (
            0,
            f"{queries.name} is not what it was when the run was made: which pictures it trained on is not known.",
        )
    found = [rows for source in sources if (rows := shared(queries, source)) is not None]
    count = len(np.unique(np.concatenate(found))) if found else 0
    if not count:
        return 0, ""
    scored = f"{queries.name}, split {queries.split}"
    return (
        count,
        f"{count} of the {len(queries)} pictures of {scored} were trained on: the figures on them are not a test.",
    )
