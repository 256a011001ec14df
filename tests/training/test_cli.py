"""The command line as a person meets it."""

import json

import pytest
import yaml
from PIL import Image

from local_distill.training.cli import main
from local_distill.training.scenes import SyntheticScenes

TINY = [
    *("--steps", "2", "--batch_size", "4", "--workers", "0", "--scenes.count", "8"),
    *("--scenes.size", "32", "--views", "local_distill.MultiCrop"),
    *("--views.global_size", "16", "--views.local_size", "8"),
    *("--views.local_count", "2", "--head.num_prototypes", "16", "--head.hidden_dim", "24"),
    *("--backbone.kwargs", '{"img_size": 16, "width": 24, "depth": 1}', "--log_every", "1"),
]


def run(*arguments):
    return main([str(argument) for argument in arguments])


def refused(capsys, *arguments):
    """What a command that must fail prints; a usage error leaves through SystemExit."""
    try:
        status = run(*arguments)
    except SystemExit as error:
        status = error.code
    assert status == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text


def test_train_knn_show(tmp_path, capsys):
    out = tmp_path / "run"
    assert run("train", "--output", out, *TINY) == 0
    checkpoint = out / "last.ckpt"
    assert str(checkpoint) in capsys.readouterr().out
    assert run("knn", "--checkpoint", checkpoint, "--train_count", 8, "--test_count", 6,
               "--scenes.size", 32, "--size", 16, "--k", 3) == 0  # fmt: skip
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found) == {"global_token", "mean_of_tokens"}
    assert all(0 <= value <= 1 for value in found.values())
    assert (
        run("show", "scenes", "--output", out / "deep" / "m.png", "--checkpoint", checkpoint) == 0
    )
    with Image.open(out / "deep" / "m.png") as picture:
        assert min(picture.size) > 500
        assert len(set(picture.convert("L").get_flattened_data())) > 50


def test_the_printed_config_trains(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        run("train", "--output", tmp_path / "run", *TINY, "--matcher.max_distance", "0.7",
            "--print_config")  # fmt: skip
    assert left.value.code in (0, None)
    text = capsys.readouterr().out
    settings = yaml.safe_load(text)
    assert settings["matcher"]["class_path"].endswith("NearestMatcher")
    assert settings["matcher"]["init_args"]["max_distance"] == 0.7
    (tmp_path / "run.yaml").write_text(text)
    assert run("train", "--config", tmp_path / "run.yaml", "--steps", 1) == 0


def test_views_by_import_path_have_their_own_defaults(capsys):
    with pytest.raises(SystemExit):
        run("train", "--views", "local_distill.MultiCrop", "--views.local_count", 6,
            "--print_config")  # fmt: skip
    views = yaml.safe_load(capsys.readouterr().out)["views"]
    assert views["class_path"].endswith("MultiCrop")
    assert [views["init_args"][name] for name in ("global_size", "local_size", "local_count")] == [
        224, 96, 6
    ]  # fmt: skip


def test_matchers_by_import_path_and_none(tmp_path):
    similar = "local_distill.matching.SimilarityMatcher"
    assert run("train", "--output", tmp_path / "a", *TINY, "--matcher", similar) == 0
    assert run("train", "--output", tmp_path / "b", *TINY, "--matcher", "null") == 0
    lines = (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()
    assert "local_loss" not in json.loads(lines[-1])


def test_resume(tmp_path, capsys):
    out = tmp_path / "run"
    assert run("train", "--output", out, *TINY) == 0
    assert "already holds a run" in refused(capsys, "train", "--output", out, *TINY)
    # the same settings again: nothing left to do, and that is no error
    assert run("train", "--output", out, *TINY, "--resume", "true") == 0
    text = refused(capsys, "train", "--output", out, *TINY, "--optim.lr", "0.5", "--resume", "true")
    assert "optim.lr: 0.002 in the checkpoint, 0.5 now" in text
    text = refused(capsys, "train", "--output", tmp_path / "new", *TINY, "--resume", "true")
    assert "is not a file" in text


def photos(folder, count=6):
    for number in range(count):
        target = folder / ("cat", "dog")[number % 2] / f"{number}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        SyntheticScenes(count, (40, 52))[number][0].save(target)
    return folder


def test_a_folder_with_a_corrupt_file(tmp_path, capsys):
    folder = photos(tmp_path / "photos")
    (folder / "cat" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no image")
    out = tmp_path / "run"
    assert run("train", "--data", folder, "--output", out, *TINY, "--steps", "4") == 0
    assert "1 unreadable file(s) were skipped" in capsys.readouterr().err
    lines = (out / "bad_images.jsonl").read_text().splitlines()
    assert [json.loads(line)["path"].endswith("broken.jpg") for line in lines] == [True]
    assert run("knn", "--train_data", folder, "--test_data", folder, "--size", 16, "--k", 1) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["global_token"] == 1.0  # each image finds itself


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["train", "--stps", "5"], "--stps"),
        (["trian"], "trian"),
        (["train", "--steps", "many"], '"steps"'),
        (["train", "--steps", "0"], "`steps` must be a whole number of at least 1"),
        (["train", "--optim.lr", "-1"], "optim.lr"),
        (["train", "--matcher", "local_distill.matching.NearstMatcher"], "NearstMatcher"),
        (["train", "--matcher.max_distance", "-1"], "max_distance"),
        (["train", "--backbone.name", "vit_smal_patch16_224"], "vit_small_patch16_224"),
        (["train", "--backbone.kwargs", '{"widht": 3}'], "widht"),
        (["train", "--data", "no/such/folder"], "not a folder"),
        (["train", "--batch_size", "9999"], "`batch_size` is 9999"),
        (["train", "--views", "local_distill.MultiCrop", "--views.global_size", "4"], "too small"),
        (["knn", "--checkpoint", "no.ckpt"], "no.ckpt"),
        (["knn", "--train_data", "somewhere"], "must both be folders"),
        (["show", "no.jpg"], "there is no file"),
        (["show", "scenes", "--output", "a.gif"], ".png"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_are_answered_in_a_line(tmp_path, monkeypatch, capsys, arguments, text):
    monkeypatch.chdir(tmp_path)
    assert text in refused(capsys, *arguments)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_folders_without_images_or_classes(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "found none" in refused(capsys, "train", "--data", tmp_path / "empty")
    flat = photos(tmp_path / "photos") / "cat"
    text = refused(capsys, "knn", "--train_data", flat, "--test_data", flat)
    assert "flat folder" in text
    other = photos(tmp_path / "other")
    (other / "dog").rename(other / "wolf")
    text = refused(capsys, "knn", "--train_data", tmp_path / "photos", "--test_data", other)
    assert "['cat', 'wolf']" in text


def test_demo(tmp_path, capsys):
    arguments = ["demo", "--output", tmp_path, "--matching", "all", "--steps", 2,
                 "--scenes.count", 40, "--train_count", 30, "--test_count", 20,
                 "--workers", 0]  # fmt: skip
    assert run(*arguments) == 0
    text = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == [
        "raw pixels", "raw pixels less their mean", "random backbone",
        "trained, no local loss", "trained, similarity",
        "trained, geometry",
    ]  # fmt: skip
    for name, row in results.items():
        assert all(f"{value:.3f}" in text for value in row.values()), name
    for picture in ("losses.png", "matches.png"):
        with Image.open(tmp_path / picture) as image:
            assert image.size[0] > 500
    # again: the trainings are done, only the figures are made anew
    assert run(*arguments) == 0
    text = refused(capsys, *arguments[:-2], "--seed", 5)
    assert "seed: 0 in the checkpoint, 5 now" in text
