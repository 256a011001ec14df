"""Image files of every kind that has stopped a training run, and what each should become.

Each kind writes one file. Either an upright RGB image must come of it, close to the one given here,
or a report; and for the damage that its format cannot show, an image of the right size.
"""

import io
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

RIGHT, REPORTED, DAMAGED = "right", "reported", "damaged"
WIDTH, HEIGHT = 45, 32


class BadKind(NamedTuple):
    """One kind of file."""

    name: str
    file: str | bytes
    write: Callable[[Path], None]
    wanted: str
    image: Image.Image | None = None
    tolerance: int = 0
    # After the data set has been opened.
    late: Callable[[Path], None] | None = None


def sample(width: int = WIDTH, height: int = HEIGHT, seed: int = 0) -> Image.Image:
    """Something smooth that no two corners share, with a little noise so that it has a body."""
    x, y = np.linspace(0, 1, width), np.linspace(0, 1, height)[:, None]
    noise = np.random.default_rng(seed).integers(0, 12, (height, width, 3))
    red, green = (
        np.broadcast_to(200 * x, (height, width)),
        np.broadcast_to(200 * y, (height, width)),
    )
    blue = 100 * (1 - x) + 80 * y
    return Image.fromarray((np.stack([red, green, blue], -1) + noise).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """The image as the content of a file."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@cache
def bad_image_kinds() -> list[BadKind]:
    """All kinds."""
    return [
        *_damaged(),
        *_no_images(),
        *_too_large(),
        *_modes(),
        *_animated(),
        *_metadata(),
        *_file_system(),
    ]


def write_bad_images(folder: Path, prefix: str = "") -> dict[str, Path]:
    """One file of each kind in a folder: {kind's name: path}. `late` has not happened yet."""
    paths = {}
    for kind in bad_image_kinds():
        name = kind.file if isinstance(kind.file, bytes) else os.fsencode(kind.file)
        path = folder / os.fsdecode(os.fsencode(prefix) + name)
        kind.write(path)
        paths[kind.name] = path
    return paths


def _content(content: bytes) -> Callable[[Path], None]:
    return lambda path: _write(path, content)


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


_ENCODINGS: dict[str, tuple[str, dict[str, object]]] = {
    "JPEG": ("jpg", {"quality": 95, "subsampling": 0}),
    "progressive JPEG": ("jpg", {"quality": 95, "subsampling": 0, "progressive": True}),
    "PNG": ("png", {}),
    "GIF": ("gif", {}),
    "WebP": ("webp", {"quality": 90}),
    "TIFF": ("tif", {}),
    "LZW TIFF": ("tif", {"compression": "tiff_lzw"}),
}


def _encoded(name: str) -> bytes:
    options = _ENCODINGS[name][1]
    return encoded(sample(), name.split(" ")[-1].upper(), **options)


def _flipped(content: bytes, start: int, count: int = 8) -> bytes:
    damaged = bytearray(content)
    for i in range(start, start + count):
        damaged[i] ^= 0xA5
    return bytes(damaged)


def _damaged() -> Iterator[BadKind]:
    for name, (suffix, _) in _ENCODINGS.items():
        whole = _encoded(name)
        for share in (1, 50, 99):
            cut = whole[: max(1, len(whole) * share // 100)]
            wanted = REPORTED
            if name.endswith("TIFF") and share == 99:
                wanted = DAMAGED  # where tags stand at the end, the pixels may all be there
            label = f"{name} cut at {share} %"
            yield BadKind(label, f"{_slug(label)}.{suffix}", _content(cut), wanted, sample(), 255)
    for name, (suffix, _) in _ENCODINGS.items():
        whole = _encoded(name)
        label = f"{name}, bytes flipped in the header"
        yield BadKind(label, f"{_slug(label)}.{suffix}", _content(_flipped(whole, 0)), REPORTED)
        label = f"{name}, bytes flipped in the body"
        body = _content(_flipped(whole, len(whole) // 2))
        wanted = REPORTED if name == "PNG" else DAMAGED
        yield BadKind(label, f"{_slug(label)}.{suffix}", body, wanted, sample(), 255)
    jpeg = _encoded("JPEG")
    scan = jpeg.index(b"\xff\xda")
    yield BadKind("JPEG cut within a marker", "marker.jpg", _content(jpeg[: scan + 5]), REPORTED)
    yield BadKind("JPEG with rubbish after it", "tail.jpg", _content(jpeg + b"\0" * 999), RIGHT,
                  sample(), 18)  # fmt: skip
    png = _encoded("PNG")
    text = png[:33] + _chunk(b"tEXt", b"Comment\0" + b"x" * 40, crc=1) + png[33:]
    yield BadKind("PNG, wrong checksum of a text", "crc.png", _content(text), REPORTED)
    yield BadKind("PNG of zero width", "zero.png", _content(_png_header(0, 5)), REPORTED)
    yield BadKind("JPEG of zero height", "zero.jpg", _content(_jpeg_sized(WIDTH, 0)), REPORTED)


def _no_images() -> Iterator[BadKind]:
    yield BadKind("empty file", "empty.jpg", _content(b""), REPORTED)
    yield BadKind("zeros", "zeros.jpg", _content(bytes(5000)), REPORTED)
    noise = np.random.default_rng(1).bytes(5000)
    yield BadKind("random bytes", "random.jpg", _content(noise), REPORTED)
    yield BadKind("text", "text.jpg", _content(b"no image\n"), REPORTED)
    page = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
    yield BadKind("HTML named .jpg", "html.jpg", _content(page), REPORTED)
    vector = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>'
    yield BadKind("SVG named .png", "svg.png", _content(vector), REPORTED)
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    yield BadKind("EPS program named .jpg", "eps.jpg", _content(script), REPORTED)
    yield BadKind("PNG named .jpg", "really_png.jpg", _content(_encoded("PNG")), RIGHT, sample())
    yield BadKind("JPEG named .PNG", "really_jpeg.PNG", _content(_encoded("JPEG")), RIGHT,
                  sample(), 18)  # fmt: skip


def _too_large() -> Iterator[BadKind]:
    yield BadKind("PNG bomb, 30,000 × 30,000 declared", "bomb.png",
                  _content(_png_header(30000, 30000)), REPORTED)  # fmt: skip
    yield BadKind("PNG of 30 megapixels", "large.png", _content(_png_header(6000, 5000)), REPORTED)
    yield BadKind("PNG bomb, 2³¹ − 1 wide declared", "wide_bomb.png",
                  _content(_png_header(2**31 - 1, 2**31 - 1)), REPORTED)  # fmt: skip
    yield BadKind("JPEG bomb, 65,535 × 65,535 declared", "bomb.jpg",
                  _content(_jpeg_sized(65535, 65535)), REPORTED)  # fmt: skip
    gif = bytearray(_encoded("GIF"))
    gif[6:10] = b"\xff" * 4
    yield BadKind("GIF bomb, 65,535 × 65,535 declared", "bomb.gif", _content(bytes(gif)), REPORTED)
    canvas = struct.pack("<I", 16382)[:3] * 2
    webp = b"WEBPVP8X" + struct.pack("<I", 10) + b"\0" * 4 + canvas + _encoded("WebP")[12:]
    webp = b"RIFF" + struct.pack("<I", len(webp)) + webp
    yield BadKind("WebP bomb, 16,383 × 16,383 declared", "bomb.webp", _content(webp), REPORTED)
    bitmap = bytearray(encoded(sample(), "BMP"))
    bitmap[18:26] = struct.pack("<ii", 60000, 60000)
    yield BadKind("BMP bomb, 60,000 × 60,000 declared", "bomb.bmp", _content(bytes(bitmap)),
                  REPORTED)  # fmt: skip
    yield BadKind("PPM bomb, 60,000 × 60,000 declared", "bomb.ppm",
                  _content(b"P6 60000 60000 255\n" + bytes(300)), REPORTED)  # fmt: skip
    yield BadKind("TIFF bomb, one tile of 32,000 × 32,000", "tile_bomb.tif",
                  _content(_tiled_tiff(32000)), REPORTED)  # fmt: skip
    png = _encoded("PNG")
    bomb = zlib.compress(bytes(50_000_000), 9)
    text = png[:33] + _chunk(b"zTXt", b"Comment\0\0" + bomb) + png[33:]
    yield BadKind("PNG, 50 MB of compressed text", "text_bomb.png", _content(text), REPORTED)
    profile = png[:33] + _chunk(b"iCCP", b"icc\0\0" + bomb) + png[33:]
    yield BadKind("PNG, 50 MB of compressed colour profile", "icc_bomb.png", _content(profile),
                  REPORTED)  # fmt: skip
    yield BadKind("JPEG, 1 MB of colour profile", "icc.jpg",
                  _content(encoded(sample(), "JPEG", quality=95, subsampling=0,
                                   icc_profile=bytes(1_000_000))), RIGHT, sample(), 18)  # fmt: skip
    yield BadKind("sparse file of 1 TB", "sparse.jpg", _sparse, REPORTED)


def _modes() -> Iterator[BadKind]:
    yield BadKind("1 × 1", "one.png", _content(encoded(sample(1, 1), "PNG")), RIGHT, sample(1, 1))
    yield BadKind("65,535 × 1", "wide.png", _content(encoded(sample(65535, 1), "PNG")), RIGHT,
                  sample(65535, 1))  # fmt: skip
    yield BadKind("1 × 3,000", "tall.png", _content(encoded(sample(1, 3000), "PNG")), RIGHT,
                  sample(1, 3000))  # fmt: skip
    grey = sample().convert("L")
    of_grey = grey.convert("RGB")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    wide = Image.fromarray(np.asarray(grey).astype(np.int32) * 257)
    unit = Image.fromarray(np.asarray(grey).astype(np.float32) / 255)
    large = Image.fromarray(np.asarray(grey).astype(np.float32) * 9)
    holes = np.asarray(grey).astype(np.float32) / 255
    holes[3, 3] = np.nan
    alpha = sample()
    alpha.putalpha(grey)
    palette = sample().quantize(16)
    rgb_deep = np.asarray(sample()).astype(">u2") * 257
    for name, file, image, kind, right, tolerance, options in (
        ("CMYK JPEG", "cmyk.jpg", sample().convert("CMYK"), "JPEG", sample(), 14,
         {"quality": 95, "subsampling": 0}),
        ("CMYK TIFF", "cmyk.tif", sample().convert("CMYK"), "TIFF", sample(), 2, {}),
        ("grey", "grey.jpg", grey, "JPEG", of_grey, 12, {"quality": 95}),
        ("grey with alpha", "la.png", grey.convert("LA"), "PNG", of_grey, 0, {}),
        ("RGBA", "rgba.png", alpha, "PNG", sample(), 0, {}),
        ("1 bit", "bit.png", grey.convert("1"), "PNG", grey.convert("1").convert("RGB"), 0, {}),
        ("palette", "p.png", palette, "PNG", palette.convert("RGB"), 0, {}),
        ("palette with transparency", "pt.png", palette, "PNG", palette.convert("RGB"), 0,
         {"transparency": bytes(range(16))}),
        ("16-bit PNG", "deep.png", deep, "PNG", of_grey, 1, {}),
        ("16-bit TIFF", "deep.tif", deep, "TIFF", of_grey, 1, {}),
        ("32-bit integer TIFF", "integer.tif", wide, "TIFF", of_grey, 1, {}),
        ("floating-point TIFF in 0 … 1", "float.tif", unit, "TIFF", of_grey, 1, {}),
        ("JPEG 2000", "a.jp2", sample(), "JPEG2000", sample(), 4, {}),
        ("floating-point TIFF beyond 1", "float_large.tif", large, "TIFF", None, 0, {}),
        ("floating-point TIFF with NaN", "nan.tif", Image.fromarray(holes), "TIFF", None, 0, {}),
    ):  # fmt: skip
        wanted = REPORTED if right is None else RIGHT
        yield BadKind(name, file, _content(encoded(image, kind, **options)), wanted, right,
                      tolerance)  # fmt: skip
    rows = b"".join(b"\0" + row.tobytes() for row in rgb_deep)
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 2, 0, 0, 0)
    png = _png((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    yield BadKind("16-bit RGB PNG", "deep_rgb.png", _content(png), RIGHT, sample(), 1)


def _animated() -> Iterator[BadKind]:
    frames = [sample(seed=1), sample().rotate(180)]
    first = sample().quantize(256).convert("RGB")
    gif = encoded(sample(), "GIF", save_all=True, append_images=frames)
    yield BadKind("animated GIF", "moving.gif", _content(gif), RIGHT, first, 60)
    webp = encoded(sample(), "WEBP", save_all=True, append_images=frames, lossless=True)
    yield BadKind("animated WebP", "moving.webp", _content(webp), RIGHT, sample())
    apng = encoded(sample(), "PNG", save_all=True, append_images=frames)
    yield BadKind("animated PNG", "moving.png", _content(apng), RIGHT, sample())
    pages = encoded(sample(), "TIFF", save_all=True, append_images=frames)
    yield BadKind("TIFF of several pages", "pages.tif", _content(pages), RIGHT, sample())


def _metadata() -> Iterator[BadKind]:
    turns = {
        1: (),
        2: (Image.Transpose.FLIP_LEFT_RIGHT,),
        3: (Image.Transpose.ROTATE_180,),
        4: (Image.Transpose.FLIP_TOP_BOTTOM,),
        5: (Image.Transpose.TRANSPOSE,),
        6: (Image.Transpose.ROTATE_90,),  # what is stored, so that a turn of 270 puts it upright
        7: (Image.Transpose.TRANSVERSE,),
        8: (Image.Transpose.ROTATE_270,),
    }
    for number, steps in turns.items():
        stored = sample()
        for step in steps:
            stored = stored.transpose(step)
        exif = Image.Exif()
        exif[0x0112] = number
        content = encoded(stored, "JPEG", exif=exif, quality=95, subsampling=0)
        name = f"EXIF orientation {number}"
        yield BadKind(name, f"exif_{number}.jpg", _content(content), RIGHT, sample(), 18)
    stored = sample().transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind, suffix in (("PNG", "png"), ("TIFF", "tif"), ("WEBP", "webp")):
        options = {"lossless": True} if kind == "WEBP" else {}
        content = encoded(stored, kind, exif=exif, **options)
        name = f"EXIF orientation 6 in {kind}"
        yield BadKind(name, f"exif_6.{suffix}", _content(content), RIGHT, sample())
    for name, damaged in (
        ("cut", exif.tobytes()[:12]),
        ("random", b"Exif\0\0" + np.random.default_rng(0).bytes(99)),
        ("with an endless directory", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 40),
    ):
        content = encoded(sample(), "JPEG", exif=damaged, quality=95, subsampling=0)
        yield BadKind(
            f"EXIF {name}", f"{_slug(name)}_exif.jpg", _content(content), RIGHT, sample(), 18
        )


def _file_system() -> Iterator[BadKind]:
    jpeg = _content(_encoded("JPEG"))
    yield BadKind("name that is not UTF-8", b"\xff\xfe\xe9.jpg", jpeg, RIGHT, sample(), 18)
    yield BadKind("name of 200 letters", "n" * 200 + ".jpg", jpeg, RIGHT, sample(), 18)
    yield BadKind("name with a line break", "line\nbreak.jpg", jpeg, RIGHT, sample(), 18)
    yield BadKind("link to nowhere", "dangling.jpg",
                  lambda path: path.symlink_to("nowhere.jpg"), REPORTED)  # fmt: skip
    yield BadKind("link to itself", "loop.jpg", lambda path: path.symlink_to(path.name), REPORTED)
    yield BadKind("link to /dev/zero", "endless.jpg",
                  lambda path: path.symlink_to("/dev/zero"), REPORTED)  # fmt: skip
    yield BadKind("FIFO", "fifo.jpg", os.mkfifo, REPORTED)
    yield BadKind("vanished file", "vanished.jpg", jpeg, REPORTED, late=Path.unlink)
    yield BadKind("became a folder", "folder.jpg", jpeg, REPORTED, late=_become_folder)
    # root may read anything
    wanted = RIGHT if os.geteuid() == 0 else REPORTED
    yield BadKind("no permission to read", "secret.jpg", jpeg, wanted, sample(), 18,
                  late=lambda path: path.chmod(0))  # fmt: skip


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def _chunk(kind: bytes, content: bytes, crc: int | None = None) -> bytes:
    checksum = zlib.crc32(kind + content) if crc is None else crc
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def _png(*chunks: tuple[bytes, bytes]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks)


def _png_header(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return _png((b"IHDR", header), (b"IDAT", zlib.compress(bytes(100_000))), (b"IEND", b""))


def _jpeg_sized(width: int, height: int) -> bytes:
    """A JPEG that says it has this size."""
    content = bytearray(_encoded("JPEG"))
    at = content.index(b"\xff\xc0") + 5
    content[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(content)


def _tiled_tiff(side: int) -> bytes:
    """An image of 16 × 16 in one deflated tile that is declared far larger."""
    data = zlib.compress(bytes(768))
    entries = [
        (256, 3, 16), (257, 3, 16), (258, 3, 8), (259, 3, 8), (262, 3, 2), (277, 3, 3),
        (322, 4, side), (323, 4, side), (324, 4, 8), (325, 4, len(data)),
    ]  # fmt: skip
    directory = struct.pack("<H", len(entries))
    for tag, kind, value in entries:
        directory += struct.pack("<HHII", tag, kind, 1, value)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory + bytes(4)


def _sparse(path: Path) -> None:
    path.write_bytes(_encoded("JPEG"))
    os.truncate(path, 10**12)


def _become_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
