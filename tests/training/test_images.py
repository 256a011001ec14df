import json
import logging

import pytest
from PIL import Image

from local_distill import DataError
from local_distill.training import ImageFiles
from local_distill.training.data.image_source import stride


def picture(path, color=(200, 10, 10), mode="RGB", **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 7), color).convert(mode).save(path, **kwargs)


def test_class_folders_and_flat_ones(tmp_path):
    picture(tmp_path / "dog" / "deep" / "b.png")
    picture(tmp_path / "dog" / "a.JPG")
    picture(tmp_path / "cat" / "c.webp")
    (tmp_path / "empty").mkdir()
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    picture(tmp_path / "dog" / "._b.png")
    files = ImageFiles(tmp_path)
    assert files.classes == ["cat", "dog"]
    assert files.targets == [0, 1, 1]
    assert [path.name for path in files.paths] == ["c.webp", "a.JPG", "b.png"]
    flat = ImageFiles(tmp_path / "cat", transform=lambda image: image.size)
    assert flat.classes == []
    assert flat[0] == ((9, 7), 0)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "CMYK", "I;16"])
def test_any_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode in ("CMYK", "I;16") else "a.png")
    image = Image.new("L", (9, 7), 200)
    image = Image.new("I;16", (9, 7), 51200) if mode == "I;16" else image.convert(mode)
    image.save(path)
    found, _ = ImageFiles(tmp_path)[0]
    assert found.mode == "RGB"
    assert found.size == (9, 7)
    if mode == "I;16":  # 51,200 of 65,535 is light grey, not clipped to white
        assert 195 <= found.getpixel((0, 0))[0] <= 205


def test_exif_rotation_is_undone(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (9, 7)).save(tmp_path / "a.jpg", exif=exif)
    assert ImageFiles(tmp_path)[0][0].size == (7, 9)


def bad_files(folder):
    picture(folder / "b_cut.jpg")
    whole = (folder / "b_cut.jpg").read_bytes()
    (folder / "b_cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "c_empty.png").write_bytes(b"")
    (folder / "d_text.jpg").write_text("<html>not found</html>")
    return 3


def test_bad_files_are_reported_and_replaced(tmp_path, caplog):
    picture(tmp_path / "a.png", (1, 2, 3))
    count = bad_files(tmp_path)
    picture(tmp_path / "e.png", (4, 5, 6))
    files = ImageFiles(tmp_path, report=tmp_path / "bad.jsonl")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            colors = [files[i][0].getpixel((0, 0)) for i in range(5)]
            # the next readable one in steps of 3 stands in, the same every time
            assert stride(5) == 3
            assert colors == [(1, 2, 3), (4, 5, 6), (1, 2, 3), (4, 5, 6), (4, 5, 6)]
    lines = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert len(lines) == count == len(caplog.records)
    assert all(line["error"] for line in lines)
    assert "b_cut.jpg" in caplog.text


def test_a_vanished_file_is_a_bad_file(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", (4, 5, 6))
    files = ImageFiles(tmp_path)
    (tmp_path / "a.png").unlink()
    assert files[0][0].getpixel((0, 0)) == (4, 5, 6)


def test_a_decompression_bomb_is_not_decoded(tmp_path, monkeypatch):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", (4, 5, 6))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)  # of 63: a warning by itself
    with pytest.raises(DataError, match="2 images in a row"):
        ImageFiles(tmp_path)[0]


def test_nothing_to_read(tmp_path):
    with pytest.raises(DataError, match="not a folder"):
        ImageFiles(tmp_path / "nowhere")
    with pytest.raises(DataError, match="found none"):
        ImageFiles(tmp_path)
    bad_files(tmp_path)
    with pytest.raises(DataError, match=r"3 images in a row.*are these images"):
        ImageFiles(tmp_path)[0]
