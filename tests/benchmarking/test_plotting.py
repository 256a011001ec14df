"""The picture of a report shows every case and every way."""

import pytest
from helpers.bench_reports import failed_row, report, row
from PIL import Image

from local_distill.benchmarking.plotting import check_plot_path, draw_report, plot_report
from local_distill.errors import ConfigError, DataError

ROWS = [
    row("plain"),
    row("ours", 0.1, seconds=0.025),
    row("plain", case="another"),
    row("ours", 7.0, case="another", seconds=1.75),
]


def labels(axes):
    return [text.get_text() for text in (*axes.texts, *axes.get_yticklabels())]


def test_roof_and_bars():
    roof, bars = draw_report(report(*ROWS, failed_row("theirs"))).axes
    # 1e10 bytes a second and 1e11 flops a second meet at 10 flops a byte; the question has 10
    line = roof.lines[0]
    assert line.get_xydata()[1].tolist() == [10.0, 1e11]
    assert line.get_xydata()[0, 1] == pytest.approx(1e10 * line.get_xydata()[0, 0])
    points = [tuple(point) for group in roof.collections for point in group.get_offsets()]
    assert (10.0, 1e9 / 0.025) in points
    assert len(points) == 4
    assert {"a case", "another", "plain", "ours", "0.1", "7"} <= set(labels(bars))
    assert "theirs" not in labels(bars)
    widths = sorted(bar.get_x() + bar.get_width() for bar in bars.patches)
    assert widths == pytest.approx([0.1, 1.0, 1.0, 7.0])


def test_without_flops_there_is_no_roof():
    rows = [one._replace(flops=0.0, product_fraction=None) for one in ROWS]
    assert len(draw_report(report(*rows)).axes) == 1


def test_a_file_that_is_no_empty_page(tmp_path):
    path = tmp_path / "bench.png"
    plot_report(report(*ROWS), path)
    with Image.open(path) as picture:
        assert min(picture.size) > 400
        assert len(set(picture.convert("L").get_flattened_data())) > 50


def test_nothing_measured_is_refused():
    with pytest.raises(DataError, match="nothing was measured"):
        draw_report(report(failed_row("plain")))


def test_an_ending_that_is_no_picture_is_refused_beforehand():
    check_plot_path("a.svg")
    with pytest.raises(ConfigError, match=r"no picture ends in 'xlsx'; use .png"):
        check_plot_path("a.xlsx")
