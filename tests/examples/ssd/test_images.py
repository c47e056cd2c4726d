"""Image files of every kind: right, or refused in one sentence that names the file."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms

from errors import InputError
from images import image_size, read_image

ORIENTATION = 0x112
# What a camera does to the scene, so that each orientation's value turns it back.
HELD = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: np.swapaxes(a, 0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.swapaxes(np.rot90(a, 2), 0, 1),
    8: lambda a: np.rot90(a, -1),
}
WHITE = 255
# How much a mode may change colours: a palette is coarse, and LAB so where colours are dark.
COARSE = {"P": 60, "LAB": 20}
# What keeps a format from changing pixels, or as little as it can.
LOSSLESS = {"jpg": {"quality": 95, "subsampling": 0}, "webp": {"lossless": True}}
# A largest shade, and the white that it is read by.
RANGES_OF_16_BITS = [(65535, 65535), (40000, 65535), (4095, 4095), (3000, 4095), (200, 255)]
RANGES_OF_FLOATS = [
    (0, 1, 1),
    (0, 0.9, 1),
    (0, 255, 256),
    (0, 65535, 65536),
    (0, 80.5, 256),
    (0, 1e-4, 2**-12),
]
DAMAGED_EXIF = [b"Exif\0\0", b"Exif\0\0rubbish", b"Exif\0\0II*\0\xff\xff\xff\xff", b"MM\0*"]


def rgb(path: Path) -> np.ndarray:
    """(H, W, 3) as ints, having checked what every image has to be."""
    image = read_image(path)
    assert image.dtype == np.uint8
    assert image.shape[0] == 3
    assert not image.flags.writeable
    assert image_size(path) == image.shape[1:]
    return image.transpose(1, 2, 0).astype(int)


def grey(path: Path) -> np.ndarray:
    """(H, W) of an image whose channels are alike."""
    pixels = rgb(path)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def saved(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def said_by(path: Path, attribute: str) -> object:
    """What Pillow says of a file."""
    with Image.open(path) as image:
        return getattr(image, attribute)


@pytest.fixture
def scene(rng) -> np.ndarray:
    """An image of distinct corners, smooth enough for JPEG."""
    colours = rng.integers(0, 256, size=(3, 5, 3), dtype=np.uint8)
    return np.repeat(np.repeat(colours, 16, axis=0), 16, axis=1)


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", HELD)
def test_every_orientation_is_turned_upright(tmp_path, scene, orientation, ending):
    stored = Image.fromarray(np.ascontiguousarray(HELD[orientation](scene)))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = (
        {"quality": 95, "subsampling": 0}
        if ending == "jpg"
        else {"lossless": True}
        if ending == "webp"
        else {}
    )
    path = saved(stored, tmp_path / f"a.{ending}", exif=exif, **options)
    found = rgb(path)
    assert found.shape == scene.shape
    # Away from the edges between patches, where JPEG rings.
    centres = found[8::16, 8::16] - scene[8::16, 8::16].astype(int)
    assert np.abs(centres).max() <= 6


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_an_orientation_that_is_none_leaves_the_image_as_it_is(tmp_path, scene, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    np.testing.assert_array_equal(rgb(saved(Image.fromarray(scene), tmp_path / "a.png", exif=exif)), scene)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0rubbish", b"Exif\0\0II*\0\xff\xff\xff\xff", b"MM\0*"]
)
def test_damaged_exif_data_leave_the_image_as_it_is(tmp_path, scene, exif):
    np.testing.assert_array_equal(rgb(saved(Image.fromarray(scene), tmp_path / "a.png", exif=exif)), scene)


def test_shades_of_8_bits_are_as_they_are(tmp_path, rng):
    values = rng.integers(0, 256, size=(6, 7), dtype=np.uint8)
    np.testing.assert_array_equal(grey(saved(Image.fromarray(values), tmp_path / "a.png")), values)


def test_two_shades_are_black_and_white(tmp_path):
    values = np.array([[True, False], [False, True]])
    np.testing.assert_array_equal(grey(saved(Image.fromarray(values), tmp_path / "a.png")), values * WHITE)


@pytest.mark.parametrize("mode", ["P", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"])
def test_colours_of_any_mode_are_those_that_are_seen(tmp_path, scene, mode):
    image = Image.fromarray(scene)
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    else:
        image = image.convert(mode)
    # HSV is a mode of no file.
    ending = {"P": "png", "RGBA": "png", "HSV": "png"}.get(mode, "tif")
    path = saved(image.convert("RGB") if mode == "HSV" else image, tmp_path / f"a.{ending}")
    assert said_by(path, "mode") == ("RGB" if mode == "HSV" else mode)
    assert np.abs(rgb(path) - scene.astype(int)).max() <= COARSE.get(mode, 8)


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P"])
def test_transparent_parts_show_white_whatever_is_below(tmp_path, mode):
    black = np.zeros((4, 6), np.uint8)
    opaque = black.copy()
    opaque[1:3, 2:4] = 255
    image = Image.merge("LA", [Image.fromarray(black), Image.fromarray(opaque)])
    path = tmp_path / ("a.gif" if mode == "P" else "a.png")
    saved(image if mode == "LA" else image.convert("RGBA"), path)
    np.testing.assert_array_equal(grey(path), WHITE - opaque.astype(int))


def test_a_transparent_colour_of_a_png_shows_white(tmp_path):
    values = np.uint8([[0, 100, 200]])
    path = saved(Image.fromarray(values), tmp_path / "a.png", transparency=100)
    np.testing.assert_array_equal(grey(path), [[0, WHITE, 200]])


@pytest.mark.parametrize("most, white", RANGES_OF_16_BITS)
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_shades_of_16_bits_keep_their_range(tmp_path, ending, most, white):
    values = np.linspace(0, most, 48).reshape(6, 8).astype(np.uint16)
    found = grey(saved(Image.fromarray(values), tmp_path / f"a.{ending}"))
    np.testing.assert_allclose(found, values / white * WHITE, atol=0.51)


def test_the_byte_order_of_16_bits_does_not_matter(tmp_path):
    values = np.linspace(0, 65535, 48).reshape(6, 8).astype(">u2")
    image = Image.frombytes("I;16B", (8, 6), values.tobytes())
    path = saved(image, tmp_path / "a.tif")
    assert said_by(path, "mode") == "I;16B"
    np.testing.assert_allclose(grey(path), values / 257, atol=0.51)


def test_a_portable_grey_map_of_any_range_is_read_by_it(tmp_path):
    values = np.linspace(0, 1000, 12).astype(">u2")
    path = tmp_path / "a.pgm"
    path.write_bytes(b"P5 4 3 1000\n" + values.tobytes())
    np.testing.assert_allclose(grey(path).ravel(), values / 1000 * WHITE, atol=1)


def test_shades_of_32_bits_and_negative_ones_keep_their_range(tmp_path):
    values = np.linspace(0, 2**31 - 1, 48).reshape(6, 8).astype(np.int32)
    found = grey(saved(Image.fromarray(values), tmp_path / "a.tif"))
    np.testing.assert_allclose(found, values / 2**32 * WHITE, atol=0.51)
    hounsfield = np.linspace(-1000, 3000, 48).reshape(6, 8).astype(np.int32)
    found = grey(saved(Image.fromarray(hounsfield), tmp_path / "b.tif"))
    np.testing.assert_allclose(found, (hounsfield + 1000) / 4000 * WHITE, atol=0.51)


@pytest.mark.parametrize(
    "least, most, white",
    [
        (0, 1, 1),
        (0, 0.9, 1),
        (0, 255, 256),
        (0, 65535, 65536),
        (0, 80.5, 256),
        (0, 1e-4, 2**-12),
        (-1, 1, None),
    ],
)
def test_floating_point_shades_keep_their_range(tmp_path, least, most, white):
    values = np.linspace(least, most, 48, dtype=np.float32).reshape(6, 8)
    found = grey(saved(Image.fromarray(values), tmp_path / "a.tif"))
    expected = values / white if white else (values - least) / (most - least)
    np.testing.assert_allclose(found, expected * WHITE, atol=0.51)


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_colours_of_16_bits_are_read_by_their_range(tmp_path, ending, rng):
    colours = rng.integers(0, 65536, size=(5, 6, 3), dtype=np.uint16)
    cv2.imwrite(str(tmp_path / f"a.{ending}"), colours[..., ::-1])
    np.testing.assert_allclose(rgb(tmp_path / f"a.{ending}"), colours / 257, atol=1.01)


def test_floating_point_colours_are_refused(tmp_path):
    cv2.imwrite(str(tmp_path / "a.tif"), np.ones((5, 6, 3), np.float32))
    refuses(tmp_path / "a.tif")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32])
def test_a_black_image_is_black(tmp_path, dtype):
    path = saved(Image.fromarray(np.zeros((4, 5), dtype)), tmp_path / "a.tif")
    assert not grey(path).any()


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_shades_that_are_no_numbers_are_refused(tmp_path, number):
    values = np.zeros((4, 5), np.float32)
    values[1, 2] = number
    refuses(saved(Image.fromarray(values), tmp_path / "a.tif"), "holds numbers that are not finite")


@pytest.mark.parametrize("ending", ["gif", "webp", "tif", "png"])
def test_of_several_frames_the_first_is_read(tmp_path, ending):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    options = LOSSLESS.get(ending, {})
    path = saved(frames[0], tmp_path / f"a.{ending}", save_all=True, append_images=frames[1:], **options)
    assert said_by(path, "n_frames") == 2
    assert (rgb(path) == [255, 0, 0]).all()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes, pixels: bytes | None = None) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = bytes(height * (3 * width + 1)) if pixels is None else pixels
    end = chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + end


def encoded(ending: str) -> bytes:
    values = np.random.default_rng(0).integers(0, 256, size=(40, 50, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, {"jpg": "jpeg", "tif": "tiff"}.get(ending, ending))
    return stream.getvalue()


BOMB = zlib.compress(bytes(2 << 20))
UNREADABLE = {
    "empty.jpg": b"",
    "text.jpg": b"not an image",
    "page.png": b"<html><body>404</body></html>",
    "bomb.png": png(30000, 30000, pixels=b"123456789"),
    "profile.png": png(8, 8, chunk(b"iCCP", b"icc\0\0" + BOMB)),
    "comment.png": png(8, 8, chunk(b"zTXt", b"Comment\0\0" + BOMB)),
    "international.png": png(8, 8, chunk(b"iTXt", b"Comment\0\1\0\0\0" + BOMB)),
    "no pixels.png": png(8, 8, pixels=b""),
    "no width.png": png(0, 8),
    "wrong sum.png": png(8, 8).replace(b"IDAT", b"IDAt"),
    "cut.ppm": b"P6 4x 4 255 " + bytes(48),
    "short.ppm": b"P6 4 4 255 " + bytes(40),
    "huge.pgm": b"P5 999999999 999999999 255\n",
    "no header.bmp": b"BM" + bytes(10),
    **{
        f"half.{ending}": encoded(ending)[: len(encoded(ending)) // 2]
        for ending in ("jpg", "png", "gif", "webp")
    },
    **{f"few.{ending}": encoded(ending)[:30] for ending in ("jpg", "png", "gif", "webp", "tif", "bmp")},
}


def refuses(path: Path, words: str = "") -> None:
    with pytest.raises(InputError) as error:
        read_image(path)
    sentence = str(error.value)
    assert sentence.startswith(f"{path} can't be read as an image (")
    assert sentence.endswith("): restore or remove it.")
    assert sentence.count("\n") == 0
    assert words in sentence


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_no_image_or_damaged_is_refused_in_a_sentence(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(UNREADABLE[name])
    refuses(path)


@pytest.mark.parametrize("ending", ["jpg", "png", "gif", "webp", "tif", "bmp"])
def test_any_damage_is_refused_or_leaves_an_image(tmp_path, ending, rng):
    """Readers let some damage pass, as pixels of another colour; nothing else may happen."""
    whole = np.frombuffer(encoded(ending), np.uint8)
    path = tmp_path / f"a.{ending}"
    for _ in range(150):
        data = whole.copy()
        places = rng.integers(len(data) if rng.random() < 0.5 else 60, size=rng.integers(1, 9))
        data[places] = rng.integers(0, 256, size=len(places))
        path.write_bytes(
            data[: rng.integers(1, len(data) + 1)].tobytes() if rng.random() < 0.3 else data.tobytes()
        )
        try:
            image = read_image(path)
        except InputError as error:
            assert str(path) in str(error)
        else:
            assert image.shape[0] == 3


def test_places_that_hold_no_file_are_refused(tmp_path):
    refuses(tmp_path, "Is a directory")
    refuses(tmp_path / "nowhere.jpg", "No such file or directory")
    refuses(tmp_path / f"{'a' * 300}.jpg", "File name too long")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    refuses(tmp_path / "loop.jpg", "symbolic links")
    with pytest.raises(InputError, match="can't be read as an image"):
        read_image(tmp_path / "nothing\0.jpg")


def test_a_file_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    def forbidden(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("images.Image.open", forbidden)
    refuses(tmp_path / "a.jpg", "Permission denied")


def test_names_that_are_no_text_are_read(tmp_path, scene):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    np.testing.assert_array_equal(rgb(saved(Image.fromarray(scene), path)), scene)
