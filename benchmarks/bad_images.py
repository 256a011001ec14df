"""What becomes of bad images, and what memory a loader's worker needs.

    python benchmarks/bad_images.py table     # a Markdown table: each kind, what came of it
    python benchmarks/bad_images.py pixels    # peak memory of one large image, by format
    python benchmarks/bad_images.py workers   # memory of workers over bad and large images
    python benchmarks/bad_images.py paths     # memory of workers over a million paths
    python benchmarks/bad_images.py index     # time to list a folder, and to index shards

Memory is read from /proc, so it needs Linux. Each figure comes from processes of its own.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from helpers.bad_image_kinds import bad_image_kinds, encoded, sample, write_bad_images

from local_distill.training.data import ImageFiles, ImageSource, ShardImages, decode_image
from local_distill.training.data.decoding import _SHARES, DEFAULT_LIMITS, error_kind
from local_distill.training.data.packed_names import PackedNames

# 24.96 megapixels: below the limit of 25.
SIDE = (5760, 4333)


def table() -> None:
    """Decode every kind, each in a process with a time limit."""
    print("| kind | what came of it |\n|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        paths = write_bad_images(Path(folder))
        for kind in bad_image_kinds():
            if kind.late is not None:
                kind.late(paths[kind.name])
            with multiprocessing.get_context("fork").Pool(1) as pool:
                outcome = pool.apply_async(judge, (kind.name, paths[kind.name])).get(timeout=20)
            print(f"| {kind.name} | {outcome} |", flush=True)


def judge(name: str, path: Path) -> str:
    kind = next(kind for kind in bad_image_kinds() if kind.name == name)
    try:
        image = decode_image(path)
    except Exception as error:
        return f"reported: {error_kind(error)}"
    if kind.image is None or image.size != kind.image.size or image.mode != "RGB":
        return f"WRONG: {image}"
    off = np.abs(np.asarray(image).astype(int) - np.asarray(kind.image).astype(int)).max()
    if off <= kind.tolerance and kind.wanted == "right":
        return "right"
    return "an image of the right size, some pixels wrong" if kind.wanted == "damaged" else "WRONG"


def large_images() -> dict[str, Callable[[], bytes]]:
    """Images just below the pixel limit, in the formats that take the most memory."""

    def of(kind: str, mode: str = "RGB", **options: Any) -> Callable[[], bytes]:
        share = _SHARES.get(kind, 1)
        return lambda: encoded(big(share).convert(mode), kind, **options)

    def deep(dtype: type, kind: str, factor: float) -> Callable[[], bytes]:
        return lambda: encoded(
            Image.fromarray((np.asarray(big().convert("L"), np.float32) * factor).astype(dtype)),
            kind,
        )

    turned = Image.Exif()
    turned[0x0112] = 6
    made = {
        "JPEG": of("JPEG"),
        "JPEG, turned by EXIF": of("JPEG", exif=turned),
        "JPEG, progressive, 4:4:4": of("JPEG", progressive=True, subsampling=0),
        "JPEG, CMYK": of("JPEG", "CMYK"),
        "PNG": of("PNG", compress_level=1),
        "PNG, RGBA": of("PNG", "RGBA", compress_level=1),
        "PNG, palette": of("PNG", "P", compress_level=1),
        "PNG, 1 bit": of("PNG", "1"),
        "PNG, 16 bit": deep(np.uint16, "PNG", 257),
        "WebP": of("WEBP", method=0),
        "WebP, turned by EXIF": of("WEBP", method=0, exif=turned),
        "WebP, lossless with alpha": of("WEBP", "RGBA", method=0, lossless=True),
        "GIF": of("GIF"),
        "TIFF": of("TIFF"),
        "TIFF, LZW": of("TIFF", compression="tiff_lzw"),
        "TIFF, CMYK": of("TIFF", "CMYK", compression="tiff_lzw"),
        "TIFF, 32-bit float": deep(np.float32, "TIFF", 1 / 255),
        "BMP": of("BMP"),
    }
    if features.check("jpg_2000"):
        made["JPEG 2000"] = of("JPEG2000")
    if features.check("avif"):
        made["AVIF"] = of("AVIF", speed=10)
    return made


def big(share: float = 1) -> Image.Image:
    side = [int(length * share**0.5) for length in SIDE]
    return sample(720, 480).resize(side, Image.Resampling.BICUBIC)


def pixels() -> None:
    """Peak memory above that before, per format, each in a fresh process."""
    print("| format | megapixels | file, MiB | peak, MiB | time, s |\n|---|---|---|---|---|")
    for name, make in large_images().items():
        with tempfile.NamedTemporaryFile(suffix=".image") as file:
            file.write(make())
            file.flush()
            command = [sys.executable, __file__, "--decode", file.name]
            peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            size = os.path.getsize(file.name) / 2**20
            with Image.open(file.name) as image:
                million = image.width * image.height / 1e6
        print(f"| {name} | {million:.1f} | {size:.0f} | {peak.strip()} |", flush=True)


def decode_one(path: str) -> None:
    from torchvision.transforms.v2 import functional

    decode_image(encoded(sample(), "PNG"))
    before, start = status("VmRSS"), time.perf_counter()
    image = decode_image(path)
    seconds = time.perf_counter() - start
    functional.resized_crop(image, 10, 10, 500, 500, [224, 224])
    print(f"{(status('VmHWM') - before) / 2**20:.0f} | {seconds:.2f}")


class Measured(Dataset[tuple[int, int, int, int]]):
    """Reads an image; gives the worker, its memory before and at its peak, and what is its own."""

    def __init__(self, images: ImageSource) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, int, int, int]:
        before = status("VmRSS")
        self.images[index]
        return os.getpid(), before, status("VmHWM"), private()


def workers() -> None:
    """Two workers over a folder of all bad kinds and of large images, twice over."""
    with tempfile.TemporaryDirectory() as folder:
        # in another process, for a fork inherits the peak of this one
        maker = multiprocessing.get_context("spawn").Process(target=make_folder, args=(folder,))
        maker.start()
        maker.join()
        report = Path(folder, "bad_images.jsonl")
        images = ImageFiles(folder, most_bad=1.0, report=report)
        for kind in bad_image_kinds():
            if kind.late is not None:
                kind.late(Path(folder, os.fsdecode(kind.file)))
        for start in ("fork", "spawn"):
            order = [i for _ in range(2) for i in range(len(images))]
            loader = DataLoader(
                Measured(images), batch_size=None, sampler=order, num_workers=2,
                multiprocessing_context=start,
            )  # fmt: skip
            rows = [tuple(int(value) for value in row) for row in loader]
            for pid in sorted({row[0] for row in rows}):
                own = [row[1:] for row in rows if row[0] == pid]
                before, _, last = own[0][0], *own[-1][1:]
                peak = max(row[1] for row in own) - before
                print(
                    f"{start}: a worker over {len(own)} images: {before / 2**20:.0f} MiB before "
                    f"them, at most {peak / 2**20:.0f} MiB more, {last / 2**20:.0f} MiB of its own "
                    "at the end"
                )
        print(f"{len(images)} files, {len(report.read_text('utf-8').splitlines())} reported")


def make_folder(folder: str) -> None:
    write_bad_images(Path(folder))
    for i, make in enumerate(large_images().values()):
        Path(folder, f"large_{i}.jpg").write_bytes(make())


class Names(Dataset[int]):
    """Looks at one path and gives the worker's private memory."""

    def __init__(self, names: Sequence[str] | PackedNames) -> None:
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> int:
        assert self.names[index]
        return private() if index == len(self.names) - 1 else 0


def paths(count: int = 1_000_000) -> None:
    """A list of paths against `PackedNames`, after a worker has looked at each once."""
    made = [f"train/n{i // 1300:08d}/n{i // 1300:08d}_{i}.JPEG" for i in range(count)]
    for name, names in (("none", made[:1]), ("PackedNames", PackedNames(made)), ("list", made)):
        loader = DataLoader(
            Names(names), batch_size=1000, num_workers=1, multiprocessing_context="fork"
        )
        most = max(int(batch.max()) for batch in loader)
        print(f"{name}: {most / 2**20:.0f} MiB private in a worker after {len(names):,} paths")


def index(files: int = 100_000, shards: int = 20, samples: int = 5_000) -> None:
    """Seconds to list a folder and to index shards; the images are tiny, the headers real."""
    content = encoded(sample(), "JPEG")
    with tempfile.TemporaryDirectory() as folder:
        for i in range(files):
            path = Path(folder, f"{i % 100:03d}", f"{i}.jpg")
            path.parent.mkdir(exist_ok=True)
            path.touch()
        start = time.perf_counter()
        ImageFiles(folder)
        print(f"listing {files:,} files in 100 folders: {time.perf_counter() - start:.2f} s")
    with tempfile.TemporaryDirectory() as folder:
        for shard in range(shards):
            with tarfile.open(f"{folder}/{shard:04d}.tar", "w") as tar:
                for i in range(samples):
                    for suffix, data in ((".jpg", content), (".cls", b"3")):
                        member = tarfile.TarInfo(f"{shard * samples + i}{suffix}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
        start = time.perf_counter()
        images = ShardImages(folder)
        print(f"indexing {len(images):,} samples of two members in {shards} shards: "
              f"{time.perf_counter() - start:.2f} s")  # fmt: skip
        start = time.perf_counter()
        for i in range(0, len(images), 50):
            images._source(i)
        seconds = (time.perf_counter() - start) / (len(images) / 50)
        print(f"reading one: {seconds * 1e6:.0f} µs")


def status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def private() -> int:
    """Bytes that this process shares with no other."""
    rows = Path("/proc/self/smaps_rollup").read_text("ascii").splitlines()
    return sum(int(row.split()[1]) for row in rows if row.startswith("Private_")) * 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = {
        "table": table,
        "pixels": pixels,
        "workers": workers,
        "paths": paths,
        "index": index,
    }
    parser.add_argument("what", nargs="*", choices=[*commands, []], help="all, if left out")
    parser.add_argument("--decode", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.decode:
        decode_one(arguments.decode)
    else:
        print(f"limits: {DEFAULT_LIMITS}")
        for what in arguments.what or commands:
            commands[what]()
