"""Runs of a tiny random Llama in the Trainer of transformers, compared with a plain loop."""

import contextlib
import copy
import json
import re
import sys
from types import SimpleNamespace

import pytest
import ranks
import torch
from tiny import TRAINER, Recorder, assert_same_run, assert_same_weights, sentences, tiny_llama
from torch import nn
from torch.utils.data import IterableDataset

from grades_kernels import Cut, FreezeReport, GradESAdamW, grades_param_groups
from grades_kernels.integrations import measurements, unwrap_optimizer

transformers = pytest.importorskip("transformers", minversion="5.3")
pytest.importorskip("accelerate")

from grades_kernels.integrations import transformers as integration  # noqa: E402
from grades_kernels.integrations.transformers import GradESCallback, add_grades  # noqa: E402

pytestmark = pytest.mark.usefixtures("without_plots")

STEPS = TRAINER["max_steps"]
# Chosen so that of the 14 matrices some freeze one after another, and some never.
OPTIONS = {"tau": 0.0095, "tau_per": "element", "alpha": 0.25}


class Tracker(transformers.TrainerCallback):
    """Stores the logs, and is added to the Trainer before the callbacks of a user, as trackers."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append(dict(logs))


def make_trainer(
    folder, *, kind=transformers.Trainer, model=None, data=None, optimizer=None, **changes
):
    settings = {**TRAINER, "weight_decay": 0.1, **changes}
    return kind(
        model=model or tiny_llama(),
        args=transformers.TrainingArguments(str(folder), **settings),
        train_dataset=sentences() if data is None else data,
        eval_dataset=sentences(4),
        data_collator=Recorder(),
        optimizers=(optimizer, None),
    )


def train(trainer, resume=None, **options):
    add_grades(trainer, **{**OPTIONS, **options})
    trainer.train(resume_from_checkpoint=resume)
    return unwrap_optimizer(trainer.optimizer)


def plain_loop(batches, *, accumulate=1, autocast=False, **options):
    """The steps of a Trainer: clipping, a linear schedule, no weight decay for norms."""
    model = tiny_llama()
    optimizer = GradESAdamW(
        grades_param_groups(model, tau=OPTIONS["tau"], weight_decay=0.1),
        lr=1e-2,
        total_steps=STEPS,
        **{**OPTIONS, **options},
    )
    scheduler = transformers.get_scheduler(
        "linear", optimizer, num_warmup_steps=0, num_training_steps=STEPS
    )
    for k in range(0, accumulate * STEPS, accumulate):
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


NO_REENTRANT = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
LOOPS = {
    "fp32": ({}, {}),
    "bf16-autocast": ({"bf16": True}, {"autocast": True}),
    "accumulation": ({"gradient_accumulation_steps": 2}, {"accumulate": 2}),
    "gradient-checkpointing": ({"gradient_checkpointing": True, **NO_REENTRANT}, {}),
}


@pytest.mark.parametrize(("changes", "loop"), LOOPS.values(), ids=LOOPS)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
def test_trainer_equals_a_plain_loop_bit_for_bit(tmp_path, changes, loop):
    trainer = make_trainer(tmp_path, **changes)
    trained = train(trainer)
    assert len({event.step for event in trained.freeze_events}) > 1 and not trained.all_frozen
    assert_same_run((trainer.model, trained), plain_loop(trainer.data_collator.batches, **loop))


def test_trainer_stops_logs_evaluates_and_saves_when_all_units_are_frozen(tmp_path, plot):
    """The step in which the last unit freezes is the last one, and ends like the planned end."""
    trainer = make_trainer(
        tmp_path, eval_strategy="steps", eval_steps=100, save_strategy="steps", save_steps=100
    )
    tracker = Tracker()
    trainer.add_callback(tracker)
    optimizer = train(trainer, max_frozen=0.5)
    last = trainer.state.global_step
    assert optimizer.all_frozen
    assert last == max(event.step for event in optimizer.freeze_events) < STEPS
    assert (tmp_path / f"checkpoint-{last}").is_dir()
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [last]

    logs = [entry for entry in tracker.logs if "loss" in entry]
    assert len(logs) == last
    assert all(entry["grades/frozen_share"] == 0 for entry in logs[:4])
    report = optimizer.report()
    shares = dict(report.frozen_share())
    for step, entry in enumerate(logs, start=1):
        assert entry["grades/frozen_share"] == shares.get(step, entry["grades/frozen_share"])
    assert logs[-1].items() >= measurements(optimizer).items()
    assert logs[-1]["grades/frozen_share"] == 1
    assert logs[-1]["grades/trainable_elements"] == report.trainable_elements()[-1][1]
    kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert {f"grades/change/{kind}" for kind in kinds} <= logs[-1].keys()
    assert not any("grades" in key for log in tracker.logs if "eval_loss" in log for key in log)

    saved = json.loads((tmp_path / f"checkpoint-{last}" / "trainer_state.json").read_text())
    assert [e for e in saved["log_history"] if "loss" in e][-1]["grades/frozen_share"] == 1
    assert FreezeReport.load(tmp_path / "grades_report.json") == report
    assert (tmp_path / "grades_report.png").stat().st_size > 0


def test_without_the_stop_of_the_callback_the_run_goes_on(tmp_path, monkeypatch):
    """Negative control: no other code stops the run above."""
    monkeypatch.setattr(integration, "is_finished", lambda optimizer: False)
    trainer = make_trainer(tmp_path)
    assert train(trainer, max_frozen=0.5).all_frozen
    assert trainer.state.global_step == STEPS


@pytest.mark.parametrize("cut", [4, 9], ids=["in-grace", "some-frozen"])
def test_resume_equals_the_uninterrupted_run_bit_for_bit(tmp_path, cut):
    settings = {"save_strategy": "steps", "save_steps": cut, "gradient_accumulation_steps": 2}
    whole = make_trainer(tmp_path / "whole", **settings)
    expected = train(whole)
    assert any(event.step <= cut for event in expected.freeze_events) == (cut == 9)

    resumed = make_trainer(tmp_path / "resumed", **settings)
    with torch.no_grad():  # so that no weight of the new model can remain unnoticed
        for p in resumed.model.parameters():
            p.zero_()
    actual = train(resumed, resume=str(tmp_path / "whole" / f"checkpoint-{cut}"))
    assert resumed.state.global_step == whole.state.global_step == STEPS
    assert_same_run((resumed.model, actual), (whole.model, expected), history=False)
    states = [optimizer.state_dict()["state"] for optimizer in (actual, expected)]
    torch.testing.assert_close(*states, rtol=0, atol=0, equal_nan=True)


def deep_llama():
    """Four blocks and a new head, so that a cut is worth it; 16 batches of four."""
    model = tiny_llama(num_hidden_layers=4)
    nn.init.zeros_(model.lm_head.weight)
    return model


@pytest.mark.parametrize("name", ["plain", "checkpointing"])
def test_a_chosen_cut_leaves_no_trace_but_frozen_tensors(tmp_path, name):
    """The run equals the one that is given the same cut, batch by batch."""
    settings = {"gradient_checkpointing": True, **NO_REENTRANT} if name == "checkpointing" else {}
    data = sentences(words=4)
    trainers = [make_trainer(tmp_path / n, model=deep_llama(), data=data, **settings) for n in "ab"]
    callback = add_grades(trainers[0], cut="auto", **OPTIONS)
    cut = callback.cut
    assert cut.k is not None and cut.stack == "model.layers"
    trainers[0].data_collator.batches.clear()
    add_grades(trainers[1], cut=cut, **OPTIONS)
    for trainer in trainers:
        trainer.train()
    first, second = (unwrap_optimizer(trainer.optimizer) for trainer in trainers)
    assert_same_run((trainers[0].model, first), (trainers[1].model, second))
    seen = [[b["input_ids"].tolist() for b in t.data_collator.batches] for t in trainers]
    assert seen[0] == seen[1]
    start = dict(deep_llama().named_parameters())
    for n, p in trainers[0].model.named_parameters():
        assert torch.equal(p, start[n]) == (n in cut.frozen)
    trained = {p for group in first.param_groups for p in group["params"]}
    assert trained == {p for p in trainers[0].model.parameters() if p.requires_grad}
    assert Cut.load(tmp_path / "a" / "grades_cut.json") == cut
    report = FreezeReport.load(tmp_path / "a" / "grades_report.json")
    assert report.cut == cut.summary() in str(report)


@pytest.fixture(scope="module")
def deep_cut(tmp_path_factory):
    trainer = make_trainer(tmp_path_factory.mktemp("cut"), model=deep_llama())
    return add_grades(trainer, cut="auto", **OPTIONS).cut


def test_a_run_with_a_cut_resumes_from_its_file(tmp_path, deep_cut):
    settings = {"save_strategy": "steps", "save_steps": 6}
    cut = deep_cut.at(2)
    whole = make_trainer(tmp_path / "whole", model=deep_llama(), **settings)
    expected = train(whole, cut=cut, tau=0.0)
    again = Cut.load(tmp_path / "whole" / "grades_cut.json")
    resumed = make_trainer(tmp_path / "resumed", model=deep_llama(), **settings)
    actual = train(resumed, resume=str(tmp_path / "whole" / "checkpoint-6"), cut=again, tau=0.0)
    assert_same_run((resumed.model, actual), (whole.model, expected), history=False)


def test_a_cut_above_all_blocks_trains_the_head_with_plain_adamw(tmp_path, deep_cut):
    trainer = make_trainer(tmp_path, model=deep_llama())
    optimizer = train(trainer, cut=deep_cut.at(4))
    assert optimizer.monitored_units == [] and trainer.state.global_step == STEPS
    assert {n for n, p in trainer.model.named_parameters() if p.requires_grad} == {
        "lm_head.weight", "model.norm.weight"
    }  # fmt: skip


def test_checkpointing_of_adapters_does_not_reach_below_the_cut(tmp_path):
    """train() enables checkpointing after the cut was applied, and inputs to need gradients."""
    peft = pytest.importorskip("peft")
    own = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")

    def trainer():
        model = peft.get_peft_model(deep_llama(), own)
        return make_trainer(tmp_path, model=model, gradient_checkpointing=True, **NO_REENTRANT)

    cut = add_grades(trainer(), cut="auto", **OPTIONS).cut.at(2)
    trained = trainer()
    train(trained, cut=cut, tau=0.0)
    base = trained.model.get_base_model()
    batch = next(iter(trained.get_train_dataloader()))["input_ids"]
    assert not base.get_input_embeddings()(batch).requires_grad


@pytest.mark.skipif(
    not hasattr(transformers.PreTrainedModel, "activation_checkpointing_enable"),
    reason="this version of Transformers checkpoints all layers or none",
)
def test_a_cut_is_chosen_where_every_second_layer_is_checkpointed(tmp_path):
    settings = {"every_n_layers": 2, "use_reentrant": False}
    trainer = make_trainer(
        tmp_path,
        model=deep_llama(),
        activation_checkpointing=True,
        activation_checkpointing_kwargs=settings,
    )
    layers, seen = trainer.model.model.layers, set()
    layers[0].register_forward_pre_hook(
        lambda *_: seen.add(tuple(layer.gradient_checkpointing for layer in layers))
    )
    add_grades(trainer, cut="auto", **OPTIONS)
    assert seen == {(True, False, True, False)}


def checkpointing(model):
    """All that checkpointing changes in a model."""
    return [
        (sorted(vars(module)), list(module._forward_hooks), getattr(module, name, None))
        for module in model.modules()
        for name in ("gradient_checkpointing", "_gradient_checkpointing_func")
    ]


@pytest.mark.parametrize("n_rows", [32, 20], ids=["chosen", "refused"])
@pytest.mark.parametrize("is_on", [False, True])
def test_checkpointing_of_the_choice_is_undone(tmp_path, is_on, n_rows):
    """train() enables it again, with its own options."""
    settings = {"gradient_checkpointing": True, **NO_REENTRANT}
    trainer = make_trainer(tmp_path, model=deep_llama(), data=sentences(n_rows), **settings)
    if is_on:
        trainer.model.activation_checkpointing_enable()
        trainer.model.enable_input_require_grads()
    before = checkpointing(trainer.model)
    refused = pytest.raises(ValueError, match="batches: 5 instead of n_batches=8")
    with refused if n_rows == 20 else contextlib.nullcontext():
        add_grades(trainer, cut={"n_batches": 8}, **OPTIONS)
    assert checkpointing(trainer.model) == before


@pytest.mark.parametrize(("rows", "read"), [(32, 8), (100, 12), (17, 5)])
def test_no_more_than_an_epoch_is_read_to_choose(tmp_path, rows, read):
    """In a second one the gain would be measured on examples that the direction knows."""
    trainer = make_trainer(tmp_path, model=deep_llama(), data=sentences(rows))
    cut = add_grades(trainer, cut="auto", **OPTIONS).cut
    drawn = [row for batch in trainer.data_collator.batches for row in batch["input_ids"].tolist()]
    assert len(trainer.data_collator.batches) in (read, read + 1)  # the loader draws one ahead
    assert len(set(map(tuple, drawn))) == len(drawn)
    assert cut.k is None  # random words: nothing is to be learned for others


def test_an_epoch_of_fewer_than_four_batches_is_too_short_to_choose(tmp_path):
    trainer = make_trainer(tmp_path, model=deep_llama(), data=sentences(12))
    with pytest.raises(ValueError, match="four batches of different examples, an epoch has 3"):
        add_grades(trainer, cut="auto", **OPTIONS)


class Preference(transformers.Trainer):
    """Its reference is the model without adapters, computed between forward and backward pass."""

    ref_model = None

    def compute_loss(self, model, inputs, **options):
        policy = super().compute_loss(model, inputs)
        with torch.no_grad(), model.disable_adapter():
            reference = super().compute_loss(model, inputs)
        return torch.nn.functional.softplus(policy - reference)


def preference_trainer(folder, **changes):
    peft = pytest.importorskip("peft")
    own = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    settings = {**TRAINER, "gradient_checkpointing": True, **NO_REENTRANT, **changes}
    return Preference(
        model=peft.get_peft_model(tiny_llama(), own),
        args=transformers.TrainingArguments(str(folder), **settings),
        train_dataset=sentences(),
    )


LOWEST = {"tau": 0.0, "taus": {r"layers\.0": 1e9}}


def test_adapters_freeze_where_the_model_without_them_is_the_reference(tmp_path):
    """Under checkpointing nothing is released there; without it, as elsewhere."""
    optimizer = train(preference_trainer(tmp_path), **LOWEST)
    assert optimizer.frozen_units and optimizer.report().step == STEPS
    optimizer = train(preference_trainer(tmp_path, gradient_checkpointing=False), **LOWEST)
    assert optimizer.frozen_units and optimizer._freezer.table.config.stop_grad == "auto"


def test_a_release_there_would_stop_the_run(tmp_path):
    """Negative control: recomputed with other flags."""
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        train(preference_trainer(tmp_path), **LOWEST, stop_grad="auto")


def test_a_cut_holds_where_the_model_without_adapters_is_the_reference(tmp_path):
    """Also under checkpointing, whose recomputation finds the flags of the forward pass."""
    cut = add_grades(preference_trainer(tmp_path), cut="auto", **OPTIONS).cut.at(1)
    trainer = preference_trainer(tmp_path)
    train(trainer, cut=cut, tau=0.0)
    trains = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert trains and not set(trains) & set(cut.frozen)


def test_a_cut_below_trained_adapters_is_refused_where_the_model_without_them_is_the_reference(
    tmp_path,
):
    trainer = preference_trainer(tmp_path)
    name, used = next((n, p) for n, p in trainer.model.named_parameters() if "lora_B" in n)
    assert ".layers.0." in name
    torch.nn.init.ones_(used)
    with pytest.raises(ValueError, match=r"no ref_model.*disable_adapter.*give the trainer"):
        add_grades(trainer, cut="auto", **OPTIONS)


def test_a_chosen_cut_needs_batches_that_are_dicts(tmp_path):
    """GRPO's are lists of prompts."""
    trainer = make_trainer(tmp_path, model=deep_llama())
    trainer.data_collator = list
    with pytest.raises(ValueError, match=r"needs batches that are dicts, not list.*choose_cut"):
        add_grades(trainer, cut="auto", **OPTIONS)


def test_a_model_that_train_makes_has_the_cut_too(tmp_path, deep_cut):
    cut = deep_cut.at(2)
    arguments = transformers.TrainingArguments(str(tmp_path), **TRAINER)
    trainer = transformers.Trainer(
        args=arguments, train_dataset=sentences(), data_collator=Recorder(), model_init=deep_llama
    )
    train(trainer, cut=cut)
    transformers.set_seed(arguments.seed)  # as the Trainer does
    start = dict(deep_llama().named_parameters())
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, start[name]) == (name in cut.frozen)


@pytest.mark.parametrize("pattern", ["(", "no_such_matrix"])
def test_patterns_are_checked_before_a_cut_is_applied(tmp_path, pattern):
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match=re.escape(repr(pattern))):
        add_grades(trainer, cut="auto", tau=0.0, taus={pattern: 1.0})
    assert all(p.requires_grad for p in trainer.model.parameters())


def test_a_threshold_for_matrices_below_the_cut_warns(tmp_path, deep_cut):
    trainer = make_trainer(tmp_path, model=deep_llama())
    with pytest.warns(UserWarning, match=r"no effect: 'layers\\\\.0'"):
        optimizer = train(trainer, cut=deep_cut.at(2), tau=0.0, taus={r"layers\.0": 1.0})
    assert {unit.tau for unit in optimizer.report().units} == {0.0}


def test_options_of_the_choice(tmp_path):
    options = {"blocks": "model.layers", "cost": "time", "n_batches": 4}
    cut = add_grades(make_trainer(tmp_path, model=deep_llama()), cut=options, **OPTIONS).cut
    assert cut.stack == "model.layers"
    with pytest.raises(ValueError, match="blocks='layers' is no stack of blocks"):
        add_grades(make_trainer(tmp_path), cut={"blocks": "layers"}, **OPTIONS)


@pytest.mark.parametrize("cut", ["half", {"block": "model.layers"}, {"model": None}], ids=str)
def test_an_impossible_cut_is_refused(tmp_path, cut):
    with pytest.raises(ValueError, match=f"Invalid cut: {re.escape(repr(cut))}.*n_batches, tied"):
        add_grades(make_trainer(tmp_path), cut=cut, **OPTIONS)


def test_a_cut_is_refused_where_it_cannot_be_applied(tmp_path):
    model = tiny_llama()
    optimizer = GradESAdamW(model.named_parameters(), tau=0.0, total_steps=4)
    with pytest.raises(ValueError, match="cut has to come before the optimizer"):
        add_grades(make_trainer(tmp_path, model=model, optimizer=optimizer), cut="auto")
    reentrant = {"gradient_checkpointing_kwargs": {"use_reentrant": True}}
    trainer = make_trainer(tmp_path, gradient_checkpointing=True, **reentrant)
    with pytest.raises(ValueError, match="reentrant activation checkpointing"):
        add_grades(trainer, cut="auto", **OPTIONS)


def test_best_model_is_loaded_after_an_early_stop(tmp_path):
    """The best weights are restored; the report still contains every event."""
    often = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(tmp_path, load_best_model_at_end=True, **often)
    optimizer = train(trainer, max_frozen=0.5)
    assert trainer.state.global_step < STEPS and optimizer.all_frozen
    losses = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    assert trainer.state.best_metric == min(losses)
    best = transformers.AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    assert_same_weights(trainer.model, best)
    assert len(FreezeReport.load(tmp_path / "grades_report.json").events) == 14


def test_optimizer_has_the_groups_and_hyperparameters_of_the_trainer(tmp_path):
    """Weight decay as in the Trainer's own AdamW, everything else from TrainingArguments."""
    changes = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6, "max_steps": 1}
    trainer = make_trainer(tmp_path, **changes)
    optimizer = train(trainer, taus={"layers.0": 0.5}, verbose=True)
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


class WithLossWeights(transformers.Trainer):
    """Its loss has weights of its own, as in sentence-transformers, at another learning rate."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.scale = nn.Parameter(torch.ones(2, 2))

    def get_optimizer_cls_and_kwargs(self, args, model=None):
        kind, options = super().get_optimizer_cls_and_kwargs(args, model)
        own = {"params": [self.scale], "lr": 0.1, "weight_decay": 0.0}
        decayed = {"params": list(model.parameters()), "weight_decay": 0.05}
        return kind, {**options, "optimizer_dict": [own, decayed]}

    def compute_loss(self, model, inputs, **options):
        return super().compute_loss(model, inputs) * self.scale.square().mean()


def test_tensors_beside_the_model_train_as_in_the_trainer_itself(tmp_path):
    def trainer(name):
        return make_trainer(tmp_path / name, kind=WithLossWeights, optim="adamw_torch")

    ours, stock = trainer("ours"), trainer("stock")
    optimizer = train(ours, tau=0.0, fused=False)
    stock.train()
    assert_same_weights(ours.model, stock.model)
    assert ours.scale.equal(stock.scale) and not ours.scale.equal(torch.ones(2, 2))
    assert len(optimizer.monitored_units) == 14
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.05}


class Stream(IterableDataset):
    def __iter__(self):
        return iter(sentences())


LENGTHS = {
    "max-steps": ({"max_steps": 5}, {}, (5, 2)),
    "epochs": ({"max_steps": -1, "num_train_epochs": 1.5}, {}, (12, 3)),
    "streaming-data": ({"max_steps": 4, "data": Stream()}, {}, (4, 1)),
    "own-grace": ({"max_steps": 2}, {"grace_steps": 1}, (None, 1)),
    "own-length": ({"max_steps": 2}, {"total_steps": 8}, (8, 2)),
}


@pytest.mark.parametrize(("changes", "options", "steps"), LENGTHS.values(), ids=LENGTHS)
@pytest.mark.filterwarnings("ignore:the optimizer was planned for 8 steps")
def test_length_is_that_of_the_trainer_unless_options_set_it(tmp_path, changes, options, steps):
    report = train(make_trainer(tmp_path, **changes), tau=0.0, **options).report()
    assert (report.total_steps, report.grace_steps) == steps


def test_before_train_the_length_is_that_of_max_steps(tmp_path):
    """Without it the Trainer has planned no number of steps."""
    trainer = make_trainer(tmp_path, max_steps=-1)
    add_grades(trainer, **OPTIONS)
    with pytest.raises(ValueError, match=r"plans no number of steps.*grace_steps"):
        trainer.create_optimizer()
    trainer = make_trainer(tmp_path, max_steps=5)
    add_grades(trainer, **OPTIONS)
    assert trainer.create_optimizer()._freezer.table.config.total_steps == 5


def test_the_grace_period_follows_the_plan_of_another_batch_size(tmp_path, monkeypatch):
    """The Trainer keeps the optimizer from the first batch size, which did not fit."""
    trainer = make_trainer(tmp_path, max_steps=-1, num_train_epochs=1, auto_find_batch_size=True)
    monkeypatch.setattr("accelerate.utils.memory.clear_device_cache", lambda *args, **kwargs: None)
    forward = trainer.model.forward

    def out_of_memory(input_ids=None, **inputs):
        if len(input_ids) > 1:
            raise RuntimeError("CUDA out of memory.")
        return forward(input_ids=input_ids, **inputs)

    monkeypatch.setattr(trainer.model, "forward", out_of_memory)
    report = train(trainer, tau=0.0).report()
    assert trainer.state.max_steps == 32 and trainer._train_batch_size == 1
    assert (report.total_steps, report.grace_steps) == (32, 8)


def test_own_optimizer_is_kept(tmp_path):
    """A Trainer that already has a GradESAdamW gets only the callback."""
    model = tiny_llama()
    own = GradESAdamW(grades_param_groups(model, tau=1e9), grace_steps=3)
    trainer = make_trainer(tmp_path, model=model, optimizer=own)
    with pytest.raises(ValueError, match=r"already has an optimizer.*'tau'"):
        add_grades(trainer, tau=1.0)
    add_grades(trainer)
    trainer.train()
    assert unwrap_optimizer(trainer.optimizer) is own
    assert not hasattr(trainer.optimizer, "all_frozen")  # accelerate's wrapper has no such reading
    assert trainer.state.global_step == 4  # the first step after the grace period of 3


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no matrix", "nothing to monitor in Linear"),
        ("no tau", "monitors no unit"),
        ("AdamW", r"no GradESAdamW but AdamW.*Train with"),
    ],
)
def test_a_run_that_cannot_freeze_is_refused_before_the_first_step(tmp_path, case, message):
    model = nn.Linear(4, 4) if case == "no matrix" else tiny_llama()
    before = copy.deepcopy(model)
    own = GradESAdamW(model.parameters()) if case == "no tau" else None
    trainer = make_trainer(tmp_path, model=model, optimizer=own)
    if case == "AdamW":
        trainer.add_callback(GradESCallback())
    else:
        add_grades(trainer, **({} if own else OPTIONS))
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert_same_weights(model, before)


@pytest.mark.parametrize("wrapper", ["FSDP1", "DeepSpeed"])
def test_flattened_parameters_are_refused_before_the_first_step(tmp_path, monkeypatch, wrapper):
    """Neither can be started on one CPU, so the test sets the attributes that the Trainer sets."""
    trainer = make_trainer(tmp_path)
    trainer.is_deepspeed_enabled = wrapper == "DeepSpeed"
    trainer.is_fsdp_enabled = wrapper == "FSDP1"
    plugin = SimpleNamespace(fsdp_version=1)
    monkeypatch.setattr(trainer.accelerator.state, "fsdp_plugin", plugin, raising=False)
    with pytest.raises(ValueError, match=rf"under {wrapper}.*FSDP2"):
        add_grades(trainer, **OPTIONS)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {}, "tau is required"),
        ({}, {"tau": 1.0, "lr": 1e-3}, "lr=0.001.*learning_rate"),
        ({}, {"tau": 1.0, "weight_decay": 0.0}, "weight_decay=0.0"),
        ({"optim": "adafactor"}, {"tau": 1.0}, "adafactor"),
        ({"optim": "adamw_torch_8bit"}, {"tau": 1.0}, "adamw_torch_8bit"),
        ({}, {"tau": 1.0, "statistic": "signl", "cut": "auto"}, "Invalid statistic: 'signl'"),
        ({}, {"tau": 1.0, "patiance": 2, "cut": "auto"}, "patiance"),
    ],
    ids=["no-tau", "lr", "weight-decay", "optim", "8 bit", "statistic", "unknown"],
)
def test_missing_and_misplaced_options_are_refused(tmp_path, changes, options, message):
    """At once, before a cut is chosen."""
    with pytest.raises((TypeError, ValueError), match=message):
        add_grades(make_trainer(tmp_path, **changes), **options)


def test_a_release_that_plans_its_steps_too_late_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers, "__version__", "5.2.0.dev0")
    with pytest.raises(ImportError, match=r"5\.3 or newer, this is 5\.2\.0\.dev0.*optimizers="):
        add_grades(make_trainer(tmp_path), tau=0.0)


def test_adding_twice_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    add_grades(trainer, tau=1.0)
    with pytest.raises(ValueError, match="set already"):
        add_grades(trainer, tau=1.0)


def test_a_finished_run_that_is_resumed_stays_as_it_is(tmp_path):
    """The Trainer cannot stop before a step; that one changes nothing."""
    runs = [make_trainer(tmp_path, save_strategy="steps", save_steps=100) for _ in range(2)]
    for trainer, resume in zip(runs, (None, True), strict=True):
        train(trainer, resume, max_frozen=0.5)
    first, second = runs
    assert 0 < first.state.global_step < STEPS
    assert_same_weights(first.model, second.model)
    for name in ("global_step", "epoch"):
        assert getattr(first.state, name) == getattr(second.state, name)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [
        f"checkpoint-{first.state.global_step}"
    ]
    optimizer = unwrap_optimizer(second.optimizer)
    optimizer.thaw()
    for group in optimizer.param_groups:
        group["tau"] = 0.0
    second.train()
    assert second.state.global_step == STEPS
    assert not torch.equal(second.model.lm_head.weight, first.model.lm_head.weight)


@pytest.mark.filterwarnings("ignore:total_steps=4 is exceeded")
def test_a_second_train_with_another_length_warns(tmp_path):
    """The Trainer keeps its optimizer for a second train(), and so its grace period."""
    trainer = make_trainer(tmp_path, max_steps=4)
    train(trainer, tau=0.0)
    trainer.args.max_steps = 6
    with pytest.warns(UserWarning, match="planned for 4 steps, the Trainer plans 6"):
        trainer.train()


def test_automatic_threshold(tmp_path):
    """tau="auto" reaches the optimizer; `taus` replaces it for some units."""
    trainer = make_trainer(tmp_path, max_steps=2)
    options = {"tau": "auto", "statistic": "signal", "tau_per": "unit", "taus": {"q_proj": 0.5}}
    for unit in train(trainer, **options).report().units:
        assert unit.tau == (0.5 if unit.kind == "q_proj" else 1.2)


def test_measurements_before_the_first_check_have_no_statistic():
    model = tiny_llama()
    optimizer = GradESAdamW(grades_param_groups(model, tau=1.0), total_steps=10)
    assert measurements(optimizer) == {
        "grades/frozen_share": 0.0,
        "grades/trainable_elements": sum(p.numel() for p in model.parameters()),
    }


def train_one_rank(folder):
    FreezeReport.plot = lambda report, path: path
    options = {"ddp_backend": "gloo", "ddp_find_unused_parameters": False}
    options |= {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 6}
    trainer = make_trainer(folder, **options)
    optimizer = train(trainer, max_frozen=0.5)
    resumed = make_trainer(f"{folder}/resumed", **options)
    train(resumed, resume=f"{folder}/checkpoint-6", max_frozen=0.5)
    assert_same_weights(resumed.model, trainer.model)
    found = {
        "events": [event[:2] for event in optimizer.freeze_events],
        "statistics": optimizer.statistics(),
        "steps": trainer.state.global_step,
        "released": sum(not p.requires_grad for p in trainer.model.parameters()),
        "share": [e["grades/frozen_share"] for e in trainer.state.log_history if "loss" in e],
        "batches": [batch["input_ids"].tolist() for batch in trainer.data_collator.batches],
    }
    with open(f"{folder}/rank{trainer.args.process_index}.json", "w") as file:
        json.dump(found, file)
    ranks.end_script()


def test_two_ranks_stop_in_the_step_in_which_a_plain_loop_stops(tmp_path):
    """DDP over gloo, compared with a loop over the batches of both ranks, and resumed."""
    launcher = "-m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node 2"
    found = ranks.run_script(__file__, tmp_path, *launcher.split())
    batches = [rank.pop("batches") for rank in found]
    assert found[0] == found[1]
    rows = (torch.tensor(a + b) for a, b in zip(*batches, strict=True))
    recorded = [{"input_ids": x, "labels": x} for x in rows]
    model, plain = plain_loop(recorded, max_frozen=0.5)
    assert found[0]["released"] == sum(not p.requires_grad for p in model.parameters()) > 0
    assert found[0]["events"] == [list(event[:2]) for event in plain.freeze_events]
    assert found[0]["statistics"] == pytest.approx(plain.statistics(), rel=1e-3)
    assert found[0]["steps"] == plain.freeze_events[-1].step < STEPS
    assert found[0]["share"][-1] == 1
    assert len(FreezeReport.load(tmp_path / "grades_report.json").events) == 14


def test_the_probe_logs_nothing_counts_nothing_and_knows_the_number_of_items(tmp_path):
    trainer = make_trainer(tmp_path, model=deep_llama())
    trainer._metrics, sent, given = {"train": []}, [], []
    trainer.log = lambda logs, *rest: sent.append(logs)

    def loss(outputs, labels, num_items_in_batch=None):
        trainer.log({"loss": 1.0})
        trainer._metrics["train"].append(1.0)
        given.append(num_items_in_batch)
        loss = nn.functional.cross_entropy
        return (
            loss(outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum")
            / num_items_in_batch
        )

    trainer.compute_loss_func = loss
    add_grades(trainer, cut="auto", **OPTIONS)
    assert given and None not in given
    assert (sent, trainer._metrics) == ([], {"train": []})
    trainer.log({})
    assert sent == [{}]


if __name__ == "__main__":
    train_one_rank(sys.argv[1])
