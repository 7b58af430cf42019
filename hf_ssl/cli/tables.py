"""The final table: which pictures it is made from, and how it is printed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..documents import DocumentError, read_json
from .console import say
from .runfolder import read_run

if TYPE_CHECKING:
    from ..data.splits import Pair

MEASURES = ("knn", "linear", "retrieval", "health")
# Two pictures of one drawing: where a model is trained on either, it is shown on both.
_PROTOCOLS = {"emoji": ("emoji:placed", "emoji"), "emoji:placed": ("emoji:placed", "emoji")}
_LAST = "last weights"
_NOT_PRINTED = ("knn200_", "r5", "jaccard_mean", "std", "i2t_r5", "t2i_r5", "zeroshot5_")


def protocols(spec: str) -> tuple[str, ...]:
    """The datasets whose tables belong to a model trained on `spec`."""
    return _PROTOCOLS.get(spec, (spec,))


def make_table(
    model: Any, processor: Any, pairs: Sequence[Pair], measures: Sequence[str] | None = MEASURES, **options: Any
) -> list[dict[str, Any]]:
    """A few rows a pair: the baselines of the `measures` (None: the model's natural ones), then the model itself.

    With `others` (`other_weights`) among the options, the model's own row is called by its weights.
    """
    from ..evaluation import evaluate_backbone, natural_measures

    measures = natural_measures(model) if measures is None else measures
    if options.get("others"):
        options.setdefault("name", "EMA weights" if _LAST in options["others"] else "last weights, published")
    rows: list[dict[str, Any]] = []
    for bank, queries in pairs:
        say(f"Measuring the baselines and the model on {queries.name}, {queries.split} ...")
        rows += evaluate_backbone(model, processor, bank, queries, measures=measures, **options)
    return rows


def other_weights(path: Path) -> dict[str, Any]:
    """{name: classifier} of the weights that a run or checkpoint with an EMA does not publish; {} without one."""
    if not any(_is_method(folder) for folder in (path, path / "ssl")):
        return {}
    from ..hub import load_method

    method, _ = load_method(path)
    if not hasattr(method, "ema"):
        return {}
    told = read_run(path).get("published") if (path / "run.json").is_file() else None  # by validation images, maybe
    if (told or {}).get("weights", method.chosen_weights()[0]) == "last":
        return {"EMA weights, not published": method.ema.eval()}
    return {_LAST: method.backbone.eval()}


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
