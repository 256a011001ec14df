"""Pictures, by their artists' data coordinates, against naive loops over the homography."""

import io
import math
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from local_distill import Matches, TokenGrid, from_box, from_matrix
from local_distill.errors import DataError, GeometryError, ShapeError
from local_distill.viz import (
    denormalize,
    draw_matches,
    draw_tokens,
    draw_views,
    match_figure,
    new_figure,
    view_colors,
)

RESNET = TokenGrid(rows=2, cols=3, stride=(32.0, 32.0), offset=(0.5, 0.5))


def panel():
    return new_figure(4, 3).add_subplot()


def picture(height, width, channels=3):
    values = torch.arange(channels * height * width, dtype=torch.float32)
    return (values / values.numel()).reshape(channels, height, width)


def mapped(matrix, x, y):
    rows = [[float(value) for value in row] for row in matrix]
    first, second, third = (row[0] * x + row[1] * y + row[2] for row in rows)
    return first / third, second / third


def center(grid, token):
    row, col = divmod(token, grid.cols)
    return grid.offset[0] + grid.stride[0] * col, grid.offset[1] + grid.stride[1] * row


def some_matches(b, s, t, k, *, matched=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(t, (b, s, k), generator=generator)
    weight = torch.rand(b, s, k, generator=generator) / k
    keep = torch.rand(b, s, generator=generator) < matched
    weight = weight * keep[..., None]
    cost = torch.where(keep, torch.rand(b, s, generator=generator), torch.inf)
    return Matches(index, weight, cost)


def expected_lines(matches, sample, student, teacher, student_size, teacher_size):
    """{(student point, teacher point): (cost, weight)} as the convention of draw_matches has it."""
    (hs, ws), (ht, _) = student_size, teacher_size
    start = ws / hs + 0.12
    lines = []
    for i in range(matches.weight.shape[1]):
        for c in range(matches.weight.shape[2]):
            weight = float(matches.weight[sample, i, c])
            if weight > 0:
                xs, ys = center(student, i)
                xt, yt = center(teacher, int(matches.teacher_index[sample, i, c]))
                ends = (xs / hs, ys / hs), (xt / ht + start, yt / ht)
                lines.append((ends, float(matches.cost[sample, i]), weight))
    return lines


@given(
    hflip=st.booleans(),
    vflip=st.booleans(),
    box=st.tuples(*[st.floats(-20, 40), st.floats(-20, 40), st.floats(1, 60), st.floats(1, 60)]),
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
)
def test_outline_stands_where_the_homography_puts_the_corners(hflip, vflip, box, size):
    left, top, width, height = box
    geometry = from_box(
        torch.tensor([left, top, left + width, top + height], dtype=torch.float64),
        size,
        (50, 70),
        hflip=hflip,
        vflip=vflip,
    )
    ax = panel()
    draw_views(ax, picture(50, 70), [geometry])
    h, w = size
    wanted = [mapped(geometry.matrix, x, y) for x, y in ((0, 0), (w, 0), (w, h), (0, h))]
    for polygon in ax.patches:  # the dark line below and the coloured one
        np.testing.assert_allclose(polygon.get_xy()[:4], wanted, atol=1e-9)
    arrow = next(text for text in ax.texts if text.arrow_patch is not None)
    np.testing.assert_allclose([arrow.xyann, arrow.xy], wanted[:2], atol=1e-9)


def test_a_perspective_keeps_its_four_corners():
    matrix = torch.tensor([[1.0, 0.2, 3.0], [0.1, 1.1, 2.0], [0.002, 0.001, 1.0]])
    geometry = from_matrix(matrix, (20, 30), (60, 80))
    ax = panel()
    draw_views(ax, picture(60, 80), [geometry])
    wanted = [mapped(matrix, x, y) for x, y in ((0, 0), (30, 0), (30, 20), (0, 20))]
    np.testing.assert_allclose(ax.patches[0].get_xy()[:4], wanted, rtol=1e-5)


def test_a_flip_turns_the_arrow_round():
    plain = from_box((10, 5, 30, 15), (8, 8), (20, 40))
    flipped = from_box((10, 5, 30, 15), (8, 8), (20, 40), hflip=True, vflip=True)
    ax = panel()
    draw_views(ax, picture(20, 40), [plain, flipped])
    arrows = [(text.xyann, text.xy) for text in ax.texts if text.arrow_patch is not None]
    assert arrows == [((10.0, 5.0), (30.0, 5.0)), ((30.0, 15.0), (10.0, 15.0))]


def test_views_have_their_own_colour_and_label():
    crops = [from_box((v, v, v + 9, v + 9), (8, 8), (40, 40)) for v in range(10)]
    ax = panel()
    draw_views(ax, picture(40, 40), crops)
    assert len({polygon.get_edgecolor() for polygon in ax.patches[1::2]}) == 10
    assert [text.get_text() for text in ax.texts if text.get_text()] == [*"0123456789"]


def test_labels_of_views_with_the_same_corner_do_not_cover_each_other():
    crops = [from_box((0, 0, 40, 30), (8, 8), (30, 40)) for _ in range(6)]
    ax = panel()
    draw_views(ax, picture(30, 40), crops)
    places = [text.xy for text in ax.texts if text.get_text()]
    distances = [math.dist(a, b) for n, a in enumerate(places) for b in places[:n]]
    assert min(distances) >= 0.04 * 50


def test_a_view_that_reaches_out_of_the_source_is_not_cut_off():
    ax = panel()
    draw_views(ax, picture(20, 30), [from_box((-5, -4, 40, 10), (8, 8), (20, 30))])
    assert ax.get_xlim() == (-5, 40)
    assert ax.get_ylim() == (20, -4)  # y runs down


def test_the_source_spans_whole_pixels():
    ax = panel()
    draw_views(ax, picture(20, 30), [])
    assert tuple(ax.images[0].get_extent()) == (0, 30, 20, 0)


@pytest.mark.parametrize("grid", [TokenGrid.tiling(3, 5, (33, 70)), RESNET])
def test_token_grid_borders_and_centres(grid):
    ax = panel()
    draw_tokens(ax, picture(33, 70), grid)
    borders = ax.collections[0].get_segments()
    xs = {float(line[0, 0]) for line in borders if line[0, 0] == line[1, 0]}
    ys = {float(line[0, 1]) for line in borders if line[0, 1] == line[1, 1]}
    assert sorted(xs) == pytest.approx(
        [grid.offset[0] + grid.stride[0] * (c - 0.5) for c in range(grid.cols + 1)]
    )
    assert sorted(ys) == pytest.approx(
        [grid.offset[1] + grid.stride[1] * (r - 0.5) for r in range(grid.rows + 1)]
    )
    wanted = [center(grid, token) for token in range(grid.num_tokens)]
    np.testing.assert_allclose(ax.collections[-1].get_offsets(), wanted)
    assert ax.get_xlim() == (0, 70)  # cells that stand out of the view are cut there


@given(
    k=st.sampled_from([1, 2, 4]),
    rows=st.integers(1, 4),
    cols=st.integers(1, 5),
    matched=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_lines_run_between_token_centres_coloured_by_cost(k, rows, cols, matched, seed):
    student, teacher = TokenGrid.tiling(rows, cols, (24, 40)), RESNET
    matches = some_matches(2, rows * cols, 6, k, matched=matched, seed=seed)
    ax = panel()
    lines = draw_matches(
        ax, picture(24, 40), picture(64, 96), student, teacher, matches, max_lines=999, sample=1
    )
    wanted = expected_lines(matches, 1, student, teacher, (24, 40), (64, 96))
    got = zip(lines.get_segments(), lines.get_array().tolist(), strict=True)
    by_ends = sorted(wanted)
    found = sorted(((tuple(a), tuple(b)), cost) for (a, b), cost in got)
    assert len(found) == len(by_ends)
    for (ends, cost), (want_ends, want_cost, _) in zip(found, by_ends, strict=True):
        np.testing.assert_allclose(ends, want_ends, atol=1e-9)
        assert cost == pytest.approx(want_cost)
    ax.figure.draw_without_rendering()
    colors = lines.get_edgecolor()
    wanted_colors = lines.get_cmap()(lines.norm(lines.get_array()))
    if len(colors):
        np.testing.assert_allclose(colors[:, :3], wanted_colors[:, :3])


def test_matched_tokens_of_a_flipped_view_meet_their_mirror_image():
    grid = TokenGrid.tiling(1, 4, (8, 32))
    mirrored = Matches(torch.tensor([[[3], [2], [1], [0]]]), torch.ones(1, 4, 1), torch.zeros(1, 4))
    lines = draw_matches(panel(), picture(8, 32), picture(8, 32), grid, grid, mirrored)
    ends = [(float(a[0]), round(float(b[0]) - 4.12, 6)) for a, b in lines.get_segments()]
    assert ends == [(0.5, 3.5), (1.5, 2.5), (2.5, 1.5), (3.5, 0.5)]


def test_cheaper_matches_have_another_colour_and_equal_costs_the_same():
    grid = TokenGrid.tiling(1, 3, (8, 24))
    index, weight = torch.zeros(1, 3, 1, dtype=torch.int64), torch.ones(1, 3, 1)
    matches = Matches(index, weight, torch.tensor([[0.1, 0.4, 0.1]]))
    ax = panel()
    lines = draw_matches(ax, picture(8, 24), picture(8, 24), grid, grid, matches)
    ax.figure.draw_without_rendering()
    first, second, third = (tuple(color) for color in lines.get_edgecolor())
    assert first == third != second
    assert sum(first[:3]) < sum(second[:3])  # brighter is costlier


def test_one_bad_match_does_not_take_the_colours_of_all_others():
    grid = TokenGrid.tiling(1, 100, (8, 800))
    cost = torch.linspace(0, 1, 100)
    cost[-1] = 1e4
    matches = Matches(torch.zeros(1, 100, 1, dtype=torch.int64), torch.ones(1, 100, 1), cost[None])
    lines = draw_matches(panel(), picture(8, 800), picture(8, 800), grid, grid, matches)
    assert lines.norm.vmax < 2


def test_tokens_without_a_match_are_hollow():
    student, teacher = TokenGrid.tiling(1, 3, (8, 24)), TokenGrid.tiling(1, 2, (8, 16))
    matches = Matches(
        torch.tensor([[[1], [0], [1]]]),
        torch.tensor([[[1.0], [0.0], [0.5]]]),
        torch.tensor([[0.2, torch.inf, 0.3]]),
    )
    ax = panel()
    draw_matches(ax, picture(8, 24), picture(8, 16), student, teacher, matches)
    ax.figure.draw_without_rendering()
    hollow, filled = [], []
    for dots in ax.collections[2:]:
        ends = hollow if len(dots.get_facecolor()) == 0 else filled
        ends += [round(float(x), 6) for x, _ in dots.get_offsets()]
    assert sorted(hollow) == [1.5, 3.62]  # student token 1, teacher token 0
    assert sorted(filled) == [0.5, 2.5, 4.62]


@pytest.mark.parametrize("candidates", [0, 1])
def test_without_any_match_the_picture_says_so(candidates):
    grid = TokenGrid.tiling(2, 3, (16, 24))
    matches = some_matches(1, 6, 6, candidates, matched=0.0)
    ax = panel()
    lines = draw_matches(ax, picture(16, 24), picture(16, 24), grid, grid, matches)
    ax.figure.savefig(io.BytesIO(), format="png")
    assert len(lines.get_segments()) == 0
    assert [text.get_text() for text in ax.texts] == ["no matches"]
    assert len(ax.figure.axes) == 1  # no colour bar


def test_a_teacher_without_tokens():
    student, teacher = TokenGrid.tiling(2, 2, (16, 16)), TokenGrid(0, 0, (8.0, 8.0), (4.0, 4.0))
    matches = Matches(
        torch.zeros(2, 4, 0, dtype=torch.int64), torch.zeros(2, 4, 0), torch.full((2, 4), torch.inf)
    )
    ax = panel()
    lines = draw_matches(ax, picture(16, 16), picture(16, 16), student, teacher, matches)
    ax.figure.savefig(io.BytesIO(), format="png")
    assert len(lines.get_segments()) == 0


def test_max_lines_keeps_an_even_grid_of_student_tokens():
    grid = TokenGrid.tiling(14, 14, (224, 224))
    matches = some_matches(1, 196, 196, 1)
    ax = panel()
    lines = draw_matches(
        ax, picture(224, 224), picture(224, 224), grid, grid, matches, max_lines=50
    )
    starts = [(float(a[0]), float(a[1])) for a, _ in lines.get_segments()]
    xs, ys = {x for x, _ in starts}, {y for _, y in starts}
    assert len(starts) == len(xs) * len(ys) == 49
    assert sum(len(dots.get_offsets()) for dots in ax.collections[2:]) == 2 * 196


def test_dense_matches_show_the_heaviest_candidates():
    student, teacher = TokenGrid.tiling(1, 2, (8, 16)), TokenGrid.tiling(1, 9, (8, 72))
    weight = torch.arange(18.0).reshape(1, 2, 9) / 200
    matches = Matches(torch.arange(9).expand(1, 2, 9), weight, torch.rand(1, 2))
    lines = draw_matches(
        panel(), picture(8, 16), picture(8, 72), student, teacher, matches, max_candidates=3
    )
    targets = [round(float(b[0]) - 2.12 - 0.5) for _, b in lines.get_segments()]
    assert targets == [8, 7, 6, 8, 7, 6]
    assert lines.get_alpha() == pytest.approx([1, 7 / 8, 6 / 8, 1, 16 / 17, 15 / 17])


def ten_views(b=2):
    torch.manual_seed(0)
    views, geometries, grids = [], [], []
    for v in range(10):
        size = (48, 64) if v < 2 else (24, 16)
        box = torch.rand(b, 4) * 20 + torch.tensor([0.0, 0, 40, 40])
        views.append(torch.rand(b, 3, *size))
        geometries.append(from_box(box, size, (80, 90), hflip=torch.arange(b) % 2 == 0))
        grids.append(TokenGrid.tiling(size[0] // 8, size[1] // 8, size))
    keys = [(v, q) for q in range(2) for v in range(10) if v != q]
    named = {
        name: {
            (v, q): some_matches(b, grids[v].num_tokens, 48, k, matched=0.6, seed=v)
            for v, q in keys
        }
        for name, k in (("geometric", 1), ("soft", 4))
    }
    return torch.rand(b, 3, 80, 90), views, geometries, grids, named


def test_match_figure_of_ten_views_shows_a_global_and_a_local_pair_for_each_matcher():
    image, views, geometries, grids, named = ten_views()
    figure = match_figure(image, views, geometries, grids, named, sample=1)
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=60)
    assert written.getvalue().startswith(b"\x89PNG")
    titles = [ax.get_title() for ax in figure.axes if "→" in ax.get_title()]
    best = max(range(2, 10), key=lambda v: int(named["geometric"][v, 0].matched[1].sum()))
    for name in ("geometric", "soft"):
        for v in (1, best):
            count = int(named[name][v, 0].matched[1].sum())
            wanted = f"{name}: view {v} → view 0, {count} of {grids[v].num_tokens} tokens matched"
            assert wanted in titles
    assert len(titles) == 4
    # figure: source, ten views, four panels, one colour bar a matcher
    assert len([ax for ax in figure.axes if ax.images]) == 15
    bars = [ax for ax in figure.axes if ax.get_ylabel() == "cost"]
    assert len(bars) == 2


def test_match_figure_without_matches_still_shows_the_views():
    image, views, geometries, grids, _ = ten_views()
    figure = match_figure(image, views[:3], geometries[:3], grids[:3], {})
    assert len([ax for ax in figure.axes if ax.images]) == 4


@pytest.mark.parametrize(
    "image",
    [
        torch.zeros(3, 5, 7),
        torch.full((3, 5, 7), 255, dtype=torch.uint8),
        torch.zeros(1, 5, 7),
        torch.zeros(2, 3, 5, 7),
        torch.zeros(3, 5, 7, dtype=torch.bfloat16, requires_grad=True),
        torch.full((3, 5, 7), 1.1),
    ],
    ids=["float", "uint8", "grey", "batch", "bf16", "overshoot"],
)
def test_forms_of_an_image(image):
    ax = panel()
    draw_tokens(ax, image, TokenGrid.tiling(1, 1, (5, 7)))
    shown = ax.images[0].get_array()
    assert shown.shape == (5, 7, 3)
    assert 0 <= shown.min() <= shown.max() <= 1


def test_pil_images_of_any_mode():
    images = pytest.importorskip("PIL.Image", reason="Pillow comes with the extra vision")
    for mode in ("RGB", "L", "RGBA", "P", "CMYK"):
        ax = panel()
        draw_tokens(ax, images.new(mode, (7, 5)), TokenGrid.tiling(1, 1, (5, 7)))
        assert ax.images[0].get_array().shape == (5, 7, 3)


def test_denormalize_undoes_a_normalisation():
    image = torch.rand(2, 3, 5, 7)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    normal = (image - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(denormalize(normal, mean, std), image)


def test_figures_need_no_pyplot_and_work_in_threads():
    image, views, geometries, grids, named = ten_views(1)
    had_pyplot = "matplotlib.pyplot" in sys.modules  # another test's
    failures = []

    def work():
        try:
            figure = match_figure(image, views, geometries, grids, named)
            figure.savefig(io.BytesIO(), format="png", dpi=40)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert ("matplotlib.pyplot" in sys.modules) == had_pyplot


def one_match(s=4, b=1):
    return Matches(torch.zeros(b, s, 1, dtype=torch.int64), torch.ones(b, s, 1), torch.zeros(b, s))


GRID = TokenGrid.tiling(2, 2, (8, 8))
VIEW = torch.zeros(3, 8, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: draw_tokens(panel(), VIEW * 0 + 2.0, GRID), DataError, "denormalize"),
        (lambda: draw_tokens(panel(), VIEW * torch.nan, GRID), DataError, "nan"),
        (lambda: draw_tokens(panel(), torch.zeros(8, 8), GRID), ShapeError, r"\(3, h, w\)"),
        (lambda: draw_tokens(panel(), VIEW.int(), GRID), ShapeError, "uint8"),
        (lambda: draw_tokens(panel(), "x.png", GRID), ShapeError, "PIL image"),
        (lambda: draw_tokens(panel(), VIEW[None], GRID, sample=1), ShapeError, "holds 1 images"),
        (lambda: draw_views(panel(), VIEW, [VIEW]), ShapeError, r"geometries\[0\]"),
        (
            lambda: draw_views(panel(), VIEW, _two(), labels="abc"),
            ShapeError,
            "`labels` has 3 entries for 2 views",
        ),
        (
            lambda: draw_views(panel(), VIEW, [_beyond_the_horizon()]),
            GeometryError,
            "horizon",
        ),
        (
            lambda: draw_matches(panel(), VIEW, VIEW, GRID, GRID, one_match(5)),
            ShapeError,
            "5 student tokens",
        ),
        (
            lambda: draw_matches(
                panel(), VIEW, VIEW, GRID, GRID, one_match()._replace(
                    teacher_index=torch.full((1, 4, 1), 4)
                )
            ),
            ShapeError,
            "teacher's grid has 2 × 2 = 4",
        ),
        (
            lambda: draw_matches(panel(), VIEW, VIEW, GRID, GRID, one_match(b=3), sample=3),
            ShapeError,
            "holds 3 images",
        ),
        (lambda: match_figure(VIEW, [], [], [], {}), ShapeError, "`views` is empty"),
        (lambda: match_figure(VIEW, [VIEW], [], [GRID], {}), ShapeError, "`geometries`"),
        (lambda: match_figure(VIEW, [VIEW] * 2, _two(), [GRID] * 2, {"a": {(2, 0): one_match()}}),
         ShapeError, "there are 2 views"),
        (lambda: match_figure(VIEW, [VIEW] * 2, _two(), [GRID] * 2, {"a": {}}, pairs=[(0, 1)]),
         DataError, r"no pair \(0, 1\)"),
        (lambda: denormalize(VIEW, (0.5,), (0.5,)), ShapeError, "channels"),
    ],
)  # fmt: skip
def test_bad_input_says_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call()


def _beyond_the_horizon():
    matrix = torch.tensor([[1.0, 0, 0], [0, 1, 0], [-0.15, 0, 1]])
    return from_matrix(matrix, (8, 8), (8, 8))


def _two():
    return [from_box((0, 0, 8, 8), (8, 8), (8, 8))] * 2


def test_colours_repeat_after_ten():
    assert view_colors(11)[10] == view_colors(1)[0]
    assert len(set(view_colors(10))) == 10
