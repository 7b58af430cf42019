"""The final table: which pictures it is made from, and how it is printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..documents import DocumentError, read_json
from .console import say

if TYPE_CHECKING:
    from ..data.sources import ImageSource

HELD_OUT = 0.2
MEASURES = ("knn", "linear", "retrieval", "health")
# Two pictures of one drawing: where a model is trained on either, it is shown on both.
_PROTOCOLS = {"emoji": ("emoji:placed", "emoji"), "emoji:placed": ("emoji:placed", "emoji")}
_NOT_PRINTED = ("knn200_", "r5", "jaccard_mean", "std", "i2t_r5", "t2i_r5", "zeroshot5_")

Pair = tuple["ImageSource", "ImageSource"]


def labelled_pair(
    spec: str, bank_split: str, query_split: str, explicit: bool = False, texts: bool = False, **options: Any
) -> Pair | None:
    """(bank, queries) of a labelled dataset; None without labels (with `texts`: and without captions).

    Where the query split is missing (and was not asked for by name: `explicit`), a fixed fifth of the bank's rows is
    held out of the bank for evaluation only.
    """
    from ..data.sources import SourceError, load_source

    bank = load_source(spec, bank_split, **options)
    if not bank.labels and not (texts and bank.has_captions):
        return None
    if not explicit and query_split == bank_split:
        return held_out(bank)
    try:
        return bank, load_source(spec, query_split, **options)
    except SourceError:
        if explicit:
            raise
        return held_out(bank)


def held_out(source: ImageSource, share: float = HELD_OUT, purpose: str = "to test on") -> Pair | None:
    """(the other rows, a fixed random `share`), both at least one row; None for a stream."""
    import numpy as np

    if source.is_stream or len(source) < 10:
        say(f"{source.name} has no split {purpose} and cannot be divided, so there is no table of accuracies.")
        return None
    rows = np.random.default_rng(0).permutation(len(source))
    cut = min(max(round(share * len(rows)), 1), len(rows) - 1)
    say(f"{source.name} has no split {purpose}: {cut} of its {len(rows)} pictures, a fixed draw, are kept for it.")
    queries, bank = (source.dataset.select(np.sort(part)) for part in (rows[:cut], rows[cut:]))
    return replace(source, dataset=bank), replace(source, dataset=queries, split=f"{source.split} (held out)")


def protocols(spec: str) -> tuple[str, ...]:
    """The datasets whose tables belong to a model trained on `spec`."""
    return _PROTOCOLS.get(spec, (spec,))


def make_table(
    model: Any, processor: Any, pairs: Sequence[Pair], measures: Sequence[str] | None = MEASURES, **options: Any
) -> list[dict[str, Any]]:
    """A few rows a pair: the baselines of the `measures` (None: the model's natural ones), then the model itself.

    With `others` (`last_weights`) among the options, the model's own row is called "EMA weights".
    """
    from ..evaluation import evaluate_backbone, natural_measures

    measures = natural_measures(model) if measures is None else measures
    if options.get("others"):
        options.setdefault("name", "EMA weights")
    rows: list[dict[str, Any]] = []
    for bank, queries in pairs:
        say(f"Measuring the baselines and the model on {queries.name}, {queries.split} ...")
        rows += evaluate_backbone(model, processor, bank, queries, measures=measures, **options)
    return rows


def last_weights(path: Path) -> dict[str, Any]:
    """{"last weights": the classifier without EMA} of a run or checkpoint that holds one beside its EMA, else {}."""
    if not any(_is_method(folder) for folder in (path, path / "ssl")):
        return {}
    from ..hub import load_method

    method, _ = load_method(path)
    return {"last weights": method.backbone.eval()} if hasattr(method, "ema") else {}


def _is_method(folder: Path) -> bool:
    try:
        config = read_json(folder / "config.json")
    except DocumentError:
        return False
    return isinstance(config, dict) and str(config.get("model_type", "")).startswith("ssl_")


def print_results(rows: Sequence[dict[str, Any]]) -> None:
    """The figures a reader compares; run.json and --json keep all of them."""
    from ..evaluation import format_table

    plain = [{name: value for name, value in row.items() if not isinstance(value, (list, dict))} for row in rows]
    columns = list(dict.fromkeys(name for row in plain for name in row))
    if any(name.startswith(("knn", "linear", "r1", "accuracy", "zeroshot", "i2t")) for name in columns):
        columns = [name for name in columns if not name.startswith(_NOT_PRINTED)]
    say("", format_table(plain, columns), "")
