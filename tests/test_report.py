"""FreezeReport: plain data that prints, survives strict JSON, counts and draws what was frozen.

Contract: importing and printing a report needs the standard library alone; a saved report is strict
JSON, written whole or not at all, and loads back equal; the printed report is ASCII without colour
codes, at most 100 columns wide; a picture is drawn without pyplot for every report, without
warnings, with no label cut off or on top of another.
"""

import dataclasses
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from grades_kernels import report as module
from grades_kernels.report import FreezeEvent, FreezeReport, UnitReport

NAN = math.nan
INF = math.inf
KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def unit(name="a", *, layer=0, kind="q_proj", n=10, tau=1.0, statistic=NAN, decided=-1, frozen=-1):
    return UnitReport(name, layer, kind, n, "change", tau, statistic, 0, decided, frozen)


def event(step, name, *, statistic=0.5, n=10, decided=None):
    return FreezeEvent(step, name, statistic, 1.0, n, step if decided is None else decided)


def report(units=(), events=(), history=(), *, step=100, total=120, grace=20, spare=0):
    n_trainable = sum(each.n_elements for each in units) + spare
    return FreezeReport(
        step, total, grace, tuple(units), tuple(events), tuple(history), n_trainable, "reference"
    )


def training_run(n_layers, *, freeze="some", cooldown=0, step=100, kinds=KINDS, tau=None):
    """A report as a run leaves it: statistics fall, units are decided below their tau."""
    units, events, columns = [], [], []
    for layer in range(n_layers):
        for number, kind in enumerate(kinds):
            threshold = 1.0 + number if tau is None else tau
            start = threshold * (2.0 + 0.1 * layer)
            rate = 0.03 if freeze == "all" else 0.005 * (1 + (layer + number) % 4)
            name = f"model.layers.{layer}.block.{kind}.weight"
            column = {}
            decided = frozen = -1
            for t in range(21, step + 1):
                column[t] = start * math.exp(-rate * (t - 20))
                if freeze != "none" and column[t] < threshold:
                    decided = t
                    break
            if decided >= 0 and decided + cooldown <= step:
                frozen = decided + cooldown
                events.append(FreezeEvent(frozen, name, column[decided], threshold, 64, decided))
            last = column[max(column)]
            units.append(
                UnitReport(name, layer, kind, 64, "change", threshold, last, 0, decided, frozen)
            )
            columns.append(column)
    history = [(t, tuple(c.get(t, NAN) for c in columns)) for t in range(21, step + 1, 2)]
    return report(units, sorted(events), history, step=step, total=step + 40, spare=1000)


THAWED = report(
    [unit("a"), unit("b", n=5, decided=70, frozen=70), unit("c", n=3)],
    # "a" was thawed and is measured again from step 50 on; "b" was frozen twice; "c" was thawed
    # and never measured again.
    [event(30, "a"), event(40, "b", n=5), event(60, "c", n=3), event(70, "b", n=5, decided=65)],
    [(30, (0.5, 2.0, 2.0)), (50, (3.0, NAN, 2.0)), (60, (3.0, NAN, 0.5)), (99, (2.0, NAN, NAN))],
    spare=100,
)
LONG = "a_name_that_goes_on_and_on." * 6
CASES = {
    "no_units": report(grace=None, total=None),
    "no_step_yet": report([unit()], step=0, total=None),
    "no_history": report([unit("a"), unit("b", layer=1)]),
    "all_nan": report(
        [unit("a"), unit("b", layer=1)], history=[(30, (NAN, NAN)), (31, (NAN, NAN))]
    ),
    "only_zeros": report([unit()], history=[(30, (0.0,)), (31, (0.0,))]),
    "some_zeros": report([unit()], history=[(30, (0.0,)), (31, (2.0,)), (33, (INF,))]),
    "one_row": report([unit()], history=[(30, (2.0,))]),
    "extreme": report([unit(tau=1e-40)], history=[(30, (3e38,)), (31, (1e-45,))]),
    "infinite_tau": report([unit(tau=INF)], history=[(30, (2.0,)), (31, (3.0,))]),
    "observing": training_run(2, tau=0.0),
    "max_frozen": report(
        [unit(decided=50, frozen=50)], [event(50, "a", statistic=NAN)], [(30, (2.0,))]
    ),
    "thawed": THAWED,
    "cooling": training_run(4, cooldown=30),
    "all_frozen": training_run(4, freeze="all"),
    "nothing_frozen": training_run(4, freeze="none"),
    "one_unit": training_run(1, kinds=["weight"]),
    "seven_units": training_run(1),
    "300_units": training_run(43),
    "300_units_cooling": training_run(43, cooldown=15),
    "one_kind": training_run(60, kinds=["weight"]),
    "thirty_kinds": training_run(2, kinds=[f"kind_{number}" for number in range(30)]),
    "no_layers": report([unit(f"group0.param{i}", layer=None, kind="matrix") for i in range(9)]),
    "odd_names": report(
        [
            unit(LONG + "experts[0].$w$", kind="experts[bold].$w$"),
            unit(LONG + "experts[1].$w$", kind="_hidden"),
            unit("_", kind=LONG),
        ],
        [event(50, LONG + "experts[0].$w$")],
        [(30, (1.0, 2.0, 3.0))],
    ),
    "past_the_plan": report([unit()], step=300, total=200, grace=500),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


class TestImports:
    PROBE = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("report", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules["report"] = module
spec.loader.exec_module(module)
unit = module.UnitReport("a", 0, "q", 10, "change", 1.0, 0.5, 0, 5, 5)
event = module.FreezeEvent(5, "a", 0.5, 1.0, 10, 5)
report = module.FreezeReport(9, None, 1, (unit,), (event,), ((5, (0.5,)),), 10, "reference")
str(report), repr(report), report.save(sys.argv[2] + ".json")
exec(sys.argv[3])
names = ["matplotlib", "matplotlib.pyplot", "rich", "numpy", "torch"]
print(*[name for name in names if name in sys.modules])
"""

    def loaded(self, tmp_path, statement):
        arguments = [module.__file__, str(tmp_path / "report"), statement]
        command = [sys.executable, "-c", self.PROBE, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return set(done.stdout.split())

    def test_import_print_and_save_need_the_standard_library_alone(self, tmp_path):
        assert self.loaded(tmp_path, "") == set()

    def test_plot_never_imports_pyplot(self, tmp_path):
        loaded = self.loaded(tmp_path, "report.plot(sys.argv[2] + '.png')")
        assert "matplotlib" in loaded
        assert "matplotlib.pyplot" not in loaded

    def test_the_probe_would_see_pyplot(self, tmp_path):
        assert "matplotlib.pyplot" in self.loaded(tmp_path, "import matplotlib.pyplot")

    def test_plot_without_matplotlib_names_the_extra(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(ImportError, match=r"pip install 'grades-kernels\[demo\]'"):
            CASES["seven_units"].plot(tmp_path / "report.png")


def strict_loads(text):
    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


class TestSaveAndLoad:
    @every_case
    def test_round_trip_through_strict_json_is_equal(self, case, tmp_path):
        path = case.save(tmp_path / "new" / "folder" / "report.json")
        assert strict_loads(path.read_text()) == case.to_dict()
        loaded = FreezeReport.load(path)
        assert loaded == case
        assert [type(row) for row in loaded.events] == [FreezeEvent] * len(case.events)
        assert str(loaded) == str(case)

    def test_nan_and_infinity_are_told_apart(self, tmp_path):
        case = report([unit(statistic=NAN, tau=INF), unit("b", statistic=INF)])
        loaded = FreezeReport.load(case.save(tmp_path / "report.json"))
        assert math.isnan(loaded.units[0].statistic)
        assert (loaded.units[0].tau, loaded.units[1].statistic) == (INF, INF)

    def test_lists_in_place_of_tuples_are_saved_too(self):
        case = FreezeReport(1, None, None, [unit()], [], [(1, [NAN])], 10, "reference")
        assert case.to_dict()["history"] == [[1, [None]]]

    def test_strict_reader_refuses_nan(self):
        with pytest.raises(ValueError, match="NaN is no JSON"):
            strict_loads(json.dumps([NAN]))

    @pytest.mark.parametrize("change", ["step", "unit", "event", "history"])
    def test_a_changed_report_is_not_equal(self, change):
        case = CASES["seven_units"]
        step, row = case.history[0]
        changed = {
            "step": {"step": case.step + 1},
            "unit": {"units": (dataclasses.replace(case.units[0], hits=9), *case.units[1:])},
            "event": {"events": (case.events[0]._replace(statistic=NAN), *case.events[1:])},
            "history": {"history": ((step, (NAN, *row[1:])), *case.history[1:])},
        }[change]
        assert dataclasses.replace(case, **changed) != case
        assert case != "a report"

    def test_a_failed_save_leaves_the_old_file_and_no_other(self, tmp_path, monkeypatch):
        path = tmp_path / "report.json"
        CASES["one_unit"].save(path)
        before = path.read_text()
        real = Path.write_text

        def disk_full(self, text, **options):
            real(self, text[:10], **options)
            raise OSError("disk full")

        monkeypatch.setattr(Path, "write_text", disk_full)
        with pytest.raises(OSError, match="disk full"):
            CASES["seven_units"].save(path)
        assert [each.name for each in tmp_path.iterdir()] == ["report.json"]
        assert path.read_text() == before

        # Negative control: writing in place would have destroyed the old file.
        with pytest.raises(OSError, match="disk full"):
            path.write_text(json.dumps(CASES["seven_units"].to_dict()), encoding="utf-8")
        assert path.read_text() != before

    @pytest.mark.parametrize(
        "text",
        ["", "not JSON", "[]", "{}", '{"units": [{}], "events": [], "history": []}', "null"],
    )
    def test_any_other_file_is_refused_by_name(self, text, tmp_path):
        path = tmp_path / "other.json"
        path.write_text(text)
        with pytest.raises(ValueError, match=r"other\.json' is not a freeze report"):
            FreezeReport.load(path)

    @pytest.mark.parametrize("damage", ["unknown field", "missing field", "short row"])
    def test_a_damaged_report_is_refused(self, damage, tmp_path):
        data = CASES["seven_units"].to_dict()
        if damage == "unknown field":
            data["colour"] = "blue"
        elif damage == "missing field":
            del data["backend"]
        else:
            data["history"][0][1].pop()
        path = tmp_path / "report.json"
        path.write_text(json.dumps(data))
        with pytest.raises(ValueError, match="is not a freeze report"):
            FreezeReport.load(path)


class TestArithmetic:
    def test_trainable_elements_by_hand(self):
        units = [
            unit("a", n=10, decided=30, frozen=30),
            unit("b", n=7, decided=25, frozen=40),
            unit("c", n=5, decided=90),
            unit("d", n=3),
        ]
        case = report(units, [event(30, "a"), event(40, "b", n=7, decided=25)], spare=100)
        assert case.trainable_elements() == [(0, 125), (30, 115), (40, 108), (100, 108)]
        assert case.frozen_share() == [(0, 0.0), (30, 0.25), (40, 0.5), (100, 0.5)]

    def test_a_thaw_gives_the_elements_back(self):
        # a: frozen 30..50 (measured again at 50). b: frozen 40, decided again at 70 in the unit's
        # own words, frozen since. c: frozen at 60, thawed at the latest at the end.
        assert THAWED.trainable_elements() == [
            (0, 118),
            (30, 108),
            (40, 103),
            (50, 113),
            (60, 110),
            (70, 110),
            (100, 113),
        ]

    def test_a_unit_that_stays_frozen_does_not_come_back(self):
        """Negative control of the thaw: the same events, but the unit is still frozen."""
        units = (unit("a", decided=30, frozen=30), *THAWED.units[1:])
        frozen = dataclasses.replace(THAWED, units=units)
        assert frozen.trainable_elements()[-1] == (100, 103)
        assert frozen.trainable_elements() != THAWED.trainable_elements()

    def test_without_an_event_the_unit_itself_counts(self):
        case = report([unit(decided=40, frozen=40)], spare=1)
        assert case.trainable_elements() == [(0, 11), (40, 1), (100, 1)]

    def test_nothing_monitored(self):
        assert report(spare=7).trainable_elements() == [(0, 7), (100, 7)]
        assert report(spare=7).frozen_share() == [(0, 0.0), (100, 0.0)]

    def test_states_of_a_unit(self):
        states = [unit(decided=d, frozen=f).state for d, f in [(-1, -1), (5, -1), (5, 9), (0, 0)]]
        assert states == ["active", "cooling", "frozen", "frozen"]

    def test_history_needs_one_statistic_per_unit(self):
        with pytest.raises(ValueError, match="history of step 30 has 1 statistics for 2 units"):
            report([unit("a"), unit("b")], history=[(30, (1.0,))])


class TestText:
    @every_case
    def test_is_ascii_without_colour_codes_and_fits(self, case):
        text = str(case)
        assert text.isascii() and "\x1b" not in text
        assert max(map(len, text.splitlines())) <= module.TEXT_WIDTH

    def test_content(self):
        case = report(
            [
                unit("layers.0.q", n=600, statistic=0.25, decided=30, frozen=30),
                unit("layers.1.q", layer=1, n=600, statistic=0.75, decided=41, frozen=51),
                unit("layers.0.up", kind="up", n=1000, tau=2.0, statistic=3.0),
                unit("layers.1.up", kind="up", layer=1, n=1000, tau=4.0, statistic=3.5, decided=99),
            ],
            [event(30, "layers.0.q", n=600), event(51, "layers.1.q", statistic=NAN, decided=41)],
            spare=800,
        )
        lines = [" ".join(line.split()) for line in str(case).splitlines()]
        assert "Freeze report after 100 of 120 planned steps (reference backend)" in lines
        assert "Monitored units: 4; decided 3, of which frozen 2; grace period 20 steps" in lines
        assert "Frozen elements: 1,200 = 37.5 % of the monitored, 30.0 % of all 4,000" in lines
        assert "kind units elements frozen first last min median max tau" in lines
        assert "q_proj 2 1,200 2 30 51 0.25 0.5 0.75 1" in lines
        assert "up 2 2,000 0 - - 3 3.25 3.5 2..4" in lines
        assert "30 30 0.5 1 600 layers.0.q" in lines
        assert "51 41 max_frozen 1 10 layers.1.q" in lines
        assert "q_proj ##" in lines
        assert "up .~" in lines

    def test_only_the_last_events_are_listed(self):
        case = CASES["300_units"]
        text = str(case)
        assert f"Last 10 of {len(case.events)} freezes" in text
        assert case.events[-10].unit in text
        assert case.events[-11].unit not in text

    def test_one_line_per_kind_not_per_unit(self):
        table = str(CASES["300_units"]).split("\n\n")[1]
        assert len(table.splitlines()) == 3 + len(KINDS)

    def test_layers_are_one_character_each(self):
        grid = str(CASES["300_units"]).split("\n\n")[-1].splitlines()
        assert grid[1].split() == ["layer", *map(str, range(0, 43, 5))]
        assert [len(line.split()[1]) for line in grid[3:]] == [43] * len(KINDS)

    def test_units_of_one_layer_in_several_states(self):
        units = [unit("a", decided=5, frozen=5), unit("b"), unit("c", layer=1, kind="up")]
        assert str(report(units)).splitlines()[-2:] == ["q_proj  +", "up       ."]

    @pytest.mark.parametrize("n_layers", [1, 200])
    def test_no_layer_grid_where_it_is_pointless_or_too_wide(self, n_layers):
        assert "By kind and layer" not in str(training_run(n_layers))
        assert "By kind and layer" in str(training_run(5))

    def test_observing_and_nothing_monitored_are_said(self):
        assert "Observing only: tau is 0" in str(CASES["observing"])
        assert "Observing only" not in str(CASES["seven_units"])
        assert "No unit is monitored" in str(CASES["no_units"])

    def test_repr_is_short(self):
        assert repr(CASES["all_frozen"]) == (
            "FreezeReport(step=100, units=28, frozen=28, events=28, history=40 rows)"
        )

    @pytest.mark.parametrize("terminal", [False, True], ids=["file", "terminal"])
    def test_rich_colours_a_terminal_only(self, terminal, monkeypatch):
        console = pytest.importorskip("rich.console")
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TERM", "xterm")
        out = io.StringIO()
        console.Console(file=out, force_terminal=terminal, width=100).print(CASES["odd_names"])
        assert ("\x1b[" in out.getvalue()) == terminal
        if not terminal:
            assert out.getvalue().rstrip("\n") == str(CASES["odd_names"])


def drawn(case):
    """The picture of a report, laid out, as a figure."""
    figure = module._Picture(case).draw()
    figure.draw_without_rendering()
    return figure


def cut_off(figure):
    """Whether anything that is drawn reaches over an edge of the page."""
    width, height = figure.get_size_inches()
    box = figure.get_tightbbox()
    return box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height


def overlaps(figure):
    """Pairs of labels of one axis, or of titles and legends, that are on top of each other."""
    groups = [list(axis.get_yticklabels(which="both")) for axis in figure.axes]
    groups += [list(axis.get_xticklabels()) for axis in figure.axes]
    groups += [list(axis.texts) for axis in figure.axes]
    groups += [
        [figure._suptitle]
        + [axis._left_title for axis in figure.axes]
        + [text for legend in figure.legends for text in legend.get_texts()]
    ]
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


@pytest.mark.filterwarnings("error")
class TestPlot:
    @pytest.fixture(autouse=True)
    def _needs_matplotlib(self):
        pytest.importorskip("matplotlib")

    @every_case
    def test_writes_a_picture_with_nothing_cut_off_or_overlapping(
        self, case, tmp_path, monkeypatch
    ):
        from matplotlib.image import imread

        figures = []
        draw = module._Picture.draw
        monkeypatch.setattr(
            module._Picture, "draw", lambda self: figures.append(draw(self)) or figures[0]
        )
        path = case.plot(tmp_path / "new" / "report.png")
        assert path == tmp_path / "new" / "report.png"
        pixels = imread(path)
        assert pixels.shape[0] > 900 and pixels.shape[1] == 2100
        assert pixels.std() > 0.01
        assert not cut_off(figures[0])
        assert overlaps(figures[0]) == []

    def test_the_layout_check_sees_too_many_labels(self, monkeypatch):
        """Negative control: a label for each of 60 rows."""
        monkeypatch.setattr(module, "LABELLED_ROWS", 1000)
        assert overlaps(drawn(CASES["one_kind"])) != []

    def test_the_layout_check_sees_a_cut(self):
        """Negative control: the same picture on a page that is too narrow, not laid out again."""
        figure = drawn(CASES["odd_names"])
        figure.set_layout_engine("none")
        figure.axes[0].set_position((0.0, 0.5, 0.4, 0.4))
        assert cut_off(figure)

    def test_a_kind_has_one_colour_in_all_panels(self):
        from matplotlib.colors import to_hex

        figure = drawn(CASES["all_frozen"])
        timeline, curves, share, _ = figure.axes
        kinds = {
            text.get_text().split()[-1]: to_hex(line.get_color())
            for text, line in zip(
                figure.legends[-1].get_texts(), figure.legends[-1].get_lines(), strict=True
            )
        }
        assert list(kinds) == KINDS
        assert len(set(kinds.values())) == len(KINDS)
        for axis in (curves, share):
            colours = {to_hex(line.get_color()) for line in axis.get_lines()}
            assert set(kinds.values()) <= colours
        # The rows of the timeline are sorted by kind, four layers each; a frozen row ends in the
        # pure colour.
        last = {}
        for bar in timeline.patches:
            row = round(bar.get_y() + bar.get_height() / 2)
            if bar.get_x() + bar.get_width() == CASES["all_frozen"].step and row >= 0:
                last[row] = to_hex(bar.get_facecolor())
        assert [last[row] for row in range(28)] == [c for c in kinds.values() for _ in range(4)]

    def test_timeline_shows_active_cooling_frozen_and_thawed(self):
        picture = module._Picture(THAWED)
        assert picture.spans(THAWED.units[0]) == [
            ("active", 0, 30),
            ("frozen", 30, 50),
            ("active", 50, 100),
        ]
        assert picture.spans(THAWED.units[1]) == [
            ("active", 0, 40),
            ("frozen", 40, 70),
            ("frozen", 70, 100),
        ]
        cooling = unit(decided=80)
        assert module._Picture(report([cooling])).spans(cooling) == [
            ("active", 0, 80),
            ("cooling", 80, 100),
        ]

    def test_curves_are_single_for_few_units_and_medians_for_many(self):
        def curves(case):
            return [line for line in drawn(case).axes[1].get_lines() if len(line.get_xdata()) > 10]

        assert len(curves(CASES["nothing_frozen"])) == 28
        many = training_run(43, freeze="none")
        assert len(curves(many)) == len(KINDS)
        start = many.history[0][1][:: len(KINDS)]
        assert curves(many)[0].get_ydata()[0] == pytest.approx(sorted(start)[21])

    def test_thresholds_are_drawn_and_infinite_or_zero_ones_explained(self):
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

    @pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
    def test_the_suffix_chooses_the_format(self, suffix, tmp_path):
        path = CASES["seven_units"].plot(tmp_path / f"report.{suffix}")
        start = path.read_bytes()[:200]
        assert {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix] in start

    def test_without_suffix_it_is_png(self, tmp_path):
        path = CASES["seven_units"].plot(tmp_path / "report")
        assert path == tmp_path / "report.png" and path.exists()

    def test_a_saved_report_gives_the_same_picture(self, tmp_path):
        case = CASES["seven_units"]
        loaded = FreezeReport.load(case.save(tmp_path / "report.json"))
        first, second = case.plot(tmp_path / "a.png"), loaded.plot(tmp_path / "b.png")
        assert first.read_bytes() == second.read_bytes()
        assert first.read_bytes() != CASES["one_unit"].plot(tmp_path / "c.png").read_bytes()
