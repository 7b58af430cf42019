"""From the bytes of one image file (or an array) to a (H, W, C) uint8 picture, or one clear error.

Every source goes through `decode_image`, so every kind of file comes out the same way: upright (EXIF), 16 bits scaled
and not clipped, transparency dropped as transformers' pipelines drop it (`hf_ssl.pixels`), and a broken file is an
error that names it, never a grey picture.

Plain 8-bit JPEG goes through simplejpeg (libjpeg-turbo, as in Pillow, so the same pixels, without Pillow's copies) and
may wait for the views to say how small it is wanted. No maintained wheel decodes a part of a JPEG file; all else, and
whatever simplejpeg complains about, is Pillow's.
"""

from __future__ import annotations

import io
import os
import re
import warnings
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
from PIL import Image, ImageFile, ImageOps

from hf_ssl.data import remote
from hf_ssl.data.files import NotRegularError, open_regular, read_starting
from hf_ssl.pixels import eight_bits, pil_pixels

MAX_PIXELS = 178_956_970  # Pillow's own error limit; checked from the header, before anything is decoded
_ORIENTATION = 0x0112  # EXIF tag
_BYTES = (bytes, bytearray, memoryview)
_JPEG = b"\xff\xd8\xff"
_JPEG_FRAMES = frozenset((0xC0, 0xC1, 0xC2))
_JPEG_SEGMENTS = frozenset((*range(0xE0, 0xF0), 0xC4, 0xDB, 0xDD, 0xFE))
_PNG = b"\x89PNG\r\n\x1a\n"
# Chunks that leave the picture as it is, with the lengths they may have; all others are Pillow's to judge.
_PNG_LENGTHS = {
    b"gAMA": (4,), b"cHRM": (32,), b"sRGB": (1,), b"pHYs": (9,), b"tIME": (7,), b"sBIT": (1, 3), b"bKGD": (2, 6),
}  # fmt: skip
# Keywords of texts; some others (exif, "Raw profile type ...", XML:com.adobe.xmp, transparency) turn a picture.
_PNG_WORDS = {
    b"title", b"author", b"description", b"copyright", b"creation time", b"software", b"disclaimer", b"warning",
    b"source", b"comment", b"date:create", b"date:modify", b"date:timestamp",
}  # fmt: skip
_PNG_TEXTS = 1 << 20  # bytes of all of them
_PGM = re.compile(rb"P5\s+([0-9]{1,9})\s+([0-9]{1,9})\s+255\s")  # no comments

# Pillow warns from half that limit on; here the limit is enforced, so in a training log the warning is only noise.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class BadImageError(ValueError):
    """One image cannot be used. `where` is the file or row, `reason` says why; both are in the message."""

    def __init__(self, where: str, reason: str = ""):
        super().__init__(f"{where}: {reason}" if reason else where)
        self.where, self.reason = where, reason


def decode_image(
    value: Any, channels: int = 3, where: str = "", keep_alpha: bool = False, plain: bool = True
) -> np.ndarray:
    """Decode one image to a C-contiguous uint8 array (H, W, `channels`); it may be read-only.

    Args:
        value: `{"bytes": ..., "path": ...}` as `datasets` stores it, bytes, a path, a PIL image, or an array or nested
            list (H, W) or (H, W, C); (C, H, W) is understood when C is `channels` and the last axis is not.
        channels: 1 (grey), 3 (RGB), 4 (RGBA for files, any four bands for arrays) or any other number (arrays only).
        where: how errors name the image; the path by default.
        keep_alpha: return RGBA (H, W, 4); otherwise transparency is dropped and the stored colours stay.
        plain: take the short way of plain JPEG.

    Raises:
        BadImageError: empty, truncated, corrupt or oversized file, or an array that is no picture of `channels` bands.
    """
    if isinstance(value, dict):
        path = value.get("path")
        where = where or path or "image"
        value = value.get("bytes") if value.get("bytes") is not None else path
    elif isinstance(value, (str, Path)):
        where = where or str(value)
    where = where or "image"
    try:
        if isinstance(value, (np.ndarray, list, tuple)):
            return _from_array(np.asarray(value), 4 if keep_alpha else channels, where)
        if isinstance(value, Image.Image):
            return _from_pil(value, channels, keep_alpha, where)
        if plain and not keep_alpha and (jpeg := open_jpeg(value, channels, where)) is not None:
            return jpeg.decode()[0]
        if not keep_alpha and isinstance(value, bytes):
            pixels = _decode_pgm(value) if channels == 1 else None
            if pixels is not None or (pixels := _decode_png(value, channels)) is not None:
                return pixels
        return _from_file(value, channels, keep_alpha, where)
    except (BadImageError, remote.RemoteError):
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error, IndexError, ...
        raise BadImageError(where, _reason(value, error)) from error


class Jpeg:
    """A plain JPEG file that is not decoded yet; `SSLImageProcessor.draw` takes it in place of a picture."""

    dtype = np.dtype(np.uint8)

    def __init__(self, data: bytes, shape: tuple[int, int, int], where: str):
        self.data, self.shape, self.where = data, shape, where

    def decode(self, shrink: float = 1.0) -> tuple[np.ndarray, int]:
        """(uint8 (H, W, C), 1), or the picture at half, a quarter or an eighth of its size with 2, 4 or 8.

        shrink: by how much every use shrinks it; decoded at 1.5 times the size that this allows or larger, so that the
        antialiased resize decides what is left of it (.3 levels of 255 from the whole picture's). BadImageError as
        `decode_image`.
        """
        height, width, channels = self.shape
        factor = 2 ** min(max(int(shrink / 1.5), 1).bit_length() - 1, 3)
        small = {"min_height": -(-height // factor), "min_width": -(-width // factor), "min_factor": factor}
        try:
            pixels = simplejpeg.decode_jpeg(
                self.data, "RGB" if channels == 3 else "GRAY", **(small if factor > 1 else {})
            )
        except ValueError:  # a warning of the decoder is an error there; Pillow knows which ones matter
            return decode_image(self.data, channels, self.where, plain=False), 1
        return pixels, factor


def open_jpeg(value: Any, channels: int = 3, where: str = "") -> Jpeg | None:
    """The image as a `Jpeg`, from its header alone; None for any other kind of file, and for JPEG that needs more:
    turned by EXIF, CMYK, 12 bits, lossless, arithmetic, colour where grey is wanted, too large, or no file at all."""
    if isinstance(value, dict):
        where = where or value.get("path") or ""
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if isinstance(value, (str, Path)):
        where = where or str(value)
        try:
            value = read_starting(value, _JPEG)
        except OSError:
            return None
    if not isinstance(value, bytes) or value[:3] != _JPEG:
        return None
    found = _jpeg_header(value)
    if found is None or channels not in (1, 3) or channels < found[2] or found[0] * found[1] > MAX_PIXELS:
        return None
    return Jpeg(value, (found[0], found[1], channels), where or "image")


def _jpeg_header(data: bytes) -> tuple[int, int, int] | None:
    """(height, width, components) of a baseline or progressive 8-bit JPEG of 1 or 3 components that stands upright."""
    at, described, found = 2, False, None
    while at + 10 < len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _JPEG_FRAMES and found is None:
            height, width = data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8]
            if data[at + 4] != 8 or data[at + 9] not in (1, 3) or not height or not width:
                return None
            found = height, width, data[at + 9]
        elif marker == 0xDA:  # pixels follow
            return found if not described or _is_upright(data) else None
        elif marker not in _JPEG_SEGMENTS:
            return None
        described |= marker == 0xE1  # EXIF or XMP, either may turn the picture
        at += 2 + (data[at + 2] << 8 | data[at + 3])
    return None


def _decode_pgm(data: bytes) -> np.ndarray | None:
    """The pixels of a plain 8-bit PGM where they lie, 1/10 of Pillow's time for a small one; None for any other."""
    header = _PGM.match(data)
    if header is None:
        return None
    height, width = int(header[2]), int(header[1])
    if not 0 < height * width <= MAX_PIXELS or len(data) != header.end() + height * width:
        return None
    return np.frombuffer(data, np.uint8, offset=header.end()).reshape(height, width, 1)


def _decode_png(data: bytes, channels: int) -> np.ndarray | None:
    """A plain PNG in half of Pillow's time: 8 bits, grey or RGB, not interlaced, nothing that changes how it is seen.

    None for any other file and for what OpenCV refuses: Pillow decides then, and says what is wrong with it.
    """
    if data[:8] != _PNG or len(data) < 33 or data[24] != 8 or data[25] not in (0, 2) or data[26:29] != b"\0\0\0":
        return None
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    if channels not in (1, 3) or (data[25] == 2 and channels == 1) or width * height > MAX_PIXELS:
        return None
    if not _png_is_plain(data):
        return None
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        return None
    if pixels.ndim == 3:
        return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
    return cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB) if channels == 3 else pixels[:, :, None]


def _png_is_plain(data: bytes) -> bool:
    """Whether every chunk up to the end is sound and one of those that change nothing of the picture."""
    at, pixels, texts = 33, 0, 0  # pixels: 0 before them, 1 among them, 2 after them
    while (kind := data[at + 4 : at + 8]) != b"IEND":
        length = int.from_bytes(data[at : at + 4], "big")
        if kind == b"IDAT":
            if pixels == 2:
                return False
            pixels = 1
        else:
            body = data[at + 8 : at + 8 + length]
            texts += length
            known = length in _PNG_LENGTHS.get(kind, ()) or (
                kind == b"tEXt" and body.partition(b"\0")[0].lower() in _PNG_WORDS
            )
            crc = int.from_bytes(data[at + 8 + length : at + 12 + length], "big")
            if not known or texts > _PNG_TEXTS or zlib.crc32(body, zlib.crc32(kind)) != crc:
                return False
            pixels = 2 if pixels else 0
        at += 12 + length
    return pixels > 0


def _is_upright(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.getexif().get(_ORIENTATION, 1) == 1
    except Exception:  # whatever is wrong with it, `decode_image` will say
        return False


def _from_file(value: bytes | str | Path | None, channels: int, keep_alpha: bool, where: str) -> np.ndarray:
    if value is None:
        raise BadImageError(where, "the row holds no image (neither bytes nor a path)")
    if not isinstance(value, (*_BYTES, str, Path)):
        raise TypeError(f"neither bytes nor a path, but {type(value).__name__}")
    if isinstance(value, str) and "://" in value:  # streamed folders of the Hub hand out hf:// addresses
        value = _from_network(value, where)
    # by its path Pillow would map an uncompressed TIFF, and forget to turn it
    with io.BytesIO(value) if isinstance(value, _BYTES) else open_regular(value) as file, Image.open(file) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise BadImageError(where, _too_large(width, height))
        return _from_pil(image, channels, keep_alpha, where)


def _from_network(address: str, where: str) -> bytes:
    try:
        return remote.read(address)
    except remote.RemoteError as error:
        if remote.is_of_hub(address):
            raise  # the data set is out of reach; elsewhere it is one image
        raise BadImageError(where, str(error)) from error


def _from_pil(image: Image.Image, channels: int, keep_alpha: bool, where: str) -> np.ndarray:
    tolerant, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        image.load()  # other libraries switch grey filling of truncated files on; here such a file is an error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = tolerant
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    wanted = 4 if keep_alpha else channels
    if wanted not in (1, 3, 4):
        raise BadImageError(where, f"an image file holds at most 4 channels, {wanted} are wanted; use array columns")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image)
        values = np.clip(values, 0, 65535).astype(np.uint16) if image.mode == "I" else values
        return _from_array(values, wanted, where)
    return pil_pixels(image, wanted)


def _from_array(array: np.ndarray, channels: int, where: str) -> np.ndarray:
    """An array of any usual dtype, (H, W), (H, W, C) or (C, H, W), to (H, W, channels) uint8."""
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or not array.size or array.dtype == object:
        raise BadImageError(where, f"an array of shape {array.shape} and dtype {array.dtype} is no picture (H, W, C)")
    if array.shape[2] != channels and array.shape[0] == channels:
        array = array.transpose(1, 2, 0)
    height, width, bands = array.shape
    if height * width > MAX_PIXELS:
        raise BadImageError(where, _too_large(width, height))
    array = _to_uint8(array, where)
    if bands != channels:
        if {bands, channels} - {1, 3, 4} or (bands, channels) == (4, 1):
            raise BadImageError(where, f"the array has {bands} channels (shape {array.shape}), {channels} are wanted")
        if (bands, channels) == (1, 3):
            return np.repeat(array, 3, axis=2)
        return _from_pil(Image.fromarray(array if bands > 1 else array[:, :, 0]), channels, False, where)
    return np.ascontiguousarray(array)


def _to_uint8(array: np.ndarray, where: str) -> np.ndarray:
    """16 bits are scaled (65535 -> 255); floats are 0..1 when no value is above 1, else 0..255, clipped."""
    kind = array.dtype.kind
    if array.dtype == np.uint8:
        return array
    if kind == "b":
        return array.astype(np.uint8) * 255
    if kind == "u" and array.dtype.itemsize == 2:
        return eight_bits(array)
    low, high = array.min(), array.max()
    if kind in "iu":
        if low < 0 or high > 255:
            raise BadImageError(
                where, f"whole numbers from {low} to {high} are no pixels; store uint8 (0..255) or uint16 (0..65535)"
            )
        return array.astype(np.uint8)
    if kind != "f" or not np.isfinite(low + high):
        raise BadImageError(where, f"the {array.dtype} array holds values that are no finite numbers")
    scaled = array * 255.0 if high <= 1 else array
    return np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)


def _too_large(width: int, height: int) -> str:
    return f"{width} x {height} pixels is more than the {MAX_PIXELS:,} that are decoded (a decompression bomb?)"


def _reason(value: Any, error: Exception) -> str:
    """The decoder's complaint in words a person can act on."""
    if isinstance(error, FileNotFoundError):
        return "the file does not exist"
    if isinstance(error, NotRegularError):
        return f"{error.strerror}"
    if isinstance(value, _BYTES):
        size = len(value)
    else:
        size = os.path.getsize(value) if isinstance(value, (str, Path)) and os.path.isfile(value) else -1
    if size == 0:
        return "the file is empty (0 bytes)"
    if isinstance(error, Image.UnidentifiedImageError):
        return "no image format that is known here (corrupt, or not an image)"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than the {MAX_PIXELS:,} pixels that are decoded (a decompression bomb?)"
    return f"cannot be decoded ({type(error).__name__}: {error})"
