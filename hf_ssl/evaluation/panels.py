"""The report's panels of pictures, as HTML: map, neighbours, attention, reconstructions."""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np

from hf_ssl.evaluation import layout, pictures
from hf_ssl.evaluation.album import Album, Missing, Run
from hf_ssl.evaluation.thumbnails import data_uri, sprite, thumbnail

# Okabe and Ito's colours for every kind of vision first; the label is also told in words
PALETTE = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9",
    "#b8a500", "#7f3c8d", "#8c6d4f", "#e15f74",
)  # fmt: skip
OTHERS = "#8a8d94"
_MAP_HEIGHT = 0.8  # of its width, as in report.html
MAP_POINTS, MAP_PICTURES = 800, 420  # exact t-SNE costs N²; more pictures than that would hide one another
_SYMBOL = {
    "right": ("✓", "same label"),
    "wrong": ("✗", "another label"),
    "same": ("=", "the same thing, drawn differently"),
}


def map_panel(album: Album) -> str:
    """The 2-D map: every picture where its features put it, before and after training at the turn of a switch."""
    if len(album.names) < 5:
        raise Missing(f"A map needs at least 5 pictures; there are {len(album.names)}.")
    chosen = np.sort(np.random.default_rng(0).permutation(len(album.names))[:MAP_POINTS])
    after = layout.tsne(album.after[chosen])
    before = None if album.before is None else layout.turn_to(layout.tsne(album.before[chosen]), after)
    side = 0.026 if len(chosen) > 150 else 0.045  # of the map's width
    after = layout.fit_box(after, _MAP_HEIGHT)
    shown = layout.thin(after, side * 0.62)[:MAP_PICTURES]
    places = [after] if before is None else [after, layout.fit_box(before, _MAP_HEIGHT)]
    for place in places:
        place[shown] = layout.push_apart(place[shown], side * 1.18, _MAP_HEIGHT)
    return _map_html(album, chosen, places, shown, side)


def _map_html(album: Album, chosen: np.ndarray, places: list[np.ndarray], shown: np.ndarray, side: float) -> str:
    values = [album.values()[i] for i in chosen]
    kinds = sorted({v for v in values if v is not None}, key=lambda v: (-values.count(v), v))
    kinds, more = kinds[: len(PALETTE)], len(kinds) > len(PALETTE)
    colour = dict(zip(kinds, PALETTE, strict=False))
    sheet, columns = sprite([album.thumbnails[chosen[i]] for i in shown])
    rows = max(1, -(-len(shown) // columns))
    number_of, points = {int(i): n for n, i in enumerate(shown)}, []
    for i in np.argsort(np.isin(np.arange(len(chosen)), shown), kind="stable"):  # dots below, pictures above
        style = f"--a:{places[0][i][0]:.2%};--b:{places[0][i][1] / _MAP_HEIGHT:.2%}"
        if len(places) > 1:
            style += f";--p:{places[1][i][0]:.2%};--q:{places[1][i][1] / _MAP_HEIGHT:.2%}"
        if values[i] is not None:
            style += f";--c:{colour.get(values[i], OTHERS)}"
        n = number_of.get(int(i))
        if n is not None:
            u, v = (100 * at / max(1, of - 1) for at, of in ((n % columns, columns), (n // columns, rows)))
            style += f";background-position:{u:.2f}% {v:.2f}%"
        told = " · ".join(str(x) for x in (album.names[chosen[i]], values[i]) if x is not None)
        kind = kinds.index(values[i]) if values[i] in colour else -1
        mark = "" if n is not None else ' class="d"'
        points.append(f'<i{mark} data-l="{kind}" title="{escape(told)}" style="{style}"></i>')
    legend = [(str(n), name, colour[name]) for n, name in enumerate(kinds)] + (
        [("-1", "others", OTHERS)] if more else []
    )
    button = '<button type="button" aria-pressed="false" data-l="{}"><i style="--c:{}"></i>{}</button>'
    buttons = "".join(button.format(n, c, escape(name)) for n, name, c in legend)
    switch = ""
    if len(places) > 1:
        switch = (
            '<input class="switch" type="radio" name="when" id="when-after" checked>'
            '<label for="when-after">trained</label>'
            '<input class="switch before" type="radio" name="when" id="when-before">'
            f'<label for="when-before">{escape(album.before_name)}</label>'
        )
    size = f"background-size:{columns * 100}% {rows * 100}%"
    alt = f"Map of {len(chosen)} pictures: similar features lie near each other"
    look = f"--sheet:url({data_uri(sheet)});--w:{side * 100:.1f}cqw"
    what = f"; the ring's colour is the {album.label}, {album.seen}" if album.label else ""
    return (
        f'<figure class="panel">{switch}<style>.map i:not(.d){{{size}}}</style><div class="wide">'
        f'<div class="map" role="img" aria-label="{escape(alt)}" style="{look}">{"".join(points)}</div></div>'
        f'<div class="labels">{buttons}</div><figcaption>t-SNE of {len(chosen)} pictures: near means similar to the '
        f"model{escape(what)}. Look for islands of one kind; distances between islands mean little. "
        "Pictures are nudged apart, and in crowded places some are dots.</figcaption></figure>"
    )


def gallery_panel(album: Album, k: int = 8) -> str:
    """Ten pictures with their `k` nearest neighbours by the features before and after training."""
    sides = [(album.before_name, album.before)] if album.before is not None else []
    found = [(name, *pictures.neighbours(features, k)) for name, features in [*sides, ("trained", album.after)]]
    shares = [(name, pictures.share_of_label(album.values(), rows)) for name, _, rows in found]
    told = ", ".join(f"{share:.0%} {name}" for name, share in shares if share is not None)
    count = found[0][2].shape[1]
    summary = "There are no labels, so judge by eye."
    if told:
        summary = (
            f"Of the {count} nearest to each of {len(album.names)} pictures, these have its {album.label}: {told}."
        )
    blocks = []
    for query in pictures.random_queries(album.values(), 10):
        label = album.values()[query]
        head = f"{album.names[query]}{f' ({label})' if label else ''}"
        lines = "".join(_neighbour_row(album, query, *side) for side in found)
        picture = f'<img src="{data_uri(album.thumbnails[query])}" alt="{escape(head)}">'
        blocks.append(f'<div class="query"><div>{picture}<span>{escape(head)}</span></div>{lines}</div>')
    used = ["right", "wrong", "same"] if album.items else ["right", "wrong"] if album.label else []
    keys = " ".join(f'<b class="badge {kind}">{_SYMBOL[kind][0]}</b>{_SYMBOL[kind][1]}' for kind in used)
    return (
        f'<p>{escape(summary)}</p><p class="hint">{keys}</p><figure class="gallery">{"".join(blocks)}'
        "<figcaption>The queries are drawn by a fixed random number, not picked. The figure under a neighbour is its "
        "cosine similarity; a network "
        "whose figures are all near 1 sees little difference between pictures. Look for more ✓ in the trained row."
        "</figcaption></figure>"
    )


def _neighbour_row(album: Album, query: int, name: str, similarity: Any, rows: Any) -> str:
    tiles = []
    for value, other in zip(similarity[query].tolist(), rows[query].tolist(), strict=True):
        kind = pictures.verdict_of(album, query, other)
        label = album.values()[other]
        alt = " · ".join(x for x in (album.names[other], label, _SYMBOL[kind][1] if kind else None) if x)
        badge = f'<b aria-hidden="true">{_SYMBOL[kind][0]}</b>' if kind else ""
        words = f'alt="{escape(alt)}" title="{escape(alt)}"'
        picture = f'<img loading="lazy" src="{data_uri(album.thumbnails[other])}" {words}>'
        tiles.append(f'<div class="tile {kind}">{picture}{badge}{value:.3f}</div>')
    return f'<div class="row"><span>{escape(name)}</span>{"".join(tiles)}</div>'


def attention_panel(album: Album, count: int = 6, most_heads: int = 6) -> str:
    """The last block's class-token attention: picture, mean before training, mean after, single heads."""
    chosen = pictures.random_queries(album.values(), count, seed=1)
    shown, heads, mean, before = pictures.attention_pictures(album, chosen)
    columns = ["picture", *([f"mean, {album.before_name}"] if before is not None else []), "mean, trained"]
    columns += [f"head {i + 1}" for i in range(min(heads.shape[1], most_heads))]
    rows = []
    for i, at in enumerate(chosen):
        row = [shown[i], *([before[i]] if before is not None else []), mean[i], *heads[i, :most_heads]]
        rows.append((album.names[at], row))
    left = heads.shape[1] - most_heads
    return _strip(
        columns,
        rows,
        "Pale yellow patches are where the class token of the last block looks; each map has its own scale. Look for "
        "a trained map that follows the object rather than the frame or single stray patches."
        + (f" {left} further heads are not shown." if left > 0 else ""),
    )


def reconstruction_panel(run: Run, album: Album, count: int = 8) -> str:
    """Original, what the encoder saw, and the prediction, for methods with `reconstruct`."""
    chosen = pictures.random_queries(album.values(), count, seed=2)
    original, seen, predicted = pictures.reconstruction_pictures(run, album, chosen)
    rows = [(album.names[at], [original[i], seen[i], predicted[i]]) for i, at in enumerate(chosen)]
    names = [name for name, _ in rows]
    lines = [(title, [row[i] for _, row in rows]) for i, title in enumerate(("original", "seen", "predicted"))]
    borrowed = (
        " Each predicted patch borrows its brightness and contrast from the original, because this model was trained "
        "on patches without them."
        if run.composite.get("norm_pix_loss")
        else ""
    )
    return _strip(
        None,
        [(f"{title}: ", pictures_) for title, pictures_ in lines],
        "Top: the picture; middle: the patches the encoder saw; bottom: the same with the missing patches predicted. "
        "Look for shapes that go on across the gaps; fine detail cannot be known." + borrowed,
        names,
    )


def _strip(
    columns: list[str] | None, rows: list[tuple[str, list[np.ndarray]]], caption: str, names: list[str] | None = None
) -> str:
    """A grid of pictures that scrolls sideways where it does not fit."""
    width = len(rows[0][1])
    small = max(rows[0][1][0].shape[:2]) < 128
    cells = [f"<span>{escape(column)}</span>" for column in columns or ()]
    for title, row in rows:
        for i, picture in enumerate(row):
            alt = f"{title}{names[i]}" if names else f"{title}: {(columns or [])[i]}"
            words = f'alt="{escape(alt)}" title="{escape(alt)}"'
            cells.append(f'<img loading="lazy" src="{data_uri(_enlarged(picture), 88)}" {words}>')
    grid = f'<div class="strip" style="--n:{width}">{"".join(cells)}</div>'
    kind = "panel pixel" if small else "panel"
    return f'<figure class="{kind}"><div class="wide">{grid}</div><figcaption>{escape(caption)}</figcaption></figure>'


def _enlarged(picture: np.ndarray, most: int = 224) -> np.ndarray:
    """Tiny pictures in whole-pixel enlargement (WebP would smear them), large ones reduced."""
    side = max(picture.shape[:2])
    if side > most:
        return thumbnail(picture, most)
    factor = max(1, 128 // side)
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)
