"""Negative controls of the Triton tests: kernels, tables and engines that are wrong on purpose."""

from functools import partial

import pytest
import test_triton_engine as engine
import test_triton_kernels as kernels
import test_triton_parity as parity
import test_triton_scaling as scaling
import torch
import triton_runs as tr
from triton_runs import CUDA

pytestmark = [pytest.mark.gpu] if CUDA else []


def variant(statistic="change", timing="same_step", amsgrad=False, maximize=True):
    test = parity.test_every_variant_equals_the_reference
    return partial(test, statistic, timing, amsgrad, maximize)


def option(name):
    return partial(parity.test_every_option_equals_the_reference, name, False)


def framed(n, offset):
    return partial(kernels.test_nothing_around_a_tensor_is_written, n, offset, "next_step", False)


def change(name, timing="same_step"):
    return partial(engine.test_changes_during_a_run, name, timing)


def shape(*shape):
    return partial(parity.test_shapes, shape, "next_step")


def patched(test, *args):
    """The check of a test whose last argument is a monkeypatch."""

    def check():
        with pytest.MonkeyPatch.context() as monkeypatch:
            test(*args, monkeypatch)

    return check


DIVIDED = patched(kernels.test_a_tensor_is_divided_among_programs)
OVERFLOW = partial(scaling.test_an_overflow_writes_nothing, 3, "same_step", True)
# Each fault is an edit of a module's text, "old -> new", with the test that has to notice it.
KERNEL_FAULTS = {
    "else 0, end, zeros -> else 0, end - 128, zeros": shape(1, 513),
    "offsets < end -> offsets < end - 1": shape(1, 511),
    "offsets < end -> offsets < end + 1": framed(513, 3),
    "// _GRAIN * _GRAIN -> // _GRAIN * _GRAIN + _GRAIN": framed(513, 0),
    "        if task == 0:\n            return\n -> ": patched(
        kernels.test_frozen_tensors_keep_every_bit, "usual", False
    ),
    "FIELDS.unit)) != 0.0 -> FIELDS.unit)) > 1.0": variant(),
    "decided_ptr + tl.load(row + FIELDS.unit) -> decided_ptr": variant(),
    "(task & FIELDS.freezes_flag) != 0 -> task != 0": option("cooldown"),
    "keeping = False -> pass": partial(
        kernels.test_a_decision_takes_effect_in_its_own_step, "same_step", 2
    ),
    "compared < tau -> compared <= tau": partial(
        parity.test_tau_is_compared_strictly, "change", "same_step"
    ),
    "(magnitude > 0) -> (magnitude >= 0)": change("zero gradients", "next_step"),
    ' & (magnitude < float("inf")) -> ': change("gradients that are not finite, signal"),
    "FIELDS.is_measured) != 0.0 -> FIELDS.is_measured) >= 0.0": change("a matrix without gradient"),
    "(value > 0) | -> (value >= 0) |": option("weight change, lr zero"),
    "numerators += m * m -> numerators += m": variant("signal", "next_step", maximize=False),
    "tl.div_rn(signed * m, past_root -> tl.div_rn(g * m, past_root": variant("gain", amsgrad=False),
    "past_root + eps -> past_root": option("gain, eps large"),
    "FIELDS.divisor), 0.0) -> FIELDS.divisor), -9.0)": option("gain, observe only"),
    "p.to(PARAM).to(tl.float32) - before -> p - before": partial(
        kernels.test_weight_change_is_measured_after_rounding, torch.bfloat16
    ),
    "FIELDS.hits_missing) <= 1.0 -> FIELDS.hits_missing) <= 9.0": option("patience"),
    "tl.load(found_inf_ptr) != 0.0 -> tl.load(found_inf_ptr) > 1e30": OVERFLOW,
    "_store(grad_ptr, offsets, mask, g, NARROW) -> pass": partial(
        scaling.test_the_unscaled_gradient_is_written_back, "same_step", "same"
    ),
    "tl.load(coefficients + FIELDS.sign) -> 1.0": variant("momentum", amsgrad=True),
    "tl.maximum(v, v_max.to(tl.float32), propagate_nan=tl.PropagateNan.ALL) -> v": variant(
        "norm", "next_step", amsgrad=True, maximize=False
    ),
    "partial, numerator -> partial, tl.load(partial) + numerator": variant(),
    "tl.where(mask, tl.div_rn(signed * m, past_root + eps), 0.0) -> "
    "tl.div_rn(signed * m, past_root + eps)": option("gain, eps zero"),
    "tl.where(mask, change, 0.0) -> change": option("weight change, eps zero"),
}
TABLE_FAULTS = {
    "np.maximum(steps_taken, 1) -> steps_taken + 1": variant("signal", maximize=False),
    "= 1 / np.sqrt(correction2) -> = 1": variant("gain", "next_step", maximize=False),
    'np.where(rows["is_ratio"] != 0, 1, sizes) -> sizes': option("signal, per element"),
    "taus = [unit.tau -> taus = [1.0": patched(engine.test_a_changed_tau_makes_nothing_anew, True),
    "n_chosen == self.n_tensors -> n_chosen > 0": partial(
        parity.test_units_of_two_tensors, 0, "same_step"
    ),
    '["one_minus_beta2"] = 1 - beta2 -> ["one_minus_beta2"] = 1 - beta2.astype("f4")': option(
        "beta1 below a half"
    ),
    "steps = steps_taken + 1 -> steps = steps_taken + 2": variant(),
    "= 1 - lr * weight_decay -> = 1": variant(),
    "lr * lr_factors -> lr": option("cooldown"),
    "np.where(is_summed, -> np.where(True,": DIVIDED,
    "np.argsort(-rows -> np.argsort(rows": DIVIDED,
    'rows["address_bits"] |= rows[name] -> pass': DIVIDED,
    "unit.frozen_at == NEVER for -> False for": variant(),
}
ENGINE_FAULTS = {
    "measured[self.steps < tables.least_steps] = 0 -> pass": option("momentum, no grace"),
    "[unit.decided_at for unit in table.units] -> 0": option("norm, gradients not stopped"),
    "table.t if config.cooldown else 0 -> 0": option("cooldown"),
    "[g is None for g in tensors.grads] -> 0": change("a matrix without gradient"),
    "[unit.prev_step == before for unit in tables.own_units] if -> 0 if": change(
        "no gradient on the last step before a check"
    ),
    "(self.steps < tables.least_steps).tobytes() if -> 0 if": option("momentum, no grace"),
    "not same_memory_order(g, p)) -> False)": partial(
        parity.test_layouts, "transposed", "contiguous"
    ),
    " or g.is_neg() or not same -> or not same": change("gradients with the negative bit"),
    "addresses != self.addresses -> not addresses": change("moments at other addresses"),
    "if self.step_versions != -> if False and self.step_versions !=": change(
        "state changed in place"
    ),
    "config.is_check(table.t + 1) -> True": partial(
        kernels.test_other_steps_do_not_touch_the_previous_gradient
    ),
    "config.is_check(t + 1)) for -> False) for": patched(
        engine.test_no_step_waits_for_a_compiler, {}, False
    ),
    "if happened: -> if True:": partial(
        scaling.test_a_run_with_overflows_equals_one_without, (3,), False, "next_step"
    ),
    "not (scaled and found[0] != 0) -> True": OVERFLOW,
}
FAULTS = {
    edit: (file, check)
    for file, faults in zip(tr.MODULES, (KERNEL_FAULTS, TABLE_FAULTS, ENGINE_FAULTS), strict=True)
    for edit, check in faults.items()
}


@pytest.mark.parametrize("edit", FAULTS)
def test_faults_are_noticed(edit, monkeypatch, tmp_path):
    """Each edit of a copy of the modules makes a test fail, or host and device disagree."""
    file, check = FAULTS[edit]
    old, new = edit.split(" -> ")
    tr.use_edited_modules(monkeypatch, tmp_path, {file: (old, new)})
    with pytest.raises((AssertionError, RuntimeError)) as caught:
        check()
    assert isinstance(caught.value, AssertionError) or "decided differently" in str(caught.value)


def test_the_checks_pass_without_a_fault(monkeypatch, tmp_path):
    """Also in a copy of the modules."""
    monkeypatch.setitem(FAULTS, "norm -> norm", ("triton_kernels", variant()))
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        test_faults_are_noticed("norm -> norm", monkeypatch, tmp_path)
