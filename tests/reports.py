"""Reports of many kinds of runs, for the tests of the report package."""

import math

import pytest

from grades_kernels.report import FreezeEvent, FreezeReport, UnitReport

NAN = math.nan
INF = math.inf
KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def unit(name="a", *, layer=0, kind="q_proj", n=10, tau=1.0, statistic=NAN, decided=-1, frozen=-1):
    return UnitReport(name, layer, kind, n, "change", tau, statistic, 0, decided, frozen)


def event(step, name, *, statistic=0.5, n=10, decided=None):
    return FreezeEvent(step, name, statistic, 1.0, n, step if decided is None else decided)


def report(units=(), events=(), history=(), *, step=100, total=120, grace=20, spare=0):
    """`spare` is the number of elements that are not monitored."""
    n_trainable = sum(each.n_elements for each in units) + spare
    return FreezeReport(
        step, total, grace, tuple(units), tuple(events), tuple(history), n_trainable, "reference"
    )


def training_run(n_layers, *, freeze="some", cooldown=0, step=100, kinds=KINDS, tau=None):
    """A report of falling statistics, in which a unit is decided when it is below its tau."""
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


LONG = "a_name_that_goes_on_and_on." * 6
TWO = [unit("a"), unit("b", layer=1)]
CASES = {
    "no_units": report(grace=None, total=None),
    "no_step_yet": report([unit()], step=0, total=None),
    "no_history": report(TWO),
    "all_nan": report(TWO, history=[(30, (NAN, NAN)), (31, (NAN, NAN))]),
    "only_zeros": report([unit()], history=[(30, (0.0,)), (31, (0.0,))]),
    "some_zeros": report([unit()], history=[(30, (0.0,)), (31, (2.0,)), (33, (INF,))]),
    "one_row": report([unit()], history=[(30, (2.0,))]),
    "extreme": report([unit(tau=1e-40)], history=[(30, (3e38,)), (31, (1e-45,))]),
    "infinite_tau": report([unit(tau=INF)], history=[(30, (2.0,)), (31, (3.0,))]),
    "observing": training_run(2, tau=0.0),
    "max_frozen": report(
        [unit(decided=50, frozen=50)], [event(50, "a", statistic=NAN)], [(30, (2.0,))]
    ),
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
    "special_names": report(
        [
            unit(LONG + "experts[0].$w$", kind="experts[bold].$w$"),
            unit(LONG + "experts[1].$w$", kind="_hidden"),
            unit("_", kind=LONG),
        ],
        [event(50, LONG + "experts[0].$w$")],
        [(30, (1.0, 2.0, 3.0))],
    ),
    "beyond_the_planned_steps": report([unit()], step=300, total=200, grace=500),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
