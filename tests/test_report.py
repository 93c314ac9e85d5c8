"""FreezeReport: imports, files, derived numbers and text.

Contract: importing and printing a report needs neither matplotlib nor rich; a saved report is
strict JSON that loads back equal, and an error leaves the old file as it was; the printed report is
ASCII without colour codes, at most 100 columns wide.
"""

import dataclasses
import io
import json
import math
import re
from pathlib import Path

import pytest
from harness import run_python
from reports import CASES, INF, KINDS, NAN, event, every_case, report, training_run, unit

from grades_kernels.report import FreezeEvent, FreezeReport

PROBE = """
import sys
from grades_kernels.report import FreezeEvent, FreezeReport, UnitReport

def show_imported():
    print(*[name for name in ("matplotlib", "matplotlib.pyplot", "rich") if name in sys.modules])

unit = UnitReport("a", 0, "q", 10, "change", 1.0, 0.5, 0, 5, 5)
event = FreezeEvent(5, "a", 0.5, 1.0, 10, 5)
report = FreezeReport(9, None, 1, (unit,), (event,), ((5, (0.5,)),), 10, "reference")
str(report), repr(report), report.save("report.json")
show_imported()
report.plot("report.png")
show_imported()
import matplotlib.pyplot, rich
show_imported()
"""


OLD_REPORT = """{"step": 100, "total_steps": null, "grace_steps": 20, "units": [
{"name": "a", "layer": null, "kind": "q", "n_elements": 6, "criterion": "change", "tau": "inf",
"statistic": null, "hits": 0, "decided_at": -1, "frozen_at": -1}],
"events": [{"step": 60, "unit": "b", "statistic": 0.5, "tau": 1.0, "n_elements": 4,
"decided_at": 55}], "history": [[30, [null]]], "n_trainable": 10, "backend": "native",
"memory": {"moments": 8, "prev_grads": 0, "grads": 0, "released": 4}, "frozen_blocks": 1,
"trained_below": ["b"]}"""


def test_only_plot_imports_matplotlib_and_never_pyplot(tmp_path):
    """Neither printing nor saving does; the last line is the negative control."""
    done = run_python("-c", PROBE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["", "matplotlib", "matplotlib matplotlib.pyplot rich"]


class TestSaveAndLoad:
    @every_case
    def test_a_report_loads_back_equal_from_strict_json(self, case, tmp_path):
        path = case.save(tmp_path / "new" / "folder" / "report.json")
        text = path.read_text()
        assert json.loads(text) == case.to_dict()
        assert not re.search("NaN|Infinity", text)  # Python's JSON has them, strict JSON has not
        loaded = FreezeReport.load(path)
        assert loaded == case
        assert [type(row) for row in loaded.events] == [FreezeEvent] * len(case.events)
        assert str(loaded) == str(case)

    def test_a_changed_report_is_not_equal(self):
        case = CASES["seven_units"]
        step, row = case.history[0]
        for changed in (
            {"step": case.step + 1},
            {"units": (dataclasses.replace(case.units[0], hits=9), *case.units[1:])},
            {"events": (case.events[0]._replace(statistic=NAN), *case.events[1:])},
            {"history": ((step, (NAN, *row[1:])), *case.history[1:])},
        ):
            assert dataclasses.replace(case, **changed) != case
        assert case != "a report"

    def test_a_failed_save_leaves_the_old_file_and_no_other(self, tmp_path, monkeypatch):
        path = tmp_path / "report.json"
        CASES["one_unit"].save(path)
        before = path.read_text()
        write_text = Path.write_text

        def disk_full(self, text, **options):
            write_text(self, text[:10], **options)
            raise OSError("disk full")

        monkeypatch.setattr(Path, "write_text", disk_full)
        with pytest.raises(OSError, match="disk full"):
            CASES["seven_units"].save(path)
        assert [each.name for each in tmp_path.iterdir()] == ["report.json"]
        assert path.read_text() == before

        # Negative control: writing in place would have destroyed the old file.
        with pytest.raises(OSError, match="disk full"):
            path.write_text("a new report", encoding="utf-8")
        assert path.read_text() != before

    REPORT = CASES["seven_units"].to_dict()

    @pytest.mark.parametrize(
        "text",
        [
            *("", "not JSON", "[]", "{}", '{"units": [{}], "events": [], "history": []}', "null"),
            json.dumps({**REPORT, "unknown": "field"}),
            json.dumps({name: value for name, value in REPORT.items() if name != "backend"}),
            json.dumps({**REPORT, "history": [[30, [1.0]]]}),
            json.dumps({**REPORT, "step": "70"}),
            json.dumps({**REPORT, "backend": 5}),
        ],
    )
    def test_load_refuses_any_other_file_and_names_it(self, text, tmp_path):
        path = tmp_path / "other.json"
        path.write_text(text)
        with pytest.raises(ValueError, match=r"other\.json' is not a freeze report"):
            FreezeReport.load(path)

    def test_a_report_of_version_0_1_0_loads(self, tmp_path):
        path = tmp_path / "report.json"
        path.write_text(OLD_REPORT)
        loaded = FreezeReport.load(path)
        assert loaded.to_dict() == json.loads(OLD_REPORT) | {"cut": ""}
        assert loaded.units[0].tau == INF and math.isnan(loaded.units[0].statistic)
        assert loaded.events == (FreezeEvent(60, "b", 0.5, 1.0, 4, 55),)


class TestDerivedNumbers:
    def test_trainable_elements_and_frozen_share_by_hand(self):
        units = [
            unit("a", n=10, decided=30, frozen=30),
            unit("b", n=7, decided=25, frozen=40),
            unit("c", n=5, decided=90),
            unit("d", n=3),
        ]
        case = report(units, [event(30, "a"), event(40, "b", n=7, decided=25)], spare=100)
        assert case.trainable_elements() == [(0, 125), (30, 115), (40, 108), (100, 108)]
        assert case.frozen_share() == [(0, 0.0), (30, 0.25), (40, 0.5), (100, 0.5)]

    def test_without_monitored_units_everything_is_trained(self):
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
    def test_text_is_ascii_without_colour_codes_and_100_columns_wide(self, case):
        text = str(case)
        assert text.isascii() and "\x1b" not in text
        assert max(map(len, text.splitlines())) <= 100

    def test_lines_of_a_small_report(self):
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
        for line in (
            "Freeze report after 100 of 120 planned steps (reference backend)",
            "Monitored units: 4; decided 3, of which frozen 2; grace period 20 steps",
            "Frozen elements: 1,200 = 37.5 % of the monitored, 30.0 % of all 4,000",
            "kind units elements frozen first last min median max tau",
            "q_proj 2 1,200 2 30 51 0.25 0.5 0.75 1",
            "up 2 2,000 0 - - 3 3.25 3.5 2..4",
            "30 30 0.5 1 600 layers.0.q",
            "51 41 max_frozen 1 10 layers.1.q",
            "q_proj ##",
            "up .~",
        ):
            assert line in lines

    def test_tables_of_many_units_stay_short(self):
        """The last 10 events, a line per kind, and a character per kind and layer."""
        case = CASES["300_units"]
        _, kinds, events, grid = str(case).split("\n\n")
        assert events.startswith(f"Last 10 of {len(case.events)} freezes")
        assert case.events[-10].unit in events and case.events[-11].unit not in events
        assert len(kinds.splitlines()) == 3 + len(KINDS)
        _, ruler, _, *rows = grid.splitlines()
        assert ruler.split() == ["layer", *map(str, range(0, 43, 5))]
        assert [len(row.split()[1]) for row in rows] == [43] * len(KINDS)

    def test_units_of_one_kind_and_layer_in_several_states(self):
        units = [unit("a", decided=5, frozen=5), unit("b"), unit("c", layer=1, kind="up")]
        assert str(report(units)).splitlines()[-2:] == ["q_proj  +", "up       ."]

    @pytest.mark.parametrize(("n_layers", "shown"), [(1, False), (5, True), (200, False)])
    def test_one_layer_or_too_many_give_no_table_of_layers(self, n_layers, shown):
        assert ("By kind and layer" in str(training_run(n_layers))) == shown

    def test_text_mentions_observing_and_that_nothing_is_monitored(self):
        assert "Observing only: tau is 0" in str(CASES["observing"])
        assert "Observing only" not in str(CASES["seven_units"])
        assert "No unit is monitored" in str(CASES["no_units"])
        assert "Before the first step" not in str(CASES["seven_units"])  # there was no cut

    def test_text_says_in_the_grace_period_when_it_ends(self):
        for step in (0, 20):
            text = str(report([unit()], step=step, grace=20))
            assert "No check yet: the grace period ends with step 20." in text
        assert "No check yet" not in str(report([unit()], step=21, grace=20))

    def test_repr_is_short(self):
        expected = "FreezeReport(step=100, units=28, frozen=28, events=28, history=40 rows)"
        assert repr(CASES["all_frozen"]) == expected

    @pytest.mark.parametrize("terminal", [False, True], ids=["file", "terminal"])
    def test_rich_writes_colours_to_a_terminal_only(self, terminal, monkeypatch):
        console = pytest.importorskip("rich.console")
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TERM", "xterm")
        case, out = CASES["special_names"], io.StringIO()
        console.Console(file=out, force_terminal=terminal, width=100).print(case)
        assert ("\x1b[" in out.getvalue()) == terminal
        if not terminal:
            assert out.getvalue().rstrip("\n") == str(case)
