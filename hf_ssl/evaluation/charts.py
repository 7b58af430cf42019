"""A run's log as line charts in inline SVG: readable without a script, report.html's adds a read-out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np

_MAX_POINTS = 600  # per line: more cannot be told apart on the page
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 26, 38


@dataclass
class Chart:
    """`lines`: name -> (steps, values). `references`: name -> a constant drawn as a dashed line."""

    title: str
    y_label: str
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    caption: str = ""
    references: Mapping[str, float] = field(default_factory=dict)
    small: bool = False
    x_label: str = "step"


# logged quantities drawn together -> title, y label, what to look for, small?
_KNOWN: tuple[tuple[tuple[str, ...], str, str, str, bool], ...] = (
    (("loss",), "Loss", "loss", "It should fall and flatten; a jump or NaN is a rate too high.", False),
    (
        ("eval_knn",),
        "Online kNN",
        "accuracy (share)",
        "It should rise: neighbours share labels that training never saw.",
        False,
    ),
    (
        ("eval_accuracy", "eval_student_accuracy", "eval_macro_f1"),
        "Accuracy on the way",
        "share",
        "Of the averaged weights and, as student, of the last ones. It should rise; the average usually leads.",
        False,
    ),
    (
        ("eval_i2t", "eval_t2i"),
        "Pictures and texts that find each other",
        "recall (share)",
        "i2t: a picture's text is among the k most similar; t2i: a text's picture is. Both should rise.",
        False,
    ),
    (
        ("utilisation", "pseudo_label_accuracy"),
        "Pseudo-labels",
        "share",
        "Utilisation: unlabelled pictures whose label is sure enough to train on. Accuracy: how many of those are "
        "right, where the truth is known. Rising use with falling accuracy means learning from mistakes.",
        False,
    ),
    (
        ("feature_std",),
        "Spread of the features",
        "std over images",
        "Near the dashed line all directions are used; near zero every picture gets one vector: collapse.",
        False,
    ),
    (
        ("rankme",),
        "Effective rank (RankMe)",
        "dimensions",
        "How many directions one batch's features fill, at most the batch or the width; 1 is collapse.",
        False,
    ),
    (
        ("teacher_entropy", "prototype_entropy"),
        "Entropy of the teacher",
        "nats",
        "Single answers should sharpen (fall below the dashed line) while their mean (prototype entropy) stays high.",
        False,
    ),
    (("learning_rate",), "Learning rate", "rate", "The schedule: warm-up, then decay.", True),
    (("grad_norm",), "Gradient norm", "norm before clipping", "Spikes here come before trouble in the loss.", True),
)
_NOT_DRAWN = {"step", "epoch", "total_flos", "skipped_images", "uniform_entropy"}


def of_log(
    keys: Sequence[str], series: Callable[[str], tuple[list, list]], references: Mapping[str, Mapping[str, float]]
) -> list[Chart]:
    """The charts of a run that logged `keys`: `series(key)` -> (steps, values); `references`: a key's dashed lines."""
    drawn, told = [], set(_NOT_DRAWN)
    for group, title, label, caption, small in _KNOWN:
        wanted = [key for key in keys if any(key == name or key.startswith(name + "_") for name in group)]
        told |= set(wanted)
        lines: dict[str, tuple[list, list]] = {}
        for key in sorted(wanted, key=lambda key: key.endswith("_top1")):  # top1 repeats the first label's accuracy
            found = ([], []) if key.endswith("_chance") else series(key)
            if found[1] and found not in lines.values():
                lines[key.removeprefix("eval_").replace("_", " ")] = found
        if lines:
            drawn.append(Chart(title, label, lines, caption, references.get(group[0], {}), small))
    for key in keys:
        if key not in told and not key.startswith(("train_", "eval_")) and series(key)[1]:
            name = key.replace("_", " ")
            drawn.append(Chart(name.capitalize(), name, {name: series(key)}, "Logged by the run.", small=True))
    return drawn


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover [low, high]: 1, 2 or 5 times a power of ten apart."""
    raw = max(high - low, 1e-12) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def number(value: float) -> str:
    """Short: 0.0031, 0.512, 12.4, 1,200."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e6):
        return f"{value:.3g}"
    if size >= 100:
        return f"{value:,.0f}"
    return f"{value:.4f}".rstrip("0").rstrip(".") if size < 1 else f"{value:.4g}"


def figure(chart: Chart) -> str:
    """The chart as a <figure>; lines without a finite value are left out and named."""
    lines = {}
    for name, (x, y) in chart.lines.items():
        points = np.array([x, y], dtype=float)
        points = points[:, np.isfinite(points).all(0)]
        if points.shape[1]:
            lines[name] = points[:, np.unique(np.linspace(0, points.shape[1] - 1, _MAX_POINTS).round().astype(int))]
    lost = [name for name in chart.lines if name not in lines]
    note = f"Not drawn, no finite value: {', '.join(lost)}. " if lost else ""
    caption = f"<figcaption>{escape(note + chart.caption)}</figcaption>"
    body = _svg(chart, lines) if lines else ""
    kind = "chart small" if chart.small else "chart"
    return f'<figure class="{kind}"><h3>{escape(chart.title)}</h3>{_legend(chart, lines)}{body}{caption}</figure>'


def _legend(chart: Chart, lines: Mapping) -> str:
    keys = [f'<span><i class="key s{i % 6}"></i>{escape(name)}</span>' for i, name in enumerate(lines)]
    keys += [f'<span><i class="key ref"></i>{escape(name)} {number(v)}</span>' for name, v in chart.references.items()]
    return f'<p class="legend">{"".join(keys)}</p>' if len(keys) > 1 else ""


def _svg(chart: Chart, lines: Mapping[str, np.ndarray]) -> str:
    width, height = 520, 190 if chart.small else 270
    xs, ys = (np.concatenate([points[i] for points in lines.values()]) for i in (0, 1))
    ys = np.concatenate([ys, list(chart.references.values())])
    x_ticks = [t for t in ticks(float(xs.min()), float(xs.max())) if xs.min() <= t <= xs.max()]
    low, high = float(ys.min()), float(ys.max())
    if low > 0 and low < 0.5 * high:
        low = 0.0  # a curve that falls by half deserves its zero
    if high - low < 1e-9 * max(abs(high), 1.0):
        low, high = low - 0.5 * max(abs(low), 1e-3), high + 0.5 * max(abs(high), 1e-3)
    y_ticks = ticks(low, high, 4)
    low, high = y_ticks[0], y_ticks[-1]
    span = max(float(xs.max() - xs.min()), 1e-12)

    def x(value):
        return _LEFT + (value - xs.min()) / span * (width - _LEFT - _RIGHT)

    def y(value):
        return height - _BOTTOM - (value - low) / (high - low) * (height - _TOP - _BOTTOM)

    parts = [f'<path class="grid" d="M{_LEFT} {y(t):.1f}H{width - _RIGHT}"/>' for t in y_ticks]
    parts += [f'<text class="ty" x="{_LEFT - 6}" y="{y(t) + 4:.1f}">{number(t)}</text>' for t in y_ticks]
    parts += [f'<text class="tx" x="{x(t):.1f}" y="{height - _BOTTOM + 16}">{number(t)}</text>' for t in x_ticks]
    parts.append(
        f'<text class="tx label" x="{(_LEFT + width) / 2:.0f}" y="{height - 4}">{escape(chart.x_label)}</text>'
    )
    parts.append(f'<text class="label" x="4" y="12">{escape(chart.y_label)}</text>')
    parts += [f'<path class="ref" d="M{_LEFT} {y(v):.1f}H{width - _RIGHT}"/>' for v in chart.references.values()]
    for i, points in enumerate(lines.values()):
        parts += _line(x(points[0]), y(points[1]), i % 6)
    data = {
        name: [[round(x(a), 1), round(float(y(b)), 1), number(a), number(b)] for a, b in points.T]
        for name, points in lines.items()
    }
    said = "; ".join(f"{name} from {number(p[1][0])} to {number(p[1][-1])}" for name, p in lines.items())
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(f"{chart.title}: {said}")}" '
        f'data-lines="{escape(json.dumps(data))}">{"".join(parts)}</svg>'
    )


def bars(title: str, names: Sequence[str], values: Sequence[float], caption: str) -> str:
    """One horizontal bar a name, as a <figure>; values are not negative (others are drawn as zero)."""
    shown = [value if math.isfinite(value) and value > 0 else 0.0 for value in values]
    top, step, width = max([*shown, 1e-12]), 20, 520
    label = min(180, 12 + 7 * max(len(name) for name in names))
    parts = []
    for i, (name, value, own) in enumerate(zip(names, shown, values, strict=True)):
        y, length = 4 + i * step, value / top * (width - label - 60)
        cut = name if len(name) <= 24 else f"{name[:23]}…"
        parts.append(f'<text class="ty" x="{label - 6}" y="{y + 12}">{escape(cut)}</text>')
        parts.append(
            f'<rect x="{label}" y="{y}" width="{length:.1f}" height="{step - 5}" style="fill:var(--s0)">'
            f"<title>{escape(name)}: {number(own)}</title></rect>"
        )
        parts.append(f'<text x="{label + length + 5:.1f}" y="{y + 12}">{number(own)}</text>')
    said = "; ".join(f"{name} {number(value)}" for name, value in list(zip(names, values, strict=True))[:40])
    return (
        f'<figure class="chart small"><h3>{escape(title)}</h3><svg viewBox="0 0 {width} {8 + step * len(shown)}" '
        f'role="img" aria-label="{escape(f"{title}: {said}")}">{"".join(parts)}</svg>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _line(x: np.ndarray, y: np.ndarray, colour: int) -> list[str]:
    """The values; where they are many and jump, faint under their running mean."""
    if len(x) == 1:
        return [f'<circle class="s{colour} dot" cx="{x[0]:.1f}" cy="{y[0]:.1f}" r="4"/>']
    jumps, rise = np.abs(np.diff(y)).sum(), y.max() - y.min()
    if len(x) < 40 or jumps < 4 * rise:
        return [f'<path class="s{colour} line" d="{_path(x, y)}"/>']
    window = max(5, len(y) // 20) | 1
    padded = np.pad(y, window // 2, mode="reflect", reflect_type="odd")
    smooth = np.convolve(padded, np.ones(window) / window, mode="valid")
    return [
        f'<path class="s{colour} faint" d="{_path(x, y)}"/>',
        f'<path class="s{colour} line" d="{_path(x, smooth)}"/>',
    ]


def _path(x: np.ndarray, y: np.ndarray) -> str:
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y, strict=True))
