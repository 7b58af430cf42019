"""Small pictures for a page: squares, sheets of many, data: URIs."""

from __future__ import annotations

import base64
import io

import numpy as np

THUMBNAIL = 96  # pixels: sharp at the 64 CSS pixels of a gallery tile on dense screens


def rgb(picture: np.ndarray) -> np.ndarray:
    """(H, W, C) uint8 -> (H, W, 3): one channel repeated, the first three of more."""
    channels = picture.shape[-1]
    if channels < 3:
        return np.repeat(picture[..., :1], 3, axis=-1)
    return np.ascontiguousarray(picture[..., :3])


def thumbnail(picture: np.ndarray, size: int = THUMBNAIL) -> np.ndarray:
    """The centre square as (size, size, 3) uint8; a small picture is enlarged in whole pixels as far as that goes."""
    import cv2

    picture = rgb(picture)
    side = min(picture.shape[:2])
    top, left = ((length - side) // 2 for length in picture.shape[:2])
    square = picture[top : top + side, left : left + side]
    if side * 2 <= size:
        square = square.repeat(size // side, axis=0).repeat(size // side, axis=1)
    return cv2.resize(square, (size, size), interpolation=cv2.INTER_AREA if side >= size else cv2.INTER_LINEAR)


def data_uri(picture: np.ndarray, quality: int = 82) -> str:
    """(H, W, 3) uint8 as a WebP data: URI."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "WEBP", quality=quality)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def sprite(pictures: list[np.ndarray], size: int = 48) -> tuple[np.ndarray, int]:
    """All pictures on one sheet, row by row: (sheet, columns)."""
    columns = max(1, int(np.ceil(len(pictures) ** 0.5)))
    rows = max(1, -(-len(pictures) // columns))
    sheet = np.full((rows * size, columns * size, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = i // columns * size, i % columns * size
        sheet[y : y + size, x : x + size] = thumbnail(picture, size)
    return sheet, columns
