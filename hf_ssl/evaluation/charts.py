"""Line charts as inline SVG, readable without a script; report.html's script adds a read-out under the pointer."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np

_MAX_POINTS = 600  # per line: more cannot be told apart on the page
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 10, 38


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
    middle = (height - _BOTTOM + _TOP) / 2
    parts.append(
        f'<text class="tx label" transform="translate(11 {middle:.0f}) rotate(-90)">{escape(chart.y_label)}</text>'
    )
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
