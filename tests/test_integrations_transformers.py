"""The Trainer of transformers, with real runs of a tiny random Llama against a plain loop."""

from __future__ import annotations

import copy
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset

from grades_kernels import FreezeReport, GradESAdamW, grades_param_groups
from grades_kernels.integrations import measurements, unwrap_optimizer

transformers = pytest.importorskip("transformers", minversion="5")
pytest.importorskip("accelerate")

from tiny import sentences, tiny_llama  # noqa: E402
from transformers import (  # noqa: E402
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_scheduler,
)

from grades_kernels.integrations import transformers as integration  # noqa: E402
from grades_kernels.integrations.transformers import GradESCallback, add_grades  # noqa: E402

pytestmark = pytest.mark.usefixtures("without_pictures")

STEPS = 16
# Chosen so that of the 14 matrices some freeze one after another, and some never.
OPTIONS = {"tau": 0.0095, "tau_per": "element", "alpha": 0.25}


class Collator:
    """Stacks rows, and keeps every batch for the plain loop."""

    def __init__(self) -> None:
        self.batches: list[dict[str, torch.Tensor]] = []

    def __call__(self, rows):
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        self.batches.append(copy.deepcopy(batch))
        return batch


class Log(TrainerCallback):
    """Stands where a tracker stands: before the callbacks that a user adds."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.seen.append(dict(logs))


def arguments(folder, **changes) -> TrainingArguments:
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**settings, **changes})


def make_trainer(folder, *, model=None, data=None, **changes) -> Trainer:
    return Trainer(
        model=model or tiny_llama(),
        args=arguments(folder, **changes),
        train_dataset=sentences() if data is None else data,
        eval_dataset=sentences(4),
        data_collator=Collator(),
    )


def run(trainer: Trainer, resume: str | None = None, **options) -> GradESAdamW:
    add_grades(trainer, **{**OPTIONS, **options})
    trainer.train(resume_from_checkpoint=resume)
    return unwrap_optimizer(trainer.optimizer)


def plain_loop(
    batches, *, accumulate=1, autocast=False, steps=STEPS, **options
) -> tuple[nn.Module, GradESAdamW]:
    """What the Trainer does, by hand: clipping, a linear schedule, no decay for norms."""
    model = tiny_llama()
    optimizer = GradESAdamW(
        grades_param_groups(model, tau=options.get("tau", OPTIONS["tau"]), weight_decay=0.1),
        lr=1e-2,
        total_steps=steps,
        **{**OPTIONS, **options},
    )
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=steps)
    for k in range(0, accumulate * steps, accumulate):
        for batch in batches[k : k + accumulate]:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(**batch).loss
            (loss / accumulate).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        model.zero_grad()
        if optimizer.all_frozen:
            break
    return model, optimizer


def assert_same_run(a: GradESAdamW, b: GradESAdamW) -> None:
    """The same events, the same statistics; NaN equals NaN in a report."""
    ours, theirs = a.report().to_dict(), b.report().to_dict()
    assert ours["events"] == theirs["events"]
    assert ours["history"] == theirs["history"]


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    theirs = dict(b.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in a.named_parameters())


@pytest.mark.parametrize(
    ("changes", "loop"),
    [
        pytest.param({}, {}, id="fp32"),
        pytest.param({"bf16": True}, {"autocast": True}, id="bf16-autocast"),
        pytest.param({"gradient_accumulation_steps": 2}, {"accumulate": 2}, id="accumulation"),
        pytest.param(
            {
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": False},
            },
            {},
            id="gradient-checkpointing",
            marks=pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),
        ),
    ],
)
def test_trainer_freezes_what_a_plain_loop_freezes(tmp_path, changes, loop):
    """Same batches, same schedule, same clipping: the same events, and bit for bit the same end."""
    trainer = make_trainer(tmp_path, **changes)
    trained = run(trainer)
    model, plain = plain_loop(trainer.data_collator.batches, **loop)
    steps = {event.step for event in trained.freeze_events}
    assert len(steps) > 1 and not trained.all_frozen  # the comparison has something to say
    assert_same_run(trained, plain)
    assert_same_weights(trainer.model, model)


def test_another_threshold_is_noticed(tmp_path):
    """Negative control of the comparison above."""
    trainer = make_trainer(tmp_path)
    trained = run(trainer)
    _, plain = plain_loop(trainer.data_collator.batches, tau=0.9 * OPTIONS["tau"])
    with pytest.raises(AssertionError):
        assert_same_run(trained, plain)


def test_stops_logs_evaluates_and_saves_when_all_is_frozen(tmp_path, picture):
    """The step in which all is frozen is the last one, and ends like the planned last step."""
    trainer = make_trainer(
        tmp_path, eval_strategy="steps", eval_steps=100, save_strategy="steps", save_steps=100
    )
    tracker = Log()
    trainer.add_callback(tracker)
    optimizer = run(trainer, max_frozen=0.5)
    last = trainer.state.global_step
    assert optimizer.all_frozen and last < STEPS
    assert last == max(event.step for event in optimizer.freeze_events)
    assert (tmp_path / f"checkpoint-{last}").is_dir()
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [last]

    losses = [entry for entry in tracker.seen if "loss" in entry]
    assert len(losses) == last
    assert all(entry["grades/frozen_share"] == 0 for entry in losses[:4])
    assert losses[-1]["grades/frozen_share"] == 1
    assert losses[-1].items() >= measurements(optimizer).items()
    report = optimizer.report()
    assert losses[-1]["grades/trainable_elements"] == report.trainable_elements()[-1][1]
    shares = dict(report.frozen_share())
    for step, entry in enumerate(losses, start=1):
        assert entry["grades/frozen_share"] == shares.get(step, entry["grades/frozen_share"])
    kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert {f"grades/change/{kind}" for kind in kinds} <= losses[-1].keys()
    assert not any(
        "grades" in key for entry in tracker.seen if "eval_loss" in entry for key in entry
    )
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged[-1]["grades/frozen_share"] == 1

    assert FreezeReport.load(tmp_path / "grades_report.json") == report
    assert (tmp_path / "grades_report.png").stat().st_size > 0
    json.loads((tmp_path / f"checkpoint-{last}" / "trainer_state.json").read_text())


def test_runs_to_the_end_if_nobody_stops_it(tmp_path, monkeypatch):
    """Negative control: it is the callback that stops the run above."""
    monkeypatch.setattr(integration, "is_finished", lambda optimizer: False)
    trainer = make_trainer(tmp_path)
    assert run(trainer, max_frozen=0.5).all_frozen
    assert trainer.state.global_step == STEPS


@pytest.mark.parametrize("cut", [4, 9], ids=["in-grace", "some-frozen"])
def test_resume_is_bit_identical(tmp_path, cut):
    """A run resumed from a checkpoint ends with the weights, state and events of the whole run."""
    settings = {"save_strategy": "steps", "save_steps": cut, "gradient_accumulation_steps": 2}
    whole = make_trainer(tmp_path / "whole", **settings)
    expected = run(whole)
    frozen_before = [event for event in expected.freeze_events if event.step <= cut]
    assert bool(frozen_before) == (cut == 9)

    resumed = make_trainer(tmp_path / "resumed", **settings)
    with torch.no_grad():  # nothing of the new model may survive
        for p in resumed.model.parameters():
            p.zero_()
    actual = run(resumed, resume=str(tmp_path / "whole" / f"checkpoint-{cut}"))
    assert resumed.state.global_step == whole.state.global_step == STEPS
    assert actual.report().to_dict()["units"] == expected.report().to_dict()["units"]
    assert actual.freeze_events == expected.freeze_events
    assert_same_weights(resumed.model, whole.model)
    a, b = actual.state_dict()["state"], expected.state_dict()["state"]
    assert a.keys() == b.keys()
    for k in a:
        for key, value in a[k].items():
            same = torch.equal(value, b[k][key]) if torch.is_tensor(value) else value == b[k][key]
            assert same or (value != value and b[k][key] != b[k][key]), key  # NaN equals NaN


def test_loads_the_best_model_at_the_end(tmp_path):
    """The best weights come back after an early stop; what was frozen stays on record."""
    trainer = make_trainer(
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
    )
    optimizer = run(trainer, max_frozen=0.5)
    assert trainer.state.global_step < STEPS and optimizer.all_frozen
    from safetensors.torch import load_file

    best = load_file(f"{trainer.state.best_model_checkpoint}/model.safetensors")
    assert all(torch.equal(p, best[name]) for name, p in trainer.model.named_parameters())
    losses = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    assert trainer.state.best_metric == min(losses)
    assert len(FreezeReport.load(tmp_path / "grades_report.json").events) == 14


def test_optimizer_has_the_groups_and_hyperparameters_of_the_trainer(tmp_path):
    """Weight decay as in the Trainer's own AdamW, everything else from TrainingArguments."""
    changes = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6, "max_steps": 1}
    trainer = make_trainer(tmp_path / "grades", **changes)
    optimizer = run(trainer, taus={"layers.0": 0.5}, verbose=True)
    stock = make_trainer(tmp_path / "stock", **changes)
    stock.train()

    def decays(trainer):
        names = {p: name for name, p in trainer.model.named_parameters()}
        return {
            names[p]: group["weight_decay"]
            for group in trainer.optimizer.param_groups
            for p in group["params"]
        }

    assert decays(trainer) == decays(stock)
    assert set(decays(trainer).values()) == {0.0, 0.1}
    for group in optimizer.param_groups:
        assert group["initial_lr"] == 1e-2
        assert (group["betas"], group["eps"]) == ((0.8, 0.95), 1e-6)
    taus = {unit.name: unit.tau for unit in optimizer.report().units}
    assert taus == {name: 0.5 if "layers.0" in name else 0.0095 for name in taus}
    assert "model.layers.1.mlp.up_proj.weight" in taus


@pytest.mark.parametrize(
    ("changes", "options", "total", "grace"),
    [
        pytest.param({"max_steps": 5}, {}, 5, 2, id="max-steps"),
        pytest.param({"max_steps": -1, "num_train_epochs": 1.5}, {}, 12, 3, id="epochs"),
        pytest.param({"max_steps": 2}, {"grace_steps": 1}, None, 1, id="own-grace"),
        pytest.param({"max_steps": 2}, {"total_steps": 8}, 8, 2, id="own-length"),
    ],
)
@pytest.mark.filterwarnings("ignore:the optimizer was planned for 8 steps")
def test_length_comes_from_the_trainer(tmp_path, changes, options, total, grace):
    """total_steps is what the Trainer plans, unless the user plans otherwise."""
    report = run(make_trainer(tmp_path, **changes), tau=0.0, **options).report()
    assert (report.total_steps, report.grace_steps) == (total, grace)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(sentences())


def test_streaming_data(tmp_path):
    """Without a length the Trainer itself asks for max_steps; with it the run is planned."""
    with pytest.raises(ValueError, match="max_steps"):
        make_trainer(tmp_path, data=Stream(), max_steps=-1)
    assert run(make_trainer(tmp_path, data=Stream(), max_steps=4)).report().total_steps == 4


def test_a_trainer_without_a_plan_is_refused(tmp_path):
    """The factory called outside of train() knows no length and says so."""
    trainer = make_trainer(tmp_path)
    add_grades(trainer, **OPTIONS)
    with pytest.raises(ValueError, match=r"plans no number of steps.*grace_steps"):
        trainer.create_optimizer()


def test_own_optimizer_is_kept(tmp_path):
    """A Trainer that was given a GradESAdamW gets the callback alone."""
    model = tiny_llama()
    own = GradESAdamW(grades_param_groups(model, tau=1e9), grace_steps=3)
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path),
        train_dataset=sentences(),
        data_collator=Collator(),
        optimizers=(own, None),
    )
    with pytest.raises(ValueError, match=r"already has an optimizer.*'tau'"):
        add_grades(trainer, tau=1.0)
    add_grades(trainer)
    trainer.train()
    assert unwrap_optimizer(trainer.optimizer) is own
    assert not hasattr(trainer.optimizer, "all_frozen")  # accelerate's wrapper passes nothing on
    assert trainer.state.global_step == 4  # the first step after the grace period of 3


class Headless(nn.Module):
    """Nothing but an embedding and an output head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 4)
        self.lm_head = nn.Linear(4, 32)

    def forward(self, input_ids, labels):
        logits = self.lm_head(self.embed(input_ids))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def test_a_model_without_matches_is_refused_before_the_first_step(tmp_path):
    model = Headless()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="nothing to monitor in Headless"):
        run(make_trainer(tmp_path, model=model))
    assert_same_weights(model, before)


def test_a_callback_without_our_optimizer_is_refused_before_the_first_step(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.add_callback(GradESCallback())
    before = copy.deepcopy(trainer.model)
    with pytest.raises(ValueError, match=r"no GradESAdamW but AdamW.*Train with"):
        trainer.train()
    assert_same_weights(trainer.model, before)


def test_an_optimizer_that_monitors_nothing_is_refused(tmp_path):
    model = tiny_llama()
    trainer = make_trainer(tmp_path, model=model)
    trainer.optimizer = GradESAdamW(model.parameters())
    add_grades(trainer)
    with pytest.raises(ValueError, match="monitors nothing"):
        trainer.train()


@pytest.mark.parametrize("wrapper", ["FSDP1", "DeepSpeed"])
def test_flat_shards_are_refused_before_the_first_step(tmp_path, monkeypatch, wrapper):
    """Neither can be started on one CPU: the flags by which the Trainer knows of them are set."""
    trainer = make_trainer(tmp_path)
    if wrapper == "DeepSpeed":
        trainer.is_deepspeed_enabled = True
    else:
        trainer.is_fsdp_enabled = True
        plugin = SimpleNamespace(fsdp_version=1)
        monkeypatch.setattr(trainer.accelerator.state, "fsdp_plugin", plugin, raising=False)
    with pytest.raises(ValueError, match=rf"under {wrapper}.*FSDP2"):
        add_grades(trainer, **OPTIONS)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {}, "tau is needed"),
        ({}, {"tau": 1.0, "lr": 1e-3}, "lr=0.001.*learning_rate"),
        ({}, {"tau": 1.0, "weight_decay": 0.0}, "weight_decay=0.0"),
        ({"optim": "adafactor"}, {"tau": 1.0}, "adafactor"),
    ],
    ids=["no-tau", "lr", "weight-decay", "optim"],
)
def test_options_that_belong_elsewhere_are_refused(tmp_path, changes, options, message):
    with pytest.raises(ValueError, match=message):
        add_grades(make_trainer(tmp_path, **changes), **options)


def test_adding_twice_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    add_grades(trainer, tau=1.0)
    with pytest.raises(ValueError, match="set already"):
        add_grades(trainer, tau=1.0)


def test_a_second_train_with_another_length_warns(tmp_path):
    """The Trainer keeps its optimizer for a second train(), and so its grace period."""
    trainer = make_trainer(tmp_path, max_steps=4)
    run(trainer, tau=0.0)
    trainer.args.max_steps = 6
    with pytest.warns(UserWarning, match="planned for 4 steps, the Trainer plans 6"):
        trainer.train()


def test_measurements_are_numbers_before_the_first_check():
    """Nothing has been measured yet: no statistic, no NaN."""
    model = tiny_llama()
    optimizer = GradESAdamW(grades_param_groups(model, tau=1.0), total_steps=10)
    found = measurements(optimizer)
    assert found == {
        "grades/frozen_share": 0.0,
        "grades/trainable_elements": sum(p.numel() for p in model.parameters()),
    }
    assert all(map(math.isfinite, found.values()))


DDP = """
import json, sys
sys.path.insert(0, {tests!r})
import test_integrations_transformers as here
here.FreezeReport.plot = lambda report, path: path

trainer = here.make_trainer({folder!r}, per_device_train_batch_size=2, ddp_backend="gloo")
optimizer = here.run(trainer, max_frozen=0.5)
with open(f"{folder}/rank{{trainer.args.process_index}}.json", "w") as file:
    json.dump(
        dict(
            events=[[event.step, event.unit] for event in optimizer.freeze_events],
            statistics=optimizer.statistics(),
            steps=trainer.state.global_step,
            share=[e["grades/frozen_share"] for e in trainer.state.log_history if "loss" in e],
            batches=[batch["input_ids"].tolist() for batch in trainer.data_collator.batches],
        ),
        file,
    )
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_processes_decide_and_stop_together(tmp_path):
    """DDP over gloo: both ranks stop in the step in which a plain loop over both batches stops."""
    tests = os.fspath(Path(__file__).parent)
    script = tmp_path / "train.py"
    script.write_text(DDP.format(tests=tests, folder=os.fspath(tmp_path)))
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
        "PYTHONPATH": os.fspath(Path(tests).parent),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, script],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        for process in ranks:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in ranks:
            process.kill()
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    shares = [rank.pop("batches") for rank in found]
    assert found[0] == found[1]

    rows = (torch.tensor(a + b) for a, b in zip(*shares, strict=True))
    # Under DDP gradients of frozen matrices are still made, and count in the norm that is clipped.
    recorded = [{"input_ids": x, "labels": x} for x in rows]
    _, plain = plain_loop(recorded, max_frozen=0.5, stop_grad=False)
    assert found[0]["events"] == [[event.step, event.unit] for event in plain.freeze_events]
    assert found[0]["statistics"] == pytest.approx(plain.statistics(), rel=1e-3)
    assert found[0]["steps"] == plain.freeze_events[-1].step < STEPS
    assert found[0]["share"][-1] == 1
    assert len(FreezeReport.load(tmp_path / "grades_report.json").events) == 14


def test_automatic_threshold(tmp_path):
    """tau="auto" reaches the optimizer, a threshold for some units goes before it."""
    trainer = make_trainer(tmp_path, max_steps=2)
    options = {"tau": "auto", "statistic": "signal", "tau_per": "unit", "taus": {"q_proj": 0.5}}
    units = run(trainer, **options).report().units
    noise = math.sqrt(2 / math.pi) * math.sqrt(0.1 / 1.9)
    for unit in units:
        assert unit.tau == pytest.approx(0.5 if unit.kind == "q_proj" else 1.1 * noise, rel=1e-9)
