"""One picture for the benchmarks that compare paths: a bar each, ours in orange, the range as a line."""

from pathlib import Path


def draw(rows: list[dict], value: str, labels: list[str], axis: str, file: Path) -> None:
    """rows: {"path", value, "low", "high"}, best shown on top; labels: what stands behind each bar."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, labels = rows[::-1], labels[::-1]
    values = [row[value] for row in rows]
    figure, axes = plt.subplots(figsize=(7, 0.45 * len(rows) + 1), layout="constrained")
    ends = [[row[value] - row["low"] for row in rows], [row["high"] - row[value] for row in rows]]
    colours = ["#c2410c" if row["path"].startswith("hf_ssl") else "#94a3b8" for row in rows]
    bars = axes.barh([row["path"] for row in rows], values, xerr=ends, color=colours, ecolor="#475569")
    axes.bar_label(bars, labels, padding=6)
    axes.set_xlabel(axis)
    axes.margins(x=0.15)
    figure.savefig(file, dpi=130)
