"""From a decoded Pillow image to the pixels that a model sees, the same for training, evaluation and a pipeline.

A pipeline of transformers opens a file with ``transformers.image_utils.load_image``: upright, ``convert("RGB")``. Its
image processor sees only that. So an alpha channel is dropped here as Pillow drops it, and the stored colours stay,
whatever they are. One colour that stands for transparent (GIF, tRNS of a PNG) outlives that step; native processors
make it white, and so does this module. A processor that is handed a Pillow image with alpha lays that on white as
well, but no pipeline ever hands it one. 16 bits are the one exception: Pillow cuts them off at 255, here they are
scaled.
"""

from __future__ import annotations

import warnings

import numpy as np
from PIL import Image

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's name of 1, 3 and 4 channels of 8 bits
_DIRECTLY = ("1", "L", "LA", "RGB", "RGBA")  # their grey is the grey of their RGB

# Pillow advises RGBA for every palette with transparency; here it is dropped on purpose.
warnings.filterwarnings("ignore", message="Palette images with Transparency", category=UserWarning)


def pil_pixels(image: Image.Image, channels: int) -> np.ndarray:
    """(H, W, `channels`) uint8 of an upright image of any mode with 8 bits: RGB, its grey (1), or RGBA (4)."""
    mode = MODES[channels]
    if mode == "L" and image.mode not in _DIRECTLY:
        image = image.convert("RGB")
    image = image if image.mode == mode else image.convert(mode)
    if mode == "RGB" and image.info.get("transparency") is not None:
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.convert("RGBA"))
        image = white
    pixels = np.asarray(image)
    return pixels[:, :, None] if channels == 1 else pixels


def eight_bits(values: np.ndarray) -> np.ndarray:
    """uint16 to uint8 of the same shape, 65535 to 255, rounded."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
