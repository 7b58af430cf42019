"""One self-contained HTML page about a run: what improved, the curves, and pictures of what the model sees."""

from __future__ import annotations

import json
import logging
import math
import shlex
import string
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any, TypeGuard

from hf_ssl.evaluation import charts, panels, pictures
from hf_ssl.evaluation.album import Album, Missing, Run, load_album
from hf_ssl.evaluation.charts import number
from hf_ssl.evaluation.health import diagnose, health_report

logger = logging.getLogger(__name__)

_TIE = 0.005  # accuracies closer than this are called equal


@dataclass
class Report:
    """The material of one page; pictures are loaded when a part first asks, and a failure is told in each of them."""

    run: Run
    dataset: str | None
    max_images: int
    progress: bool

    @cached_property
    def _album(self) -> Album | Exception:
        try:
            return load_album(self.run, self.dataset, self.max_images, self.progress)
        except Exception as error:
            logger.warning("The report has no pictures: %s", error, exc_info=not isinstance(error, Missing))
            return error

    @property
    def album(self) -> Album:
        if isinstance(self._album, Missing):
            raise self._album
        if isinstance(self._album, Exception):
            raise Missing(f"The pictures could not be loaded: {self._album}")
        return self._album

    def series(self, key: str) -> tuple[list, list]:
        """(steps, values) of one logged quantity."""
        found = [(e["step"], e[key]) for e in self.run.log if _is_number(e.get(key)) and _is_number(e.get("step"))]
        return [step for step, _ in found], [value for _, value in found]

    def last(self, key: str) -> float | None:
        values = self.series(key)[1]
        return values[-1] if values else None


def write_report(
    run_dir: str | Path, dataset: str | None = None, max_images: int = 1500, progress: bool = True
) -> Path:
    """Write `run_dir`/report.html, one file that needs no network, and return its path.

    `dataset`: whose test pictures to show (default: the run's own). `max_images`: at most so many of them, a fixed
    random subset. A part that cannot be made says why in its place. Raises FileNotFoundError where `run_dir` holds
    no run.
    """
    report = Report(Run.open(run_dir), dataset, max_images, progress)
    parts = [
        _header(report),
        _part("Results", "results", _results, report),
        _part("Training", "training", _curves, report),
        _part("Map of the pictures", "map", lambda r: panels.map_panel(r.album), report),
        _part("Nearest neighbours, before and after", "neighbours", lambda r: panels.gallery_panel(r.album), report),
        _part("Where the model looks", "attention", lambda r: panels.attention_panel(r.album), report),
        _part("What it fills in", "reconstruction", lambda r: panels.reconstruction_panel(r.run, r.album), report),
        _part("Pictures left out", "skipped", _skipped, report),
        _part("How to repeat this run", "repeat", _repeat, report),
    ]
    if report.run.problems:
        words = " ".join(dict.fromkeys(report.run.problems))
        parts.insert(1, f'<p class="warn">Not everything of this run could be read. {escape(words)}</p>')
    template = string.Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    path = report.run.folder / "report.html"
    title = escape(f"{_method(report)[0]} on {_dataset(report)}")
    path.write_text(template.substitute(title=title, body="\n".join(parts)), encoding="utf-8")
    return path


def _part(title: str, anchor: str, build: Callable[[Report], str], report: Report) -> str:
    try:
        body = build(report)
    except Missing as reason:
        body = f'<p class="missing">{escape(str(reason))}</p>'
    except Exception as error:  # one broken part must not cost the reader the others
        logger.warning("Part %r of the report failed", title, exc_info=True)
        body = f'<p class="missing">This part could not be made: {escape(f"{type(error).__name__}: {error}")}</p>'
    return f'<section id="{anchor}"><h2>{escape(title)}</h2>\n{body}</section>'


# --- header -------------------------------------------------------------------------------------------------------


def _header(report: Report) -> str:
    name, paper = _method(report)
    tiles = [("steps", max((e["step"] for e in report.run.log if _is_number(e.get("step"))), default=None))]
    seconds = report.run.card.get("time_seconds")
    tiles += [("time", _duration(seconds) if _is_number(seconds) else None)]
    tiles += [("last loss", report.last("loss")), ("images per second", report.last("images_per_second"))]
    tiles += [("online kNN, last", report.last("eval_knn_top1"))]
    shown = [(label, number(v) if _is_number(v) else v) for label, v in tiles if v is not None]
    items = "".join(f"<li><b>{escape(str(value))}</b><span>{escape(label)}</span></li>" for label, value in shown)
    mood, sentences = verdict(report.run.card.get("results"))
    ill, health = _health(report)
    mood = "mixed" if ill and mood == "good" else mood
    words = "".join(f"<p>{escape(sentence)}</p>" for sentence in [*sentences, health])
    return (
        f'<header><h1>{escape(name)} on {escape(_dataset(report))}</h1><p class="paper">{escape(paper)}</p>'
        f'<ul class="tiles">{items}</ul><div class="verdict {mood}">{words}</div></header>'
    )


def _method(report: Report) -> tuple[str, str]:
    """(name, the paper in a line): run.json's, or what the method class says of itself."""
    method = report.run.card.get("method") or str(report.run.composite.get("model_type", "")).removeprefix("ssl_")
    paper: Any = None
    if report.run.composite:
        try:
            paper = getattr(pictures.composite_class(report.run), "paper", None)
        except Exception as error:  # a method this installation does not know
            logger.warning("%s", error)
    if paper is None:
        return str(method or "A run"), ""
    return paper.name, f"{paper.title}, arXiv {paper.arxiv}: {paper.teaches}."


def _dataset(report: Report) -> str:
    return str(report.dataset or report.run.card.get("dataset") or "an unnamed dataset")


def _health(report: Report) -> tuple[bool, str]:
    """(is there a sign of collapse, a sentence)."""
    try:
        album = report.album
        after = health_report(album.after)
        before = health_report(album.before) if album.before is not None else None
    except (Missing, ValueError) as error:
        return False, f"Health could not be judged. {error}"
    last, width = report.last("teacher_entropy"), report.run.composite.get("out_dim")
    if last is not None and _is_number(width) and width > 1:
        after["entropy"] = last / math.log(width)
        marginal = report.last("prototype_entropy")
        after |= {"marginal_entropy": marginal / math.log(width)} if marginal is not None else {}
    loss = report.last("loss")
    words = diagnose(after | ({"loss": loss} if loss is not None else {}), before)
    figures = f"spread {after['std_ratio']:.2f} of 1/√d, effective rank {after['rankme']:.0f} of {after['dim']:.0f}"
    return bool(words), f"Health: {' '.join(words) or f'no sign of collapse ({figures}).'}"


def verdict(rows: Any) -> tuple[str, list[str]]:
    """(mood: "good", "mixed", "bad" or "", a sentence per protocol) from run.json's results, whichever way they go."""
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    moods, sentences = [], []
    for protocol in dict.fromkeys(row.get("protocol") for row in rows):
        models = {row.get("model"): row for row in rows if row.get("protocol") == protocol}
        trained = models.get("trained", {})
        clauses = []
        for baseline, words in (("untrained", "the untrained network"), ("raw pixels", "raw pixels")):
            other = models.get(baseline, {})
            keys = [k for k in trained if _is_quality(k) and _is_number(trained[k]) and _is_number(other.get(k))]
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
        return f"{_heading(key)} {other[key]:.2f} → {trained[key]:.2f}"

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


# --- table and curves ---------------------------------------------------------------------------------------------


def _results(report: Report) -> str:
    rows = report.run.card.get("results")
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    if not rows:
        raise Missing("run.json has no results: the run was not evaluated. `hf-ssl evaluate` makes this table.")
    tables = [
        _table(str(protocol or "results"), [row for row in rows if row.get("protocol") == protocol])
        for protocol in dict.fromkeys(row.get("protocol") for row in rows)
    ]
    return "".join(tables) + (
        '<p class="hint">Bold: the best of each column. Look for the trained row to beat both baselines; raw pixels '
        "are strong where pictures are aligned. Spread and rank describe the features and are no scores.</p>"
    )


def _table(protocol: str, rows: list[dict]) -> str:
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in ("protocol", "model")]
    best = {}
    for key in filter(_is_quality, columns):
        values = [round(row[key], 3) for row in rows if _is_number(row.get(key))]
        best[key] = max(values, default=math.nan)
    lines = []
    for row in rows:
        cells = []
        for key in columns:
            value = row.get(key)
            text = f"{value:.3f}" if _is_number(value) and _is_quality(key) else _text(value)
            top = _is_number(value) and round(value, 3) == best.get(key)
            cells.append(f"<td><b>{escape(text)}</b></td>" if top else f"<td>{escape(text)}</td>")
        kind = ' class="trained"' if row.get("model") == "trained" else ""
        lines.append(f'<tr{kind}><th scope="row">{escape(str(row.get("model", "?")))}</th>{"".join(cells)}</tr>')
    head = "".join(f'<th scope="col">{escape(_heading(key))}</th>' for key in columns)
    return (
        f'<div class="wide"><table><caption>{escape(protocol)}</caption><thead><tr><th scope="col">model</th>{head}'
        f"</tr></thead><tbody>{''.join(lines)}</tbody></table></div><br>"
    )


def _heading(key: str) -> str:
    """knn20_group -> "kNN-20 group", r1 -> "R@1"."""
    stem, _, label = key.partition("_")
    label = "" if label == "label" else label.replace("_", " ")
    for prefix, name in (("knn", "kNN-"), ("r", "R@")):
        if stem.startswith(prefix) and stem[len(prefix) :].isdigit():
            return f"{name}{stem[len(prefix) :]} {label}".strip()
    names = {"std": "spread (std)", "rankme": "RankMe", "jaccard": "attention Jaccard,", "linear": "linear probe"}
    return f"{names.get(stem, stem)} {label}".strip()


def _is_quality(key: str) -> bool:
    return key.startswith(("knn", "linear", "jaccard", "top")) or (key[:1] == "r" and key[1:].isdigit())


def _curves(report: Report) -> str:
    if not report.run.log:
        raise Missing("There are no curves: the run left no trainer_state.json.")
    logged = list(dict.fromkeys(key for entry in report.run.log for key in entry))
    width = report.run.composite.get("out_dim")
    log_k = {"log K, all the same": math.log(width)} if _is_number(width) and width > 1 else {}
    spread = {}
    if not isinstance(report._album, Exception):
        spread = {"1/√d, healthy": 1 / math.sqrt(report.album.after.shape[1])}
    drawn = charts.of_log(logged, report.series, {"feature_std": spread, "teacher_entropy": log_k})
    figures = "".join(charts.figure(chart) for chart in drawn)
    missing = ""
    if not any(key.startswith("eval_knn") for key in logged):
        missing = (
            '<p class="hint">No kNN curve: the run did not evaluate on the way, or its pictures have no labels.</p>'
        )
    return f'<div class="charts">{figures}</div>{missing}'


# --- what it took -------------------------------------------------------------------------------------------------


def _skipped(report: Report) -> str:
    count, names = skipped_images(report.run.card.get("skipped_images"))
    said = {None: "run.json does not say how many pictures training skipped.", 0: "Training skipped no picture."}
    words = said.get(count, f"Training skipped {_plural(count or 0)} that could not be read.")
    parts = [f"<p>{escape(words)}</p>", _names(names, count or 0)]
    if not isinstance(report._album, Exception) and report.album.skipped:
        skipped = report.album.skipped
        parts += [
            f"<p>{escape(f'{_plural(len(skipped))} could not be read for this report.')}</p>",
            _names(skipped, len(skipped)),
        ]
    return "".join(parts)


def skipped_images(found: Any) -> tuple[int | None, list[str]]:
    """(count, names) from run.json's entry: a count, a list of names, or an object with both; (None, []) otherwise."""
    if _is_number(found):
        return int(found), []
    if isinstance(found, list):
        return len(found), [str(name) for name in found]
    if isinstance(found, dict):
        names = next((v for v in found.values() if isinstance(v, list)), [])
        counts = [found.get(key) for key in ("skipped", "distinct", "count", "total")]
        count = next((c for c in counts if _is_number(c)), len(names))
        return int(count), [str(name) for name in names]
    return None, []


def _names(names: list[str], count: int) -> str:
    if not names:
        return ""
    items = "".join(f"<li>{escape(name)}</li>" for name in names[:200])
    more = f"<p>and {count - 200} more</p>" if count > 200 else ""
    fold = "<details open>" if len(names) <= 10 else "<details>"
    return f'{fold}<summary>Which ones, and why</summary><ul class="names">{items}</ul>{more}</details>'


def _plural(count: int) -> str:
    return "1 picture" if count == 1 else f"{count:,} pictures"


def _repeat(report: Report) -> str:
    card = report.run.card
    command = card.get("command")
    command = shlex.join(map(str, command)) if isinstance(command, list) else command
    parts = [
        f"<pre><code>{escape(str(command))}</code></pre>" if command else "<p>run.json does not hold the command.</p>"
    ]
    environment = report.run.part("environment")
    parts.append(_plain_table(environment) if environment else "<p>run.json does not describe the environment.</p>")
    for title, key in (("All training arguments", "arguments"), ("What training started from", "init")):
        if report.run.part(key):
            parts.append(f"<details><summary>{title}</summary>{_plain_table(report.run.part(key))}</details>")
    if report.run.composite:
        parts.append(f"<details><summary>The method's config</summary>{_plain_table(report.run.composite)}</details>")
    return "".join(parts)


def _plain_table(values: dict) -> str:
    lines = [f'<tr><th scope="row">{escape(str(k))}</th><td>{escape(_text(v))}</td></tr>' for k, v in values.items()]
    return f'<div class="wide"><table class="plain"><tbody>{"".join(lines)}</tbody></table></div>'


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if _is_number(value):
        return number(value)
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
