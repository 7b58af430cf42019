"""The report's table of results and the sentences on it."""

from __future__ import annotations

import json
import math
from html import escape
from typing import Any, TypeGuard

from hf_ssl.evaluation.charts import number

_TIE = 0.005  # accuracies closer than this are called equal
OWN_ROWS = ("trained", "EMA weights", "last weights, published")  # what the model's own row is called
_BASELINES = (
    ("untrained", "the untrained network"),
    ("raw pixels", "raw pixels"),
    ("majority class", "naming the commonest class"),
    ("chance", "chance"),
)


def verdict(rows: Any) -> tuple[str, list[str]]:
    """(mood: "good", "mixed", "bad" or "", a sentence per protocol) from run.json's results, whichever way they go."""
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    moods, sentences = [], []
    for protocol in dict.fromkeys(row.get("protocol") for row in rows):
        models = {row.get("model"): row for row in rows if row.get("protocol") == protocol}
        trained: dict = next((models[name] for name in OWN_ROWS if name in models), {})
        clauses = []
        for baseline, words in _BASELINES:
            other = models.get(baseline, {})
            keys = [k for k in trained if is_quality(k) and is_number(trained[k]) and is_number(other.get(k))]
            if not keys:
                continue
            gain = {k: trained[k] - other[k] for k in keys}
            better, worse = [k for k in keys if gain[k] > _TIE], [k for k in keys if gain[k] < -_TIE]
            moods.append("good" if len(better) == len(keys) else "mixed" if better else "bad")
            clauses.append(_clause(words, keys, better, worse, gain, trained, other))
        if clauses:
            where = f"{protocol[:1].upper()}{protocol[1:]}: the" if isinstance(protocol, str) else "The"
            sentences.append(f"{where} trained model is {', and '.join(clauses)}.")
    if not sentences:
        return "", ["There is no results table, so nothing can be said about what training improved."]
    mood = "good" if set(moods) == {"good"} else "bad" if set(moods) == {"bad"} else "mixed"
    return mood, sentences


def _clause(words: str, keys: list, better: list, worse: list, gain: dict, trained: dict, other: dict) -> str:
    def example(key: str) -> str:
        return f"{heading(key)} {other[key]:.2f} → {trained[key]:.2f}"

    if not better:
        told = "worse than" if len(worse) == len(keys) else "no better than"
        return f"{told} {words} on {_count(len(keys), len(keys))} ({example(min(keys, key=gain.__getitem__))})"
    clause = f"better than {words} on {_count(len(better), len(keys))} ({example(max(better, key=gain.__getitem__))})"
    equal = len(keys) - len(better) - len(worse)
    if worse:
        clause += f", but worse on {len(worse)} ({example(min(worse, key=gain.__getitem__))})"
    return clause + (f", level on {equal}" if equal else "")


def _count(some: int, total: int) -> str:
    if total == 1:
        return "the one measure"
    return f"all {total} measures" if some == total else f"{some} of {total} measures"


def table(protocol: str, rows: list[dict]) -> str:
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in ("protocol", "model")]
    columns = [key for key in columns if not any(isinstance(row.get(key), (list, dict)) for row in rows)]
    best = {}
    for key in filter(is_quality, columns):
        values = [round(row[key], 3) for row in rows if is_number(row.get(key))]
        best[key] = max(values, default=math.nan)
    lines = []
    for row in rows:
        cells = []
        for key in columns:
            value = row.get(key)
            shown = f"{value:.3f}" if is_number(value) and is_quality(key) else text(value)
            top = is_number(value) and round(value, 3) == best.get(key)
            cells.append(f"<td><b>{escape(shown)}</b></td>" if top else f"<td>{escape(shown)}</td>")
        kind = ' class="trained"' if row.get("model") in OWN_ROWS else ""
        lines.append(f'<tr{kind}><th scope="row">{escape(str(row.get("model", "?")))}</th>{"".join(cells)}</tr>')
    head = "".join(f'<th scope="col">{escape(heading(key))}</th>' for key in columns)
    return (
        f'<div class="wide"><table><caption>{escape(protocol)}</caption><thead><tr><th scope="col">model</th>{head}'
        f"</tr></thead><tbody>{''.join(lines)}</tbody></table></div><br>"
    )


def heading(key: str) -> str:
    """knn20_group -> "kNN-20 group", i2t_r1 -> "image → text R@1"."""
    stem, _, label = key.partition("_")
    label = "" if label == "label" else label.replace("_", " ")
    if stem in ("i2t", "t2i"):
        return f"{'image → text' if stem == 'i2t' else 'text → image'} R@{label.removeprefix('r')}"
    for prefix, name in (("knn", "kNN-"), ("r", "R@")):
        if stem.startswith(prefix) and stem[len(prefix) :].isdigit():
            return f"{name}{stem[len(prefix) :]} {label}".strip()
    if stem.startswith("lowshot"):
        return f"{stem.removeprefix('lowshot')} % of labels, {label}".removesuffix(", ")
    names = {
        "std": "spread (std)", "rankme": "RankMe", "jaccard": "attention Jaccard,", "linear": "linear probe",
        "macro": "macro", "ece": "calibration error (ECE)", "top5": "top-5", "zeroshot": "zero-shot",
        "zeroshot5": "zero-shot top-5",
    }  # fmt: skip
    return f"{names.get(stem, stem)} {label}".strip().replace("macro f1", "macro F1")


def is_quality(key: str) -> bool:
    known = ("knn", "linear", "jaccard", "top", "accuracy", "macro_f1", "zeroshot", "lowshot", "i2t_", "t2i_")
    return key.startswith(known) or (key[:1] == "r" and key[1:].isdigit())


def text(value: Any) -> str:
    if value is None:
        return "–"
    if is_number(value):
        return number(value)
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
