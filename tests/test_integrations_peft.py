"""LoRA and DoRA adapters of PEFT as units, in a plain loop, in the Trainer and in TRL."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from grades_kernels import GradESAdamW, grades_param_groups
from grades_kernels.integrations import unwrap_optimizer

transformers = pytest.importorskip("transformers", minversion="5")
peft = pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model  # noqa: E402
from tiny import sentences, tiny_llama  # noqa: E402
from transformers import Trainer, TrainingArguments  # noqa: E402

from grades_kernels.integrations import transformers as integration  # noqa: E402
from grades_kernels.integrations.transformers import add_grades  # noqa: E402

pytestmark = pytest.mark.usefixtures("without_pictures")

NEVER = 0.0
ALWAYS = 1e9
TARGETS = ["q_proj", "down_proj"]


def lora_llama(name: str = "default", **changes) -> nn.Module:
    config = LoraConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM", **changes)
    return get_peft_model(tiny_llama(), config, adapter_name=name)


def batches(n: int):
    rows = torch.stack([row["input_ids"] for row in sentences(4 * n)])
    return rows.view(n, 4, -1)


def train(model: nn.Module, optimizer: GradESAdamW, n: int, start: int = 0) -> list[dict]:
    """`n` steps of a plain loop; returns the gradients of every step by name."""
    seen = []
    for batch in batches(start + n)[start:]:
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        seen.append({k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
    return seen


def pair(layer: int, kind: str, name: str = "default") -> str:
    module = "self_attn" if kind == "q_proj" else "mlp"
    return f"model.layers.{layer}.{module}.{kind}.lora.{name}"


def units(name: str = "default") -> list[str]:
    return [pair(layer, kind, name) for layer in (0, 1) for kind in TARGETS]


def factors(grads: dict, unit: str, name: str = "default") -> list[torch.Tensor]:
    module = "base_model.model." + unit.removesuffix(f".lora.{name}")
    return [grads[f"{module}.lora_{factor}.{name}.weight"] for factor in "AB"]


@pytest.mark.parametrize("name", ["default", "task-7", "weight"])
def test_a_pair_is_one_unit_whatever_the_adapter_is_called(name):
    model = lora_llama(name)
    for params in (grades_param_groups(model, tau=1.0), model.named_parameters()):
        if isinstance(params, list):
            optimizer = GradESAdamW(params, grace_steps=0)
        else:
            learning = [(k, p) for k, p in params if p.requires_grad]
            optimizer = GradESAdamW(learning, tau=1.0, grace_steps=0)
        assert optimizer.monitored_units == units(name)
        kinds = {unit.kind for unit in optimizer.report().units}
        assert kinds == {"q_proj.lora", "down_proj.lora"}


@pytest.mark.parametrize("statistic", ["norm", "change"])
def test_statistic_of_a_pair_is_the_sum_over_both_factors(statistic):
    model = lora_llama()
    optimizer = GradESAdamW(
        grades_param_groups(model, tau=NEVER), lr=1e-2, grace_steps=1, statistic=statistic
    )
    before, last = train(model, optimizer, 4)[-2:]
    for unit, measured in optimizer.statistics().items():
        expected = 0.0
        for g, old in zip(factors(last, unit), factors(before, unit), strict=True):
            g, old = g.double(), old.double()
            expected += (g if statistic == "norm" else g - old).abs().sum().item()
        assert measured == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("statistic", "timing", "first"),
    [
        # While B is zero the gradient of A is zero: there is no evidence in step 1.
        ("norm", "same_step", 2),
        ("change", "same_step", 2),
        ("momentum", "same_step", 2),
        ("signal", "same_step", 2),
        ("weight_change", "next_step", 2),
    ],
)
def test_both_factors_freeze_in_one_step_with_every_statistic(statistic, timing, first):
    model = lora_llama()
    optimizer = GradESAdamW(
        grades_param_groups(model, tau=ALWAYS),
        lr=1e-2,
        grace_steps=0,
        statistic=statistic,
        freeze_timing=timing,
    )
    train(model, optimizer, first - 1)
    assert optimizer.frozen_units == []
    train(model, optimizer, 1, start=first - 1)
    assert [(event.step, event.unit) for event in optimizer.freeze_events] == [
        (first, unit) for unit in units()
    ]
    assert optimizer.all_frozen
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    for event in optimizer.freeze_events:
        assert event.n_elements == sum(factors(sizes, event.unit))


def two_adapters() -> nn.Module:
    model = lora_llama("one")
    model.add_adapter("two", LoraConfig(r=2, target_modules=TARGETS))
    model.set_adapter("one")
    return model


@pytest.mark.parametrize("source", ["grades_param_groups", "named_parameters"])
def test_only_the_active_adapter_is_watched(source):
    """Neither an inactive adapter nor the frozen base keeps `all_frozen` from coming true."""
    model = two_adapters()
    idle = {k: p.clone() for k, p in model.named_parameters() if not p.requires_grad}
    if source == "grades_param_groups":
        optimizer = GradESAdamW(grades_param_groups(model, tau=ALWAYS), grace_steps=2)
    else:
        optimizer = GradESAdamW(model.named_parameters(), tau=ALWAYS, grace_steps=2)
    assert optimizer.monitored_units == units("one")
    train(model, optimizer, 2)
    assert not optimizer.all_frozen
    train(model, optimizer, 1, start=2)
    assert optimizer.all_frozen and optimizer.frozen_units == units("one")
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], p) for name, p in idle.items())


def test_the_other_adapter_is_watched_once_it_is_active():
    """A switch of adapters within one optimizer: what was frozen stays, what is new is watched."""
    model = two_adapters()
    optimizer = GradESAdamW(model.named_parameters(), tau=ALWAYS, grace_steps=2)
    train(model, optimizer, 3)
    assert optimizer.frozen_units == units("one")
    model.set_adapter("two")
    train(model, optimizer, 2, start=3)
    assert {unit for unit in optimizer.monitored_units if unit.endswith("two")} == set(units("two"))
    train(model, optimizer, 1, start=5)
    assert optimizer.all_frozen
    assert set(optimizer.frozen_units) == {*units("one"), *units("two")}


def test_a_fixed_factor_leaves_the_other_one_to_freeze():
    """As in LoRA-FA, which trains B alone."""
    model = lora_llama()
    for name, p in model.named_parameters():
        if ".lora_A." in name:
            p.requires_grad_(False)
    optimizer = GradESAdamW(model.named_parameters(), tau=ALWAYS, grace_steps=1, statistic="norm")
    train(model, optimizer, 2)
    assert optimizer.frozen_units == units()


def test_magnitudes_of_dora_train_on_while_their_pair_is_frozen():
    """A magnitude vector is a vector: plain AdamW as for a bias, no part of the statistic."""
    model = lora_llama(use_dora=True)
    optimizer = GradESAdamW(grades_param_groups(model, tau=ALWAYS), lr=1e-2, grace_steps=2)
    assert optimizer.monitored_units == units()
    train(model, optimizer, 3)
    assert optimizer.all_frozen
    before = {name: p.clone() for name, p in model.named_parameters()}
    train(model, optimizer, 2, start=3)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == ("magnitude" not in name), name


# In trainers


class Collator:
    """Stacks rows, and keeps every batch for the plain loop."""

    def __init__(self, inner=None) -> None:
        self.inner = inner
        self.batches: list[dict[str, torch.Tensor]] = []

    def __call__(self, rows):
        if self.inner is None:
            batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        else:
            batch = self.inner(rows)
        self.batches.append({k: v for k, v in copy.deepcopy(batch).items() if torch.is_tensor(v)})
        return batch


SETTINGS = {
    "per_device_train_batch_size": 4,
    "max_steps": 16,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
OPTIONS = {"tau": 0.0185, "tau_per": "element", "alpha": 0.25, "statistic": "norm"}


def make_trainer(folder, **changes) -> Trainer:
    return Trainer(
        model=lora_llama(),
        args=TrainingArguments(str(folder), **{**SETTINGS, **changes}),
        train_dataset=sentences(),
        data_collator=Collator(),
    )


def plain_loop(recorded: list[dict], model: nn.Module | None = None) -> GradESAdamW:
    model = model or lora_llama()
    groups = grades_param_groups(model, tau=OPTIONS["tau"], weight_decay=0.0)
    optimizer = GradESAdamW(groups, lr=1e-2, total_steps=16, **OPTIONS)
    for batch in recorded[:16]:
        model(**batch).loss.backward()
        optimizer.step()
        model.zero_grad()
        if optimizer.all_frozen:
            break
    return optimizer


def test_trainer_freezes_the_pairs_that_a_plain_loop_freezes(tmp_path):
    trainer = make_trainer(tmp_path)
    add_grades(trainer, **OPTIONS)
    trainer.train()
    trained = unwrap_optimizer(trainer.optimizer)
    assert trained.freeze_events
    assert trained.freeze_events == plain_loop(trainer.data_collator.batches).freeze_events


def test_resume_of_adapters_is_bit_identical(tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 8}
    whole = make_trainer(tmp_path, **changes)
    add_grades(whole, **OPTIONS)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", **changes)
    add_grades(resumed, **OPTIONS)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    expected, actual = (unwrap_optimizer(t.optimizer) for t in (whole, resumed))
    assert expected.freeze_events and actual.freeze_events == expected.freeze_events
    weights = dict(whole.model.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in resumed.model.named_parameters())


def test_resume_of_a_finished_run_says_that_it_had_finished(tmp_path, monkeypatch):
    """With adapters alone nothing is left to train: backward would fail with torch's own words.

    That the host learns a step late of what a device has decided is played here.
    """
    monkeypatch.setattr(integration, "is_finished", lambda optimizer: optimizer.report().step > 5)
    changes = {"save_strategy": "steps", "save_steps": 100}
    first = make_trainer(tmp_path, **changes)
    add_grades(first, **{**OPTIONS, "tau": ALWAYS})
    first.train()
    again = make_trainer(tmp_path, **changes)
    add_grades(again, **{**OPTIONS, "tau": ALWAYS})
    with pytest.raises(RuntimeError, match=r"all 4 units were frozen.*had finished"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


def test_sft_trainer_freezes_what_a_plain_loop_freezes(tmp_path):
    """TRL's SFTTrainer, which makes the adapters itself; the same events as a plain loop."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{n}": n for n in range(30)} | {"<pad>": 30, "</s>": 31}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w0")),
        pad_token="<pad>",
        eos_token="</s>",
    )
    data = datasets.Dataset.from_list(
        [{"input_ids": row["input_ids"].tolist()} for row in sentences()]
    )
    trainer = trl.SFTTrainer(
        model=lora_llama().unload(),
        args=trl.SFTConfig(str(tmp_path), bf16=False, **SETTINGS),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM"),
    )
    trainer.data_collator = collator = Collator(trainer.data_collator)
    start = lora_llama()
    start.load_state_dict(trainer.model.state_dict())
    add_grades(trainer, **OPTIONS)
    trainer.train()
    trained = unwrap_optimizer(trainer.optimizer)
    plain = plain_loop(collator.batches, start)
    assert trained.monitored_units == units()
    assert trained.freeze_events
    assert not trained.all_frozen
    assert [e[:2] for e in trained.freeze_events] == [e[:2] for e in plain.freeze_events]
    for ours, theirs in zip(trained.freeze_events, plain.freeze_events, strict=True):
        assert ours.statistic == pytest.approx(theirs.statistic, rel=1e-4)
