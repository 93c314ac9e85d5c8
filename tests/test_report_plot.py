"""The picture of a report.

Contract: a picture is drawn for every report, without warnings, and no label is cut off or overlaps
another.
"""

import sys

import pytest
from reports import CASES, KINDS, every_case, training_run, unit

from grades_kernels import calibrate
from grades_kernels.report import plot

pytestmark = pytest.mark.filterwarnings("error")
pytest.importorskip("matplotlib")


def drawn(case):
    """The picture of a report, laid out, as a figure."""
    figure = plot.Picture(case).draw()
    figure.draw_without_rendering()
    return figure


def cut_off(figure):
    """Whether any part of the figure extends beyond an edge of the page."""
    width, height = figure.get_size_inches()
    box = figure.get_tightbbox()
    return box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height


def overlaps(figure):
    """Pairs of labels of one axis, or of titles and legends, that overlap."""
    groups = [list(axis.get_yticklabels(which="both")) for axis in figure.axes]
    groups += [list(axis.get_xticklabels()) for axis in figure.axes]
    groups += [list(axis.texts) for axis in figure.axes]
    legends = [text for legend in figure.legends for text in legend.get_texts()]
    groups += [[figure._suptitle, *(axis._left_title for axis in figure.axes), *legends]]
    found = []
    for group in groups:
        shown = [text for text in group if text.get_text().strip()]
        boxes = [text.get_window_extent() for text in shown]
        found += [
            (shown[i].get_text(), shown[j].get_text())
            for i in range(len(boxes))
            for j in range(i)
            if boxes[i].shrunk(0.98, 0.85).overlaps(boxes[j].shrunk(0.98, 0.85))
        ]
    return found


@every_case
def test_a_picture_has_nothing_cut_off_or_overlapping(case, tmp_path, monkeypatch):
    from matplotlib.figure import Figure
    from matplotlib.image import imread

    figures = []
    savefig = Figure.savefig

    def saved(figure, *arguments, **options):
        figures.append(figure)
        savefig(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", saved)
    path = case.plot(tmp_path / "new" / "report.png")
    assert path == tmp_path / "new" / "report.png"
    pixels = imread(path)
    assert pixels.shape[0] > 900 and pixels.shape[1] == 2100
    assert pixels.std() > 0.01
    assert not cut_off(figures[0])
    assert overlaps(figures[0]) == []


def test_overlaps_are_found_with_a_label_for_each_of_60_rows(monkeypatch):
    """Negative control of the test above."""
    monkeypatch.setattr(plot, "LABELLED_ROWS", 1000)
    assert overlaps(drawn(CASES["one_kind"])) != []


def test_a_kind_has_one_colour_in_all_panels():
    from matplotlib.colors import to_hex

    figure = drawn(CASES["all_frozen"])
    timeline, curves, share, _ = figure.axes
    legend = figure.legends[-1]
    labels = [f"4 \N{MULTIPLICATION SIGN} {kind}, tau {k}" for k, kind in enumerate(KINDS, start=1)]
    assert [text.get_text() for text in legend.get_texts()] == labels
    colours = [to_hex(line.get_color()) for line in legend.get_lines()]
    assert len(set(colours)) == len(KINDS)
    for axis in (curves, share):
        assert set(colours) <= {to_hex(line.get_color()) for line in axis.get_lines()}
    # The rows of the timeline are sorted by kind, four layers each; a frozen row ends in the
    # pure colour.
    last = {}
    for bar in timeline.patches:
        row = round(bar.get_y() + bar.get_height() / 2)
        if bar.get_x() + bar.get_width() == CASES["all_frozen"].step and row >= 0:
            last[row] = to_hex(bar.get_facecolor())
    assert [last[row] for row in range(28)] == [colour for colour in colours for _ in range(4)]


def test_timeline_shows_active_cooling_and_frozen():
    active, cooling, frozen = unit(), unit(decided=80), unit(decided=40, frozen=60)
    assert plot.spans(active, 100) == [("active", 0, 100)]
    assert plot.spans(cooling, 100) == [("active", 0, 80), ("cooling", 80, 100)]
    stages = [("active", 0, 40), ("cooling", 40, 60), ("frozen", 60, 100)]
    assert plot.spans(frozen, 100) == stages


def test_curves_are_single_for_few_units_and_medians_for_many():
    def curves(case):
        return [line for line in drawn(case).axes[1].get_lines() if len(line.get_xdata()) > 10]

    assert len(curves(CASES["nothing_frozen"])) == 28
    many = training_run(43, freeze="none")
    assert len(curves(many)) == len(KINDS)
    start = many.history[0][1][:: len(KINDS)]
    assert curves(many)[0].get_ydata()[0] == pytest.approx(sorted(start)[21])


def test_thresholds_are_drawn_and_infinite_or_zero_ones_explained():
    def remark(name):
        return drawn(CASES[name]).axes[1].texts[-1].get_text()

    dashed = [
        line.get_ydata()[0]
        for line in drawn(CASES["seven_units"]).axes[1].get_lines()
        if line.get_linestyle() == "--"
    ]
    assert dashed == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert "tau is 0: observing only" in remark("observing")
    assert "tau inf freezes at once" in remark("infinite_tau")
    assert "zeros are left out" in remark("some_zeros")


STARTS = {"": b"\x89PNG", ".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}


@pytest.mark.parametrize("suffix", STARTS)
def test_the_suffix_chooses_the_format(suffix, tmp_path):
    path = CASES["seven_units"].plot(tmp_path / f"report{suffix}")
    assert path == tmp_path / f"report{suffix or '.png'}"
    assert path.read_bytes().startswith(STARTS[suffix])


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for each in (CASES["seven_units"], calibrate(CASES["nothing_frozen"])):
        with pytest.raises(ImportError, match=r"pip install 'grades-kernels\[demo\]'"):
            each.plot(tmp_path / "picture.png")
