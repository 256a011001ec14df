"""The command on real photographs, with a corrupt file among them (scikit-image ships some)."""

import json
import shutil
from pathlib import Path

import pytest

from local_distill.training.cli import main

skimage_data = pytest.importorskip("skimage.data", reason="scikit-image is in the extra `dev`")


def test_training_on_photographs(tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    shipped = Path(skimage_data.__file__).parent
    photos = [p for p in shipped.iterdir() if p.suffix in (".png", ".jpg", ".jpeg")]
    assert len(photos) >= 4
    for photo in photos:
        shutil.copy(photo, folder)
    whole = photos[0].read_bytes()
    (folder / "corrupt.jpg").write_bytes(whole[: len(whole) // 3])
    out = tmp_path / "run"
    arguments = ["--steps", "3", "--batch_size", str(len(photos) + 1), "--log_every", "1"]
    assert main(["train", "--data", str(folder), "--output", str(out), *arguments]) == 0
    assert "some images could not be read" in capsys.readouterr().err
    lines = (out / "bad_images.jsonl").read_text().splitlines()  # once, whoever met it
    assert ["corrupt.jpg" in line for line in lines] == [True]
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert all(step["coverage"] > 0.5 for step in steps)
    photo, picture = str(photos[0]), str(out / "m.png")
    assert main(["show", photo, "--output", picture, "--checkpoint", str(out)]) == 0
    assert Path(picture).stat().st_size > 20_000
