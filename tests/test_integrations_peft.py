"""LoRA and DoRA adapters of PEFT as units, in a plain loop, in the Trainer and in TRL."""

import contextlib

import pytest
import torch
from tiny import TRAINER, Recorder, assert_same_weights, sentences, tiny_llama

from grades_kernels import GradESAdamW, grades_param_groups
from grades_kernels.integrations import unwrap_optimizer

transformers = pytest.importorskip("transformers", minversion="5.3")
peft = pytest.importorskip("peft")

from grades_kernels.integrations import transformers as integration  # noqa: E402
from grades_kernels.integrations.transformers import add_grades  # noqa: E402

pytestmark = pytest.mark.usefixtures("without_plots")

ALWAYS = 1e9
KINDS = {"q_proj": "self_attn.q_proj", "down_proj": "mlp.down_proj"}
LORA = {"r": 2, "target_modules": list(KINDS), "task_type": "CAUSAL_LM"}


def lora_llama(name="default", **changes):
    return peft.get_peft_model(tiny_llama(), peft.LoraConfig(**LORA, **changes), adapter_name=name)


def units(name="default"):
    return [f"model.layers.{k}.{kind}.lora.{name}" for k in (0, 1) for kind in KINDS.values()]


def factors(tensors, unit):
    """The entries of both factors of a unit of the adapter "default" in a dict by name."""
    module = "base_model.model." + unit.removesuffix(".lora.default")
    return [tensors[f"{module}.lora_{factor}.default.weight"] for factor in "AB"]


def monitor(model, tau=ALWAYS, source="grades_param_groups", **options):
    """An optimizer with parameters from one of the two sources that users have."""
    if source == "grades_param_groups":
        return GradESAdamW(grades_param_groups(model, tau=tau), **options)
    return GradESAdamW(model.named_parameters(), tau=tau, **options)


def train(model, optimizer, n, start=0):
    """Train `n` steps in a plain loop and return the gradients of every step by name."""
    gradients = []
    rows = torch.stack([row["input_ids"] for row in sentences(4 * (start + n))])
    for batch in rows.view(start + n, 4, -1)[start:]:
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        named = model.named_parameters()
        gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})
        optimizer.step()
    return gradients


both_sources = pytest.mark.parametrize("source", ["grades_param_groups", "named_parameters"])


@pytest.mark.parametrize(
    ("statistic", "timing"),
    [(name, "same_step") for name in ("norm", "change", "momentum", "signal")]
    + [("weight_change", "next_step")],
)
def test_both_factors_freeze_in_one_step_with_every_statistic(statistic, timing):
    """Not in step 1: while B is zero the gradient of A is zero, which cannot be measured."""
    model = lora_llama()
    optimizer = monitor(model, lr=1e-2, grace_steps=0, statistic=statistic, freeze_timing=timing)
    train(model, optimizer, 1)
    assert optimizer.frozen_units == []
    step = 3 if statistic == "signal" else 2  # it needs moments of two gradients
    train(model, optimizer, step - 1, start=1)
    assert [event[:2] for event in optimizer.freeze_events] == [(step, unit) for unit in units()]
    assert optimizer.all_frozen
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    for event in optimizer.freeze_events:
        assert event.n_elements == sum(factors(sizes, event.unit))


def two_adapters():
    model = lora_llama("one")
    model.add_adapter("two", peft.LoraConfig(**LORA))
    model.set_adapter("one")
    return model


@both_sources
def test_only_the_active_adapter_is_monitored(source):
    """Neither an inactive adapter nor the base model, which is not trained, delays `all_frozen`."""
    model = two_adapters()
    idle = {k: p.clone() for k, p in model.named_parameters() if not p.requires_grad}
    optimizer = monitor(model, source=source, grace_steps=2)
    assert optimizer.monitored_units == units("one")
    train(model, optimizer, 2)
    assert not optimizer.all_frozen
    train(model, optimizer, 1, start=2)
    assert optimizer.all_frozen and optimizer.frozen_units == units("one")
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], p) for name, p in idle.items())


def test_another_adapter_is_monitored_once_it_is_active():
    """After the switch the units of the first adapter stay frozen."""
    model = two_adapters()
    optimizer = monitor(model, source="named_parameters", grace_steps=2)
    train(model, optimizer, 3)
    assert optimizer.frozen_units == units("one")
    model.set_adapter("two")
    train(model, optimizer, 2, start=3)
    assert {unit for unit in optimizer.monitored_units if unit.endswith("two")} == set(units("two"))
    train(model, optimizer, 1, start=5)
    assert optimizer.all_frozen
    assert set(optimizer.frozen_units) == {*units("one"), *units("two")}


def test_a_pair_freezes_if_only_one_factor_is_trained():
    """As in LoRA-FA, which trains B alone."""
    model = lora_llama()
    for name, p in model.named_parameters():
        if ".lora_A." in name:
            p.requires_grad_(False)
    optimizer = monitor(model, source="named_parameters", grace_steps=1, statistic="norm")
    train(model, optimizer, 2)
    assert optimizer.frozen_units == units()


@pytest.mark.parametrize("stop_grad", ["auto", False])
def test_adalora_reads_the_gradients_of_frozen_factors_too(stop_grad):
    settings = {"target_modules": list(KINDS), "total_step": 9, "tinit": 1, "tfinal": 1}
    model = peft.get_peft_model(tiny_llama(), peft.AdaLoraConfig(**settings))
    optimizer = monitor(model, statistic="norm", grace_steps=0, stop_grad=stop_grad)
    needed = pytest.raises(TypeError) if stop_grad else contextlib.nullcontext()
    with needed:
        for step in range(6):
            train(model, optimizer, 1, start=step)
            model.base_model.update_and_allocate(step)
    assert optimizer.all_frozen


def test_magnitudes_of_dora_train_on_while_their_pair_is_frozen():
    """A magnitude vector is updated by AdamW as a bias is, and no part of the statistic."""
    model = lora_llama(use_dora=True)
    optimizer = monitor(model, lr=1e-2, grace_steps=2)
    assert optimizer.monitored_units == units()
    train(model, optimizer, 3)
    assert optimizer.all_frozen
    before = {name: p.clone() for name, p in model.named_parameters()}
    train(model, optimizer, 2, start=3)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == ("magnitude" not in name), name


SETTINGS = {**TRAINER, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
OPTIONS = {"tau": 0.0185, "tau_per": "element", "alpha": 0.25, "statistic": "norm"}


def make_trainer(folder, **options):
    trainer = transformers.Trainer(
        model=lora_llama(),
        args=transformers.TrainingArguments(
            str(folder), **{**SETTINGS, "save_strategy": "steps", "save_steps": 8}
        ),
        train_dataset=sentences(),
        data_collator=Recorder(),
    )
    add_grades(trainer, **{**OPTIONS, **options})
    return trainer


def plain_loop(batches, model):
    groups = grades_param_groups(model, tau=OPTIONS["tau"], weight_decay=0.0)
    optimizer = GradESAdamW(groups, lr=1e-2, total_steps=16, **OPTIONS)
    for batch in batches[:16]:
        model(**batch).loss.backward()
        optimizer.step()
        model.zero_grad()
        if optimizer.all_frozen:
            break
    return optimizer


def test_trainer_equals_a_plain_loop_and_resumes_bit_for_bit(tmp_path):
    whole = make_trainer(tmp_path)
    whole.train()
    expected = unwrap_optimizer(whole.optimizer).freeze_events
    assert expected
    assert expected == plain_loop(whole.data_collator.batches, lora_llama()).freeze_events
    resumed = make_trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert unwrap_optimizer(resumed.optimizer).freeze_events == expected
    assert_same_weights(resumed.model, whole.model)


def test_resume_of_a_finished_run_is_refused(tmp_path, monkeypatch):
    """With adapters alone no parameter is left to train, and backward would fail.

    As on a device whose decisions the host reads one step late, the first run stops late.
    """
    monkeypatch.setattr(integration, "is_finished", lambda optimizer: optimizer.report().step > 5)
    make_trainer(tmp_path, tau=ALWAYS).train()
    with pytest.raises(RuntimeError, match=r"all 4 units were frozen.*had finished"):
        make_trainer(tmp_path, tau=ALWAYS).train(resume_from_checkpoint=f"{tmp_path}/checkpoint-6")


def test_sft_trainer_equals_a_plain_loop(tmp_path):
    """TRL's SFTTrainer, which creates the adapters itself."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from tokenizers import Tokenizer, models

    vocabulary = {f"w{n}": n for n in range(30)} | {"<pad>": 30, "</s>": 31}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w0")),
        pad_token="<pad>",
        eos_token="</s>",
    )
    rows = [{"input_ids": row["input_ids"].tolist()} for row in sentences()]
    trainer = trl.SFTTrainer(
        model=lora_llama().unload(),
        args=trl.SFTConfig(str(tmp_path), bf16=False, **SETTINGS),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(**LORA),
    )
    trainer.data_collator = Recorder(trainer.data_collator)
    start = lora_llama()
    start.load_state_dict(trainer.model.state_dict())
    add_grades(trainer, **OPTIONS)
    trainer.train()
    trained = unwrap_optimizer(trainer.optimizer)
    assert trained.monitored_units == units()
    assert trained.freeze_events and not trained.all_frozen
    plain = plain_loop(trainer.data_collator.batches, start)
    for ours, theirs in zip(trained.freeze_events, plain.freeze_events, strict=True):
        assert ours[:2] == theirs[:2]
        assert ours.statistic == pytest.approx(theirs.statistic, rel=1e-4)
