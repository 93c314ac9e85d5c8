"""A tau of the authors' own package keeps its meaning: statistic="weight_change".

`grades` 1.0.6 freezes a matrix when sum |w_t - w_{t-1}| over one optimizer step is below tau. From
the same weights and on the same data, its callback beside AdamW, and GradESAdamW alone, must freeze
the same matrices at the same steps and end at the same weights, bit for bit.

What has to be translated: its first possible freeze is at step int(alpha * T), ours is at the first
step after the grace period, hence grace_steps = int(alpha * T) - 1. It measures nothing useful in
step 1 and freezes what it cannot measure, hence no alpha that allows a freeze there. Gradient
clipping is off: it leaves a frozen matrix out of the norm from the next step on, and we one later.
"""

import re
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch

from grades_kernels import GradESAdamW
from grades_kernels.calibration import calibrate

grades = pytest.importorskip("grades", reason="the authors' package is not installed")
transformers = pytest.importorskip("transformers")

STEPS, ALPHA = 20, 0.4
GRACE_STEPS = int(ALPHA * STEPS) - 1


def make_model(lora):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
    )
    model = transformers.LlamaForCausalLM(config)
    if lora:
        peft = pytest.importorskip("peft")
        targets = ["q_proj", "v_proj", "down_proj"]
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets))
    return model


class StopsWhenAllIsFrozen(transformers.TrainerCallback):
    def __init__(self, optimizer):
        self.optimizer = optimizer

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = self.optimizer.all_frozen


def train(tmp_path, lora, *, theirs=None, **ours):
    """One run under Trainer: with the authors' callback, or with GradESAdamW.

    Returns:
        The model, when each matrix froze ("0 q_proj" -> step), steps run, and the report of ours.
    """
    model = make_model(lora)
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hyper = {"lr": 5e-3, "weight_decay": 0.01}
    if theirs is not None:
        optimizer = torch.optim.AdamW([p for _, p in parameters], foreach=False, **hyper)
        callback = grades.GradEarlyStoppingCallback(grades.GradEarlyStoppingConfig(**theirs))
    else:
        # LoRA pairs, and of the whole model the projections: neither embedding, norms nor head.
        optimizer = GradESAdamW(
            parameters,
            fused=False,
            freeze_timing="next_step",
            **{"statistic": "weight_change", **ours},
            **hyper,
        )
        callback = StopsWhenAllIsFrozen(optimizer)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(37, (4 * STEPS, 12), generator=generator)
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=STEPS,
            per_device_train_batch_size=4,
            max_grad_norm=0.0,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=3,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
        callbacks=[callback],
        optimizers=(
            optimizer,
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / STEPS),
        ),
    )
    trainer.train()
    if theirs is not None:
        froze = {
            re.sub(r"layer_0*(\d+)_(?:attn|mlp)_(\w+)", r"\1 \2", name): stats.frozen_at_step
            for name, stats in callback.component_stats.items()
        }
        report = None
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
    """A run in which nothing freezes: it tells where thresholds lie that freeze a given share."""
    run = train(tmp_path_factory.mktemp("observed"), request.param, tau=0.0, grace_steps=1)
    return request.param, run.report


def threshold(report, share):
    """One tau for all, under which so many freeze before three quarters of the run are over."""
    return calibrate(report, share, 3 * STEPS // 4, per="all", grace_steps=GRACE_STEPS).taus["."]


def test_the_package_is_the_one_that_is_meant():
    assert metadata.version("grades") == "1.0.6"


@pytest.mark.parametrize("share", [0.3, 0.7, 1.0])
def test_the_same_matrices_freeze_at_the_same_steps(share, observed, tmp_path):
    """Events, the step at which training ends, and every weight are equal."""
    lora, report = observed
    tau = threshold(report, share)
    measured = [x for _, row in report.history for x in row]
    assert min(abs(x / tau - 1) for x in measured) > 1e-5, "rounding cannot decide"

    theirs = train(tmp_path, lora, theirs={"tau": tau, "alpha": ALPHA})
    ours = train(tmp_path, lora, tau=tau, grace_steps=GRACE_STEPS)
    assert len(ours.froze) == (9 if lora else 21)
    assert ours.froze == theirs.froze
    n_frozen = sum(step is not None for step in ours.froze.values())
    assert n_frozen >= share * len(ours.froze) - 1e-9
    assert len(set(ours.froze.values()) - {None}) > 1, "they freeze at different steps"
    assert ours.steps == theirs.steps
    assert share < 1.0 or ours.steps < STEPS
    for (name, p), q in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("change", ["statistic", "tau", "grace period"])
def test_another_rule_freezes_otherwise(change, observed, tmp_path):
    """Negative control: the comparison notices another statistic, threshold and grace period."""
    lora, report = observed
    tau = threshold(report, 0.7)
    theirs = train(tmp_path, lora, theirs={"tau": tau, "alpha": ALPHA})
    options = {"tau": tau, "grace_steps": GRACE_STEPS}
    options |= {
        "statistic": {"statistic": "norm"},
        "tau": {"tau": 0.8 * tau},
        "grace period": {"grace_steps": GRACE_STEPS + 6},
    }[change]
    assert train(tmp_path, lora, **options).froze != theirs.froze


def test_where_the_package_does_not_behave(tmp_path):
    """With alpha = 0 it freezes everything in step 1, at any tau; we measure first."""
    theirs = train(tmp_path, False, theirs={"tau": 1e-30, "alpha": 0.0})
    assert set(theirs.froze.values()) == {1} and theirs.steps == 1
    ours = train(tmp_path, False, tau=1e-30, grace_steps=0)
    assert set(ours.froze.values()) == {None} and ours.steps == STEPS
