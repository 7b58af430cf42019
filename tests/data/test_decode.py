"""Every kind of image file comes out with the pixel values it was made of, and every broken one with a clear error."""

import contextlib
import io
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from hf_ssl.data.decode import MAX_PIXELS, BadImageError, decode_image, open_jpeg

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
RGB = np.array([[RED, GREEN, BLUE], [WHITE, (0, 0, 0), (10, 20, 30)]], np.uint8)


def encode(image, format="PNG", **options):
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def flat(mode, *colour, size=(8, 8)):
    return Image.new(mode, size, colour if len(colour) > 1 else colour[0])


def png_header(width, height):
    body = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big") + b"\0\0\0\1IDAT"
    )


def test_rgb_is_exact_from_every_kind_of_value(tmp_path):
    data = encode(RGB)
    (tmp_path / "a.png").write_bytes(data)
    path = str(tmp_path / "a.png")
    for value in (data, path, tmp_path / "a.png", {"bytes": data, "path": None}, {"bytes": None, "path": path}):
        np.testing.assert_array_equal(decode_image(value), RGB)
    for value in (Image.fromarray(RGB), RGB, RGB.tolist()):
        picture = decode_image(value)
        np.testing.assert_array_equal(picture, RGB)
        assert picture.dtype == np.uint8 and picture.flags.c_contiguous


def test_plain_pgm_is_read_where_it_lies_and_any_other_as_pillow_does():
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3)
    pixels = grey.tobytes()
    data = b"P5 3 2 255\n" + pixels
    np.testing.assert_array_equal(decode_image(data, channels=1), grey[:, :, None])
    np.testing.assert_array_equal(decode_image(b"P5\n# said\n3 2\n255\n" + pixels, channels=1), grey[:, :, None])
    np.testing.assert_array_equal(decode_image(data), np.repeat(grey[:, :, None], 3, 2))
    assert decode_image(b"P5 3 2 15\n" + pixels, channels=1)[1, 2, 0] == 85  # 5 of 15
    np.testing.assert_array_equal(decode_image(data + b"more", channels=1), grey[:, :, None])
    with pytest.raises(BadImageError):
        decode_image(data[:-1], channels=1, where="short.pgm")


def test_grey_kinds():
    grey = np.array([[0, 100, 255]], np.uint8)
    for value in (encode(grey), grey, grey[:, :, None]):
        np.testing.assert_array_equal(decode_image(value), np.repeat(grey[:, :, None], 3, 2))
        np.testing.assert_array_equal(decode_image(value, channels=1), grey[:, :, None])
    bits = Image.fromarray(grey > 50)
    assert bits.mode == "1"
    assert decode_image(encode(bits)).tolist() == [[[0] * 3, [255] * 3, [255] * 3]]
    # ITU-R 601: .299 R + .587 G + .114 B
    assert decode_image(encode(RGB), channels=1)[0, :, 0].tolist() == [76, 150, 29]


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bits_are_scaled_not_clipped(format):
    deep = np.array([[0, 257, 256 * 100, 32768, 65535]], np.uint16)
    wanted = [0, 1, 100, 128, 255]  # value / 257, rounded
    assert decode_image(encode(deep, format), channels=1)[0, :, 0].tolist() == wanted
    assert decode_image(encode(deep, format))[0, :, 2].tolist() == wanted
    assert decode_image(encode(deep, format), keep_alpha=True)[0, :, 3].tolist() == [255] * 5
    assert decode_image(deep, channels=1)[0, :, 0].tolist() == wanted
    assert decode_image(encode(Image.fromarray(deep.astype(np.int32)), "TIFF"), channels=1)[0, :, 0].tolist() == wanted
    big_endian = Image.frombytes("I;16B", (5, 1), deep.astype(">u2").tobytes())
    assert decode_image(big_endian, channels=1)[0, :, 0].tolist() == wanted


def test_floats():
    unit = np.array([[0, 0.5, 1]], np.float32)
    assert decode_image(encode(Image.fromarray(unit), "TIFF"), channels=1)[0, :, 0].tolist() == [0, 128, 255]
    assert decode_image(np.array([[-3, 100.4, 300]]), channels=1)[0, :, 0].tolist() == [0, 100, 255]
    with pytest.raises(BadImageError, match="no finite numbers"):
        decode_image(np.array([[np.nan, 1]]), channels=1)


def test_an_alpha_channel_is_dropped_or_kept_and_a_colour_that_stands_for_transparent_is_white():
    rgba = np.array([[(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 51)]], np.uint8)
    for value in (encode(rgba), rgba):
        np.testing.assert_array_equal(decode_image(value), rgba[..., :3])
    np.testing.assert_array_equal(decode_image(encode(rgba), keep_alpha=True), rgba)
    np.testing.assert_array_equal(decode_image(encode(rgba), channels=4), rgba)
    assert decode_image(encode(RGB), keep_alpha=True)[..., 3].min() == 255
    assert decode_image(encode(flat("LA", 90, 51)))[0, 0].tolist() == [90] * 3
    assert decode_image(encode(flat("LA", 90, 51)), channels=1)[0, 0].tolist() == [90]
    assert decode_image(encode(flat("RGB", 9, 8, 7), transparency=(9, 8, 7)))[0, 0].tolist() == [255] * 3


def test_palettes():
    palette = Image.fromarray(RGB).convert("P", palette=Image.Palette.ADAPTIVE)
    np.testing.assert_array_equal(decode_image(encode(palette)), RGB)
    see_through = palette.getpixel((0, 0))
    picture = decode_image(encode(palette, transparency=see_through))
    assert picture[0].tolist() == [list(WHITE), list(GREEN), list(BLUE)]  # red became transparent
    assert decode_image(encode(palette, transparency=see_through), keep_alpha=True)[0, :, 3].tolist() == [0, 255, 255]
    assert decode_image(encode(palette), channels=1)[0, :, 0].tolist() == [76, 150, 29]
    pa = Image.new("PA", (1, 1))
    pa.putpalette([10, 20, 30])
    pa.putpixel((0, 0), (0, 255))
    assert decode_image(pa)[0, 0].tolist() == [10, 20, 30]


def test_other_colour_spaces():
    assert decode_image(encode(flat("CMYK", 0, 255, 255, 0), "TIFF"))[0, 0].tolist() == [255, 0, 0]
    jpeg = decode_image(encode(flat("CMYK", 0, 255, 255, 0), "JPEG", quality=100))  # stored inverted, as Adobe does
    np.testing.assert_allclose(jpeg[4, 4], RED, atol=3)
    np.testing.assert_allclose(decode_image(flat("YCbCr", 76, 85, 255))[0, 0], RED, atol=3)
    np.testing.assert_allclose(decode_image(flat("HSV", 85, 255, 255))[0, 0], GREEN, atol=3)
    np.testing.assert_allclose(
        decode_image(encode(flat("LAB", 255, 128, 128), "TIFF"))[0, 0], WHITE, atol=3
    )  # 128 is a* = 0
    assert decode_image(flat("RGBX", 1, 2, 3, 4))[0, 0].tolist() == [1, 2, 3]
    assert decode_image(flat("CMYK", 0, 0, 0, 255), channels=1)[0, 0].tolist() == [0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_picture_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    # the stored pixels are the upright ones moved by the inverse of what the tag asks for
    inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose values
    stored = Image.fromarray(RGB)
    if orientation > 1:
        stored = stored.transpose(Image.Transpose(inverse[orientation]))
    np.testing.assert_array_equal(decode_image(encode(stored, exif=exif)), RGB)
    assert ImageOps.exif_transpose(Image.open(io.BytesIO(encode(stored, exif=exif)))).size == (3, 2)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_animations_give_their_first_frame(format):
    frames = [flat("RGB", *RED), flat("RGB", *GREEN), flat("RGB", *BLUE)]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], duration=50, **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert decode_image(data)[3, 3].tolist() == list(RED)


def test_arrays_of_any_number_of_channels():
    bands = np.arange(5 * 6 * 13, dtype=np.uint8).reshape(5, 6, 13)
    np.testing.assert_array_equal(decode_image(bands, channels=13), bands)
    np.testing.assert_array_equal(decode_image(bands.tolist(), channels=13), bands)
    turned = decode_image(bands.transpose(2, 0, 1), channels=13)
    np.testing.assert_array_equal(turned, bands)
    assert turned.flags.c_contiguous
    np.testing.assert_array_equal(decode_image(bands > 7, channels=13), (bands > 7) * np.uint8(255))
    for value, words in (
        (bands, "13 channels"),
        (np.zeros((4,), np.uint8), "no picture"),
        (np.zeros((0, 4, 3), np.uint8), "no picture"),
        ([[1, 2], [3]], "cannot be decoded"),
        (np.full((2, 2, 3), 300), "whole numbers from 300 to 300"),
        (np.full((2, 2, 3), -1), "whole numbers from -1"),
    ):
        with pytest.raises(BadImageError, match=words):
            decode_image(value, where="row 7")
    with pytest.raises(BadImageError, match="at most 4 channels"):
        decode_image(encode(RGB), channels=13)


def noise(size=48):
    return np.random.default_rng(0).integers(0, 255, (size, size, 3)).astype(np.uint8)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
def test_truncated_files_are_errors_even_where_pillow_was_told_to_fill_them(tmp_path, format, kept, monkeypatch):
    data = encode(noise(), format)
    path = tmp_path / f"cut.{format.lower()}"
    path.write_bytes(data[: int(len(data) * kept)])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(BadImageError, match=str(path)) as caught:
        decode_image({"bytes": None, "path": str(path)})
    assert caught.value.where == str(path) and caught.value.reason
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_broken_files_say_what_is_wrong(tmp_path):
    empty, text = tmp_path / "empty.jpg", tmp_path / "text.png"
    empty.write_bytes(b"")
    text.write_bytes(b"<html>404</html>")
    damaged = bytearray(encode(noise()))
    damaged[len(damaged) // 2] ^= 255  # one byte of the pixel data: the checksum no longer fits
    for value, words in (
        (empty, "empty.jpg: the file is empty"),
        (b"", "row 3: the file is empty"),
        (text, "text.png: no image format"),
        (bytes(damaged), "row 3: cannot be decoded"),
        (tmp_path / "gone.png", "gone.png: the file does not exist"),
        ({"bytes": None, "path": None}, "row 3: the row holds no image"),
        (None, "row 3: the row holds no image"),
        ({"bytes": 5, "path": None}, "row 3: cannot be decoded"),
    ):
        with pytest.raises(BadImageError, match=words):
            decode_image(value, where="" if hasattr(value, "name") else "row 3")


@pytest.mark.parametrize("size", [(50_000, 50_000), (MAX_PIXELS // 1000 + 1, 1000)])
def test_a_bomb_is_refused_by_its_header(size, monkeypatch):
    for limit in (Image.MAX_IMAGE_PIXELS, None):  # None: other code switched Pillow's own check off
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(BadImageError, match="decompression bomb"):
            decode_image(png_header(*size), where="bomb.png")


def test_pillows_bomb_warning_does_not_leak(tmp_path):
    (tmp_path / "large.png").write_bytes(png_header(10_000, 10_000))  # Pillow warns from 89 million pixels on
    script = (
        "import sys, warnings; warnings.simplefilter('default')\n"
        "from hf_ssl.data import decode_image, BadImageError\n"
        "try: decode_image(sys.argv[1])\n"
        "except BadImageError as error: print(error)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "large.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "large.png: cannot be decoded" in done.stdout and "Bomb" not in done.stderr


def photo(height=301, width=403):
    """Smooth, so that what a smaller decoding gives is near to the average of blocks."""
    coarse = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30, "optimize": True}])
def test_plain_jpeg_has_pillows_pixels_the_short_way(options, tmp_path):
    data = encode(photo(), "JPEG", **options)
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    for value in (data, {"bytes": data, "path": None}, str(path), path, {"bytes": None, "path": str(path)}):
        jpeg = open_jpeg(value)
        assert jpeg.shape == (301, 403, 3)
        np.testing.assert_array_equal(jpeg.decode()[0], pixels)
        np.testing.assert_array_equal(decode_image(value), pixels)
    grey = encode(photo().convert("L"), "JPEG", **options)
    pixels = np.asarray(Image.open(io.BytesIO(grey)))
    np.testing.assert_array_equal(open_jpeg(grey, 1).decode()[0], pixels[:, :, None])
    np.testing.assert_array_equal(open_jpeg(grey, 3).decode()[0], np.repeat(pixels[:, :, None], 3, 2))


@pytest.mark.parametrize(("shrink", "factor"), [(0.3, 1), (2.9, 1), (3, 2), (5.9, 2), (6, 4), (12, 8), (99, 8)])
def test_a_jpeg_is_decoded_as_small_as_it_is_wanted(shrink, factor):
    jpeg = open_jpeg(encode(photo(), "JPEG", quality=95))
    pixels, shrunk = jpeg.decode(shrink)
    assert shrunk == factor
    assert pixels.shape == (-(-301 // factor), -(-403 // factor), 3)
    side = 300 // factor
    blocks = (
        jpeg.decode()[0][: side * factor, : side * factor].reshape(side, factor, side, factor, 3).mean(axis=(1, 3))
    )
    assert np.abs(blocks - pixels[:side, :side]).mean() < 2


def test_what_is_no_plain_upright_jpeg_is_left_to_pillow(tmp_path, monkeypatch):
    turned = Image.Exif()
    turned[0x0112] = 6
    upright = Image.Exif()
    upright[0x010F] = "a camera"
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="3"/></x:xmpmeta>'
    image, plain = photo(), encode(photo(), "JPEG")
    assert open_jpeg(encode(image, "JPEG", exif=upright)) is not None
    assert open_jpeg(encode(image, "JPEG", comment="a comment", dpi=(300, 300))) is not None
    left = [encode(image, "JPEG", exif=turned), encode(image, "JPEG", xmp=xmp), encode(image.convert("CMYK"), "JPEG")]
    for data in left:
        assert open_jpeg(data) is None
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        np.testing.assert_array_equal(decode_image(data), np.asarray(expected))
    others = [
        encode(image),
        encode(image, "WEBP"),
        b"",
        b"\xff\xd8\xff",
        plain[:20],
        None,
        RGB,
        str(tmp_path / "no.jpg"),
    ]
    assert not any(open_jpeg(value) for value in others)
    assert open_jpeg(plain, channels=1) is None  # Pillow's grey of the colours is another one than the file's
    assert open_jpeg(plain, channels=4) is None
    lossless = plain.replace(b"\xff\xc0\x00\x11", b"\xff\xc3\x00\x11")
    assert lossless != plain and open_jpeg(lossless) is None
    monkeypatch.setattr("hf_ssl.data.decode.MAX_PIXELS", 1000)
    assert open_jpeg(plain) is None


def test_a_truncated_jpeg_is_an_error_the_short_way_too(tmp_path):
    data = encode(photo(), "JPEG")
    for kept in (len(data) // 2, len(data) - 40, len(data) - 3):
        jpeg = open_jpeg(data[:kept], where="row 3 of pictures")
        for shrink in (1, 9):
            with pytest.raises(BadImageError, match=r"row 3 of pictures: cannot be decoded .*truncated"):
                jpeg.decode(shrink)
    path = tmp_path / "cut.jpg"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(BadImageError, match=r"cut\.jpg: cannot be decoded"):
        decode_image(path)


def test_what_pillow_puts_up_with_is_decoded():
    """Bytes between the segments are a warning of the decoder, and no harm."""
    data = encode(photo(), "JPEG")
    at = data.index(b"\xff\xda") + 2 + int.from_bytes(data[data.index(b"\xff\xda") + 2 :][:2], "big")
    odd = data[: data.rindex(b"\xff\xd9")] + b"\x00\x00\x00" + data[-2:]
    assert at < len(odd) and open_jpeg(odd) is not None
    np.testing.assert_array_equal(decode_image(odd), np.asarray(Image.open(io.BytesIO(odd))))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("channels", [1, 3])
def test_png_has_pillows_pixels_the_short_way_broken_or_not(mode, channels):
    """400 damaged files: whatever Pillow refuses is refused, and what both read is the same to the last bit."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 64, (9, 7, 3), dtype=np.uint8)).convert(mode)
    data = encode(picture, "PNG")
    wanted = np.asarray(picture.convert("RGB" if channels == 3 else "L")).reshape(9, 7, channels)
    assert np.array_equal(decode_image(data, channels), wanted)
    for trial in range(400):
        damaged = bytearray(data)
        if trial % 2:
            damaged[rng.integers(len(data))] = rng.integers(256)
        else:
            del damaged[rng.integers(len(data)) :]
        outcomes = []
        for value in (bytes(damaged), io.BytesIO(bytes(damaged))):  # Pillow alone opens the second
            try:
                with Image.open(value) if isinstance(value, io.BytesIO) else contextlib.nullcontext(value) as image:
                    outcomes.append(decode_image(image, channels).tobytes())
            except (BadImageError, OSError, SyntaxError):
                outcomes.append(b"refused")
        assert outcomes[0] == outcomes[1], trial


def test_png_that_needs_more_is_left_to_pillow(monkeypatch):
    """Turned by EXIF, transparent, a palette, 16 bits, interlaced: none is decoded the short way."""
    monkeypatch.setattr("cv2.imdecode", None)
    turned = Image.Exif()
    turned[0x0112] = 6
    picture = Image.new("RGB", (4, 2), (9, 8, 7))
    assert decode_image(encode(picture, "PNG", exif=turned)).shape == (4, 2, 3)
    assert decode_image(encode(picture, "PNG", transparency=(9, 8, 7))).min() == 255
    for mode in ("P", "RGBA", "I;16", "1", "LA"):
        assert decode_image(encode(Image.new(mode, (4, 2)), "PNG")).shape == (2, 4, 3)
    assert decode_image(encode(picture, "PNG"), channels=1).shape == (2, 4, 1)


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def rgb_png(before=b"", after=b"", rows=None):
    """A 4 x 2 PNG with chunks around its pixels; no two pixels are alike."""
    stored = b"".join(b"\0" + bytes(range(9 * y, 9 * y + 12)) for y in range(2)) if rows is None else rows
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 2, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(stored))
    return b"\x89PNG\r\n\x1a\n" + header + before + pixels + after + chunk(b"IEND", b"")


TURNED = Image.Exif()
TURNED[0x0112] = 6
EXIF = TURNED.tobytes().removeprefix(b"Exif\0\0")
RAW = b"\nexif\n%8d\n" % (len(EXIF) + 6) + (b"Exif\0\0" + EXIF).hex().encode()
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
BOMB = zlib.compress(b"a" * 2_000_000)


def as_pillow_shows(data, channels=3):
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return decode_image(ImageOps.exif_transpose(image), channels)


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_png_is_turned_whatever_says_so(place, tmp_path):
    """EXIF in a chunk, in ImageMagick's raw profile, plain or compressed; XMP: from bytes and from a file."""
    for body in (
        chunk(b"eXIf", EXIF),
        chunk(b"tEXt", b"Raw profile type exif\0" + RAW),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(RAW)),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP)),
    ):
        data = rgb_png(**{place: body})
        (tmp_path / "a.png").write_bytes(data)
        for value in (data, {"bytes": data, "path": None}, str(tmp_path / "a.png")):
            picture = decode_image(value)
            assert picture.shape == (4, 2, 3), body[:30]
            np.testing.assert_array_equal(picture, as_pillow_shows(data))


def test_an_animation_shows_what_pillow_shows_first():
    first, second = flat("RGB", *RED), flat("RGB", *GREEN)
    apart = encode(first, save_all=True, append_images=[second, second], default_image=True)
    assert decode_image(apart)[0, 0].tolist() == list(RED)  # the default image is no frame
    alone = rgb_png(chunk(b"acTL", struct.pack(">II", 2, 0)))
    np.testing.assert_array_equal(decode_image(alone), decode_image(rgb_png()))


@pytest.mark.parametrize(
    "body",
    [
        chunk(b"zTXt", b"Comment\0\0" + BOMB),
        chunk(b"iTXt", b"Comment\0\1\0\0\0" + BOMB),
        chunk(b"iCCP", b"p\0\0" + BOMB),
        chunk(b"pHYs", b"\0\0"),
        chunk(b"tEXt", b"Comment\0x")[:-1] + b"?",
    ],
    ids=["zTXt bomb", "iTXt bomb", "iCCP bomb", "short pHYs", "wrong checksum"],
)
def test_a_png_with_a_chunk_that_pillow_refuses_is_refused(body):
    assert np.array_equal(decode_image(rgb_png(chunk(b"tEXt", b"Comment\0x"))), decode_image(rgb_png()))
    with pytest.raises(BadImageError, match=r"cannot be decoded|no image format"):
        decode_image(rgb_png(body))


def test_png_chunks_of_all_kinds_change_no_more_than_pillow_says():
    """500 files with sound checksums and up to three chunks of any kind and length, before and after the pixels."""
    rng = np.random.default_rng(0)
    keys = [b"Comment", b"Software", b"exif", b"transparency", b"interlace", b"Title", b"", b"xmp"]
    kinds = [
        b"gAMA",
        b"cHRM",
        b"sRGB",
        b"sBIT",
        b"bKGD",
        b"pHYs",
        b"tIME",
        b"tRNS",
        b"PLTE",
        b"acTL",
        b"fcTL",
        b"abCd",
    ]
    lengths = [0, 1, 2, 3, 4, 6, 7, 9, 26, 32]
    seen = set()
    for trial in range(500):
        parts = []
        for _ in range(rng.integers(4)):
            text = b"\0".join((keys[rng.integers(len(keys))], rng.bytes(5)))
            other = kinds[rng.integers(len(kinds))], rng.bytes(lengths[rng.integers(len(lengths))])
            parts.append(chunk(*((b"tEXt", text) if rng.random() < 0.3 else other)))
        rows = b"".join(b"\0" + rng.bytes(12) for _ in range(2))[: rng.choice([26, 26, 26, 20])]
        cut = rng.integers(len(parts) + 1)
        data = rgb_png(b"".join(parts[:cut]), b"".join(parts[cut:]), rows)
        try:
            wanted = as_pillow_shows(data).tobytes()
        except (BadImageError, OSError, SyntaxError, ValueError, TypeError, struct.error, IndexError):
            wanted = None
        try:
            found = decode_image(data).tobytes()
        except BadImageError:
            found = None
        assert found == wanted, (trial, data)
        seen.add(found is None)
    assert seen == {True, False}


def test_a_jpeg_is_turned_by_what_stands_behind_its_frame_header():
    data = encode(Image.fromarray(noise()), "JPEG")
    at = data.index(b"\xff\xda")
    body = b"Exif\0\0" + EXIF
    late = data[:at] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[at:]
    assert open_jpeg(late) is None and open_jpeg(data) is not None
    np.testing.assert_array_equal(decode_image(late), np.rot90(decode_image(data), -1))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_a_tiff_is_turned_from_a_file_as_from_bytes(mode, tmp_path):
    """Pillow maps an uncompressed file that it opens by its path, and forgets its orientation."""
    data = encode(Image.fromarray(RGB).convert(mode), "TIFF", tiffinfo={0x0112: 6})
    (tmp_path / "a.tif").write_bytes(data)
    assert decode_image(data).shape == (3, 2, 3)
    np.testing.assert_array_equal(decode_image(str(tmp_path / "a.tif")), decode_image(data))


def test_only_regular_files_are_opened(tmp_path):
    """Nobody writes into the pipe: to open it would be to wait for ever."""
    os.mkfifo(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").symlink_to("/dev/zero")
    (tmp_path / "c.jpg").mkdir()
    for name, kind in (("a", "a pipe"), ("b", "a device"), ("c", "a folder")):
        path = tmp_path / f"{name}.jpg"
        assert open_jpeg(path) is None
        with pytest.raises(BadImageError, match=f"{path}: {kind}, not a regular file"):
            decode_image({"bytes": None, "path": str(path)})
