"""The built-in emoji as any `datasets` script sees them: a parquet file of drawings with transparency and labels."""

from pathlib import Path

import datasets
import numpy as np
from PIL import Image

FILE = Path(__file__).parents[2] / "hf_ssl" / "data" / "assets" / "emoji.parquet"


def load(split: str) -> datasets.Dataset:
    """Rows of "train" or "test": image (RGBA), group and subgroup (labels), code_point, style, name."""
    rows = datasets.load_dataset("parquet", data_files=str(FILE), split="train")
    chosen = np.flatnonzero(np.array(rows["split"]) == split)
    rows = rows.select(chosen).cast_column("image", datasets.Image())
    return rows if isinstance(rows.features["group"], datasets.ClassLabel) else rows.class_encode_column("group")


def on_white(image: Image.Image) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")
