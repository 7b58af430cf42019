"""The built-in emoji: 1,892 code points in two drawing styles, 64 px RGBA, and their placement on a background."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hf_ssl.data.captions import Captions

if TYPE_CHECKING:
    from datasets import Dataset

ASSET = Path(__file__).parent / "assets" / "emoji.parquet"
SIZE = 64  # of the drawings, pixels
SCALE = (0.5, 1.0)  # of the drawing's side, as a fraction of the canvas
FOREGROUND_ALPHA = 128
SPLITS = ("train", "test", "all")


def load_emoji(split: str = "train") -> Dataset:
    """Rows of the built-in set, two (styles "google", "twitter") per code point, in Unicode order.

    Columns: image (undecoded {"bytes", "path"}, lossless WebP), code_point, style, name, keywords, group, subgroup,
    split.
    Splits are by code point, with gender variants and identical drawings on one side. Reads one file, writes nothing.

    Raises:
        ValueError: `split` is not "train", "test" or "all".
        FileNotFoundError: the package was installed without its data file.
    """
    if split not in SPLITS:
        raise ValueError(f"emoji has no split {split!r}: use one of {', '.join(SPLITS)}.")
    if not ASSET.is_file():
        raise FileNotFoundError(
            f"{ASSET} is missing: reinstall hf_ssl, or run recipes/data/build_emoji.py in the repository."
        )
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
    from datasets import Dataset, Features, Image

    table = pq.read_table(ASSET)
    features = Features.from_arrow_schema(table.schema)
    if split != "all":
        table = table.filter(pc.equal(table["split"], split))
    features["image"] = Image(decode=False)
    # The licence texts stay in the file: in memory the schema says only what `datasets` needs.
    return Dataset(table.cast(features.arrow_schema))


class KeywordCaptions(Captions):
    """The name is the caption. For training the text is, with equal odds, the name before some keywords, or keywords.

    Joined by ", "; k of the n keywords (0 to n after the name, else 1 to n), each number, choice and order equally
    likely. Keywords alone are what a prompt for a class looks like: "animal" must mean something by itself.
    """

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column, "keywords")

    def draw(self, row: dict, rng: np.random.Generator) -> str:
        keywords = row["keywords"]
        named = not keywords or rng.random() < 0.5
        count = rng.integers(0 if named else 1, len(keywords) + 1)
        some = [keywords[i] for i in rng.permutation(len(keywords))[:count]]
        return ", ".join([*self.texts(row), *some] if named else some)


def centre(rgba: np.ndarray) -> np.ndarray:
    """(H, W, 4) uint8 -> (H, W, 3) uint8: the drawing where it is, on white (rounded to nearest)."""
    alpha = rgba[..., 3:].astype(np.uint16)
    return ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def place(
    rgba: np.ndarray,
    rng: np.random.Generator,
    size: int = SIZE,
    return_mask: bool = False,
    scale: tuple[float, float] = SCALE,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """The drawing at a random position and scale on a plain background of random colour.

    Args:
        rgba: (H, W, 4) uint8, straight alpha.
        rng: draws, in this order: scale, left, top, red, green, blue. The same state gives the same picture.
        size: side of the canvas in pixels.
        return_mask: also return the (size, size) bool mask of pixels the placed drawing covers at least half.
        scale: range of the drawing's side, as a fraction of the canvas; within (0, 1] it never leaves the canvas.

    Returns:
        (size, size, 3) uint8, or the pair (picture, mask).
    """
    import cv2

    draws = rng.random(6)
    side = max(1, round((scale[0] + (scale[1] - scale[0]) * draws[0]) * size))
    left, top = (draws[1:3] * (size - side + 1)).astype(int).tolist()
    colour = (draws[3:] * 256).astype(np.uint8)
    # Premultiplied, so that the invisible colour next to an edge cannot bleed into it.
    drawing = cv2.cvtColor(rgba, cv2.COLOR_RGBA2mRGBA)
    method = cv2.INTER_AREA if side < max(rgba.shape[:2]) else cv2.INTER_LINEAR
    drawing = cv2.resize(drawing, (side, side), interpolation=method)
    opaque = cv2.extractChannel(drawing, 3)
    behind = cv2.merge([cv2.bitwise_not(opaque)] * 3)
    picture = np.empty((size, size, 3), np.uint8)
    picture.reshape(size, -1)[:] = np.tile(colour, size)  # whole rows: four times faster than pixel by pixel
    window = slice(top, top + side), slice(left, left + side)
    background = cv2.multiply(behind, picture[window], scale=1 / 255)
    picture[window] = cv2.add(cv2.cvtColor(drawing, cv2.COLOR_RGBA2RGB), background)
    if not return_mask:
        return picture
    mask = np.zeros((size, size), bool)
    mask[window] = opaque >= FOREGROUND_ALPHA
    return picture, mask
