"""The report's panels of a classifier: which classes it takes for which, and how far to trust it."""

from __future__ import annotations

import logging
from html import escape
from typing import Any

import numpy as np

from hf_ssl.evaluation import charts
from hf_ssl.evaluation.album import NotApplicable, Run
from hf_ssl.evaluation.classification import UNKNOWN, classification_report, predict
from hf_ssl.evaluation.report_table import OWN_ROWS

logger = logging.getLogger(__name__)

_MOST = 40  # classes in one picture: more cannot be read
_NUMBERED = 20  # up to so many, the cells hold their counts


def confusion_panel(run: Run, dataset: str | None = None, max_images: int = 1500) -> str:
    """Confusion matrix and reliability diagram: of run.json's table where it has them, else of fresh predictions."""
    report = None if dataset else _recorded(run)
    if report is None:
        report = _measured(run, dataset, max_images)
    names, confusion = [str(name) for name in report["classes"]], np.asarray(report["confusion"])
    reliability = charts.figure(reliability_chart(report["calibration"], report["ece"]))
    return f'<div class="charts">{confusion_figure(confusion, names)}{reliability}</div>'


def _recorded(run: Run) -> dict[str, Any] | None:
    rows = run.card.get("results")
    keys = ("classes", "confusion", "calibration", "ece")
    for row in rows if isinstance(rows, list) else ():
        if isinstance(row, dict) and row.get("model") in OWN_ROWS and all(key in row for key in keys):
            return row
    return None


def _measured(run: Run, dataset: str | None, max_images: int) -> dict[str, Any]:
    source = run.source(dataset)
    if not source.labels:
        raise NotApplicable(f"{source.name} has no labels, so there is nothing to compare the predictions with.")
    found = predict(str(run.folder), source, max_images=max_images, progress=False)
    if not (found.labels != UNKNOWN).any():
        raise NotApplicable(f"None of the pictures of {source.name} that were looked at has a label.")
    return classification_report(found.probabilities, found.labels, found.names) | {"classes": list(found.names)}


def confusion_figure(confusion: np.ndarray, names: list[str]) -> str:
    """Counts (C, C), rows the truth, as a <figure>; of many classes, those with the most mistakes."""
    errors = confusion.sum(0) + confusion.sum(1) - 2 * confusion.diagonal()
    kept = np.sort(np.argsort(-errors, kind="stable")[:_MOST])
    told = f"The {_MOST} of {len(names)} classes with the most mistakes. " if len(kept) < len(names) else ""
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    cell = max(9, min(30, 420 // len(kept)))
    left = min(150, 14 + 7 * max(len(names[i]) for i in kept))
    parts = []
    for y, true in enumerate(kept):
        parts.append(_label(names[true], left - 6, y * cell + cell / 2 + 4, "end"))
        for x, guess in enumerate(kept):
            count = int(confusion[true, guess])
            if count:
                at = (left + x * cell, y * cell)
                parts.append(_cell(at, cell, shares[true, guess], count, (names[true], names[guess]), len(kept)))
    side = cell * len(kept)
    for x, guess in enumerate(kept):
        parts.append(_label(names[guess], left + x * cell + cell / 2 + 4, side + 8, "end", turned=True))
    frame = f'<path class="grid" style="fill:none" d="M{left} 0h{side}v{side}h-{side}z"/>'
    pairs = worst_pairs(confusion, names)
    said = f"Confusion matrix of {len(kept)} classes. {pairs}"
    caption = f"{told}Rows: the truth; columns: the answer; the darker, the larger the share of the row. {pairs}"
    svg = (
        f'<svg viewBox="0 0 {left + side + 8} {side + left}" role="img" aria-label="{escape(said)}" '
        f'style="min-width:{min(left + side, 520)}px">{frame}{"".join(parts)}</svg>'
    )
    return (
        f'<figure class="chart"><h3>Confusion</h3><div class="wide">{svg}</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _label(name: str, x: float, y: float, anchor: str, turned: bool = False) -> str:
    cut = name if len(name) <= 18 else f"{name[:17]}…"
    turn = f' transform="rotate(-60 {x:.1f} {y:.1f})"' if turned else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" style="text-anchor:{anchor}"{turn}>{escape(cut)}</text>'


def _cell(at: tuple[int, int], side: int, share: float, count: int, pair: tuple[str, str], classes: int) -> str:
    colour = "var(--accent)" if pair[0] == pair[1] else "var(--bad)"
    words = f"{count} of {pair[0]} called {pair[1]} ({share:.0%})"
    square = (
        f'<rect x="{at[0]}" y="{at[1]}" width="{side}" height="{side}" '
        f'style="fill:{colour};fill-opacity:{0.08 + 0.72 * share:.2f}"><title>{escape(words)}</title></rect>'
    )
    if classes > _NUMBERED or side < 18:
        return square
    ink = "fill:var(--ink);text-anchor:middle;pointer-events:none"
    return square + f'<text x="{at[0] + side / 2}" y="{at[1] + side / 2 + 4}" style="{ink}">{count}</text>'


def worst_pairs(confusion: np.ndarray, names: list[str], most: int = 3) -> str:
    """The commonest mistakes in a sentence."""
    wrong = confusion.astype(int).copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    found = [(int(wrong.flat[i]), *divmod(int(i), len(names))) for i in order if wrong.flat[i]]
    if not found:
        return "It made no mistake."
    told = ", ".join(f"{names[true]} called {names[guess]} ({count} times)" for count, true, guess in found)
    return f"Most often: {told}."


def reliability_chart(calibration: list[dict[str, Any]], ece: float) -> charts.Chart:
    """Accuracy against confidence, bin by bin, beside the line of a model that can be believed."""
    filled = [b for b in calibration if b["count"]]
    lines = {
        "the model": ([b["confidence"] for b in filled], [b["accuracy"] for b in filled]),
        "to be believed": ([0.0, 1.0], [0.0, 1.0]),
    }
    counts = sum(b["count"] for b in filled)
    sure = sum(b["count"] for b in filled if b["confidence"] > 0.9)
    caption = (
        f"Below the straight line the model is surer than it is right. Mean gap (ECE) {ece:.3f} over {counts:,} "
        f"pictures; of {sure / max(counts, 1):.0%} of them it is more than 90 % sure."
    )
    return charts.Chart("Reliability", "accuracy", lines, caption, x_label="confidence")
