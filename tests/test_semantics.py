"""The definition of GradESAdamW, rule by rule, on cases small enough to check by hand.

Most tests monitor 1x1 matrices: there the statistic "norm" is |g| and "change" is |g_t - g_{t-1}|,
so a list of numbers scripts a whole run. All of them run on the reference and on the native op, in
float64 where the numbers have to be exact.
"""

import copy
import itertools
import math
import sys
import warnings
from decimal import ROUND_CEILING, Decimal

import numpy as np
import pytest
import torch
from conftest import FUSED
from harness import TIMINGS, assert_same, feed, parameters, snapshot, tensors_of, train
from hypothesis import given, settings
from hypothesis import strategies as st

from grades_kernels import GradESAdamW
from grades_kernels.freezing import table

LOW, HIGH = 1.0, 8.0  # gradients whose norm lies below and above the default tau of these tests
NAN, INF = math.nan, math.inf
DEFAULTS = {"lr": 0.1, "tau": 2.0, "statistic": "norm", "fused": False}


@pytest.fixture(scope="module", autouse=True)
def every_backend(backend):
    DEFAULTS["fused"] = FUSED[backend]


def matrices(n, shape=(1, 1), dtype=torch.float64):
    return [torch.nn.Parameter(torch.full(shape, i + 1.0, dtype=dtype)) for i in range(n)]


def optimizer(params, **options):
    """GradESAdamW, without a grace period unless one is asked for."""
    grace = {} if "total_steps" in options else {"grace_steps": 0}
    return GradESAdamW(params, **{**DEFAULTS, **grace, **options})


def run(*sequences, **options):
    """Runs 1x1 matrices through their sequences of gradients."""
    opt = optimizer(matrices(len(sequences)), **options)
    for grads in zip(*sequences, strict=True):
        feed(opt, *grads)
    return opt


def freezes(opt):
    """[(step, position of the unit)], in the order in which they happened."""
    return [(e.step, opt.monitored_units.index(e.unit)) for e in opt.freeze_events]


def values(opt):
    return [p.item() for p in tensors_of(opt)]


def state_of(opt, i=0):
    """The state of the parameter at this position."""
    return opt.state.get(tensors_of(opt)[i], {})


def statistics(opt):
    return [*opt.statistics().values()]


def measured(opt, gradients):
    """All statistics after each of these steps."""
    seen = []
    for g in gradients:
        feed(opt, g)
        seen += statistics(opt)
    return seen


def adamw(sequence, lr=0.1, start=1.0, **options):
    """Value and state of a 1x1 matrix under torch.optim.AdamW; lr may be a list, one per step."""
    (p,) = matrices(1)
    p.data.fill_(start)
    opt = torch.optim.AdamW([p], foreach=False, **options)
    for t, g in enumerate(sequence):
        opt.param_groups[0]["lr"] = lr[t] if isinstance(lr, list) else lr
        p.grad = None if g is None else torch.full_like(p, g)
        opt.step()
    return p.item(), opt.state[p]


def assert_equal(mine, adamws):
    """The bits are AdamW's on the reference; other backends may round differently."""
    mine, adamws = torch.as_tensor(mine).detach(), torch.as_tensor(adamws).detach()
    if DEFAULTS["fused"] is False:
        assert torch.equal(mine, adamws)
    else:  # cancellation loses digits, so the tolerance is relative to the largest value
        rtol = 2 * torch.finfo(mine.dtype).eps
        torch.testing.assert_close(mine, adamws, rtol=rtol, atol=rtol * float(adamws.abs().max()))


def test_three_steps_computed_by_hand():
    """Two 2x2 matrices, lr 0.1, betas (1/2, 1/2), eps 0, weight decay 1/2, tau 2, grace of 1 step.

    A weight is multiplied by 1 - 0.1 * 0.5 = 0.95 and moved by -0.1 * r, r = m^ / sqrt(v^). With
    betas of 1/2 the bias-corrected moments after 1, 2 and 3 gradients a, b, c are

        m^ = a                 v^ = a^2                       r = sign(a)
        m^ = (a + 2b) / 3      v^ = (a^2 + 2b^2) / 3
        m^ = (a + 2b + 4c)/7   v^ = (a^2 + 2b^2 + 4c^2) / 7

    Gradients of A (steps 1, 2, 3) and r of step 2:
        5, 1, 1.5      m^ = 7/3    v^ = 27/3 = 9     r = 7/9
        1, 1, 1        m^ = 1      v^ = 1            r = 1
        1, 11, 10.5    m^ = 23/3   v^ = 243/3 = 81   r = 23/27
        -5, 1, 1.25    m^ = -1     v^ = 9            r = -1/3
    Change at step 2: 4 + 0 + 10 + 6 = 20, at step 3: 0.5 + 0 + 0.5 + 0.25 = 1.25 < 2: A freezes at
    step 3, before its update.

    Gradients of B, r of steps 2 and 3 (v^ = 9 and (25 + 2 + 36) / 7 = 9, four times that in the
    last row):
        5, 1, 3        r = 7/9       m^ = 19/7   r = 19/21
        5, -1, 3       r = 1/3       m^ = 15/7   r = 5/7
        -5, 1, 3       r = -1/3      m^ = 9/7    r = 3/7
        10, 2, -6      r = 7/9       m^ = -10/7  r = -5/21
    Change at step 2: 4 + 6 + 6 + 8 = 24, at step 3: 2 + 4 + 2 + 8 = 16: B goes on.
    """
    a = torch.nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64))
    b = torch.nn.Parameter(torch.tensor([[-1.0, 0.0], [1.0, 2.0]], dtype=torch.float64))
    hyper = {"lr": 0.1, "betas": (0.5, 0.5), "eps": 0.0, "weight_decay": 0.5}
    opt = optimizer([a, b], tau=2.0, statistic="change", grace_steps=1, **hyper)

    def step(*grads):
        feed(opt, *(torch.tensor(g, dtype=torch.float64) for g in grads))

    def assert_is(tensor, *rows):
        torch.testing.assert_close(
            tensor.detach(), torch.tensor(rows, dtype=torch.float64), rtol=1e-14, atol=1e-15
        )

    step([[5.0, 1.0], [1.0, -5.0]], [[5.0, 5.0], [-5.0, 10.0]])
    assert_is(a, [0.85, 1.8], [2.75, 3.9])  # 0.95 - 0.1, 1.9 - 0.1, 2.85 - 0.1, 3.8 + 0.1
    assert_is(b, [-1.05, -0.1], [1.05, 1.8])  # -0.95 - 0.1, 0 - 0.1, 0.95 + 0.1, 1.9 - 0.1
    assert all(math.isnan(s) for s in opt.statistics().values())

    step([[1.0, 1.0], [11.0, 1.0]], [[1.0, -1.0], [1.0, 2.0]])
    a2 = [0.8075 - 0.7 / 9, 1.71 - 0.1], [2.6125 - 2.3 / 27, 3.705 + 0.1 / 3]
    b2 = [-0.9975 - 0.7 / 9, -0.095 - 0.1 / 3], [0.9975 + 0.1 / 3, 1.71 - 0.7 / 9]
    assert_is(a, *a2)
    assert_is(b, *b2)
    assert opt.statistics() == {"group0.param0": 20.0, "group0.param1": 24.0}
    assert opt.freeze_events == []

    step([[1.5, 1.0], [10.5, 1.25]], [[3.0, 3.0], [3.0, -6.0]])
    assert_is(a, *a2)
    assert_is(
        b,
        [0.95 * b2[0][0] - 1.9 / 21, 0.95 * b2[0][1] - 0.5 / 7],
        [0.95 * b2[1][0] - 0.3 / 7, 0.95 * b2[1][1] + 0.5 / 21],
    )
    assert opt.statistics() == {"group0.param0": 1.25, "group0.param1": 16.0}
    (event,) = opt.freeze_events
    assert (event.step, event.decided_at, event.unit) == (3, 3, "group0.param0")
    assert (event.statistic, event.tau, event.n_elements) == (1.25, 2.0, 4)
    # A's moments stopped after its second gradient: m = a / 4 + b / 2, v = a^2 / 4 + b^2 / 2.
    assert_is(opt.state[a]["exp_avg"], [1.75, 0.75], [5.75, -0.75])
    assert_is(opt.state[a]["exp_avg_sq"], [6.75, 0.75], [60.75, 6.75])
    assert (float(opt.state[a]["step"]), float(opt.state[b]["step"])) == (2, 3)


# 1. Steps that really happened


def test_a_step_skipped_by_grad_scaler_counts_for_nothing():
    (p,) = matrices(1)
    opt = optimizer([p], statistic="change", tau=1.0, grace_steps=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def step(g, overflow=False):
        opt.zero_grad()
        scaler.scale((p * g).sum()).backward()
        if overflow:
            p.grad.fill_(INF)
        scaler.step(opt)
        scaler.update()

    step(5.0)
    step(3.0)
    before = snapshot(opt)
    step(3.2, overflow=True)
    assert_same(snapshot(opt), before)
    step(3.5)  # |3.5 - 3.0|: the step before is the last one that happened
    (event,) = opt.freeze_events
    assert (event.step, event.statistic) == (3, 0.5)


# 2. Grace period and checks


def ceiling(alpha, total):
    return int((Decimal(repr(alpha)) * total).to_integral_value(ROUND_CEILING))


def first_check(**options):
    """The first step at which a unit that is always below tau freezes."""
    opt = optimizer(matrices(1), **options)
    while not opt.freeze_events:
        feed(opt, LOW)
    return opt.freeze_events[0].step


ROUNDING_TRAPS = [
    (hundredths / 100, total)
    for hundredths, total in itertools.product(range(100), range(1, 60))
    if math.ceil(hundredths / 100 * total) != ceiling(hundredths / 100, total)
]


def test_there_are_alphas_that_floating_point_rounds_up():
    """Negative control of the next test: its cases do trap the naive formula."""
    assert (0.28, 25) in ROUNDING_TRAPS
    assert math.ceil(0.28 * 25) == 8


@pytest.mark.parametrize(("alpha", "total"), [(0.28, 25), *ROUNDING_TRAPS[:12], (0.5, 7), (0.0, 5)])
def test_alpha_of_total_steps_is_rounded_up_exactly(alpha, total):
    assert first_check(alpha=alpha, total_steps=total) == ceiling(alpha, total) + 1


def test_alpha_of_another_number_type_is_the_decimal_number_that_was_written():
    assert float(np.float32(0.28)) > 0.28
    assert first_check(alpha=np.float32(0.28), total_steps=25) == 8


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    alpha=st.floats(0, 1, exclude_max=True) | st.integers(0, 999).map(lambda n: n / 1000),
    total=st.integers(1, 40),
)
def test_alpha_of_total_steps_for_any_alpha(alpha, total):
    with warnings.catch_warnings():  # alpha next to 1: the first check lies behind the last step
        warnings.simplefilter("ignore")
        assert first_check(alpha=alpha, total_steps=total) == ceiling(alpha, total) + 1


def test_alpha_is_half_by_default_and_grace_steps_wins():
    assert first_check(total_steps=10) == 6
    assert first_check(total_steps=10, alpha=0.5, grace_steps=2) == 3


@pytest.mark.parametrize(
    ("grace", "every", "checks"),
    [(0, 1, [1, 2, 3, 4]), (0, 3, [1, 4, 7]), (3, 2, [4, 6, 8]), (2, 4, [3, 7])],
)
def test_checks_start_after_the_grace_period_and_come_every_check_every(grace, every, checks):
    opt = optimizer(matrices(1), tau=0.0, grace_steps=grace, check_every=every)
    seen = measured(opt, range(1, max(checks) + 1))
    assert list(dict.fromkeys(s for s in seen if not math.isnan(s))) == checks
    assert [seen[t - 1] for t in checks] == checks


def test_going_past_total_steps_warns_once_and_training_goes_on():
    opt = run([LOW] * 2, total_steps=2, tau=0.0)
    with pytest.warns(UserWarning, match="total_steps") as caught:
        feed(opt, LOW)
    assert caught[0].filename.endswith("harness.py"), "the line that called step()"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        feed(opt, LOW)
    assert values(opt)[0] == adamw([LOW] * 4)[0]


@pytest.mark.parametrize(("grace", "every", "kept"), [(3, 1, [3, 4, 5, 6]), (3, 3, [3, 6])])
def test_the_previous_gradient_needs_no_memory_before_it_is_of_use(grace, every, kept):
    """It is there after the step before the first check, holding that very gradient."""
    opt = optimizer(matrices(1), statistic="change", tau=0.0, grace_steps=grace, check_every=every)
    for t in range(1, 7):
        feed(opt, float(t))
        previous = state_of(opt).get("prev_grad")
        if t < grace:
            assert previous is None or previous.numel() == 0
        elif t in kept:
            assert previous.item() == t


@pytest.mark.parametrize("statistic", ["norm", "momentum"])
def test_only_change_keeps_previous_gradients(statistic):
    previous = state_of(run([LOW] * 4, statistic=statistic, tau=0.0)).get("prev_grad")
    assert previous is None or previous.numel() == 0


# 3. The statistic


HALF_BETA = {"statistic": "momentum", "betas": (0.5, 0.9)}
ROWS = [[[1.0, -2.0], [0.0, 4.0]], [[-1.0, -2.5], [3.0, 3.0]]]
MEASURED = {
    # |31 - 30| and |64 - 60|; the check at step 1 is void.
    "change is taken from the step before whatever check_every": (
        {"statistic": "change", "check_every": 3},
        [10, 20, 30, 31, 50, 60, 64],
        [NAN, NAN, NAN, 1.0, 1.0, 1.0, 4.0],
    ),
    # Moments 2 and 2.5 before the updates, so |3 - 2| and |7 - 2.5|.
    "momentum": (HALF_BETA, [4, 3, 7], [NAN, 1.0, 4.5]),
    "momentum, maximize": (HALF_BETA | {"maximize": True}, [4, 3, 7], [NAN, 1.0, 4.5]),
    **{
        f"{name}, maximize={flag}": ({"statistic": name, "maximize": flag}, ROWS, sums)
        for name, sums in (("norm", [7.0, 9.5]), ("change", [NAN, 2 + 0.5 + 3 + 1]))
        for flag in (False, True)
    },
}


@pytest.mark.parametrize(("options", "gradients", "expected"), MEASURED.values(), ids=MEASURED)
def test_statistics_by_hand(options, gradients, expected):
    gradients = [torch.tensor(g, dtype=torch.float64) for g in gradients]
    opt = optimizer(matrices(1, gradients[0].shape or (1, 1)), tau=0.0, **options)
    assert_same(measured(opt, (g.expand(tensors_of(opt)[0].shape) for g in gradients)), expected)


LORA = "layers.0.self_attn.q_proj.lora_{}.default.weight"


def lora_pair(**options):
    """A LoRA pair of six and two elements, one unit."""
    pair = [("A", torch.ones(2, 3)), ("B", torch.ones(1, 2))]
    named = [(LORA.format(k), torch.nn.Parameter(x.double())) for k, x in pair]
    opt = optimizer(named, **options)
    assert len(opt.monitored_units) == 1
    return opt


@pytest.mark.parametrize(("tau_per", "value"), [("unit", 7.0), ("element", 0.875)])
def test_a_pair_is_measured_as_a_sum_and_freezes_together(tau_per, value):
    """Six elements of 1 and two of 0.5 are 7, or 7 / 8 per element of the unit."""
    opt = lora_pair(tau=value, tau_per=tau_per)
    feed(opt, 1.0, 0.5)
    assert statistics(opt) == [value]
    assert not opt.freeze_events
    before = snapshot(opt)["params"]
    opt.param_groups[0]["tau"] = math.nextafter(value, 8.0)
    feed(opt, 1.0, 0.5)
    assert [(e.step, e.statistic, e.n_elements) for e in opt.freeze_events] == [(2, value, 8)]
    assert_same(snapshot(opt)["params"], before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_gradients_are_summed_in_fp32_or_better(dtype):
    """16384 times 0.01 stagnates in bf16, 16384 times 8 overflows fp16."""
    for g in (0.01, 8.0):
        (statistic,) = measured(optimizer(matrices(1, (128, 128), dtype), tau=0.0), [g])
        assert statistic == pytest.approx(16384 * float(torch.tensor(g, dtype=dtype)), rel=1e-5)


def test_low_precision_differences_are_not_rounded():
    """1 - 2^-9 needs nine bits: bf16 has eight and would give 1."""
    opt = optimizer(matrices(1, (2, 2), torch.bfloat16), statistic="change", tau=0.0)
    assert measured(opt, [2.0**-9, 1.0])[1] == 4 * (1 - 2.0**-9)


def test_the_statistic_is_bitwise_repeatable():
    def once():
        generator = torch.Generator().manual_seed(0)
        opt = optimizer(matrices(1, (67, 131), torch.float32), statistic="change", tau=0.0)
        return measured(opt, (torch.randn(67, 131, generator=generator) for _ in range(3)))

    assert_same(once(), once())


def test_statistics_are_nan_before_the_first_measurement():
    opt = optimizer(matrices(2), grace_steps=1)
    assert_same(statistics(opt), [NAN, NAN])
    feed(opt, LOW, LOW)
    assert_same(statistics(opt), [NAN, NAN])
    feed(opt, 3.0, None)
    assert_same(statistics(opt), [3.0, NAN])


# 4. No evidence
VOIDS = {"missing": None, "zero": 0.0, "nan": NAN, "inf": INF}


@pytest.mark.parametrize("void", VOIDS.values(), ids=VOIDS.keys())
def test_a_void_check_leaves_the_last_statistic(void):
    assert statistics(run([3.0, void])) == [3.0]


@pytest.mark.parametrize("hidden", [NAN, INF, -INF])
@pytest.mark.parametrize("statistic", ["change", "norm", "momentum"])
def test_one_non_finite_element_makes_a_check_void(statistic, hidden):
    opt = optimizer(matrices(1, (3, 3)), statistic=statistic, tau=1e30)
    broken = torch.full((3, 3), LOW, dtype=torch.float64)
    broken[1, 2] = hidden
    assert_same(measured(opt, [broken, broken]), [NAN, NAN])
    assert freezes(opt) == []


def test_a_gradient_with_some_zeros_is_evidence():
    opt = optimizer(matrices(1, (2, 2)))
    feed(opt, torch.tensor([[0.0, 0.0], [0.0, 0.5]], dtype=torch.float64))
    assert freezes(opt) == [(1, 0)]


@pytest.mark.parametrize("void", VOIDS.values(), ids=VOIDS)
@pytest.mark.parametrize("side", [0, 1])
def test_one_void_tensor_makes_its_unit_void(void, side):
    """LoRA's A has a gradient of zero while B is zero: the pair has to wait."""
    opt = lora_pair(tau=1e30)
    grads = [1.0, 1.0]
    grads[side] = void
    feed(opt, *grads)
    assert freezes(opt) == []
    feed(opt, 1.0, 1.0)
    assert freezes(opt) == [(2, 0)]


# Whole runs: (gradients, one sequence per unit), options, and of each freeze the step, the position
# of its unit and, in some runs, the step of the decision and the statistic.
CHANGE, MOMENTUM = {"statistic": "change"}, {"statistic": "momentum", "tau": 1e30}
LATE = {"patience": 3, "check_every": 3, "grace_steps": 1}
SCRIPTS = {
    # 1. Steps that really happened
    "steps without any gradient count": ([[None, None, LOW]], {"grace_steps": 2}, [(3, 0)]),
    "a step without a gradient counts": ([[None, LOW, LOW]], {"grace_steps": 2}, [(3, 0)]),
    # 4. No evidence
    **{
        f"{name}: {what}": ([sequence], {"patience": patience}, expected)
        for name, v in VOIDS.items()
        for what, sequence, patience, expected in (
            ("void checks never freeze", [v] * 5, 1, []),
            ("a void check does not reset patience", [LOW, v, LOW], 2, [(3, 0)]),
            ("void checks do not count for patience", [LOW, v, v], 2, []),
            ("a first void check does not count", [v, LOW], 2, []),
        )
    },
    **{
        f"change and a {name} gradient: {what}": ([[5.0, v, 5.0, 5.0][:n]], CHANGE, expected)
        for name, v in (("missing", None), ("nan", NAN))
        for what, n, expected in (
            ("the gap and the step after it are void", 3, []),
            ("the second step after it is evidence", 4, [(4, 0)]),
        )
    },
    # Checks at 1, 3, 5. Step 4 has no gradient, so the one kept at step 2 is of no use at 5.
    "a gap revives no gradient": ([[5.0, 7.0, 20.0, None, 7.0]], CHANGE | {"check_every": 2}, []),
    "change after a zero gradient": ([[1.0, 0.0, 1.0]], CHANGE, [(3, 0, 3, 1.0)]),
    "an unchanged gradient": ([[5.0, 5.0]], CHANGE | {"tau": 1e-300}, [(2, 0, 2, 0.0)]),
    "change at zero gradients is void": ([[5.0, 0.0, 0.0, 0.0]], CHANGE, []),
    "the first step is void for change": ([[LOW] * 3], CHANGE | {"tau": 1e30}, [(2, 0)]),
    "the first step is void for momentum": ([[LOW] * 3], MOMENTUM, [(2, 0)]),
    "the first step is evidence for norm": ([[LOW] * 3], {"tau": 1e30}, [(1, 0)]),
    "momentum waits for a moment": ([[None, LOW, LOW]], MOMENTUM, [(3, 0)]),
    "a gap does not take the moment away": ([[LOW, None, LOW]], MOMENTUM, [(3, 0)]),
    # 5. Threshold, patience, max_frozen
    "tau itself is not below tau": ([[1.5]], {"tau": 1.5}, []),
    "just below tau": ([[1.5]], {"tau": math.nextafter(1.5, 2.0)}, [(1, 0)]),
    "one of three is below tau": ([[1.0], [2.0], [3.0]], {"tau": 2.0}, [(1, 0)]),
    "two of three": ([[1.0], [2.0], [3.0]], {"tau": math.nextafter(2, 3)}, [(1, 0), (1, 1)]),
    "three hits": ([[LOW] * 3], {"patience": 3}, [(3, 0)]),
    "a miss resets": ([[LOW, LOW, HIGH, LOW, LOW, LOW]], {"patience": 3}, [(6, 0)]),
    "alternating misses": ([[LOW, HIGH, LOW, HIGH, LOW, LOW]], {"patience": 3}, []),
    "void among hits": ([[LOW, LOW, NAN, LOW]], {"patience": 3}, [(4, 0)]),
    "exactly tau resets": ([[LOW, LOW, 2.0, LOW, LOW]], {"patience": 3}, []),
    "patience counts checks": ([[LOW] * 8], LATE, [(8, 0)]),
    "only checks count": ([[HIGH, LOW, HIGH, HIGH, LOW]], LATE | {"patience": 2}, [(5, 0)]),
    **{
        f"max_frozen={share:.3f} of three": (
            [[LOW] * 2, [LOW] * 2, [HIGH] * 2],
            {"max_frozen": share},
            [(1, 0), (1, 1)] + [(2, 2)] * closes,
        )
        for share, closes in ((2 / 3, True), (0.66, True), (0.67, False))
    },
    "max_frozen counts units that are cooling": (
        [[LOW] * 5, [HIGH] * 5],
        {"max_frozen": 0.5, "cooldown": 3},
        [(4, 0, 1), (5, 1, 2)],
    ),
    "max_frozen=1 leaves stragglers alone": ([[LOW] * 5, [HIGH] * 5], {}, [(1, 0)]),
    # 6. Timing and 10. observing
    "the decisive step, same_step": ([[HIGH, HIGH, LOW]], {}, [(3, 0)]),
    "the decisive step, next_step": ([[HIGH, HIGH, LOW]], {"freeze_timing": "next_step"}, [(3, 0)]),
    "a statistic of zero is not below a tau of zero": ([[5.0, 5.0]], CHANGE | {"tau": 0.0}, []),
}


@pytest.mark.parametrize(("sequences", "options", "expected"), SCRIPTS.values(), ids=SCRIPTS)
def test_units_freeze_at_these_steps(sequences, options, expected):
    opt = run(*sequences, **options)
    more = [(e.decided_at, e.statistic) for e in opt.freeze_events]
    found = [(*f, *m) for f, m in zip(freezes(opt), more, strict=True)]
    assert [f[: len(e)] for f, e in zip(found, expected, strict=True)] == expected
    assert opt.frozen_units == [opt.monitored_units[i] for _, i, *_ in expected]
    assert opt.all_frozen is (len(expected) == len(sequences))


def test_the_count_of_hits_is_in_the_state():
    opt = optimizer(matrices(1), patience=4)
    counts = []
    for g in [LOW, LOW, NAN, LOW, HIGH, LOW]:
        feed(opt, g)
        counts.append(opt.state_dict()["state"][0]["grades_hits"])
    assert counts == [1, 2, 2, 3, 0, 1]


def test_measurements_of_another_statistic_count_no_more():
    """Neither as hits nor in the report, whose numbers are all of one statistic."""
    opt = optimizer(matrices(2), patience=3)
    feed(opt, LOW, LOW)
    feed(opt, LOW, LOW)
    opt.param_groups[0] |= {"statistic": "signal", "tau": 1e30}
    feed(opt, LOW, LOW)
    hits = [state["grades_hits"] for state in opt.state_dict()["state"].values()]
    assert hits == [1, 1]
    steps = [step for step, row in opt.report().history if math.isfinite(row[0])]
    assert steps == [3] and opt.frozen_units == []
    feed(opt, LOW, LOW)
    feed(opt, LOW, LOW)
    assert freezes(opt) == [(5, 0), (5, 1)]


def test_a_frozen_unit_keeps_what_decided_it_under_another_statistic():
    opt = run([LOW], [HIGH])
    opt.param_groups[0]["statistic"] = "signal"
    feed(opt, LOW, HIGH)
    assert opt.statistics()["group0.param0"] == opt.freeze_events[0].statistic == LOW
    assert [math.isfinite(x) for x in opt.report().history[0][1]] == [True, False]


@pytest.mark.parametrize("timing", TIMINGS)
def test_max_frozen_decides_the_last_unit_one_step_later(timing):
    """Unit 0 is decided at step 2; unit 1 follows at 3, without an update in either timing."""
    opt = run([HIGH, LOW, LOW, LOW], [HIGH] * 4, max_frozen=0.5, freeze_timing=timing)
    first, second = opt.freeze_events
    assert (first.step, first.decided_at, first.statistic) == (2, 2, LOW)
    assert_same([second.step, second.decided_at, second.statistic], [3, 3, NAN])
    assert values(opt)[1] == adamw([HIGH, HIGH], start=2.0)[0]
    assert opt.all_frozen


def test_max_frozen_needs_no_check_no_gradient_and_no_tau():
    """Checks come at 1, 6, 11: units 1 (no gradient) and 2 (observed only) close at step 2."""
    a, b, c = matrices(3)
    groups = [{"params": [a, b]}, {"params": [c], "tau": 0.0}]
    opt = optimizer(groups, max_frozen=0.3, check_every=5)
    feed(opt, LOW, HIGH, LOW)
    feed(opt, LOW, None, LOW)
    assert freezes(opt) == [(1, 0), (2, 1), (2, 2)]


@pytest.mark.parametrize(
    ("options", "turn", "expected", "n_updates"),
    [
        ({"patience": 2}, 1, [(3, 0), (4, 1)], 1),
        ({"cooldown": 3}, 2, [(4, 0), (6, 1)], 2),
        ({"patience": 2, "statistic": "change", "tau": 1e9}, 3, [(3, 0), (6, 1)], 2),
    ],
)
def test_matrices_that_train_in_turns_keep_their_hits_and_decisions(
    options, turn, expected, n_updates
):
    """A step in which one needs no gradient is void for it, and no more than that."""
    opt = optimizer(matrices(2), **options)
    for t in range(6):
        on = t // turn % 2
        for i, p in enumerate(tensors_of(opt)):
            p.requires_grad_(i == on)
        feed(opt, *[LOW if i == on else None for i in range(2)])
    for p in tensors_of(opt):
        p.requires_grad_(True)
    feed(opt, HIGH, HIGH)
    assert freezes(opt) == expected
    assert [state_of(opt, i)["step"].item() for i in range(2)] == [n_updates] * 2


# 6. Timing


@pytest.mark.parametrize("statistic", ["change", "norm", "momentum"])
def test_the_timings_differ_by_exactly_one_update(statistic):
    sequence = [HIGH, 3.0, 1.0, 1.0, 1.0, 1.0]
    hyper = {"betas": (0.5, 0.9), "weight_decay": 0.3}
    options = {"statistic": statistic, "tau": 2.5, "stop_grad": False}  # which keeps the moments
    same, late = (run(sequence, freeze_timing=t, **hyper, **options) for t in TIMINGS)
    (event,) = same.freeze_events
    assert late.freeze_events == [event]
    for opt, updates in ((same, event.step - 1), (late, event.step)):
        value, state = adamw(sequence[:updates], **hyper)
        assert values(opt) == [value]
        mine = state_of(opt)
        assert (float(mine["step"]), mine["exp_avg"]) == (updates, state["exp_avg"])


# 7. Cooldown


@pytest.mark.parametrize("timing", TIMINGS)
def test_a_decided_unit_cools_down_before_it_freezes(timing):
    """Decided at 3 with K = 4: factors 1, 3/4, 1/2, 1/4 at steps 3 to 6, frozen from 7 on."""
    sequence = [HIGH, HIGH, LOW, 5.0, 6.0, 7.0, 8.0, 9.0]
    opt = run(sequence, cooldown=4, weight_decay=0.3, freeze_timing=timing, stop_grad=False)
    (event,) = opt.freeze_events
    assert (event.step, event.decided_at, event.statistic) == (7, 3, LOW)
    cooldown = [0.1, 0.1, 0.1, 0.075, 0.05, 0.025]
    value, state = adamw(sequence[:6], lr=cooldown, weight_decay=0.3)
    assert values(opt) == [pytest.approx(value, rel=1e-14)]
    mine = state_of(opt)
    assert mine["step"] == 6
    assert torch.equal(mine["exp_avg"], state["exp_avg"])
    assert torch.equal(mine["exp_avg_sq"], state["exp_avg_sq"])


def test_both_timings_give_the_same_run_with_a_cooldown():
    sequences = [HIGH, 3.0, LOW, 4.0, 5.0, 6.0], [HIGH] * 6
    runs = [run(*sequences, cooldown=2, freeze_timing=timing) for timing in TIMINGS]
    assert_same(*map(snapshot, runs))


def test_a_cooling_unit_is_not_frozen_and_not_measured():
    opt = optimizer(matrices(1), cooldown=3)
    feed(opt, LOW)
    for g in (7.0, 9.0):  # far above tau: too late to matter
        feed(opt, g)
        assert (opt.frozen_units, opt.freeze_events, opt.all_frozen) == ([], [], False)
        assert statistics(opt) == [LOW]
    feed(opt, 9.0)
    assert (opt.frozen_units, opt.all_frozen) == (["group0.param0"], True)


@pytest.mark.parametrize("scheduled", [[0.1] * 5, [0.1, 0.2, 0.05, 0.3, 0.1]])
def test_the_cooldown_multiplies_the_scheduler(scheduled):
    opt = optimizer(matrices(1), cooldown=2, grace_steps=1)
    for lr in scheduled:
        opt.param_groups[0]["lr"] = lr
        feed(opt, LOW)
    lrs = [scheduled[0], scheduled[1], scheduled[2] / 2]
    assert values(opt) == [pytest.approx(adamw([LOW] * 3, lr=lrs)[0], rel=1e-14)]
    assert opt.param_groups[0]["lr"] == scheduled[-1], "the group belongs to the scheduler"


def test_unmonitored_tensors_follow_the_last_unit():
    """Units decided at 1 and 3, K = 2: the plain tensor has factors 1 1 1 1/2 0 0, never frozen."""
    a, b, plain = matrices(3)
    opt = optimizer([{"params": [a, b]}, {"params": [plain], "tau": None}], cooldown=2)
    grads = [(LOW, HIGH, 3.0), (LOW, HIGH, 1.0), *[(LOW, LOW, 2.0)] * 4]
    for row in grads:
        feed(opt, *row)
    assert freezes(opt) == [(3, 0), (5, 1)]
    lrs = [0.1, 0.1, 0.1, 0.05, 0.0, 0.0]
    value, state = adamw([row[2] for row in grads], lr=lrs, start=3.0)
    assert plain.item() == pytest.approx(value, rel=1e-14)
    assert opt.state[plain]["step"] == 6
    assert torch.equal(opt.state[plain]["exp_avg"], state["exp_avg"])


def monitored_and_plain(**options):
    """An optimizer over a monitored matrix and one that is not, and the latter."""
    a, plain = matrices(2)
    return plain, optimizer([{"params": [a]}, {"params": [plain], "tau": None}], **options)


def test_unmonitored_tensors_go_on_without_a_cooldown_and_before_the_last_decision():
    for options in ({"cooldown": 0}, {"cooldown": 1, "patience": 9}):
        plain, opt = monitored_and_plain(**options)
        for _ in range(5):
            feed(opt, LOW, 3.0)
        assert plain.item() == adamw([3.0] * 5, start=2.0)[0]


def test_a_plain_optimizer_has_no_cooldown():
    """With nothing monitored no unit is undecided, which must not count as all decided."""
    opt = run([3.0] * 4, tau=None, cooldown=2)
    assert values(opt) == [adamw([3.0] * 4)[0]]


# 8. Frozen means untouched


@pytest.mark.parametrize("stop_grad", ["auto", False])
@pytest.mark.parametrize("options", [{}, {"cooldown": 2}, {"freeze_timing": "next_step"}], ids=str)
def test_a_frozen_tensor_stays_bit_for_bit_whatever_arrives(options, stop_grad):
    generator = torch.Generator().manual_seed(1)
    params = matrices(2, (3, 5), torch.float32)
    hyper = {"tau": 16.0, "weight_decay": 0.9, "amsgrad": True}
    opt = optimizer(params, **hyper, stop_grad=stop_grad, **options)
    moments = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    numbers = ("grades_frozen_at", "grades_hits", "grades_decided_at", "grades_statistic")
    kept = ("step", *numbers, *(() if stop_grad else moments))
    feed(opt, 5.0, 5.0)
    while not opt.freeze_events:
        feed(opt, 1.0, 5.0)
    frozen, moving = params
    before = copy.deepcopy((frozen.detach(), [opt.state[frozen][key] for key in kept]))
    statistic = opt.statistics()["group0.param0"]
    for _ in range(20):
        before_moving = moving.detach().clone()
        g = torch.randn(3, 5, generator=generator) * 100
        for bad in (g, None, 0.0, NAN, INF):
            feed(opt, bad, 5.0)
        assert not torch.equal(moving, before_moving)
    assert_same([frozen, *(opt.state[frozen][key] for key in kept)], [before[0], *before[1]])
    if stop_grad:
        assert [opt.state[frozen][key].numel() for key in moments] == [0, 0, 0], "not released"
    assert opt.statistics()["group0.param0"] == statistic
    assert len(opt.freeze_events) == 1


def test_a_unit_can_freeze_before_it_ever_moved():
    opt = run([LOW, HIGH])
    assert (freezes(opt), values(opt)) == ([(1, 0)], [1.0])


def test_all_frozen_needs_a_monitored_unit_and_every_one_of_them():
    assert run([LOW] * 3, tau=None).all_frozen is False
    assert optimizer(matrices(1)).all_frozen is False
    for last, every_one in ((HIGH, False), (LOW, True)):
        assert run([LOW] * 3, [HIGH, HIGH, last]).all_frozen is every_one


# 10. AdamW where nothing freezes


@pytest.mark.parametrize("tau", [None, 0.0, 1e-9], ids=["plain", "observing", "never reached"])
@pytest.mark.parametrize("statistic", ["change", "norm", "momentum"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_without_a_freeze_the_result_is_adamw(tau, statistic, dtype):
    """Bit for bit on the reference; on the native op AdamW(fused=True) up to rounding."""
    hyper = {"lr": 0.03, "betas": (0.8, 0.97), "weight_decay": 0.2, "amsgrad": True}
    flags = {"foreach": False} if DEFAULTS["fused"] is False else {"fused": True}
    start = [parameters((4, 7), (4, 7), (5,), dtype=dtype) for _ in range(2)]
    mine = optimizer(start[0], tau=tau, statistic=statistic, max_frozen=0.5, **hyper)
    theirs = torch.optim.AdamW(start[1], **flags, **hyper)
    for p, q in zip(tensors_of(train(mine, 8)), tensors_of(train(theirs, 8)), strict=True):
        assert_equal(p, q)
        for key, value in theirs.state[q].items():
            assert_equal(mine.state[p][key], value)


def test_observing_reports_without_freezing():
    opt = run([5.0, 5.0, 6.0], statistic="change", tau=0.0)
    assert (freezes(opt), opt.statistics()) == ([], {"group0.param0": 1.0})


def test_a_long_history_has_every_second_then_every_fourth_check(monkeypatch):
    monkeypatch.setattr(table, "MAX_HISTORY_ROWS", 4)
    opt, seen = optimizer(matrices(1), tau=0.0), []
    for g in range(1, 13):
        feed(opt, float(g))
        assert all(row == (step,) for step, row in opt.report().history)
        seen.append([step for step, _ in opt.report().history])
    assert seen[3:5] == [[1, 2, 3, 4], [1, 3, 5]]
    assert seen[7:9] == [[1, 3, 5, 7], [1, 5, 9]] and seen[11] == [1, 5, 9]


def test_the_history_of_many_units_is_small():
    """Eight bytes per value: 18,000 experts and 512 rows would take 300 MB as tuples of floats."""
    opt = run(*[[LOW]] * 100, tau=0.0)
    [(_, row)] = opt._freezer.table.history
    assert sys.getsizeof(row) <= 100 * 8 + 100


def test_tau_and_statistic_belong_to_the_group():
    a, b, c = matrices(3)
    groups = {"params": [a], "tau": 4.0}, {"params": [b], "statistic": "change"}
    opt = optimizer([*groups, {"params": [c], "tau": None}], tau=0.5)
    assert opt.monitored_units == ["group0.param0", "group1.param0"]
    for _ in range(2):
        feed(opt, 3.0, 3.0, 0.1)
    assert [(e.step, e.unit, e.statistic, e.tau) for e in opt.freeze_events] == [
        (1, "group0.param0", 3.0, 4.0),
        (2, "group1.param0", 0.0, 0.5),
    ]


@pytest.mark.parametrize(
    ("grads", "key", "value", "event"),
    [((3.0, 3.0), "tau", 3.5, (3, 3.0, 3.5)), ((HIGH, HIGH), "statistic", "change", (4, 0.0, 2.0))],
    ids=["tau", "statistic"],
)
def test_tau_and_statistic_may_be_changed_between_steps(grads, key, value, event):
    """After a switch to "change" step 3 has no previous gradient, step 4 has."""
    opt = optimizer(matrices(1), **({"tau": 0.0} if key == "tau" else {}))
    for g in (*grads, *grads):
        if opt.report().step == 2:
            opt.param_groups[0][key] = value
        feed(opt, g)
    assert [(e.step, e.statistic, e.tau) for e in opt.freeze_events] == [event]


def test_vectors_scalars_and_empty_tensors_are_not_monitored():
    shapes = [(2, 2), (4,), (), (0, 3), (2, 1, 3)]
    opt = optimizer([p for shape in shapes for p in matrices(1, shape)])
    assert opt.monitored_units == ["group0.param0", "group0.param4"]
    assert sum(e.n_elements for e in run([LOW]).freeze_events) == 1


def test_a_head_may_come_before_the_groups_that_are_monitored():
    head, block = matrices(2)
    first = {"params": [("lm_head.weight", head)]}
    alone = optimizer([first])
    with pytest.raises(ValueError, match='are added later, this group alone takes "tau": None'):
        alone.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt = optimizer([{**first, "tau": None}])
        feed(opt, LOW)
        opt.add_param_group({"params": [("layers.0.weight", block)]})
        feed(opt, LOW, HIGH)
    assert opt.statistics() == {"layers.0.weight": HIGH}


def test_a_group_added_in_the_middle_of_a_run_is_monitored():
    opt = run([LOW] * 3)
    assert opt.all_frozen
    (new,) = matrices(1)
    opt.add_param_group({"params": [new], "tau": 4.0})
    assert not opt.all_frozen
    assert opt.monitored_units == ["group0.param0", "group1.param0"]
    feed(opt, LOW, HIGH)
    feed(opt, LOW, 3.0)
    assert freezes(opt) == [(1, 0), (5, 1)]
    assert new.item() == adamw([HIGH])[0]
    assert opt.all_frozen


@pytest.mark.parametrize(
    ("key", "value", "first"),
    [("tau", 4.0, {"tau": None}), ("statistic", "change", {"statistic": "norm"})],
    ids=["tau", "statistic"],
)
def test_readings_show_a_changed_group_after_the_next_step(key, value, first):
    # new behaviour: a reading never rebuilds the units
    a, b = matrices(2)
    opt = optimizer([{"params": [a]}, {"params": [b], **first}])

    def readings():
        units = [repr(unit) for unit in opt.report().units]
        return opt.monitored_units, opt.all_frozen, opt.backend, units

    feed(opt, HIGH, HIGH)
    before = readings()
    opt.param_groups[1][key] = value
    assert readings() == before
    feed(opt, HIGH, HIGH)
    assert readings() != before
    assert opt.monitored_units == ["group0.param0", "group1.param0"]


@pytest.mark.parametrize("everything", [True, False])
def test_a_thawed_unit_starts_anew(everything):
    opt = run([HIGH, LOW, LOW], [HIGH] * 3, patience=2, amsgrad=True)
    assert freezes(opt) == [(3, 0)]
    start = values(opt)[0]
    opt.thaw(None if everything else ["group0.param0"])
    assert opt.frozen_units == []
    sequence = [HIGH, LOW, 5.0]
    for g in sequence:
        feed(opt, g, HIGH)
    value, state = adamw(sequence, start=start, amsgrad=True)
    assert_equal(values(opt)[0], value)
    for key in ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        assert_equal(state_of(opt)[key], state[key])
    other, _ = adamw([HIGH] * 6, start=2.0, amsgrad=True)
    assert_equal(values(opt)[1], other)  # it went on


def test_a_thawed_unit_has_no_hits_and_may_freeze_again():
    opt = run([LOW, LOW], patience=2)
    opt.thaw()
    assert freezes(opt) == [], "one event for each unit that is frozen now"
    feed(opt, LOW)
    assert freezes(opt) == []
    feed(opt, LOW)
    assert freezes(opt) == [(4, 0)]


@pytest.mark.parametrize(("statistic", "step"), [("change", 4), ("momentum", 4), ("norm", 3)])
def test_the_first_check_after_a_thaw_has_no_past(statistic, step):
    opt = run([LOW] * 2, statistic=statistic, tau=1e30)
    opt.thaw()
    for _ in range(2):
        feed(opt, LOW)
    assert freezes(opt)[-1] == (step, 0)


def test_thawing_a_cooling_unit_keeps_its_moments_and_its_pace():
    opt = run([HIGH, LOW, HIGH], cooldown=4)
    opt.thaw()
    feed(opt, HIGH)
    lrs = [0.1, 0.1, 0.075, 0.1]
    value, state = adamw([HIGH, LOW, HIGH, HIGH], lr=lrs)
    assert values(opt) == [pytest.approx(value, rel=1e-14)]
    assert torch.equal(state_of(opt)["exp_avg"], state["exp_avg"])
    for _ in range(6):
        feed(opt, HIGH)
    assert freezes(opt) == []


def test_thaw_ends_the_cooldown_of_unmonitored_tensors():
    plain, opt = monitored_and_plain(cooldown=1)
    for _ in range(3):  # decided at 1: the plain tensor does not move from step 2 on
        feed(opt, LOW, 3.0)
    opt.thaw()
    feed(opt, HIGH, 3.0)
    lrs = [0.1, 0.0, 0.0, 0.1]
    assert plain.item() == pytest.approx(adamw([3.0] * 4, lr=lrs, start=2.0)[0], rel=1e-14)


def test_thaw_takes_a_name_or_any_iterable_of_names():
    for units in ("group0.param0", ["group0.param0"], (name for name in ["group0.param0"])):
        opt = run([LOW], [LOW])
        opt.thaw(units)
        assert opt.frozen_units == ["group0.param1"]


def test_thaw_of_an_unknown_unit_changes_nothing():
    opt = run([LOW] * 2)
    before = snapshot(opt)
    with pytest.raises(ValueError, match="unknown"):
        opt.thaw(["group0.param0", "unknown"])
    assert_same(snapshot(opt), before)


def test_freeze_hooks_are_called_once_per_step_that_freezes():
    calls = []
    opt = optimizer(matrices(3))
    handle = opt.register_freeze_hook(lambda o, events: calls.append((o, list(events))))
    feed(opt, LOW, LOW, HIGH)
    feed(opt, LOW, LOW, HIGH)
    assert [(o is opt, [e.unit for e in events]) for o, events in calls] == [
        (True, ["group0.param0", "group0.param1"])
    ]
    handle.remove()
    feed(opt, LOW, LOW, LOW)
    assert len(calls) == 1
    assert len(opt.freeze_events) == 3


def test_an_exception_in_a_freeze_hook_leaves_the_optimizer_consistent():
    """The step has happened when a hook is called: with or without it, the run is the same."""
    sequences = [LOW] * 4, [HIGH, 3.0, 4.0, LOW]
    untouched = run(*sequences, statistic="change", tau=2.5)
    opt = optimizer(matrices(2), statistic="change", tau=2.5)

    def fail(opt, events):
        failures.append(events)
        raise RuntimeError("hook failed")

    failures = []
    opt.register_freeze_hook(fail)
    for grads in zip(*sequences, strict=True):
        before = len(failures)
        try:
            feed(opt, *grads)
        except RuntimeError as error:
            assert "hook failed" in str(error)
            before += 1
        assert len(failures) == before, "every error of a hook reaches the caller"
    assert len(failures) == len({e.step for e in untouched.freeze_events}) > 0
    assert_same(snapshot(opt), snapshot(untouched))


@pytest.mark.parametrize("stop_grad", ["auto", True])
@pytest.mark.parametrize("options", [{}, {"freeze_timing": "next_step"}, {"cooldown": 2}], ids=str)
def test_stop_grad_acts_at_the_start_of_the_step_after_the_freeze(stop_grad, options):
    (p, other) = matrices(2)
    opt = optimizer([p, other], stop_grad=stop_grad, **options)
    while not opt.freeze_events:
        feed(opt, LOW, HIGH)
    assert p.requires_grad, "step post-hooks still see the gradient"
    assert p.grad is not None
    feed(opt, LOW, HIGH)
    assert (p.requires_grad, p.grad) == (False, None)
    assert other.requires_grad
    opt.thaw()
    assert p.requires_grad


@pytest.mark.parametrize("statistic", ["change", "norm", "momentum"])
def test_fp32_gradients_on_bf16_parameters(statistic):
    """The gradient is used as it is: 1 + 2^-12 is not a bf16 number."""
    p = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    p.grad_dtype = torch.float32
    wide = torch.ones(4, 4, requires_grad=True)
    opt = optimizer([p], statistic=statistic, tau=0.0, betas=(0.0, 0.9))
    adam = torch.optim.AdamW([wide], lr=0.1, betas=(0.0, 0.9), foreach=False)
    exact = 1 + 2.0**-12
    for g in (2.0, exact):
        for one in (opt, adam):
            feed(one, torch.full((4, 4), g))
    assert statistics(opt) == [16 * (exact if statistic == "norm" else 2 - exact)]
    torch.testing.assert_close(p.float(), wide, rtol=2**-7, atol=0)
    if statistic == "change":
        assert opt.state[p]["prev_grad"].dtype is torch.float32


def test_a_previous_gradient_of_another_dtype_is_still_the_previous_gradient():
    p = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    p.grad_dtype = None  # any dtype
    opt = optimizer([p], statistic="change", tau=0.0)
    for g, dtype in ((3.0, torch.bfloat16), (3.5, torch.float32), (3.25, torch.bfloat16)):
        p.grad = torch.full((2, 2), g, dtype=dtype)
        opt.step()
        statistic = opt.statistics()["group0.param0"]
        assert math.isnan(statistic) or statistic == {3.5: 2.0, 3.25: 1.0}[g]


BAD_ARGUMENTS = [
    (name, value, allowed.split())
    for name, allowed, *bad in (
        ("alpha", "0 1", 1.0, -0.1, NAN),
        ("tau", "0 None", -1.0, NAN),
        ("patience", "1", 0, -3, 1.5, None),
        ("check_every", "1", 0, 2.5, None),
        ("cooldown", "0", -1, NAN, None),
        ("max_frozen", "0 1", 0.0, 1.01, NAN),
        ("grace_steps", "0", -1),
        ("total_steps", "1", 0),
        ("statistic", "change norm momentum", "gradient"),
        ("freeze_timing", "same_step next_step", "now"),
        ("tau_per", "unit element", "matrix"),
        ("stop_grad", "auto True False", "maybe"),
    )
    for value in bad
]


@pytest.mark.parametrize(
    ("name", "value", "allowed"), BAD_ARGUMENTS, ids=[f"{n}={v}" for n, v, _ in BAD_ARGUMENTS]
)
def test_an_impossible_argument_is_named_with_its_value_and_range(name, value, allowed):
    options = {"total_steps": 10, name: value}
    with pytest.raises(ValueError) as caught:
        optimizer(matrices(1), **options)
    message = str(caught.value)
    assert name in message
    assert str(value) in message
    for word in allowed:
        assert word in message.replace(str(value), "", 1)


@pytest.mark.parametrize(
    ("name", "value"), [("tau", -1.0), ("tau", NAN), ("tau", "low"), ("statistic", "spread")]
)
def test_an_impossible_group_value_is_refused_early_and_late(name, value):
    with pytest.raises(ValueError, match=name):
        optimizer([{"params": matrices(1), name: value}])
    opt = optimizer(matrices(1), tau=4.0)
    with pytest.raises(ValueError, match=name):
        opt.add_param_group({"params": matrices(1), name: value})
    assert len(opt.param_groups) == 1
    feed(opt, HIGH)
    before, good = snapshot(opt), opt.param_groups[0][name]
    opt.param_groups[0][name] = value
    with pytest.raises(ValueError, match=name):
        feed(opt, LOW)
    opt.param_groups[0][name] = good
    assert_same(snapshot(opt), before)


@pytest.mark.parametrize("name", ["patience", "cooldown", "alpha", "grace_steps", "max_frozen"])
def test_a_group_cannot_have_an_option_of_the_whole_optimizer(name):
    with pytest.raises(ValueError, match=rf"group has {name}=0\.25, the optimizer"):
        optimizer([{"params": matrices(1), name: 0.25}])
    # Without tau it may be a key of somebody else, which AdamW keeps (pytorch_optimizer's WSAM).
    other = optimizer([{"params": matrices(1), name: 0.25, "tau": None}])
    assert other.param_groups[0][name] == 0.25
    own = optimizer(matrices(1), alpha=0.75)
    same = {"patience": 1, "alpha": 0.75}  # a wrapper's copy
    own.add_param_group({"params": matrices(1), **same})
    saved = own.state_dict()
    saved["param_groups"][1]["patience"] = 2  # of another run
    own.load_state_dict(saved)


def test_integers_of_numpy_are_integers():
    opt = optimizer(matrices(1), patience=np.int64(2), total_steps=np.int32(4), alpha=0.5)
    config = opt._freezer.table.config
    assert type(config.grace_steps) is type(config.patience) is int
    assert freezes(run([LOW] * 3, patience=np.int64(2))) == [(2, 0)]


def test_tau_needs_a_grace_period():
    for params, own in ((matrices(1), {"tau": 1.0}), ([{"params": matrices(1), "tau": 1.0}], {})):
        with pytest.raises(ValueError, match=r"(?s)(?=.*total_steps)(?=.*grace_steps)"):
            GradESAdamW(params, **own)
    GradESAdamW(matrices(1))  # nothing monitored, nothing needed


def test_tau_with_nothing_to_monitor_is_an_error_at_the_first_step():
    params = matrices(1, (3,)) + matrices(1, ())
    opt = optimizer(params)
    with pytest.raises(ValueError, match="tau"):
        feed(opt, 1.0, 1.0)
    assert [p.sum().item() for p in params] == [3.0, 1.0]


def test_monitored_tensors_may_all_rest_for_a_while():
    """A head or the norms may be trained alone for some steps, as under AdamW."""
    [weight], [bias] = matrices(1), matrices(1, (1,))
    opt = optimizer([weight, bias])
    weight.requires_grad_(False)
    with pytest.warns(UserWarning, match="nothing is measured or frozen until") as caught:
        feed(opt, None, HIGH)
        feed(opt, None, HIGH)
    assert len(caught) == 1 and opt.monitored_units == []
    weight.requires_grad_(True)
    feed(opt, LOW, HIGH)
    assert freezes(opt) == [(3, 0)]


@pytest.mark.parametrize("is_copy", [False, True])
def test_options_without_tau_are_reported_where_no_group_says_so(is_copy):
    """A group with tau=None of its own is meant so, as in an optimizer for each parameter."""
    own = {"statistic": "norm", "patience": 3}
    for group, expected in (({}, 1), ({"tau": None}, 0)):
        opt = GradESAdamW([{"params": matrices(1), **group}], **own)
        opt = copy.deepcopy(opt) if is_copy else opt
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            feed(opt, LOW)
            feed(opt, LOW)
        assert len(caught) == expected
        assert all("Without effect: patience=3, statistic='norm'" in str(x) for x in caught)


def test_units_that_can_never_freeze_are_named():
    """Some models have matrices whose gradient is zero by construction."""
    opt = optimizer(matrices(3))
    feed(opt, LOW, HIGH, 0.0)
    feed(opt, None, LOW, 0.0)
    with pytest.warns(UserWarning, match=r"1 of 3 units, such as 'group0.param2'.*max_frozen"):
        feed(opt, None, None, 0.0)
    assert not opt.all_frozen


def test_single_groups_without_anything_to_monitor_are_normal():
    opt = optimizer([{"params": ps} for ps in (matrices(1), matrices(1, (3,)), [])])
    feed(opt, LOW, 1.0)
    assert freezes(opt) == [(1, 0)]


def test_two_units_of_one_name_are_an_error():
    a, b = (
        (f"{prefix}layers.0.mlp.up_proj.weight", p)
        for prefix, p in zip(("", "module."), matrices(2), strict=True)
    )
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj"):
        optimizer([a, b]).step()
    opt = optimizer([a])
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj"):
        opt.add_param_group({"params": [b]})
    assert len(opt.param_groups) == 1
    feed(opt, LOW)
    assert freezes(opt) == [(1, 0)]


SPARSE, SHAPE = "Adam does not support sparse gradients, please", "shape|size"


@pytest.mark.parametrize("words", [SPARSE, SHAPE], ids=["sparse", "foreign shape"])
@pytest.mark.parametrize("statistic", ["change", "norm", "momentum"])
@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("before_error", [0, 3])
def test_an_error_in_step_leaves_everything_as_it_was(words, statistic, timing, before_error):
    """The last tensor's gradient is wrong: no other tensor, count or statistic may have moved."""
    options = {"statistic": statistic, "freeze_timing": timing, "tau": 0.5, "patience": 2}
    sequence = [HIGH, 3.0, 3.0, 3.0, 3.0, 3.0]
    untouched = run(sequence, sequence, **options)
    opt = optimizer(matrices(2), **options)
    first, last = tensors_of(opt)
    for t, g in enumerate(sequence):
        if t == before_error:
            before = snapshot(opt)
            first.grad = torch.full_like(first, g)
            last.grad = torch.eye(1, dtype=last.dtype)
            if words == SPARSE:
                last.grad = last.grad.to_sparse()
            else:
                last.grad.data = torch.ones(2, 3, dtype=last.dtype)
            with pytest.raises((RuntimeError, ValueError), match=words):
                opt.step()
            last.grad = None
            assert_same(snapshot(opt), before)
        feed(opt, g, g)
    assert_same(snapshot(opt), snapshot(untouched))


def test_steps_of_tensors_decided_before_their_first_gradient_are_fp32():
    """In bf16, a default dtype that torch's AdamW does not follow either, 256 + 1 is 256."""
    p, q = (torch.nn.Parameter(torch.ones(2, 2)) for _ in "ab")
    torch.set_default_dtype(torch.bfloat16)
    try:
        opt = GradESAdamW([p, q], tau=1e9, grace_steps=0, statistic="norm", max_frozen=0.5)
        for _ in range(3):
            feed(opt, 1.0, None)
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(opt.frozen_units) == 2 and opt.state[q]["step"].dtype == torch.float32
