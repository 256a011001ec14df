"""Folders, lists, shards and Hugging Face data sets: what each takes for an image and a label."""

import io
import json
import os
import pickle
import sys
import tarfile

import numpy as np
import pytest
from helpers.bad_image_kinds import encoded, sample, write_bad_images
from PIL import Image

from local_distill import ConfigError, DataError, MissingExtraError
from local_distill.training import SyntheticScenes
from local_distill.training.data import (
    HuggingFaceImages,
    ImageFiles,
    ImageLimits,
    ImageList,
    ShardImages,
    open_images,
)
from local_distill.training.data.open_images import _name_and_split
from local_distill.training.options import SceneOptions


def picture(path, color=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), (color, 0, 0)).save(path)


def red(images):
    """The first value of every image, and the labels that come with them."""
    rows = [images[i] for i in range(len(images))]
    return [image.getpixel((0, 0))[0] for image, _ in rows], [label for _, label in rows]


# Folders


def test_a_nested_folder_without_classes(tmp_path, caplog):
    for i, name in enumerate(("a.png", "2020/05/b.png", "2020/c.png", "x/y/z/d.png")):
        picture(tmp_path / name, i)
    picture(tmp_path / ".thumbnails" / "b.png")
    images = open_images(str(tmp_path))
    assert isinstance(images, ImageFiles)
    assert (images.classes, images.targets) == ([], [0] * 4)
    assert red(images)[0] == [1, 2, 0, 3]  # sorted folder by folder
    assert "1 of 4 images lie directly in it" in caplog.text


def test_links_are_followed_once(tmp_path):
    picture(tmp_path / "cat" / "a.png", 1)
    picture(tmp_path.parent / f"{tmp_path.name}_else" / "b.png", 2)
    (tmp_path / "cat" / "up").symlink_to(tmp_path)
    (tmp_path / "cat" / "again.png").symlink_to("a.png")
    (tmp_path / "dog").symlink_to(tmp_path.parent / f"{tmp_path.name}_else")
    images = ImageFiles(tmp_path)
    assert images.classes == ["cat", "dog"]
    assert red(images) == ([1, 1, 2], [0, 0, 1])


def test_a_folder_of_every_bad_kind_is_listed(tmp_path):
    paths = write_bad_images(tmp_path)
    images = ImageFiles(tmp_path)
    assert {os.fsencode(path) for path in images.paths} == {os.fsencode(p) for p in paths.values()}


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    picture(tmp_path / "cat" / "a.png")
    real = os.scandir

    def scandir(path):
        if str(path).endswith("cat"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)  # root may list anything
    with pytest.raises(DataError, match=r"cat' cannot be listed: .*Permission denied"):
        ImageFiles(tmp_path)


def test_some_of_the_images(tmp_path):
    for i, name in enumerate(("cat/a.png", "cat/b.png", "dog/c.png", "dog/d.png")):
        picture(tmp_path / name, i)
    (tmp_path / "dog/d.png").write_bytes(b"")
    images = ImageFiles(tmp_path)
    some = images.select([3, 1]).select([1, 0, 1])
    assert isinstance(some, ImageFiles)
    assert (some.targets, some.classes) == ([0, 1, 0], ["cat", "dog"])
    assert red(some) == ([1, 1, 1], [0, 0, 0])  # stood in for by one of its own
    assert [path.name for path in some.paths] == ["b.png", "d.png", "b.png"]
    assert images.bad_images.counts == (2, 1)
    with pytest.raises(ConfigError, match="from 0 to 3"):
        images.select([4])
    with pytest.raises(IndexError):
        some[3]


# Lists


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("l.txt", "# my images\nb.png\tdog\n\nsub/a.png\tcat\r\n"),
        ("l.tsv", "\ufeffb.png\tdog\nsub/a.png\tcat"),
        ("l.csv", "path,label,size\nb.png,dog,3\n\nsub/a.png,cat,4\n"),
        ("l.csv", 'label,file_name\ndog,"b.png"\ncat,"sub/a.png"\n'),
        ("l.jsonl", '{"path": "b.png", "label": "dog"}\n{"image": "sub/a.png", "label": "cat"}\n'),
    ],
)
def test_lists_with_class_names(tmp_path, name, content):
    picture(tmp_path / "sub" / "a.png", 1)
    picture(tmp_path / "b.png", 2)
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    images = open_images(str(tmp_path / name))
    assert isinstance(images, ImageList)
    assert (images.classes, images.targets) == (["cat", "dog"], [1, 0])
    assert red(images) == ([2, 1], [1, 0])


def test_lists_with_numbers_and_without_labels(tmp_path):
    picture(tmp_path / "a.png", 1)
    odd = os.fsdecode(b"\xff \xe9.png")
    picture(tmp_path / odd, 2)
    whole = os.fsencode(tmp_path / odd)
    (tmp_path / "n.txt").write_bytes(b"a.png\t2\n" + whole + b"\t0\n")
    images = ImageList(tmp_path / "n.txt")
    assert (images.classes, images.targets) == (["0", "1", "2"], [2, 0])
    assert red(images)[0] == [1, 2]
    (tmp_path / "n.jsonl").write_text('{"path": "a.png", "label": 1}\n')
    assert ImageList(tmp_path / "n.jsonl").targets == [1]
    (tmp_path / "p.txt").write_text("a.png\n")
    assert (ImageList(tmp_path / "p.txt").classes, red(ImageList(tmp_path / "p.txt"))[1]) == (
        [],
        [0],
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.txt", "# none\n", "names no image"),
        ("l.txt", "a.png\t1\nb.png\n", r"line 2: no label, but 1 of 2 images have one"),
        (
            "l.csv",
            "picture\na.png\n",
            r"line 2: no path; wanted one of the columns path, .*picture",
        ),
        ("l.jsonl", '{"path": "a.png"}\n{"pa', "line 2: no JSON"),
        ("l.jsonl", "[1]\n", r"line 1: wanted an object"),
    ],
)
def test_lists_that_cannot_be(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        open_images(str(tmp_path / name))


# Shards


def write_shard(path, samples):
    """Members in the order given: {name: bytes}."""
    with tarfile.open(path, "w") as shard:
        for name, content in samples.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    return path


def shard_of(path, numbers, label=True):
    samples = {}
    for i in numbers:
        samples[f"s/{i:04d}.png"] = encoded(Image.new("RGB", (40, 30), (i, 0, 0)), "PNG")
        samples |= {f"s/{i:04d}.cls": f"{i % 3}\n".encode()} if label else {}
    return write_shard(path, samples)


def test_shards_by_braces_pattern_and_folder(tmp_path):
    shard_of(tmp_path / "train-00.tar", range(4))
    shard_of(tmp_path / "train-01.tar", range(4, 7))
    wanted = ([0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 0, 1, 2, 0])
    for data in ("train-{00..01}.tar", "train-*.tar", "."):
        images = open_images(str(tmp_path / data))
        assert isinstance(images, ShardImages)
        assert (red(images), images.targets) == (wanted, wanted[1])
        assert images.classes == ["0", "1", "2"]
    assert images.names[4].endswith("train-01.tar/s/0004.png")
    assert len(ShardImages(tmp_path / "train-01.tar")) == 3


def test_a_folder_with_the_archive_it_came_from(tmp_path):
    shard_of(tmp_path / "cat.tar", range(4))
    picture(tmp_path / "cat" / "a.png", 9)
    assert red(open_images(str(tmp_path))) == ([9], [0])


def test_samples_of_shards(tmp_path):
    content = encoded(sample(), "JPEG")
    path = write_shard(
        tmp_path / "a.tar",
        {
            "a/1.cls": b"2",  # before its image
            "a/1.seg.png": b"of another kind",
            "a/1.JPG": content,
            "a/2.json": b"{}",  # without an image
            "b/1.jpeg": content,
            "b/" + "long" * 40 + ".jpg": content,
            "c.jpg": b"",
        },
    )
    images = ShardImages(path, most_bad=1.0)
    assert [name.rpartition("a.tar/")[2] for name in images.names] == [
        "a/1.JPG", "b/1.jpeg", "b/" + "long" * 40 + ".jpg", "c.jpg",
    ]  # fmt: skip
    assert (images.classes, images.targets) == ([], [0] * 4)  # not all have a label
    assert np.array_equal(np.asarray(images[2][0]), np.asarray(images[0][0]))
    assert images[3][0].size == sample().size
    assert images.bad_images.counts == (3, 1)
    with pytest.raises(DataError, match="more than the limit of 10"):
        ShardImages(path, limits=ImageLimits(max_bytes=10))[0]


def test_damaged_shards_serve_what_they_have(tmp_path):
    whole = shard_of(tmp_path / "a.tar", range(6), label=False).read_bytes()
    header = whole.index(b"s/0003.png")
    report = tmp_path / "bad.jsonl"

    def opened(content):
        report.unlink(missing_ok=True)
        (tmp_path / "a.tar").write_bytes(content)
        images = ShardImages(tmp_path / "a.tar", report=report)
        reds, _ = red(images)
        rows = report.read_text().splitlines() if report.exists() else []
        return reds, [json.loads(row) for row in rows]

    assert opened(whole) == ([0, 1, 2, 3, 4, 5], [])
    reds, rows = opened(whole[:header] + os.urandom(512) + whole[header + 512 :])
    assert reds == [0, 1, 2, 4, 5]
    assert [row["kind"] for row in rows] == ["damaged shard"]
    assert rows[0]["error"] == f"no member in bytes {header:,} … {header + 1024:,}"
    assert rows[0]["index"] is None
    for cut in (header, header + 100):
        reds, rows = opened(whole[:cut])
        assert reds == [0, 1, 2]
        assert [row["kind"] for row in rows] == ["damaged shard"]
        assert rows[0]["error"] == f"cut or damaged after byte {header:,} of {cut:,}"
    reds, rows = opened(whole[: header + 540])  # within an image
    assert (reds[:3], len(reds)) == ([0, 1, 2], 4)
    assert [row["kind"] for row in rows] == ["damaged shard", "broken"]
    assert "bytes too early" in rows[1]["error"]
    # a member's body: its image is bad, and the shard is not
    body = bytearray(whole)
    body[header + 550] ^= 255
    reds, rows = opened(bytes(body))
    assert reds[:3] + reds[4:] == [0, 1, 2, 4, 5]
    assert [row["path"] for row in rows] == [f"{tmp_path}/a.tar/s/0003.png"]
    assert opened(whole + bytes(10240)) == ([0, 1, 2, 3, 4, 5], [])


def test_shards_that_cannot_be(tmp_path):
    with pytest.raises(DataError, match=r"2 of 2 shards .* are not there"):
        open_images(str(tmp_path / "x-{0..1}.tar"))
    with pytest.raises(DataError, match="no shard"):
        open_images(str(tmp_path / "x-*.tar"))
    (tmp_path / "a.tar").write_bytes(b"no tar" * 200)
    shard_of(tmp_path / "b.tar", range(2))
    with pytest.raises(DataError, match=r"no images in 1 shards of .*a\.tar"):
        open_images(str(tmp_path / "a.tar"))
    assert len(open_images(str(tmp_path))) == 2
    (tmp_path / "b.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"plain \.tar files, got .*b\.tar\.gz"):
        open_images(str(tmp_path / "b.tar.gz"))


def test_shards_written_by_webdataset(tmp_path):
    webdataset = pytest.importorskip("webdataset", reason="shards are written by the library")
    with webdataset.ShardWriter(str(tmp_path / "t-%06d.tar"), maxcount=3, verbose=0) as writer:
        for i in range(8):
            image = Image.new("RGB", (4, 3), (i, 0, 0))
            writer.write({"__key__": f"k{i}", "png": image, "cls": i % 2, "txt": "a caption"})
    images = open_images(str(tmp_path / "t-{000000..000002}.tar"))
    assert red(images) == (list(range(8)), [0, 1] * 4)


# Hugging Face


@pytest.mark.parametrize(
    ("text", "name", "split"),
    [
        ("me/pets", "me/pets", None),
        ("me/pets:test", "me/pets", "test"),
        ("me/pets:train[:10%]", "me/pets", "train[:10%]"),
        ("DISK/a:b", "DISK/a:b", None),
        ("DISK/a:b:train[:10%]", "DISK/a:b", "train[:10%]"),
    ],
)
def test_names_and_splits(tmp_path, text, name, split):
    (tmp_path / "a:b").mkdir()
    found = _name_and_split(text.replace("DISK", str(tmp_path)))
    assert found == (name.replace("DISK", str(tmp_path)), split)


@pytest.fixture
def rows():
    datasets = pytest.importorskip("datasets", reason="needs the library")
    features = datasets.Features(
        {
            "id": datasets.Value("int64"),
            "img": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
        }
    )
    pictures = [{"bytes": encoded(Image.new("RGB", (4, 3), (i, 0, 0)), "PNG"), "path": None}
                for i in range(5)]  # fmt: skip
    pictures[3]["bytes"] = b"no image"
    table = {"id": list(range(5)), "img": pictures, "label": [0, 1, 1, 0, None]}
    return datasets.Dataset.from_dict(table, features=features)


def test_hugging_face_rows(rows, tmp_path):
    rows.save_to_disk(tmp_path / "one")
    report = tmp_path / "bad.jsonl"
    images = open_images(f"hf:{tmp_path / 'one'}", report=report)
    assert isinstance(images, HuggingFaceImages)
    assert (images.classes, images.targets) == (["cat", "dog"], [0, 1, 1, 0, -1])
    assert red(images) == ([0, 1, 2, 1, 4], [0, 1, 1, 1, -1])  # 1 stands in for 3
    row = json.loads(report.read_text())
    assert (row["path"], row["kind"]) == (f"{tmp_path / 'one'}[3]", "not an image")
    again = pickle.loads(pickle.dumps(images))
    assert red(again) == red(images)


def test_hugging_face_splits(rows, tmp_path):
    import datasets

    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "a:b")
    assert len(open_images(f"hf:{tmp_path / 'a:b'}")) == 5
    assert red(open_images(f"hf:{tmp_path / 'a:b'}:test")) == ([1], [1])
    with pytest.raises(DataError, match=r"no split 'dev', only train, test"):
        open_images(f"hf:{tmp_path / 'a:b'}:dev")
    datasets.DatasetDict({"x": rows, "y": rows}).save_to_disk(tmp_path / "xy")
    with pytest.raises(DataError, match=r"has the splits x, y: say which"):
        open_images(f"hf:{tmp_path / 'xy'}")
    rows.remove_columns("img").save_to_disk(tmp_path / "none")
    with pytest.raises(DataError, match=r"no column of images, only id: .*label: "):
        open_images(f"hf:{tmp_path / 'none'}")
    rows.remove_columns("label").save_to_disk(tmp_path / "plain")
    assert open_images(f"hf:{tmp_path / 'plain'}").classes == []
    with pytest.raises(DataError, match="cannot be loaded"):
        open_images(f"hf:{tmp_path / 'nowhere'}")


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "braceexpand", None)
    with pytest.raises(MissingExtraError, match=r'pip install "local-distill\[data\]"'):
        open_images("hf:anything")
    with pytest.raises(MissingExtraError, match=r'pip install "local-distill\[data\]"'):
        open_images(str(tmp_path / "x-{0..1}.tar"))


# All


def test_scenes_and_what_is_nothing(tmp_path):
    scenes = open_images("scenes", scenes=SceneOptions(count=3, size=48, seed=2))
    assert isinstance(scenes, SyntheticScenes)
    assert (len(scenes), scenes[0][0].size) == (3, (48, 48))
    with pytest.raises(DataError, match=r"there is no .*nowhere'; give \"scenes\", a folder"):
        open_images(str(tmp_path / "nowhere"))
    (tmp_path / "a.bin").touch()
    with pytest.raises(DataError, match="a file of no known kind"):
        open_images(str(tmp_path / "a.bin"))
    with pytest.raises(ConfigError, match="max_pixels"):
        open_images(str(tmp_path), max_pixels=0)


def test_options_reach_every_source(tmp_path, rows):
    for i in range(4):
        picture(tmp_path / "folder" / f"{i}.png", i)
    (tmp_path / "l.txt").write_text("\n".join(f"folder/{i}.png" for i in range(4)))
    shard_of(tmp_path / "s.tar", range(4))
    rows.save_to_disk(tmp_path / "hf")
    for data in ("folder", "l.txt", "s.tar", "hf:"):
        data = f"hf:{tmp_path / 'hf'}" if data == "hf:" else str(tmp_path / data)
        report = tmp_path / "r.jsonl"
        images = open_images(data, max_pixels=11, report=report, most_bad=0.3, max_bytes=10**6)
        assert images.bad_images.most_bad == 0.3
        assert images.limits == (11, 10**6)
        with pytest.raises(DataError, match="images in a row cannot be read"):
            images[0]
        lines = [json.loads(line) for line in report.read_text().splitlines()]
        assert {line["kind"] for line in lines} <= {"too many pixels", "not an image"}
        assert len(lines) == len(images)
        assert pickle.loads(pickle.dumps(images)).targets == images.targets
        report.unlink()
