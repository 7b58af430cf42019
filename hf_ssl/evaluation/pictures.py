"""What a model learned, as pictures: neighbours before and after training, attention, reconstructions."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_ssl.evaluation.album import Album, Missing, NotApplicable, Run, load_album
from hf_ssl.evaluation.features import frozen
from hf_ssl.evaluation.knn import nearest
from hf_ssl.evaluation.thumbnails import thumbnail
from hf_ssl.files import whole_file
from hf_ssl.loading import load_pretrained

_GLOW = ((4, 2, 12), (81, 18, 124), (183, 55, 121), (252, 137, 97), (252, 253, 191))  # lightness rises evenly
RIGHT, WRONG, SAME = (0, 128, 92), (200, 60, 20), (0, 92, 175)  # apart for every kind of colour vision


# --- neighbours ---------------------------------------------------------------------------------------------------


def neighbours(features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(similarities, rows), each (N, k): the pictures most similar to each one, itself left out."""
    k = min(k, len(features) - 1)
    if k < 1:
        raise Missing("One picture alone has no neighbours.")
    similarity, rows = nearest(features, features, min(k + 1, len(features)))
    itself = rows == torch.arange(len(rows), device=rows.device)[:, None]
    itself[~itself.any(1), -1] = True  # pushed out by exact duplicates: drop the last one instead
    keep = ~itself
    return similarity[keep].reshape(len(rows), -1).cpu(), rows[keep].reshape(len(rows), -1).cpu()


def random_queries(values: list[str | None], count: int, seed: int = 0) -> list[int]:
    """Positions of `count` pictures drawn blindly, as many labels as possible among them."""
    order = np.random.default_rng(seed).permutation(len(values)).tolist()
    seen: Counter = Counter()
    rank = {}
    for i in order:
        rank[i] = seen[values[i]]
        seen[values[i]] += 1
    return sorted(order, key=lambda i: rank[i])[:count]  # stable: within a round the order stays random


def share_of_label(values: list[str | None], rows: Tensor) -> float | None:
    """Share of the (N, k) neighbours that carry their query's label, over labelled pictures; None without labels."""
    hits = [
        np.mean([values[j] == value for j in found])
        for value, found in zip(values, rows.tolist(), strict=True)
        if value is not None
    ]
    return float(np.mean(hits)) if hits else None


def verdict_of(album: Album, query: int, found: int) -> str:
    """ "same" (the same thing drawn in another style), "right", "wrong", or "" where labels are missing."""
    if album.items and album.items[query] == album.items[found]:
        return "same"
    mine, other = album.values()[query], album.values()[found]
    return "" if mine is None or other is None else "right" if mine == other else "wrong"


def gallery_png(run_dir: str | Path, path: str | Path, queries: int = 6, dataset: str | None = None) -> Path:
    """One PNG: `queries` pictures drawn blindly, each with its nearest neighbours before and after training."""
    album = load_album(Run.open(run_dir), dataset, progress=False)
    figure = before_after_figure(album, queries)
    with whole_file(path) as file:
        figure.save(file)
    return Path(path)


def before_after_figure(album: Album, queries: int = 6, k: int = 5, tile: int = 80):
    """A PIL picture: per row a query, its `k` neighbours before training, its `k` neighbours after it."""
    from PIL import Image, ImageDraw, ImageFont

    k, gap, head = min(k, len(album.names) - 1), 8, 40
    sides = [(album.before_name, album.before)] if album.before is not None else []
    sides = [(name, neighbours(features, k)[1]) for name, features in [*sides, ("trained", album.after)]]
    chosen = random_queries(album.values(), queries)
    block = k * (tile + gap)
    size = (3 * gap + tile + len(sides) * (block + 3 * gap), head + len(chosen) * (tile + gap) + gap)
    figure = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(figure), ImageFont.load_default(18)
    draw.text((gap, 10), "picture", "black", font)
    lefts = [3 * gap + tile + 2 * gap + i * (block + 3 * gap) for i in range(len(sides))]
    for left, (name, _) in zip(lefts, sides, strict=True):
        draw.text((left, 10), f"nearest, {name}", "black", font)
    for line, query in enumerate(chosen):
        top = head + line * (tile + gap)
        figure.paste(Image.fromarray(thumbnail(album.thumbnails[query], tile)), (gap, top))
        for left, (_, rows) in zip(lefts, sides, strict=True):
            for i, found in enumerate(rows[query].tolist()):
                x = left + i * (tile + gap)
                figure.paste(Image.fromarray(thumbnail(album.thumbnails[found], tile)), (x, top))
                _mark(draw, x, top, tile, verdict_of(album, query, found))
    return figure


def _mark(draw, x: int, y: int, tile: int, verdict: str) -> None:
    """A frame, and in the corner a tick, a cross or a twin's double ring: never colour alone."""
    if not verdict:
        return
    colour = {"right": RIGHT, "wrong": WRONG, "same": SAME}[verdict]
    draw.rectangle((x - 2, y - 2, x + tile + 1, y + tile + 1), outline=colour, width=3)
    size = tile // 4
    left, top = x + tile - size + 1, y + tile - size + 1
    draw.rectangle((left, top, left + size, top + size), fill=colour)
    at = [(left + size * u, top + size * v) for u, v in _STROKES[verdict]]
    for first, second in zip(at[::2], at[1::2], strict=True):
        draw.line((*first, *second), fill="white", width=max(2, tile // 32))


_STROKES = {
    "right": ((0.2, 0.5), (0.42, 0.75), (0.42, 0.75), (0.8, 0.25)),
    "wrong": ((0.25, 0.25), (0.75, 0.75), (0.75, 0.25), (0.25, 0.75)),
    "same": ((0.2, 0.35), (0.8, 0.35), (0.2, 0.65), (0.8, 0.65)),
}


# --- attention and reconstruction ---------------------------------------------------------------------------------


def attention_pictures(
    album: Album, chosen: list[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """(pictures (B, H, W, 3), heads (B, heads, H, W, 3), their mean (B, H, W, 3), that before training or None).

    All uint8. Raises NotApplicable where the model has no class token whose attention could be read.
    """
    from hf_ssl.backbones import last_attention

    pixels = album.pixels(chosen)
    pictures = album.shown(pixels)

    def maps(model) -> Tensor:
        parameter = next(model.parameters())
        with frozen(model):
            return last_attention(model, pixels.to(parameter.device, parameter.dtype)).float().cpu()

    try:
        after = maps(album.model)
    except ValueError as error:
        raise NotApplicable(f"No attention maps: {error}.") from error
    heads = np.stack([overlay(pictures, after[:, i]) for i in range(after.shape[1])], axis=1)
    before = None
    if album.before_model is not None:
        before = overlay(pictures, maps(album.before_model).mean(1))
    return pictures, heads, overlay(pictures, after.mean(1)), before


def overlay(pictures: np.ndarray, attention: Tensor) -> np.ndarray:
    """A map (B, N) over the patches of pictures (B, H, W, 3) as a glow, from dark violet to pale yellow = most."""
    batch, height, width, _ = pictures.shape
    patches = attention.shape[1]
    rows = max(1, round((patches * height / width) ** 0.5))
    if patches % rows:
        raise Missing(f"{patches} patches do not form a grid over a {height} x {width} picture.")
    grid = F.interpolate(attention.reshape(batch, 1, rows, -1), size=(height, width), mode="nearest")[:, 0].numpy()
    low, high = grid.min((1, 2), keepdims=True), grid.max((1, 2), keepdims=True)
    strength = ((grid - low) / np.maximum(high - low, 1e-12))[..., None]
    at = np.linspace(0, 1, len(_GLOW))
    heat = np.concatenate([np.interp(strength, at, channel) for channel in np.array(_GLOW).T], axis=-1)
    return (0.62 * heat + 0.38 * pictures.mean(-1, keepdims=True)).clip(0, 255).astype(np.uint8)


def reconstruction_pictures(run: Run, album: Album, chosen: list[int], seed: int = 0) -> tuple[np.ndarray, ...]:
    """(originals, what the encoder saw, predictions), each (B, H, W, 3) uint8, by the method's own `reconstruct`."""
    if not run.composite:
        raise Missing("No reconstructions: the run folder has no ssl/, where the whole method would be.")
    model_class = composite_class(run)
    if not hasattr(model_class, "reconstruct"):
        raise NotApplicable("No reconstructions: this method does not predict pixels.")
    model = load_pretrained(model_class, run.folder / "ssl", dtype=torch.float32)
    pixels = album.pixels(chosen)
    with frozen(model):
        torch.manual_seed(seed)
        seen, predicted = model.reconstruct(pixels)
    return album.shown(pixels), album.shown(seen), album.shown(predicted)


def composite_class(run: Run) -> type:
    """The class of the whole method in ssl/; ValueError or OSError where this installation does not know it."""
    import hf_ssl

    hf_ssl.SSLModel  # noqa: B018 -- the first use of a name registers the methods with the Auto classes
    from transformers import MODEL_FOR_PRETRAINING_MAPPING, AutoConfig

    found: Any = MODEL_FOR_PRETRAINING_MAPPING[type(load_pretrained(AutoConfig, run.folder / "ssl"))]
    return found
