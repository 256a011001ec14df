"""Bad images: what each kind becomes, who stands in, what is reported, when it stops."""

import json
import logging
import multiprocessing
import os
from operator import attrgetter

import numpy as np
import pytest
import torch
from helpers.bad_image_kinds import (
    DAMAGED,
    HEIGHT,
    REPORTED,
    WIDTH,
    bad_image_kinds,
    encoded,
    sample,
    write_bad_images,
)
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

from local_distill import ConfigError, DataError
from local_distill.training import DemoCrop
from local_distill.training.data import BadImages, ImageFiles, ImageLimits, ImageList, decode_image
from local_distill.training.data import decoding as decoding_module
from local_distill.training.data.bad_images import BadImage
from local_distill.training.data.decoding import error_kind
from local_distill.training.data.image_source import stride

KINDS = bad_image_kinds()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_each_kind_is_a_right_image_or_reported(kind, tmp_path):
    path = tmp_path / os.fsdecode(kind.file)
    kind.write(path)
    if kind.late is not None:
        kind.late(path)
    try:
        image, why = decode_image(path), ""
    except Exception as error:  # of any kind: that is what a loader has to live with
        image, why = None, f"{error_kind(error)}: {error}"
    if image is None:
        assert kind.wanted in (REPORTED, DAMAGED), why
        return
    assert kind.wanted != REPORTED
    assert image.mode == "RGB"
    assert image.size == kind.image.size
    off = np.asarray(image).astype(int) - np.asarray(kind.image).astype(int)
    assert np.abs(off).max() <= kind.tolerance
    assert ImageOps.exif_transpose(image).size == image.size  # it is not turned once more


def test_there_are_kinds_enough():
    assert len(KINDS) >= 30
    assert len({kind.name for kind in KINDS}) == len({kind.file for kind in KINDS}) == len(KINDS)


def test_pixels_are_limited_before_decoding(tmp_path, monkeypatch):
    sample().save(tmp_path / "a.png")
    exact, less = ImageLimits(max_pixels=WIDTH * HEIGHT), ImageLimits(WIDTH * HEIGHT - 1)
    assert decode_image(tmp_path / "a.png", exact).size == (WIDTH, HEIGHT)

    def load(_):
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    with pytest.raises(DataError, match=rf"45 × 32 pixels are more than the limit of {less[0]}"):
        decode_image(tmp_path / "a.png", less)
    with pytest.raises(DataError, match="bytes are more than the limit of 99"):
        decode_image(tmp_path / "a.png", ImageLimits(max_bytes=99))
    with pytest.raises(ConfigError, match="max_pixels"):
        ImageFiles(tmp_path, limits=ImageLimits(max_pixels=0))


def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    sample().save(path)
    loaded = decoding_module._loaded

    def slowly(image):
        with path.open("ab") as stream:
            stream.write(b"more")
        return loaded(image)

    monkeypatch.setattr(decoding_module, "_loaded", slowly)
    with pytest.raises(DataError, match="written to while it was read") as error:
        decode_image(path)
    assert error.value.kind == "changed while read"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A function that makes a list of every kind, one in so many, among good images."""
    folder = tmp_path_factory.mktemp("mixed")
    bad = write_bad_images(folder)
    for i in range(10):
        sample(seed=i + 1).save(folder / f"good_{i}.png")

    def make(one_in, step=1):
        names, late = [], []
        for kind in KINDS[::step]:
            names += [f"good_{(7 * len(names) + i) % 10}.png" for i in range(one_in - 1)]
            # a list has one name a line; so this one is reported as missing
            names.append(os.fsdecode(os.path.basename(bad[kind.name])).replace("\n", " "))
            late += [] if kind.late is None else [kind]
        path = folder / f"one_in_{one_in}.txt"
        path.write_bytes(os.fsencode("\n".join(names)))
        for kind in late:
            kind.write(bad[kind.name]) if not bad[kind.name].exists() else None
        return path

    return make


def as_numbers(image):
    return torch.tensor([*image.size, *image.resize((2, 2), Image.Resampling.BOX).tobytes()])


@pytest.mark.parametrize(("one_in", "step", "most_bad"), [(10, 1, 0.2), (100, 4, 0.1)])
def test_no_run_is_lost_to_bad_images(mixed, one_in, step, most_bad, tmp_path):
    path = mixed(one_in, step)
    epochs = {}
    for workers in (0, 2):
        report = tmp_path / f"bad_{workers}.jsonl"
        images = ImageList(path, transform=as_numbers, report=report, most_bad=most_bad)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(3)).tolist()
        loader = DataLoader(
            images, batch_size=50, sampler=order, num_workers=workers,
            multiprocessing_context="fork" if workers else None,
        )  # fmt: skip
        epochs[workers] = torch.cat([batch for batch, _ in loader])
        looked_at, bad = images.bad_images.counts
        assert looked_at == len(images) == one_in * len(KINDS[::step])
        rows = [json.loads(line) for line in report.read_text().splitlines()]
        assert len(rows) == len({row["path"] for row in rows}) == bad
        assert bad >= sum(kind.wanted == REPORTED for kind in KINDS[::step])
        assert all(row["kind"] and row["error"] and row["replaced_by"] for row in rows)
    assert torch.equal(epochs[0], epochs[2])


def test_views_of_all_that_decodes(mixed):
    images = ImageList(mixed(2), most_bad=1.0)
    crop = DemoCrop()
    shapes = {tuple(view.shape) for i in range(1, len(images), 2) for view in crop(images[i][0])[0]}
    assert shapes == {(3, 48, 48), (3, 24, 24)}


def folder_of(tmp_path, good, bad):
    """Good images, then as many empty files."""
    for i in range(good):
        sample(4, 4, seed=i).save(tmp_path / f"a_{i:04d}.png")
    for i in range(bad):
        (tmp_path / f"b_{i:04d}.png").touch()
    return tmp_path


def test_a_stand_in_depends_on_the_data_alone(tmp_path):
    images = ImageFiles(folder_of(tmp_path, 40, 60), most_bad=1.0)
    forwards = [images[i][0].tobytes() for i in range(100)]
    again = ImageFiles(tmp_path, most_bad=1.0)
    assert [again[i][0].tobytes() for i in reversed(range(100))] == forwards[::-1]
    # not one neighbour for all of a bad stretch
    assert len(set(forwards[40:])) > 20
    step = stride(100)
    expected = next(j for k in range(100) if (j := (57 + k * step) % 100) < 40)
    assert forwards[57] == forwards[expected]


def test_labels_are_those_of_the_stand_in(tmp_path):
    for name, bad in (("cat", 0), ("dog", 1)):
        (tmp_path / name).mkdir()
        folder_of(tmp_path / name, 1, bad)
    images = ImageFiles(tmp_path)
    assert images.targets == [0, 1, 1]
    assert images[2][1] == images[(2 + stride(3)) % 3][1]


def test_too_many_bad_images_stop_the_run(tmp_path):
    report = tmp_path / "runs" / "bad.jsonl"
    images = ImageFiles(folder_of(tmp_path, 80, 20), report=report)
    with pytest.raises(DataError) as error:
        [images[i] for i in range(100)]
    message = str(error.value)
    assert "10 of 90 images looked at are bad (11.1%), more than `most_bad`, 0.1" in message
    assert "BadImageError: the file is empty" in message
    assert str(report) in message
    assert "raise `most_bad`" in message
    assert len(report.read_text().splitlines()) == 10


def test_few_bad_images_never_stop_it(tmp_path):
    images = ImageFiles(folder_of(tmp_path, 10, 9))
    for _ in range(2):
        for i in range(19):
            assert images[i][0].size == (4, 4)
    assert images.bad_images.counts == (19, 9)


def test_zero_stands_for_none_at_all(tmp_path):
    images = ImageFiles(folder_of(tmp_path, 3, 1), most_bad=0)
    assert [images[i][1] for i in range(3)] == [0, 0, 0]
    with pytest.raises(DataError, match="1 of 4 images looked at are bad"):
        images[3]
    with pytest.raises(ConfigError, match="most_bad"):
        ImageFiles(tmp_path, most_bad=1.5)


@pytest.mark.parametrize(("start", "workers"), [("fork", 2), ("spawn", 1)])
def test_workers_count_in_common(tmp_path, start, workers):
    """The share is of all workers: of two, each by itself has too few bad images to stop."""
    # a transform that a spawned worker finds without importing this module
    images = ImageFiles(folder_of(tmp_path, 82, 18), transform=attrgetter("size"))
    loader = DataLoader(
        images,
        batch_size=None,
        sampler=range(100),
        num_workers=workers,
        multiprocessing_context=start,
    )
    with pytest.raises(DataError, match=r"are bad \(1\d\.\d%\), more than `most_bad`"):
        list(loader)
    looked_at, bad = images.bad_images.counts
    assert looked_at > 82
    assert bad >= 10


def test_a_resumed_run_reports_nothing_twice(tmp_path):
    report = tmp_path / "bad.jsonl"
    folder_of(tmp_path, 5, 4)
    images = ImageFiles(tmp_path, report=report)
    assert [images[i][1] for i in (5, 6)] == [0, 0]
    before = report.read_bytes()
    report.write_bytes(before + b'{"path": "/killed/whi')
    resumed = ImageFiles(tmp_path, report=report)
    assert [resumed[i][1] for i in (5, 6, 7, 6)] == [0, 0, 0, 0]
    lines = report.read_text().splitlines()
    assert len(lines) == 4
    assert lines[2] == '{"path": "/killed/whi'
    row = json.loads(lines[3])
    assert row["path"].endswith("b_0002.png")
    assert row["index"] == 7
    assert row["kind"] == "empty"
    assert (
        row["replaced_by"] == images.names[(7 + 2 * stride(9)) % 9]
    )  # the next but one: that is bad too


def test_a_report_that_cannot_be_written_is_no_end(tmp_path, caplog):
    images = ImageFiles(folder_of(tmp_path, 2, 1), report=tmp_path)  # a folder
    with caplog.at_level(logging.WARNING):
        assert images[2][0].size == (4, 4)
    assert "cannot be written" in caplog.text
    assert images.bad_images.counts == (2, 1)


def test_the_log_does_not_drown(tmp_path, caplog):
    images = ImageFiles(folder_of(tmp_path, 40, 60), most_bad=1.0)
    with caplog.at_level(logging.WARNING):
        assert len([images[i] for i in range(100)]) == 100
    assert len(caplog.records) == 21
    assert "go to `report`" in caplog.records[-1].message


def count_some(account, start):
    for i in range(start, 3000, 3):
        account.good(i)
        if i % 30 == start:
            account.bad([BadImage(i, f"{i}", "broken", "cut")], None)


def test_counts_of_several_processes(tmp_path):
    account = BadImages(3000, report=tmp_path / "bad.jsonl", most_bad=1.0)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=count_some, args=(account, start)) for start in (0, 1, 2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert account.counts == (3000, 300)
    rows = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert sorted(row["index"] for row in rows) == [i for i in range(3000) if i % 30 < 3]


def test_bytes_are_decoded_as_files_are():
    assert np.array_equal(np.asarray(decode_image(encoded(sample(), "PNG"))), np.asarray(sample()))
    with pytest.raises(DataError, match="none of JPEG"):
        decode_image(b"no image")
