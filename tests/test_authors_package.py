"""A tau of the authors' own package has the same meaning here with statistic="weight_change".

`grades` 1.0.6 freezes a matrix when sum |w_t - w_{t-1}| over one optimizer step is below tau. From
the same weights and on the same data, its callback beside AdamW, and GradESAdamW alone, must freeze
the same matrices at the same steps and end at the same weights, bit for bit.

The options differ in three points. Its first possible freeze is at step int(alpha * T), ours is at
the first step after the grace period, hence grace_steps = int(alpha * T) - 1. It freezes in step 1
what it cannot measure yet, hence no alpha that allows a freeze there. Gradient clipping is off: it
leaves a frozen matrix out of the norm from the next step on, and we one step later.
"""

import functools
import re
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from tiny import TRAINER, assert_same_weights, sentences, tiny_llama

from grades_kernels import GradESAdamW
from grades_kernels.report import calibrate

grades = pytest.importorskip("grades", reason="the authors' package is not installed")
transformers = pytest.importorskip("transformers")

STEPS, ALPHA = 20, 0.4
GRACE_STEPS = int(ALPHA * STEPS) - 1


class StopWhenAllFrozen(transformers.TrainerCallback):
    def __init__(self, optimizer):
        self.optimizer = optimizer

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = self.optimizer.all_frozen


def train(tmp_path, lora, *, theirs=None, **ours):
    """One run under Trainer: with the authors' callback, or with GradESAdamW.

    Returns:
        The model, when each matrix froze ("0 q_proj" -> step), steps run, and the report of ours.
    """
    model = tiny_llama(num_hidden_layers=3)
    if lora:
        peft = pytest.importorskip("peft")
        targets = ["q_proj", "v_proj", "down_proj"]
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets))
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hyper = {"lr": 5e-3, "weight_decay": 0.01}
    if theirs is not None:
        optimizer = torch.optim.AdamW([p for _, p in parameters], foreach=False, **hyper)
        callback = grades.GradEarlyStoppingCallback(grades.GradEarlyStoppingConfig(**theirs))
    else:  # of the whole model it monitors the projections alone, as the authors' callback
        ours = {"statistic": "weight_change", "freeze_timing": "next_step", **ours}
        optimizer = GradESAdamW(parameters, fused=False, **ours, **hyper)
        callback = StopWhenAllFrozen(optimizer)
    settings = {**TRAINER, "max_steps": STEPS, "max_grad_norm": 0.0, "seed": 3}
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / STEPS)
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(str(tmp_path), **settings),
        train_dataset=sentences(4 * STEPS, 12),
        callbacks=[callback],
        optimizers=(optimizer, schedule),
    )
    trainer.train()
    if theirs is not None:
        report = None
        froze = {
            re.sub(r"layer_0*(\d+)_(?:attn|mlp)_(\w+)", r"\1 \2", name): stats.frozen_at_step
            for name, stats in callback.component_stats.items()
        }
    else:
        report = optimizer.report()
        froze = {
            f"{unit.layer} {unit.kind.removesuffix('.lora')}": (
                unit.frozen_at if unit.frozen_at > 0 else None
            )
            for unit in report.units
        }
    return SimpleNamespace(model=model, froze=froze, steps=trainer.state.global_step, report=report)


@pytest.fixture(scope="module", params=[False, True], ids=["full", "lora"])
def observed(request, tmp_path_factory):
    """Whether runs are with LoRA, the report of one in which nothing freezes, theirs by tau."""
    assert metadata.version("grades") == "1.0.6"
    lora, folder = request.param, tmp_path_factory.mktemp("observed")

    @functools.cache
    def run_theirs(tau):
        return train(folder, lora, theirs={"tau": tau, "alpha": ALPHA})

    return lora, train(folder, lora, tau=0.0, grace_steps=1).report, run_theirs


def threshold(report, share):
    """The tau under which this share freezes before three quarters of the run are over."""
    return calibrate(report, share, 3 * STEPS // 4, per="all", grace_steps=GRACE_STEPS).taus["."]


@pytest.mark.parametrize("share", [0.3, 0.7, 1.0])
def test_the_same_matrices_freeze_at_the_same_steps(share, observed, tmp_path):
    """Events, the step at which training ends, and every weight are equal."""
    lora, report, run_theirs = observed
    tau = threshold(report, share)
    measured = [x for _, row in report.history for x in row]
    assert min(abs(x / tau - 1) for x in measured) > 1e-5, "rounding cannot decide"

    theirs = run_theirs(tau)
    ours = train(tmp_path, lora, tau=tau, grace_steps=GRACE_STEPS)
    assert len(ours.froze) == (9 if lora else 21)
    assert ours.froze == theirs.froze
    steps = [step for step in ours.froze.values() if step is not None]
    assert len(steps) >= share * len(ours.froze) - 1e-9
    assert len(set(steps)) > 1, "they freeze at different steps"
    assert ours.steps == theirs.steps
    assert share < 1.0 or ours.steps < STEPS
    assert_same_weights(ours.model, theirs.model)


@pytest.mark.parametrize("change", ["statistic", "tau", "grace period"])
def test_another_rule_freezes_at_other_steps(change, observed, tmp_path):
    """Negative control: the comparison notices another statistic, threshold and grace period."""
    lora, report, run_theirs = observed
    tau = threshold(report, 0.7)
    options = {"tau": tau, "grace_steps": GRACE_STEPS}
    options |= {
        "statistic": {"statistic": "norm"},
        "tau": {"tau": 0.8 * tau},
        "grace period": {"grace_steps": GRACE_STEPS + 6},
    }[change]
    assert train(tmp_path, lora, **options).froze != run_theirs(tau).froze


def test_without_a_grace_period_the_package_freezes_before_it_measures(tmp_path):
    """With alpha = 0 it freezes every matrix in step 1, at any tau; GradESAdamW measures first."""
    theirs = train(tmp_path, False, theirs={"tau": 1e-30, "alpha": 0.0})
    assert set(theirs.froze.values()) == {1} and theirs.steps == 1
    ours = train(tmp_path, False, tau=1e-30, grace_steps=0)
    assert set(ours.froze.values()) == {None} and ours.steps == STEPS
