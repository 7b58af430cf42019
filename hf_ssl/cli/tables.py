"""The final table: which pictures it is made from, and how it is printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .console import say

if TYPE_CHECKING:
    from ..data.sources import ImageSource

HELD_OUT = 0.2
MEASURES = ("knn", "linear", "retrieval", "health")
# Two pictures of one drawing: where a model is trained on either, it is shown on both.
_PROTOCOLS = {"emoji": ("emoji:placed", "emoji"), "emoji:placed": ("emoji:placed", "emoji")}
_NOT_PRINTED = ("knn200_", "r5", "jaccard_mean", "std")

Pair = tuple["ImageSource", "ImageSource"]


def labelled_pair(spec: str, bank_split: str, query_split: str, explicit: bool = False, **options: Any) -> Pair | None:
    """(bank, queries) of a labelled dataset; None without labels.

    Where the query split is missing (and was not asked for by name: `explicit`), a fixed fifth of the bank's rows is
    held out of the bank for evaluation only.
    """
    from ..data.sources import SourceError, load_source

    bank = load_source(spec, bank_split, **options)
    if not bank.labels:
        return None
    if not explicit and query_split == bank_split:
        return held_out(bank)
    try:
        return bank, load_source(spec, query_split, **options)
    except SourceError:
        if explicit:
            raise
        return held_out(bank)


def held_out(source: ImageSource) -> Pair | None:
    """(the other rows, a fixed random fifth), both at least one row; None for a stream."""
    import numpy as np

    if source.is_stream or len(source) < 10:
        say(f"{source.name} has no split to test on and cannot be divided, so there is no table of accuracies.")
        return None
    rows = np.random.default_rng(0).permutation(len(source))
    cut = round(HELD_OUT * len(rows))
    say(f"{source.name} has no split to test on: {cut} of its {len(rows)} pictures, a fixed draw, are the queries.")
    queries, bank = (source.dataset.select(np.sort(part)) for part in (rows[:cut], rows[cut:]))
    return replace(source, dataset=bank), replace(source, dataset=queries, split=f"{source.split} (held out)")


def protocols(spec: str) -> tuple[str, ...]:
    """The datasets whose tables belong to a model trained on `spec`."""
    return _PROTOCOLS.get(spec, (spec,))


def make_table(
    model: str, processor: Any, pairs: Sequence[Pair], measures: Sequence[str] = MEASURES, **options: Any
) -> list[dict[str, Any]]:
    """Three rows a pair: raw pixels, untrained, trained."""
    from ..evaluation import evaluate_backbone

    rows: list[dict[str, Any]] = []
    for bank, queries in pairs:
        say(f"Measuring raw pixels, the untrained and the trained backbone on {queries.name}, {queries.split} ...")
        rows += evaluate_backbone(model, processor, bank, queries, measures=measures, **options)
    return rows


def print_results(rows: Sequence[dict[str, Any]]) -> None:
    """The figures a reader compares; run.json and --json keep all of them."""
    from ..evaluation import format_table

    columns = dict.fromkeys(name for row in rows for name in row)
    if any(name.startswith(("knn", "linear", "r1")) for name in columns):
        columns = {name: None for name in columns if not name.startswith(_NOT_PRINTED)}
    say("", format_table(rows, list(columns)), "")
