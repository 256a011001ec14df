"""The command line as a person meets it."""

import json
import runpy
import sys

import pytest
import yaml
from PIL import Image

import local_distill
from local_distill.training.checkpoints import load_checkpoint
from local_distill.training.cli import main
from local_distill.training.scenes import SyntheticScenes

TINY = [
    *("--steps", "2", "--batch_size", "4", "--workers", "0", "--scenes.count", "8"),
    *("--scenes.size", "32", "--views", "local_distill.MultiCrop"),
    *("--views.global_size", "16", "--views.local_size", "8"),
    *("--views.local_count", "2", "--pictures", "false"),
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


MATCHER = "local_distill.matching.NearestMatcher"
SMALL_HEAD = [
    *("--method.head.num_prototypes", "16", "--method.head.hidden_dim", "24"),
    *("--method.head.bottleneck_dim", "8"),
]


def test_train_eval_report_export_show(tmp_path, capsys):
    out = tmp_path / "run"
    assert run("train", "--output", out, *TINY, "--pictures", "true") == 0
    assert "step-00000002.ckpt" in capsys.readouterr().out
    assert len(list((out / "pictures").glob("step-00000002-*.png"))) == 2
    assert yaml.safe_load((out / "config.yaml").read_text())["steps"] == 2
    assert run("eval", "--checkpoint", out, "--train_count", 8, "--test_count", 6, "--tasks",
               '["knn"]', "--scenes.size", 32, "--size", 16, "--k", 3) == 0  # fmt: skip
    (found,) = (out / "eval").glob("*.json")
    assert json.loads(found.read_text())
    assert run("report", out) == 0
    page = (out / "report.html").read_text()
    assert "data:image/" in page
    assert run("export", out, tmp_path / "backbone.safetensors") == 0
    assert (tmp_path / "backbone.safetensors").stat().st_size > 1000
    assert run("show", "scenes", "--output", out / "deep" / "m.png", "--checkpoint", out) == 0
    with Image.open(out / "deep" / "m.png") as picture:
        assert min(picture.size) > 500
        assert len(set(picture.convert("L").get_flattened_data())) > 50


def test_the_printed_and_the_kept_config_train(tmp_path, capsys):
    arguments = [*TINY, "--method", "Glsd", *SMALL_HEAD, "--method.matcher", MATCHER,
                 "--method.matcher.max_distance", "0.7"]  # fmt: skip
    with pytest.raises(SystemExit) as left:
        run("train", "--output", tmp_path / "run", *arguments, "--print_config")
    assert left.value.code in (0, None)
    text = capsys.readouterr().out
    settings = yaml.safe_load(text)
    assert settings["method"]["class_path"] == "local_distill.training.methods.Glsd"
    matcher = settings["method"]["init_args"]["matcher"]
    assert matcher["class_path"].endswith("NearestMatcher")
    assert matcher["init_args"]["max_distance"] == 0.7
    (tmp_path / "run.yaml").write_text(text)
    assert run("train", "--config", tmp_path / "run.yaml", "--steps", 1) == 0
    kept = tmp_path / "run" / "config.yaml"
    assert run("train", "--config", kept, "--output", tmp_path / "again") == 0
    one, two = (load_checkpoint(tmp_path / name)["network"] for name in ("run", "again"))
    assert all(one[name].equal(two[name]) for name in one)


def test_views_by_import_path_have_their_own_defaults(capsys):
    with pytest.raises(SystemExit):
        run("train", "--views", "local_distill.MultiCrop", "--views.local_count", 6,
            "--print_config")  # fmt: skip
    views = yaml.safe_load(capsys.readouterr().out)["views"]
    assert views["class_path"].endswith("MultiCrop")
    assert [views["init_args"][name] for name in ("global_size", "local_size", "local_count")] == [
        224, 96, 6
    ]  # fmt: skip


def test_a_matcher_of_ones_own_is_found_in_the_current_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_own_matchers.py").write_text(
        "import local_distill\n\n\nclass Nearest(local_distill.NearestMatcher):\n    pass\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    with pytest.raises(SystemExit):
        run("train", "--method", "Glsd", "--method.matcher", "my_own_matchers.Nearest",
            "--print_config")  # fmt: skip
    method = yaml.safe_load(capsys.readouterr().out)["method"]["init_args"]
    assert method["matcher"]["class_path"] == "my_own_matchers.Nearest"


def test_methods_by_name(tmp_path):
    assert run("train", "--output", tmp_path / "a", *TINY, "--method", "Esvit", *SMALL_HEAD) == 0
    assert run("train", "--output", tmp_path / "b", *TINY, "--method", "Dino", *SMALL_HEAD) == 0
    lines = [
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])
        for name in ("a", "b")
    ]
    assert ["local_loss" in line for line in lines] == [True, False]


def test_a_methods_own_sizes_are_the_published_ones(capsys):
    with pytest.raises(SystemExit):
        run("train", "--method", "Ibot", "--print_config")
    settings = yaml.safe_load(capsys.readouterr().out)["method"]["init_args"]
    assert settings["head"]["num_prototypes"] == 8192
    assert settings["head"]["hidden_dim"] == 2048


def test_resume(tmp_path, capsys):
    out = tmp_path / "run"
    assert run("train", "--output", out, *TINY) == 0
    assert "already holds a run" in refused(capsys, "train", "--output", out, *TINY)
    # the same settings again: nothing left to do, and that is no error
    assert run("train", "--output", out, *TINY, "--resume", "true") == 0
    text = refused(capsys, "train", "--output", out, *TINY, "--optim.lr", "0.5", "--resume", "true")
    assert "optim.lr: 0.002 in the checkpoint, 0.5 now" in text
    # nothing to go on from yet: it starts, so that one command serves for both
    assert run("train", "--output", tmp_path / "new", *TINY, "--resume", "true") == 0


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
    settings = ["--steps", "4", "--most_bad", "0.5"]
    assert run("train", "--data", folder, "--output", out, *TINY, *settings) == 0
    assert "some images could not be read" in capsys.readouterr().err
    lines = (out / "bad_images.jsonl").read_text().splitlines()
    assert ["broken.jpg" in line for line in lines] == [True]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["train", "--stps", "5"], "--stps"),
        (["trian"], "trian"),
        (["train", "--steps", "many"], '"steps"'),
        (["train", "--steps", "0"], "`steps` must be a whole number of at least 1"),
        (["train", "--optim.lr", "-1"], "optim.lr"),
        (["train", "--method", "Glds"], "no 'Glds', did you mean Glsd? There are Adasim, Cribo"),
        (["train", "--method=dino"], "no 'dino', did you mean Dino?"),
        (["train", "--method", "Glsd", "--method.mather", "null"], "mather"),
        (
            [
                "train",
                "--method",
                "Glsd",
                "--method.matcher",
                "local_distill.matching.NearstMatcher",
            ],
            "NearstMatcher",
        ),
        (
            [
                "train",
                "--method",
                "Glsd",
                "--method.matcher",
                MATCHER,
                "--method.matcher.max_distance",
                "-1",
            ],
            "max_distance",
        ),
        (["train", "--method", "Glsd", "--method.temps.teacher", "0"], "temps.teacher"),
        (["train", "--optim.name", "adamz"], "adamz"),
        (["train", "--precision", "16-mixed", "--accelerator", "cpu"], "needs a GPU"),
        (["train", "--steps", "5", "--epochs", "2"], "either `steps` or `epochs`"),
        (["train", "--backbone.name", "vit_smal_patch16_224"], "vit_small_patch16_224"),
        (["train", "--backbone.kwargs", '{"widht": 3}'], "widht"),
        (["train", "--data", "no/such/folder"], "there is no"),
        (["train", "--batch_size", "9999"], "`batch_size` is 9999"),
        (["train", "--views", "local_distill.MultiCrop", "--views.global_size", "4"], "too small"),
        (["eval", "--checkpoint", "no.ckpt"], "no.ckpt"),
        (["eval", "--train_data", "somewhere"], "must both be folders"),
        (["eval", "--tasks", '["knm"]'], "knm"),
        (["report", "no/such/run"], "no/such/run"),
        (["export", "no/such/run", "a.safetensors"], "no/such/run"),
        (["show", "no.jpg"], "there is no file"),
        (["show", "scenes", "--output", "a.gif"], ".png"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_are_answered_in_a_line(tmp_path, monkeypatch, capsys, arguments, text):
    monkeypatch.chdir(tmp_path)
    assert text in refused(capsys, *arguments)
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("train --step 2", "there is no option --step, did you mean --steps?"),
        ("train --lr 0.1", "there is no option --lr, did you mean --optim.lr?"),
        ("train --name=x", "did you mean --backbone.name or --optim.name?"),
        ("train photos", "'photos' stands alone, did you mean --data photos?"),
        ("demo --worker 2", "did you mean --workers? (see local-distill demo --help)"),
        ("show scenes --sed 3", "no option --sed, did you mean --seed? (see local-distill show"),
        ("eval /nope", "'/nope' stands alone, did you mean --checkpoint /nope?"),
        ("show a.png b.png", "'b.png' is one argument too many"),
        ("show", "`show` needs IMAGE: local-distill show IMAGE (see local-distill show --help)"),
        ("export run", "`export` needs TARGET: local-distill export CHECKPOINT TARGET"),
        ("export --checkpoint a --target b", "as in `local-distill export CHECKPOINT TARGET`"),
        ("trian", "there is no command 'trian', did you mean train?"),
        ("", "name a command; there are train, eval,"),
        ("train --method.matcher foo", "`--method.matcher` is a setting of a method, but none is "
         "named before it: --method NAME must come first, as in `local-distill train --method "
         "Glsd --method.matcher local_distill.SimilarityMatcher`; a matcher is named by its"),
        ("train --method.temps.teacher 0", "--method NAME must come first"),
        ("train --method Glsd --method.matcher nearest", "`--method.matcher`: 'nearest' is no "
         "import path, did you mean local_distill.NearestMatcher? In local_distill there are Bil"),
        ("train --method Glsd --method.mather null", "did you mean --method.matcher?"),
        ("bench matchers --quik", "did you mean --quick? (see local-distill bench matchers --help"),
    ],
)  # fmt: skip
def test_typos_are_answered_in_one_line_with_what_was_meant(capsys, arguments, text):
    said = refused(capsys, *arguments.split())
    assert text in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert "NestedArg" not in said


def test_a_setting_after_a_config_without_a_method(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("method: null\n")
    said = refused(capsys, "train", "--config", tmp_path / "run.yaml", "--method.matcher", MATCHER)
    assert "--method NAME must come first" in said


def test_every_name_suggested_for_a_matcher_can_be_given(capsys):
    said = refused(capsys, "train", "--method", "Glsd", "--method.matcher", "foo")
    names = said.partition("there are ")[2].partition(";")[0].split(", ")
    assert "SimilarityMatcher" in names
    assert all(hasattr(local_distill, name) for name in names)


def test_the_package_is_the_command_too(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["local_distill", "bench", "matchers", "--quik"])
    with pytest.raises(SystemExit) as left:
        runpy.run_module("local_distill", run_name="__main__")
    assert left.value.code == 2
    assert "did you mean --quick?" in capsys.readouterr().err


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
