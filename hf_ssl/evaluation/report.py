"""One self-contained HTML page about a run: what improved, the curves, and pictures of what the model sees."""

from __future__ import annotations

import logging
import math
import shlex
import string
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

from hf_ssl.backbones import model_kind
from hf_ssl.data.files import printable
from hf_ssl.evaluation import charts, classifier_panels, panels, pictures, text_panels
from hf_ssl.evaluation.album import Album, Missing, NotApplicable, Run, load_album
from hf_ssl.evaluation.charts import number
from hf_ssl.evaluation.health import diagnose, entropy_shares, health_report
from hf_ssl.evaluation.report_table import is_number, table, text, verdict
from hf_ssl.files import whole_file
from hf_ssl.untouched import untouched

logger = logging.getLogger(__name__)


@dataclass
class Report:
    """The material of one page; pictures are loaded when a part first asks, and each of them shows a failure."""

    run: Run
    dataset: str | None
    max_images: int
    progress: bool

    @cached_property
    def _album(self) -> Album | Exception:
        try:
            return load_album(self.run, self.dataset, self.max_images, self.progress)
        except Exception as error:
            logger.warning(
                "The report has no pictures: %s", error, exc_info=not isinstance(error, (Missing, ValueError, OSError))
            )
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
        found = [(e["step"], e[key]) for e in self.run.log if is_number(e.get(key)) and is_number(e.get("step"))]
        return [step for step, _ in found], [value for _, value in found]

    def last(self, key: str) -> float | None:
        values = self.series(key)[1]
        return values[-1] if values else None


@untouched()
def write_report(
    run_dir: str | Path, dataset: str | None = None, max_images: int = 1500, progress: bool = True
) -> Path:
    """Write `run_dir`/report.html, one file that needs no network, and return its path.

    `dataset`: whose test pictures to show (default: the run's own). `max_images`: at most so many of them, a fixed
    random subset. A part that cannot be made says why in its place; one that this model or these pictures cannot have
    is left out. Raises FileNotFoundError where `run_dir` holds no run, WriteError (an OSError) where the page cannot
    be written: an earlier one is then untouched.
    """
    report = Report(Run.open(run_dir), dataset, max_images, progress)
    parts = [
        _header(report),
        _part("Results", "results", _results, report),
        _part("Training", "training", _curves, report),
        _part("Map of the pictures", "map", lambda r: panels.map_panel(r.album), report),
        _part("Nearest neighbours, before and after", "neighbours", lambda r: panels.gallery_panel(r.album), report),
        *_own_parts(report),
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
    page = printable(template.substitute(title=title, body="\n".join(filter(None, parts))))
    with whole_file(path) as file:
        file.write_text(page, encoding="utf-8")
    return path


def _own_parts(report: Report) -> list[str]:
    """What only a classifier or an image-text model has to show."""
    try:
        kind = model_kind(str(report.run.folder))
    except Exception:  # no model, or one that this installation does not know: the other parts say so
        return []
    if kind == "classifier":
        return [_part("Which classes it confuses", "confusion", _confusion, report)]
    if kind == "image_text":
        return [_part("Zero-shot: pictures and their best-matching texts", "texts", _texts, report)]
    return []


def _confusion(report: Report) -> str:
    return classifier_panels.confusion_panel(report.run, report.dataset, report.max_images)


def _texts(report: Report) -> str:
    return text_panels.text_panel(str(report.run.folder), report.album)


def _part(title: str, anchor: str, build: Callable[[Report], str], report: Report) -> str:
    try:
        body = build(report)
    except NotApplicable:
        return ""
    except Missing as reason:
        body = f'<p class="missing">{escape(str(reason))}</p>'
    except Exception as error:  # one broken part must not cost the reader the others
        logger.warning("Part %r of the report failed", title, exc_info=True)
        body = f'<p class="missing">This part could not be made: {escape(f"{type(error).__name__}: {error}")}</p>'
    return f'<section id="{anchor}"><h2>{escape(title)}</h2>\n{body}</section>'


# --- header -------------------------------------------------------------------------------------------------------


def _header(report: Report) -> str:
    name, paper = _method(report)
    tiles = [("steps", max((e["step"] for e in report.run.log if is_number(e.get("step"))), default=None))]
    seconds = report.run.card.get("time_seconds")
    tiles += [("time", _duration(seconds) if is_number(seconds) else None)]
    tiles += [("last loss", report.last("loss")), ("images per second", report.last("images_per_second"))]
    tiles += [("online kNN, last", report.last("eval_knn_top1")), ("accuracy, last", report.last("eval_accuracy"))]
    shown = [(label, number(v) if is_number(v) else v) for label, v in tiles if v is not None]
    items = "".join(f"<li><b>{escape(str(value))}</b><span>{escape(label)}</span></li>" for label, value in shown)
    mood, sentences = verdict(report.run.card.get("results"))
    ill, health = _health(report)
    mood = "mixed" if ill and mood == "good" else mood
    published = report.run.card.get("published") or {}
    if published.get("weights") == "last":
        sentences = [*sentences, f"The last weights are published, not their average: {published.get('why')}."]
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


def _uniform_entropy(report: Report) -> float | None:
    """ln K of the teacher's K answers: as logged, or by the field of the methods that did not log it yet."""
    width = report.run.composite.get("out_dim")
    return report.last("uniform_entropy") or (math.log(width) if is_number(width) and width > 1 else None)


def _health(report: Report) -> tuple[bool, str]:
    """(is there a sign of collapse, a sentence)."""
    try:
        album = report.album
        after = health_report(album.after)
        before = health_report(album.before) if album.before is not None else None
    except (Missing, ValueError) as error:
        return False, f"Health could not be judged. {error}"
    logged = {name: report.last(name) for name in ("teacher_entropy", "prototype_entropy")}
    logged["uniform_entropy"] = _uniform_entropy(report)
    after |= entropy_shares({name: value for name, value in logged.items() if value is not None})
    loss = report.last("loss")
    words = diagnose(after | ({"loss": loss} if loss is not None else {}), before)
    figures = f"spread {after['std_ratio']:.2f} of 1/√d, effective rank {after['rankme']:.0f} of {after['dim']:.0f}"
    return bool(words), f"Health: {' '.join(words) or f'no sign of collapse ({figures}).'}"


# --- table and curves ---------------------------------------------------------------------------------------------


def _results(report: Report) -> str:
    rows = report.run.card.get("results")
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    if not rows:
        raise Missing("run.json has no results: the run was not evaluated. `hf-ssl evaluate` makes this table.")
    tables = [
        table(str(protocol or "results"), [row for row in rows if row.get("protocol") == protocol])
        for protocol in dict.fromkeys(row.get("protocol") for row in rows)
    ]
    return "".join(tables) + (
        '<p class="hint">Bold: the best of each column. Look for the trained row to beat both baselines; raw pixels '
        "are strong where pictures are aligned. Spread and rank describe the features and are no scores.</p>"
    )


def _curves(report: Report) -> str:
    if not report.run.log:
        raise Missing("There are no curves: the run left no trainer_state.json.")
    logged = list(dict.fromkeys(key for entry in report.run.log for key in entry))
    limit = _uniform_entropy(report)
    log_k = {"log K, all the same": limit} if limit else {}
    spread = {}
    if not isinstance(report._album, Exception):
        spread = {"1/√d, healthy": 1 / math.sqrt(report.album.after.shape[1])}
    drawn = charts.of_log(logged, report.series, {"feature_std": spread, "teacher_entropy": log_k})
    figures = "".join(charts.figure(chart) for chart in drawn)
    figures += "".join(_histogram(report, key) for key in logged)
    missing = ""
    if not any(key.startswith("eval_") for key in logged):
        missing = '<p class="hint">No evaluation curves: the run did not evaluate as it trained (--eval_strategy).</p>'
    return f'<div class="charts">{figures}</div>{missing}'


def _histogram(report: Report, key: str) -> str:
    """The last entry of a quantity that was logged as a list, as bars; "" for any other."""
    last = next((e for e in reversed(report.run.log) if isinstance(e.get(key), list)), None)
    if last is None or not last[key] or not all(is_number(value) for value in last[key]):
        return ""
    names = report.run.class_names()
    names = names if len(names) == len(last[key]) else [str(i) for i in range(len(last[key]))]
    title = key.replace("_", " ").capitalize()
    return charts.bars(title, names, last[key], f"As logged at step {last.get('step', '?')}, the last one.")


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
    if is_number(found):
        return int(found), []
    if isinstance(found, list):
        return len(found), [str(name) for name in found]
    if isinstance(found, dict):
        names = next((v for v in found.values() if isinstance(v, list)), [])
        counts = [found.get(key) for key in ("skipped", "distinct", "count", "total")]
        count = next((c for c in counts if is_number(c)), len(names))
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
    lines = [f'<tr><th scope="row">{escape(str(k))}</th><td>{escape(text(v))}</td></tr>' for k, v in values.items()]
    return f'<div class="wide"><table class="plain"><tbody>{"".join(lines)}</tbody></table></div>'


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
