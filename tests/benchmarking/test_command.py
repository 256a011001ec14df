"""``local-distill bench`` as a person meets it."""

import pytest
import torch

from local_distill.benchmarking import command, losses, matchers
from local_distill.benchmarking.cases import Case, Work
from local_distill.benchmarking.command import SUITES, Suite, main
from local_distill.benchmarking.report import read_report
from local_distill.training.cli import main as local_distill

# ways that have to be there, and whose they are
WANTED = {
    "matchers": {
        "plain: table of squared distances, min",
        "plain: normalise, multiply, max",
        "torch.cdist, min",
        "NearestMatcher('lattice')",
        "SimilarityMatcher('cosine')",
        "SinkhornMatcher",
        "local_distill.NearestMatcher",
        "local_distill.SimilarityMatcher",
    },
    "losses": {
        "plain",
        "LocalDistillationLoss",
        "LocalDistillationLoss on PrototypeLogits",
        "GlobalDistillationLoss",
        "KoLeoLoss",
        "VICRegLoss",
    },
    "step": {"global loss alone", "PrototypeLogits"},
    "transforms": {"torchvision, no geometry", "torchvision under track", "MultiCrop"},
}
OTHERS = {
    "matchers": {
        "lightly": "Lightly nearest_neighbors",
        "kornia": "kornia DescriptorMatcher('nn')",
    },
    "losses": {"lightly": "Lightly DINOLoss"},
    "step": {},
    "transforms": {"kornia": "kornia, its matrices"},
}


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_quickly(suite, tmp_path, capsys):
    path, picture = tmp_path / "out.json", tmp_path / "out.png"
    own = ["--matcher", "local_distill.NearestMatcher"]
    own += ["--matcher", "local_distill.SimilarityMatcher"]
    status = local_distill(
        ["bench", suite, "--quick", "--repeats", "2", "--json", str(path), "--plot", str(picture),
         *(own if suite == "matchers" else [])]
    )  # fmt: skip
    text = capsys.readouterr().out
    assert status == 0, text
    report = read_report(path)
    ways = {row.way for row in report.rows}
    assert ways >= WANTED[suite]
    for library, way in OTHERS[suite].items():
        assert (way in ways) == (report.libraries[library] is not None)
    for row in report.rows:
        assert row.failed is None
        assert row.way in text
        assert row.ratio.low <= row.ratio.median <= row.ratio.high
        assert row.peak_bytes >= 0
    assert picture.stat().st_size > 10_000
    assert main(["compare", str(path), str(path)]) == 0


def refused(capsys, *arguments):
    try:
        status = main(arguments)
    except SystemExit as error:
        status = error.code
    assert status == 2
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1
    assert said.err.startswith("error: ")
    assert "GFLOP" not in said.out  # nothing was measured before
    return said.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["macthers"], "invalid choice: 'macthers'"),
        ([], "SUITE"),
        (["matchers", "--szies", "Swin"], "--szies"),
        (["matchers", "--sizes", "S16"], "no size 'S16'"),
        (["matchers", "--batch", "0"], "--batch must be at least 1, got 0"),
        (["matchers", "--batch", "many"], "--batch"),
        (["matchers", "--repeats", "0"], "--repeats must be at least 1"),
        (["matchers", "--threads", "-1"], "--threads must be at least 1"),
        (["losses", "--prototypes", "-4"], "--prototypes must be at least 1"),
        (["losses", "--dtype", "int8"], "int8"),
        (["matchers", "--device", "gpu"], "--device 'gpu' is no device"),
        (["matchers", "--device", "meta"], "measured are cpu and cuda"),
        (["matchers", "--device", "cuda:99"], "--device cuda:99: torch sees"),
        (["matchers", "--matcher", "local_distill.NearestMacher"], "did you mean `NearestMatcher`"),
        (["losses", "--matcher", "local_distill.NearestMatcher"], "--matcher"),
        (["transforms", "--sizes", "Swin"], "no option --sizes (see local-distill bench transf"),
        (["transforms", "--device", "cuda"], "there is no option --device"),
        (["matchers", "--quik"], "--quik, did you mean --quick? (see local-distill bench matchers"),
        (["matchers", "--qui"], "there is no option --qui, did you mean --quick?"),  # unabbreviated
        (["compare", "a.json", "b.json", "c.json"], "'c.json' is one argument too many"),
        (["matchers", "--json", "no/such/folder/a.json"], "no folder no/such/folder"),
        (["matchers", "--plot", "picture.xlsx"], "no picture ends in 'xlsx'"),
        (["compare", "a.json"], "after"),
    ],
)
def test_typos_are_one_line(capsys, arguments, message):
    assert message in refused(capsys, *arguments)


def wrong_losses(monkeypatch):
    plain = losses.plain_koleo_loss
    monkeypatch.setattr(losses, "plain_koleo_loss", lambda features: plain(features) + 0.1)
    return "losses", {"KoLeoLoss", "Lightly KoLeoLoss"}


def wrong_places(monkeypatch):
    centers = matchers.plain_centers
    monkeypatch.setattr(matchers, "plain_centers", lambda view: centers(view) + 1.0)
    found = matchers.match_by_table

    def nearer(table, made):
        return {pair: (cost * 0.5, index) for pair, (cost, index) in found(table, made).items()}

    monkeypatch.setattr(matchers, "match_by_table", nearer)
    return "matchers", {"NearestMatcher('lattice')", "SimilarityMatcher('cosine')"}


@pytest.mark.parametrize("wrong", [wrong_losses, wrong_places])
def test_ways_that_disagree_with_the_reference_are_not_measured(wrong, monkeypatch, tmp_path):
    suite, names = wrong(monkeypatch)
    path = tmp_path / "wrong.json"
    assert main([suite, "--quick", "--repeats", "1", "--json", str(path)]) == 1
    failed = {row.way: row.failed for row in read_report(path).rows if row.failed is not None}
    assert set(failed) <= names
    assert {name for name in names if "Lightly" not in name} <= set(failed)
    assert all("plain" in reason for reason in failed.values())


def test_half_precision(tmp_path):
    path = tmp_path / "out.json"
    for suite in ("matchers", "losses"):
        assert (
            main([suite, "--quick", "--repeats", "1", "--dtype", "bfloat16", "--json", str(path)])
            == 0
        )
        assert read_report(path).settings["dtype"] == "bfloat16"


def test_one_image_is_enough_for_what_needs_no_other(tmp_path):
    path = tmp_path / "one.json"
    assert main(["losses", "--quick", "--batch", "1", "--json", str(path)]) == 0
    cases = {row.case for row in read_report(path).rows}
    assert not any("KoLeo" in case or "VICReg" in case for case in cases)


def test_a_way_that_fails_is_shown_and_the_status_says_so(capsys, monkeypatch, tmp_path):
    def broken():
        raise KeyError("no")

    def cases(settings):
        yield Case("odd", "one", {"plain": lambda: 1, "theirs": broken}, "plain", Work(0.0, 8.0))

    monkeypatch.setitem(command.SUITES, "odd", Suite("a suite", cases))
    path = tmp_path / "odd.json"
    assert main(["odd", "--quick", "--json", str(path)]) == 1
    said = capsys.readouterr()
    assert "not measured: KeyError: 'no'" in said.out
    assert "could not be measured: theirs" in said.err
    assert read_report(path).rows[1].failed == "KeyError: 'no'"


def test_threads_are_those_asked_for_and_then_those_before(monkeypatch, tmp_path):
    threads, seen = torch.get_num_threads(), set()

    def cases(settings):
        ways = {"plain": lambda: seen.add(torch.get_num_threads())}
        yield Case("odd", "one", ways, "plain", Work(0.0, 8.0))

    monkeypatch.setitem(command.SUITES, "odd", Suite("a suite", cases))
    path = tmp_path / "odd.json"
    more = ["--quick", "--threads", str(threads + 1), "--json", str(path)]
    assert main(["odd", *more]) == 0
    assert seen == {threads + 1}
    assert read_report(path).machine.threads == threads + 1
    assert torch.get_num_threads() == threads


def test_control_c_is_no_traceback(capsys, monkeypatch):
    def cases(settings):
        raise KeyboardInterrupt

    monkeypatch.setitem(command.SUITES, "odd", Suite("a suite", cases))
    assert main(["odd", "--quick"]) == 130
    assert "interrupted" in capsys.readouterr().err
