import dataclasses
import doctest
import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from local_distill import MultiCrop, NearestMatcher, SimilarityMatcher, TokenGrid, Tokens, from_box
from local_distill.training import SyntheticScenes
from local_distill.training.loading import SampleKey, SeededViews

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.study import intervals, page, tuning  # noqa: E402
from benchmarks.study.__main__ import RESULTS, run_study  # noqa: E402
from benchmarks.study.intervals import holm, mean_interval, paired_difference  # noqa: E402
from benchmarks.study.pieces import (  # noqa: E402
    UNTRAINED,
    Piece,
    final_pieces,
    tasks_of,
)
from benchmarks.study.presets import PRESETS  # noqa: E402
from benchmarks.study.results_file import append_record, read_records  # noqa: E402
from benchmarks.study.run_piece import run_piece, scenes_of  # noqa: E402
from benchmarks.study.shared_views import SharedViews  # noqa: E402
from benchmarks.study.summary import chosen_finals, comparisons, scores_by_seed  # noqa: E402
from benchmarks.study.tables import preset_tables, study_tables  # noqa: E402
from benchmarks.study.tuning import choices, is_tuned, search, tuning_pieces  # noqa: E402
from benchmarks.study.watched_matcher import WatchedMatcher  # noqa: E402

SMOKE = PRESETS["smoke"]


def record_of(preset, piece, **scores):
    return {
        "settings": preset.fingerprint(preset.study(piece.study)),
        **piece._asdict(),
        "scores": scores,
        "training": {},
    }


def tune(study, value):
    """Records of every tuning piece that is asked for, until none is, with a made-up criterion."""
    records = {}
    while not is_tuned(study, records):
        missing = [piece for piece in tuning_pieces(study, records) if piece not in records]
        assert missing
        for piece in missing:
            records[piece] = {"scores": dict.fromkeys(study.criterion, value(piece))}
    return records


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_the_plan_holds_every_variant_alike(name):
    preset = PRESETS[name]
    for study in preset.studies:
        tuned = list(tune(study, lambda piece: -abs(piece.lr - 0.003) - piece.temp))
        assert not {piece.seed for piece in tuned} & set(study.seeds)
        for variant in study.variants:
            mine = [piece._replace(variant="") for piece in tuned if piece.variant == variant]
            assert len(mine) * len(study.variants) == len(tuned)
        finals = final_pieces(study, dict.fromkeys(study.variants, (1.0, 1.0)))
        assert len(finals) == len(study.seeds) * (1 + len(study.variants) * len(study.shares))


def test_tasks_hold_each_piece_once_and_whole_seeds_come_first():
    preset = PRESETS["cpu"]
    finals = []
    for study in preset.studies:
        finals += final_pieces(study, dict.fromkeys(study.variants, (1.0, 1.0)))
    tasks = tasks_of(preset, finals)
    assert sorted(piece for task in tasks for piece in task) == sorted(finals)
    for task in tasks:
        assert len({(piece.study, piece.seed) for piece in task}) == 1
        assert len({piece.share for piece in task if piece.variant != UNTRAINED}) == 1
    # the ends before what lies between, share by share, and each of these seed by seed
    shares = [max(piece.share for piece in task) for task in tasks]
    order = [
        (share if share in (0.1, 0.5) else 0.0, task[0].seed)
        for share, task in zip(shares, tasks, strict=True)
    ]
    assert order == sorted(order)


def test_scenes_of_a_seed_are_nested_and_none_are_tested_on():
    piece = Piece("matching", "final", "vanilla", 0.25, 3, 1.0, 1.0)
    few, many = scenes_of(SMOKE, piece), scenes_of(SMOKE, piece._replace(share=1.0))
    assert (len(few), len(many)) == (8, 32)
    assert torch.equal(few.scene(7).image, many.scene(7).image)
    other = scenes_of(SMOKE, piece._replace(seed=4))
    assert not torch.equal(few.scene(7).image, other.scene(7).image)
    assert few.seed not in (0, 1, 2)


def test_results_survive_half_a_line_and_leave_other_settings_out(tmp_path):
    path = tmp_path / "deep" / "results.jsonl"
    piece = Piece("matching", "tune", "vanilla", 1.0, 100, 0.001, 0.04)
    append_record(path, record_of(SMOKE, piece, knn=0.5))
    with path.open("a") as stream:
        stream.write('{"settings": "cut o')
    append_record(path, record_of(SMOKE, piece._replace(seed=101), knn=0.25))
    append_record(path, {**record_of(SMOKE, piece._replace(seed=102)), "settings": "others"})
    found = read_records(path, SMOKE)
    assert {piece.seed: record["scores"]["knn"] for piece, record in found.items()} == {
        100: 0.5,
        101: 0.25,
    }
    assert read_records(tmp_path / "none.jsonl", SMOKE) == {}


def test_results_written_by_many_at_once_are_whole(tmp_path):
    path = tmp_path / "results.jsonl"
    many = [Piece("matching", "tune", "x" * 2000, 1.0, seed, 0.1, 0.1) for seed in range(60)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda piece: append_record(path, record_of(SMOKE, piece)), many))
    assert read_records(path, SMOKE).keys() == set(many)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("recipe", {"steps": 7}),
        ("recipe", {"views": {"global_size": 24}}),
        ("scenes", 33),
        ("evaluating", {"voters": 61}),
    ],
)
def test_other_settings_have_another_fingerprint(part, change):
    study = SMOKE.study("matching")
    assert SMOKE.fingerprint(study) == SMOKE.fingerprint(dataclasses.replace(study, seeds=(7,)))
    if part == "recipe":
        other = dataclasses.replace(study, recipe=dataclasses.replace(study.recipe, **change))
        assert SMOKE.fingerprint(other) != SMOKE.fingerprint(study)
    else:
        if part == "evaluating":
            change = dataclasses.replace(SMOKE.evaluating, **change)
        preset = dataclasses.replace(SMOKE, **{part: change})
        assert preset.fingerprint(study) != SMOKE.fingerprint(study)


def test_intervals_are_those_of_scipy():
    ones, twos = [0.61, 0.7, 0.66, 0.64, 0.71], [0.6, 0.66, 0.67, 0.6, 0.65]
    found = mean_interval(ones)
    expected = stats.t.interval(0.95, 4, stats.tmean(ones), stats.sem(ones))
    assert (found.low, found.high) == pytest.approx(expected, rel=1e-12)
    test = stats.ttest_rel(ones, twos)
    paired = paired_difference(ones, twos)
    assert paired.p == pytest.approx(test.pvalue, rel=1e-12)
    wanted = test.confidence_interval(0.95)
    assert (paired.low, paired.high) == pytest.approx((wanted.low, wanted.high), rel=1e-12)
    assert math.isnan(mean_interval([0.3]).low)
    assert paired_difference([1.0, 2.0], [0.5, 1.5]).p == 0.0  # no spread at all


def test_holm_is_the_step_down_procedure():
    ps = [0.02, 0.5, 0.004, 0.03, 0.011]
    for level in (0.01, 0.02, 0.05, 0.06, 0.2, 1.0):
        rejected, left = set(), sorted(range(len(ps)), key=lambda i: ps[i])
        while left and ps[left[0]] <= level / len(left):
            rejected.add(left.pop(0))
        assert {i for i, p in enumerate(holm(ps)) if p <= level} == rejected


def test_tuning_takes_the_best_on_average_and_tells_edges():
    study = dataclasses.replace(
        SMOKE.study("matching"),
        variants=("vanilla", "hybrid"), tuned_on=((0.25, 100), (1.0, 101)),
        rates=(1.0, 2.0, 4.0), temps=(0.1,), extensions=0,
    )  # fmt: skip
    # by variant and seed the criterion of the three rates
    values = {
        ("vanilla", 100): (0.5, 0.4, 0.1),
        ("vanilla", 101): (0.1, 0.4, 0.5),
        ("hybrid", 100): (0.5, 0.4, 0.4),
        ("hybrid", 101): (0.5, 0.4, 0.7),
    }
    records = {}
    for piece in tuning_pieces(study, {}):
        value = values[piece.variant, piece.seed][study.rates.index(piece.lr)]
        records[piece] = {"scores": {"knn": value + 0.1, "miou": value - 0.1}}
    found = choices(study, records)
    assert found["vanilla"][:2] == (2.0, 0.1)
    assert found["vanilla"].value == pytest.approx(0.4)
    assert found["vanilla"].at_edge == ()
    assert found["hybrid"][:2] == (4.0, 0.1)
    assert found["hybrid"].at_edge == ("lr",)


@given(
    best=st.floats(0.02, 200.0),
    start=st.lists(st.sampled_from([0.5, 1.0, 2.0, 4.0]), min_size=1, max_size=4, unique=True),
    extensions=st.integers(0, 5),
)
def test_a_search_finds_a_lone_peak_or_stops_at_an_edge(best, start, extensions):
    tried, found = search(start, lambda number: -abs(math.log(number / best)), extensions)
    assert tried == sorted(set(tried))
    assert set(start) <= set(tried)
    assert len(tried) <= len(start) + extensions
    assert found == min(tried, key=lambda number: abs(math.log(number / best)))
    if found in (tried[0], tried[-1]):  # never while there was leave to go on
        assert len(tried) == len(start) + extensions


def test_temperatures_are_tried_at_the_best_rate_of_each_variant():
    study = dataclasses.replace(
        SMOKE.study("matching"),
        variants=("vanilla", "hybrid"), rates=(1.0, 2.0), temps=(0.1, 0.2), extensions=2,
    )  # fmt: skip
    peaks = {"vanilla": (4.0, 0.1), "hybrid": (1.0, 0.4)}

    def value(piece):
        lr, temp = peaks[piece.variant]
        return -abs(math.log(piece.lr / lr)) - abs(math.log(piece.temp / temp))

    records = tune(study, value)
    assert {name: tuple(choice[:2]) for name, choice in choices(study, records).items()} == peaks
    tried = {(piece.lr, piece.temp) for piece in records if piece.variant == "vanilla"}
    assert tried == {(1.0, 0.1), (2.0, 0.1), (4.0, 0.1), (8.0, 0.1), (4.0, 0.2), (4.0, 0.05)}
    with pytest.raises(ValueError, match="'hybrid'"):
        choices(study, {piece: row for piece, row in records.items() if piece.variant != "hybrid"})


def test_finals_are_compared_at_equal_seed_and_with_what_was_chosen():
    study = dataclasses.replace(
        SMOKE.study("matching"),
        variants=("vanilla", "hybrid"), shares=(1.0,),
        rates=(1.0, 2.0), temps=(0.1,), extensions=0,
    )  # fmt: skip
    records = {
        piece: record_of(SMOKE, piece, knn=piece.lr, miou=piece.lr)
        for piece in tuning_pieces(study, {})
    }
    for seed in (0, 1, 2):
        for lr in (1.0, 2.0):
            for variant, gain in (("vanilla", 0.0), ("hybrid", 0.1 + 0.01 * seed)):
                piece = Piece("matching", "final", variant, 1.0, seed, lr, 0.1)
                records[piece] = record_of(SMOKE, piece, knn=seed + gain + 100 * (lr == 1.0))
    study = dataclasses.replace(study, seeds=(0, 1, 2))
    finals = chosen_finals(study, records)
    assert {piece.lr for piece in finals} == {2.0}
    assert scores_by_seed(study, finals, "vanilla", 1.0, "knn") == {0: 0.0, 1: 1.0, 2: 2.0}
    (row,) = comparisons(study, finals, "knn", [("hybrid", "vanilla")])
    assert row.difference.mean == pytest.approx(0.11)
    assert row.difference.high - row.difference.low < 0.06  # that of either alone is above 4
    assert chosen_finals(study, {}) == {}


def test_shared_views_are_the_views_and_drawn_once():
    crop = MultiCrop(global_size=16, local_size=8, local_count=1)
    drawn = []

    def views(image):
        drawn.append(image)
        return crop(image)

    images = SyntheticScenes(3, 32)
    plain, shared = (
        SeededViews(images, crop, seed=5),
        SeededViews(images, SharedViews(views, most=1), seed=5),
    )
    keys = [SampleKey(0, 1), SampleKey(0, 1), SampleKey(2, 0), SampleKey(2, 0)]
    for key in keys:
        (wanted, _), (found, _) = plain[key], shared[key]
        for one, other in zip(wanted.views, found.views, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
        for one, other in zip(wanted.geometries, found.geometries, strict=True):
            assert torch.equal(one.matrix, other.matrix)
    assert len(drawn) == 3  # the first sample's once; there is no room for the second's


def test_a_watched_matcher_hands_on_the_matches_and_knows_which_are_true():
    grid = TokenGrid.tiling(4, 4, view_size=(32, 32))
    boxes = torch.tensor([[0.0, 0, 32, 32], [8, 8, 40, 40]])
    views = [
        Tokens(torch.randn(2, 16, 5), from_box(boxes + shift, (32, 32), (64, 64)), grid)
        for shift in (0.0, 6.0)
    ]
    for matcher, least, most in ((NearestMatcher(), 1.0, 1.0), (SimilarityMatcher(), 0.0, 0.6)):
        watched = WatchedMatcher(matcher, every=2)
        for _ in range(5):
            found = watched.match_views(views, views)
        wanted = matcher(views[0], views[1])
        assert torch.equal(found[0, 1].teacher_index, wanted.teacher_index)
        summary = watched.summary()
        assert least <= summary["true_late"] <= most
        flags = torch.cat([matches.matched.flatten() for matches in found.values()])
        assert summary["matched"] == pytest.approx(float(flags.float().mean()))


def test_a_study_runs_resumes_and_repeats_itself(tmp_path):
    study = dataclasses.replace(
        SMOKE.study("matching"),
        variants=("vanilla", "hybrid"), shares=(1.0,), seeds=(0,),
        rates=(1e-3,), temps=(0.04,),
    )  # fmt: skip
    study = dataclasses.replace(study, recipe=dataclasses.replace(study.recipe, steps=3))
    preset = dataclasses.replace(SMOKE, studies=(study,))
    path = tmp_path / "results.jsonl"
    assert not run_study(preset, path, jobs=0, until=0.0)  # no time: nothing is begun
    assert not path.exists()
    assert run_study(preset, path, jobs=0)
    lines = path.read_text().splitlines()
    assert len(lines) == 2 + 3
    # A piece that was killed leaves nothing; it is run again, and comes to the same.
    path.write_text("\n".join(lines[:-1]) + "\n")
    assert run_study(preset, path, jobs=0)
    again = path.read_text().splitlines()
    one, other = json.loads(lines[-1]), json.loads(again[-1])
    assert again[:-1] == lines[:-1]
    assert (one["scores"], one["training"]) == (other["scores"], other["training"])
    assert one["training"]["matched"] > 0.3
    tables = study_tables(study, read_records(path, preset))
    assert "hybrid" in tables["matching: tuning"]


def test_a_layers_piece_has_a_score_for_every_block():
    piece = Piece("layers", "tune", "every", 1.0, 100, 1e-3, 0.2)
    scores = run_piece(SMOKE, piece)["scores"]
    assert len(scores["knn_layers"]) == len(scores["linear_layers"]) == 2
    assert scores["knn"] == scores["knn_layers"][-1]


@pytest.mark.parametrize("module", [intervals, page, tuning], ids=lambda module: module.__name__)
def test_examples_of_the_study_run(module):
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    tried = doctest.testmod(module, optionflags=flags)
    assert tried.attempted > 0
    assert tried.failed == 0


def test_the_page_shows_the_committed_results():
    preset = PRESETS["cpu"]
    tables = preset_tables(preset, read_records(RESULTS / "cpu.jsonl", preset))
    text = (ROOT / "docs/training/study.md").read_text(encoding="utf-8")
    assert text.count("<!-- table: ") > 8
    assert page.update_page(text, tables) == text, (
        "docs/training/study.md is behind the results: "
        "python -m benchmarks.study --tables --page docs/training/study.md"
    )
