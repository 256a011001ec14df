"""The page of a run, as a browser and as an attacker would read it."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from PIL import Image

from local_distill.errors import ConfigError, DataError
from local_distill.training.report import report
from local_distill.training.report.curves import Curve, curve_svg, metric_panels
from local_distill.training.report.evaluations import evaluation_html, side_by_side
from local_distill.training.report.health import find
from local_distill.training.report.html import image_uri
from local_distill.training.report.page import page
from local_distill.training.report.read_run import read_run

EVIL = "<script>alert(1)</script>"
VOID = {"meta", "link", "img", "input", "br", "hr", "wbr"}


class Reader(HTMLParser):
    """Refuses what is not closed, and keeps texts, tags and addresses."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.texts, self.addresses, self.ids = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href", "data")]
        self.ids += [value for name, value in attrs if name == "id"]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else, at {self.getpos()}"

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)


def read(html):
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    assert len(set(reader.ids)) == len(reader.ids)
    return reader


def lines(count=40, **more):
    return [
        {
            "step": 5 * i,
            "epoch": round((5 * i - 1) / 20, 4),
            "loss": 5.5 - 0.03125 * i,
            "global_loss": 5.6 - 0.02 * i,
            "local_loss": 5.4 - 0.04 * i,
            "coverage": 0.75,
            "teacher_entropy": 4.0,
            "lr": 0.001,
            "gradient_norm": 1.5,
            **more,
        }
        for i in range(1, count + 1)
    ]


def write_metrics(folder, metrics, tail=""):
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in metrics)
    (folder / "metrics.jsonl").write_text(text + tail)
    return folder


def draw(path, size=(80, 60), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


RESULTS = {
    "version": "0.1.0",
    "settings": {"checkpoint": EVIL, "k": 20},
    "numbers": {
        "knn/global_token": 0.7125, "knn/majority": 0.1375, "dense/miou": 0.3375,
        "dense/majority_miou": 0.0555, "correspondence/median": None,
        "correspondence/same_place_median": 1.25, "correspondence/chance_median": 2.75,
        "knn/global_token_strength": 0.5, "layers/knn/global_token/1": 0.2125,
    },
    "layers": {"knn/global_token": [0.2125, 0.5125, 0.7125]},
    "counts": {"train": 2000},
    "seconds": {"knn": 0.5},
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with every part, whose names are hostile wherever names can be."""
    run = tmp_path_factory.mktemp("runs") / "a <b>run & more"
    metrics = lines()
    metrics[3]["loss"] = math.nan
    for line in metrics:
        line[EVIL] = 0.125
    write_metrics(run, metrics, tail='{"step": 999, "lo')
    settings = {
        "method": {
            "class_path": "local_distill.training.methods.Glsd",
            "init_args": {"head": {"num_prototypes": 256}},
        },
        "backbone": {"name": "tiny_vit", "kwargs": {}},
        "data": f"/photos/{EVIL}",
        "steps": 400,
    }
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    for step in (0, 50, 200):
        for kind in ("matches", "tokens"):
            draw(run / "pictures" / f"step-{step:08d}-{kind}.png", seed=step)
    (run / "pictures" / "step-00000300-matches.png").write_bytes(b"\x89PNG cut off")
    (run / "eval").mkdir()
    (run / "eval" / "scenes.json").write_text(json.dumps(RESULTS))
    (run / "eval" / f"other {EVIL[:8]}.json").write_text(json.dumps({"a": {EVIL: [1, 2.5]}}))
    (run / "eval" / "broken.json").write_text('{"a": ')
    draw(run / "eval" / "scenes-correspondence.png")
    bad = {"path": f"cat/{EVIL}\udcff.jpg", "error": 'it\'s "bad"'}
    (run / "bad_images.jsonl").write_text(json.dumps(bad) + "\n")
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "step-00000200.ckpt").write_bytes(b"0" * 2048)
    return run


@pytest.fixture(scope="module")
def html(whole):
    return report(str(whole)).read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_fetches_nothing(html):
    reader = read(html)
    assert re.search(r"https?://|//[a-z]+\.[a-z]", html.replace("/photos/", "")) is None
    assert all(address.startswith(("data:", "#")) for address in reader.addresses)
    assert "@import" not in html
    assert "url(" not in re.sub(r"url\(#[\w-]+\)", "", html)
    targets = {address[1:] for address in reader.addresses if address.startswith("#")}
    assert targets <= set(reader.ids)
    policies = [a["content"] for tag, a in reader.tags if a.get("http-equiv")]
    assert policies[0].startswith("default-src 'none'")
    assert ("meta", {"charset": "utf-8"}) in reader.tags
    assert any(a.get("name") == "viewport" for _, a in reader.tags)


def test_names_do_not_become_markup(html):
    reader = read(html)
    assert [tag for tag, _ in reader.tags].count("script") == 1  # its own
    assert "alert" not in re.findall(r"<script>(.*?)</script>", html, re.DOTALL)[0]
    head = html[: html.index("<nav")]
    assert "<b>" not in head
    assert "a &lt;b&gt;run &amp; more" in head
    text = " ".join(reader.texts)
    assert text.count(EVIL) >= 5  # metric, data, evaluation, settings of it, bad image
    assert "a <b>run & more" in text
    assert 'it\'s "bad"' in text


def test_the_numbers_of_the_run_are_on_the_page(html):
    text = " ".join(read(html).texts)
    for wanted in (
        "200 of 400", "4.25", "5.545",  # steps, last loss, ln 256
        "Glsd · tiny_vit", "num_prototypes", "256",
        "0.7125", "0.1375", "0.3375", "0.0555", "0.5125",
        "step-00000200.ckpt", "2.0 KiB",
        "first at step 20", "eval/broken.json cannot be read", "step-00000300-matches.png",
        "0.75", "epoch",
    ):  # fmt: skip
        assert wanted in text, wanted


def test_pictures_can_be_stepped_through(html):
    reader = read(html)
    steps = [a["data-step"] for tag, a in reader.tags if "data-step" in a]
    assert steps == ["step 0", "step 50", "step 200"] * 2
    shown = [a for tag, a in reader.tags if tag == "img"]
    assert len(shown) == 7  # and a plot of the evaluation
    assert all(a["alt"] and a["src"].startswith("data:image/") for a in shown)
    assert sum(tag == "input" for tag, _ in reader.tags) == 2


def test_the_same_run_gives_the_same_page(whole, html):
    assert page(read_run(whole)) == html


def test_a_run_with_metrics_alone(tmp_path):
    run = write_metrics(tmp_path / "run", [{"step": 1, "loss": 2.5}])
    target = report(str(run), str(tmp_path / "new" / "page.html"))
    assert target == tmp_path / "new" / "page.html"
    text = " ".join(read(target.read_text(encoding="utf-8")).texts)
    for wanted in (
        f"no evaluation yet: local-distill eval --checkpoint {run}", "no pictures yet",
        "no checkpoint yet", "no settings", "None were reported", "too few to judge by", "2.5",
    ):  # fmt: skip
        assert wanted in text, wanted
    assert list(run.iterdir()) == [run / "metrics.jsonl"]
    assert [path.name for path in target.parent.iterdir()] == ["page.html"]


def test_what_holds_no_run_is_refused(tmp_path):
    with pytest.raises(DataError, match="not a folder"):
        report(str(tmp_path / "none"))
    with pytest.raises(DataError, match="no metrics"):
        report(str(tmp_path))
    for text in ("", '{"step": 1, "lo', "[1, 2]\nnonsense\n", '{"loss": 2}\n'):
        (tmp_path / "metrics.jsonl").write_text(text)
        with pytest.raises(DataError, match="no metrics"):
            report(str(tmp_path))
    write_metrics(tmp_path, lines(3))
    with pytest.raises(ConfigError, match=r"\.html"):
        report(str(tmp_path), "page.pdf")
    with pytest.raises(ConfigError, match="cannot be written"):
        report(str(tmp_path), str(tmp_path / "metrics.jsonl" / "page.html"))


def test_a_resumed_and_damaged_log_is_read(tmp_path):
    metrics = [{"step": 10, "loss": 1.0}, {"step": 20, "loss": 2.0}, {"step": 20, "loss": 3.0}]
    run = write_metrics(tmp_path, metrics, tail='nonsense\n{"step": 15, "loss": 4.0}\n{"st')
    (run / "config.yaml").write_text("a: [1\n")
    (run / "bad_images.jsonl").write_text("")
    found = read_run(run)
    assert [(line["step"], line["loss"]) for line in found.metrics] == [(10, 1), (15, 4), (20, 3)]
    assert found.problems[0] == "metrics.jsonl: 1 of 6 lines cannot be read"
    assert "config.yaml" in found.problems[1]
    assert found.bad_images == []


@pytest.mark.parametrize(
    ("more", "level", "title"),
    [
        ({}, "good", "No collapse in teacher_entropy"),
        ({"teacher_entropy": 0.001}, "bad", "Collapse: teacher_entropy is near 0"),
        ({"teacher_entropy": 0.001, "marginal_entropy": 5.0}, "good", "No collapse in"),
        ({"marginal_entropy": 0.01}, "bad", "Collapse: marginal_entropy is near 0"),
        ({"marginal_entropy": 4.0, "information": 0.0}, "bad", "Collapse: information"),
        ({"teacher_entropy": 5.54, "teacher_kl": 0.005}, "bad", "teacher_entropy is near ln c"),
        ({"feature_std": 0.01}, "bad", "Collapse: feature_std"),
        ({"coverage": 0.0}, "bad", "coverage is 0"),
        ({"coverage": 0.01}, "note", "coverage is small"),
        ({"gradient_norm": 0.0}, "bad", "The gradient is 0"),
        ({"gradient_norm": math.inf}, "note", "The gradient was not finite"),
        ({"loss": 4.0}, "note", "The loss did not fall"),
        ({"loss": math.nan}, "bad", "loss is not finite"),
        ({"skipped_steps": 3}, "note", "Steps were skipped"),
    ],
)
def test_health(tmp_path, more, level, title):
    found = find(read_run(write_metrics(tmp_path, lines(**more))))
    told = [one for one in found if title in one.title]
    assert [one.level for one in told] == [level]
    if level == "bad":
        assert found[0] == told[0]  # the worst first
    assert more or all(one.level == "good" or "checkpoint" in one.title for one in found)


def test_the_prototypes_may_come_from_the_settings(tmp_path):
    run = write_metrics(tmp_path, lines(teacher_entropy=math.log(16) - 1e-3))
    assert "No collapse" in str(find(read_run(run)))
    (run / "config.yaml").write_text("head: {num_prototypes: 16}\n")
    assert "near ln c" in find(read_run(run))[0].title


def drawn_points(svg, number):
    """Points of a line, in the picture's own units."""
    path = re.search(rf'<path d="([^"]*)"[^>]*stroke: var\(--line-{number}\)', svg)[1]
    return np.array([[float(v) for v in pair] for pair in re.findall(r"([\d.]+) ([\d.]+)", path)])


def test_curves_are_true_to_the_numbers():
    x, y = np.array([0, 10, 20, 40]), np.array([1.0, 3.0, 2.0, 5.0])
    svg = curve_svg([Curve("a", list(zip(x, y, strict=True)))])
    points = drawn_points(svg, 0)
    across = (points[:, 0] - points[0, 0]) / (points[-1, 0] - points[0, 0])
    up = (points[:, 1] - points[0, 1]) / (points[-1, 1] - points[0, 1])
    np.testing.assert_allclose(across, x / 40, atol=1e-4)
    np.testing.assert_allclose(up, (y - 1) / 4, atol=1e-4)
    assert "http" not in svg
    assert "--ink" in svg


def test_long_curves_are_thinned_and_odd_values_marked():
    rng = np.random.default_rng(0)
    values = 2 + rng.random(20_001)
    values[[5, 17_000]] = math.nan, math.inf
    svg = curve_svg([Curve("long", list(enumerate(values)))], epochs=(0.01, 0.0))
    assert len(svg) < 60_000
    points = drawn_points(svg, 0)
    assert 300 < len(points) <= 400
    assert len(re.findall(r"<use ", svg.partition("--line-0")[0] + svg)) > 2
    assert ">epoch<" in svg
    only = curve_svg([Curve("nothing finite", [(1, math.nan)]), Curve("empty", [])])
    assert only.startswith("<svg")


def test_each_metric_is_drawn_once():
    metrics = lines(teacher_kl=1.0, queue_size=7, said="a text", flag=True)
    panels = metric_panels(metrics)
    names = [curve.name for panel in panels for curve in panel.curves]
    assert sorted(names) == sorted(set(metrics[0]) - {"step", "epoch", "said", "flag"})
    assert panels[0].title == "Loss"
    assert [curve.name for curve in panels[0].curves] == ["loss", "global_loss", "local_loss"]
    assert panels[-1].title == "queue_size"


def rows(html):
    return [
        re.sub(r"<[^>]+>", "|", row).strip("|").replace("||", "|").split("|")
        for row in re.findall(r"<tr>(.*?)</tr>", html)
    ]


def test_results_of_eval_stand_beside_the_level_of_no_features():
    html = evaluation_html(RESULTS)
    wanted = [
        ["task", "measure", "value", "without features", "same place"],
        ["knn", "global token", "0.7125", "0.1375"],
        ["dense", "miou", "0.3375", "0.0555"],
        ["correspondence", "median", "–", "2.75", "1.25"],
        ["knn", "global token strength", "0.5"],
    ]
    assert rows(html)[: len(wanted)] == wanted
    assert ["layer", "1", "2", "3"] in rows(html)
    first, second = np.diff(drawn_points(html, 0)[:, 1])
    np.testing.assert_allclose(first / second, 0.3 / 0.2, rtol=1e-3)
    assert side_by_side({"one": RESULTS}) == ""
    both = rows(side_by_side({"one": RESULTS, "two": RESULTS, "odd": [1]}))
    assert both[0] == ["task", "measure", "one", "two"]
    assert ["knn", "global token", "0.7125", "0.7125"] in both


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ({"a": 0.25, "b": "c"}, ["a", "0.25"]),
        ({"knn": {"x": 1, "y": 2.5}, "linear": {"x": 3}}, ["knn", "1", "2.5"]),
        ([{"layer": 1, "acc": 0.5}, {"layer": 2, "acc": 0.75}], ["2", "0.75"]),
        ({"deep": {"deeper": {"deepest": {"most": {"over": {"n": 4}}}}}}, None),
        ([], None),
        (3.5, ["value", "3.5"]),
        ([1, "two", None], ["1", "two"]),
        ({"long": list(range(1000))}, None),
    ],
)
def test_results_of_any_shape_are_shown(value, wanted):
    html = evaluation_html(value)
    read(html)
    assert wanted is None or wanted in rows(html)


def test_large_pictures_are_reduced(tmp_path):
    draw(tmp_path / "large.png", size=(2400, 600))
    uri, width, height = image_uri(tmp_path / "large.png")
    assert (width, height) == (1100, 275)
    assert len(uri) < (tmp_path / "large.png").stat().st_size / 3


def test_of_many_pictures_evenly_many_are_shown(tmp_path):
    run = write_metrics(tmp_path, lines(3))
    for step in range(60):
        draw(run / "pictures" / f"step-{step:08d}-tokens.png", size=(4, 4))
    html = page(read_run(run))
    steps = [a["data-step"] for _, a in read(html).tags if "data-step" in a]
    assert len(steps) == 24
    assert (steps[0], steps[-1]) == ("step 0", "step 59")
    assert "24 of 60 pictures are shown" in html
