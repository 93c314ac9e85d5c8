"""GradES in the Trainer of transformers, which one line adds to an existing trainer.

trainer = Trainer(model=model, args=args, train_dataset=dataset)
add_grades(trainer, tau=1.8)
trainer.train()
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..cut.choose import choose_cut
from ..cut.cut import Cut, disable_input_grads, has_trained_adapters
from ..freezing.config import exact_grace_steps
from ..freezing.param_groups import grades_param_groups
from ..optimizer import GradESAdamW
from .shared import (
    choice_options,
    is_finished,
    measurements,
    release_under_ddp,
    save_report,
    silent,
    unwrap_optimizer,
    within_an_epoch,
)

__all__ = ["GradESCallback", "GradESFactory", "add_grades", "unwrap_optimizer"]

logger = logging.getLogger(__name__)


def add_grades(
    trainer: Trainer, *, cut: Cut | Mapping[str, Any] | str | None = None, **options: Any
) -> GradESCallback:
    """Make a Trainer train with GradESAdamW, and add a `GradESCallback` to it.

    Learning rate, betas, eps and weight decay are those of the `TrainingArguments`, `total_steps`
    is the number of steps that the Trainer plans, and norms and biases are not decayed, as in the
    Trainer's own AdamW. If the Trainer already has a GradESAdamW, only the callback is added.

    Args:
        trainer: A Trainer, or one of a class derived from it (TRL's SFTTrainer), before `train()`.
        cut: "auto" chooses which of the lowest blocks not to train at all, with `choose_cut` and 12
            of the Trainer's batches, and applies it now; a dict does so with other options of
            `choose_cut`, for example `{"blocks": "encoder.block"}`. A `Cut` is applied as it is,
            which is how a run is resumed: `Cut.load(output_dir + "/grades_cut.json")`. None:
            everything trains.
        **options: `tau`, which is required; `taus` and `verbose` of `grades_param_groups`; and any
            option of GradESAdamW that `TrainingArguments` does not have.

    Returns:
        The callback that was added. It comes before all others, so that every tracker of
        `args.report_to` logs the numbers that it adds.

    Raises:
        TypeError: For an option that GradESAdamW does not have.
        ImportError: With a release of Transformers before 5.3.
        ValueError: Under FSDP1 or DeepSpeed, for an option that `TrainingArguments` sets,
            without `tau`, for a value that GradESAdamW refuses, or if the Trainer has another
            optimizer already, or any with a `cut`; for a `cut` where the Trainer cannot have one.
            Also the errors of `choose_cut` and `Cut.apply`.
    """
    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 3):
        # Before, the Trainer makes the optimizer before it has planned the number of steps.
        raise ImportError(
            f"add_grades needs transformers 5.3 or newer, this is {transformers.__version__}: pass "
            "GradESAdamW to the Trainer by `optimizers=(optimizer, None)`, with GradESCallback()."
        )
    to_choose = choice_options(cut)
    is_fsdp1 = trainer.is_fsdp_enabled and (
        trainer.accelerator.state.fsdp_plugin.fsdp_version == 1  # absent without FSDP
    )
    if trainer.is_deepspeed_enabled or is_fsdp1:
        raise ValueError(
            f"this Trainer runs under {'FSDP1' if is_fsdp1 else 'DeepSpeed'}, which flattens the "
            "parameters, so that no matrix can be measured or frozen. Use FSDP2 (fsdp=True, "
            'fsdp_config={"version": 2}) or DDP.'
        )
    if trainer.optimizer is not None:
        release_under_ddp(unwrap_optimizer(trainer.optimizer), lambda: trainer.model_wrapped)
        if cut is not None:
            raise ValueError(
                "add_grades: cut has to come before the optimizer, which this Trainer has already. "
                "Call Cut.apply(model) before you make it."
            )
        if options:
            raise ValueError(
                f"add_grades: this trainer already has an optimizer: pass {sorted(options)} to it, "
                "or build the Trainer without `optimizers`."
            )
        alpha = None
    elif trainer.optimizer_cls_and_kwargs is not None:
        raise ValueError(
            "add_grades: optimizer_cls_and_kwargs is set already, by another call of add_grades or "
            "the Trainer's argument. Build the Trainer anew, without it."
        )
    else:
        if options.get("tau") is None:
            raise ValueError(
                "add_grades: tau is required. Start with tau=0.0, which measures and never "
                "freezes, to find its scale."
            )
        of_trainer = {"lr", "betas", "eps", "weight_decay"}
        taken = [f"{name}={value!r}" for name, value in options.items() if name in of_trainer]
        if taken:
            raise ValueError(
                f"add_grades: {', '.join(taken)}: set learning_rate, adam_beta1, adam_beta2, "
                "adam_epsilon and weight_decay in TrainingArguments."
            )
        optim = trainer.args.optim
        if getattr(optim, "value", optim) not in ("adamw_torch", "adamw_torch_fused"):
            raise ValueError(
                f"TrainingArguments.optim={optim!r}: GradES freezes under AdamW whose moments have "
                "the dtype of the parameters. Remove optim."
            )
        model: Any = trainer.model
        if _recomputes_with_other_flags(trainer):
            if cut is not None and any(has_trained_adapters(m) for m in model.modules()):
                raise ValueError(
                    "add_grades: with gradient checkpointing and no ref_model, the reference of "
                    "this trainer is the model in disable_adapter(), which lets adapters below a "
                    "cut train again before their recomputation, unless they are new (B = 0). Set "
                    "gradient_checkpointing=False, or give the trainer a ref_model."
                )
            options.setdefault("stop_grad", False)
        of_groups = ("taus", "verbose", "fused")  # the tensors decide about the last one
        own = {name: value for name, value in options.items() if name not in of_groups}
        GradESAdamW([nn.Parameter(torch.zeros(1, 1))], **{"grace_steps": 0, **own})  # checks them
        if options.get("taus") is not None:
            grades_param_groups(model, tau=options["tau"], taus=options["taus"])  # checks them
        if to_choose is not None:
            cut = _chosen_cut(trainer, to_choose)
        if isinstance(cut, Cut):
            if trainer.is_world_process_zero():
                print(cut)
            cut.apply(model)
        alpha = options.get("alpha", (GradESAdamW.__init__.__kwdefaults__ or {})["alpha"])
        if options.get("total_steps") is not None or options.get("grace_steps") is not None:
            alpha = None
        factory: Any = GradESFactory  # annotated as an optimizer class, but any callable works
        options |= {"trainer": trainer, "cut": cut}
        trainer.optimizer_cls_and_kwargs = (factory, options)
    callback = GradESCallback(cut if isinstance(cut, Cut) else None, alpha=alpha)
    trainer.callback_handler.callbacks.insert(0, callback)
    return callback


def _recomputes_with_other_flags(trainer: Any) -> bool:
    """Whether PEFT's `disable_adapter` runs between a forward pass and its recomputation.

    As in TRL's DPOTrainer with adapters. Its end sets `requires_grad` of all adapters, also of
    released ones, and checkpointing raises where a recomputation saves other tensors.
    """
    has_adapters = hasattr(trainer.model, "disable_adapter")
    is_own_reference = getattr(trainer, "ref_model", trainer) is None
    return _checkpointing(trainer.args) is not None and has_adapters and is_own_reference


def _checkpointing(args: Any) -> dict[str, Any] | None:
    """The options of the Trainer's activation checkpointing; None where it is off."""
    renamed = hasattr(args, "activation_checkpointing")  # the old name goes with Transformers 6
    name = "activation_checkpointing" if renamed else "gradient_checkpointing"
    return dict(getattr(args, f"{name}_kwargs") or {}) if getattr(args, name) else None


def _chosen_cut(trainer: Trainer, options: Mapping[str, Any]) -> Cut:
    """The cut that `choose_cut` chooses from the Trainer's own batches and loss."""

    def loss(model: nn.Module, inputs: Any) -> Any:
        if not isinstance(inputs, Mapping):
            raise ValueError(
                f"cut='auto' needs batches that are dicts, not {type(inputs).__name__}: a trainer "
                "that generates its own data (GRPO) compares no two weights on the same. Pass a "
                "Cut that choose_cut has made with fixed batches."
            )
        # train() has autocast from the wrapped model
        with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
            ready = trainer._prepare_inputs(dict(inputs))
            if trainer.compute_loss_func is None:
                return trainer.compute_loss(model, ready)
            n_items = trainer._get_num_items_in_batch([ready], trainer.args.device)
            return trainer.compute_loss(model, ready, num_items_in_batch=n_items)

    model: Any = trainer.model
    loader: Any = trainer.get_train_dataloader()
    training = model.training
    model.train()
    # What a trainer counts or averages stays.
    counts = {
        name: copy.deepcopy(x)
        for name, x in vars(trainer).items()
        if name[0] == "_" and isinstance(x, (int, float, dict, list))
    }
    try:
        with silent(trainer, "log"), _checkpointed(model, _checkpointing(trainer.args)):
            return choose_cut(model, loss, loader, **within_an_epoch(options, loader))
    finally:
        model.train(training)
        vars(trainer).update(counts)
        # The loader was left in the middle of an epoch, and train() makes its own.
        prepared = trainer.accelerator._dataloaders
        if loader in prepared:
            prepared.remove(loader)
            loader.end()


@contextmanager
def _checkpointed(model: Any, checkpointing: dict[str, Any] | None) -> Iterator[None]:
    """Enable activation checkpointing as `train()` does; afterwards the model is as before."""
    if checkpointing is None:
        yield
        return
    names = ["gradient_checkpointing", "_gradient_checkpointing_func"]
    names += ["_require_grads_hook", "_require_grads_hooks"]
    before = [
        (m, {name: x for name, x in vars(m).items() if name in names}, dict(m._forward_hooks))
        for m in model.modules()
    ]
    of_layers = {"every_n_layers", "offload"} & checkpointing.keys()
    own = {name: checkpointing.pop(name) for name in of_layers}
    enable = getattr(model, "activation_checkpointing_enable", None)
    try:
        (enable or model.gradient_checkpointing_enable)(checkpointing or None, **own)
        yield
    finally:
        for module, attributes, hooks in before:
            for name in names:
                vars(module).pop(name, None)
            vars(module).update(attributes)
            module._forward_hooks.clear()
            module._forward_hooks.update(hooks)


class GradESFactory:
    """Makes the optimizer of a Trainer, in place of the class in `optimizer_cls_and_kwargs`.

    The Trainer calls `GradESFactory()(model, **kwargs)` after it has planned the number of steps.
    """

    def __call__(
        self,
        model: nn.Module,
        *,
        trainer: Trainer,
        tau: Any,
        taus: Mapping[str, float | None] | None = None,
        verbose: bool = False,
        cut: Cut | None = None,
        **options: Any,
    ) -> GradESAdamW:
        """Return a GradESAdamW with parameter names, the Trainer's weight decay and its length.

        `tau`, `taus` and `verbose` are those of `grades_param_groups`, `options` of GradESAdamW,
        `cut` is the cut that was applied to the model, and is applied to the one that `train()`
        makes with `model_init`; `total_steps` or `grace_steps` replaces the planned steps.

        Raises:
            ValueError: If no matrix can be monitored, or if the Trainer plans no number of steps.
        """
        args = trainer.args
        if options.get("total_steps") is None and options.get("grace_steps") is None:
            # The second, where the optimizer is made before train().
            planned = max(trainer.state.max_steps, args.max_steps)
            if planned < 1:
                raise ValueError(
                    "the Trainer plans no number of steps: set max_steps in TrainingArguments, or "
                    "pass total_steps or grace_steps to add_grades."
                )
            options["total_steps"] = planned
        if cut is not None and trainer.model_init is not None:
            cut.apply(model)
        settings = _settings_of_tensors(trainer, model)
        found: Any = [{"params": [x for x in model.named_parameters() if x[1].requires_grad]}]
        if cut is None or cut.leaves_blocks:
            found = grades_param_groups(model, tau=tau, taus=taus, verbose=verbose)
        tensors = [(name, p, group.get("tau")) for group in found for name, p in group["params"]]
        of_model = {p for _, p, _ in tensors}
        beside = [p for p in settings if p not in of_model]
        tensors += [(f"beside_the_model.{k}", p, None) for k, p in enumerate(beside)]
        groups: dict[str, dict[str, Any]] = {}
        for name, p, own_tau in tensors:
            if p in settings:
                own = {**settings[p], "tau": own_tau}
                group = groups.setdefault(repr(sorted(own.items())), {**own, "params": []})
                group["params"].append((name, p))
        options |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        optimizer = GradESAdamW([*groups.values()], lr=args.learning_rate, tau=tau, **options)
        release_under_ddp(optimizer, lambda: trainer.model_wrapped)
        return optimizer


def _settings_of_tensors(trainer: Any, model: nn.Module) -> dict[Tensor, dict[str, Any]]:
    """The tensors of the Trainer's own AdamW, with the options of their parameter group.

    A derived class may have groups of its own, as that of sentence-transformers, whose losses have
    weights.
    """
    args = trainer.args
    _, own = trainer.get_optimizer_cls_and_kwargs(args, model)
    groups = next((own[key] for key in ("optimizer_dict", "model", "params") if key in own), None)
    if groups is not None:
        return {
            p: {key: value for key, value in group.items() if key != "params"}
            for group in groups
            for p in group["params"]
        }
    decayed = set(trainer.get_decay_parameter_names(model))
    return {
        p: {"weight_decay": args.weight_decay if name in decayed else 0.0}
        for name, p in model.named_parameters()
        if p.requires_grad
    }


class GradESCallback(TrainerCallback):
    """Logs the progress of freezing, stops training when all units are frozen, saves the report.

    When it stops, the Trainer logs, evaluates and saves as at the planned end. The Trainer's log
    gets the numbers of `grades_kernels.integrations.measurements`; at the end "grades_report.json"
    and "grades_report.png" are written to `args.output_dir`. Use `add_grades` to add it: as one of
    the Trainer's `callbacks` it comes after the trackers, which then do not log the numbers.

    Args:
        cut: The cut that was applied to the model; it is written to "grades_cut.json".
        alpha: That of the optimizer, where the Trainer has planned its steps: it gives the grace
            period of another plan (`auto_find_batch_size`) before the first step. Else None.
    """

    def __init__(self, cut: Cut | None = None, *, alpha: float | None = None) -> None:
        self.cut, self.alpha = cut, alpha
        self._finished_at: tuple[int, float] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise, before the first step, if the optimizer cannot freeze or train anything."""
        grades = unwrap_optimizer(kwargs["optimizer"])
        self._finished_at = None  # of an earlier call of train()
        table, planned = grades._freezer.table, state.max_steps
        if self.alpha is not None and table.t == 0:
            grace_steps = exact_grace_steps(self.alpha, planned)
            table.config = replace(table.config, total_steps=planned, grace_steps=grace_steps)
        report = grades.report()
        if self.cut is not None and self.cut.k is not None:
            disable_input_grads(kwargs["model"])  # train() has enabled checkpointing since `apply`
        if self.cut is not None and args.should_save and args.output_dir is not None:
            self.cut.save(Path(args.output_dir) / "grades_cut.json")
        if not report.units and self.cut is not None and not self.cut.leaves_blocks:
            return  # the head alone trains
        if not report.units:
            raise ValueError("the optimizer monitors no unit: set tau or remove GradESCallback")
        if report.total_steps not in (None, planned):
            warnings.warn(
                f"the optimizer was planned for {report.total_steps} steps, the Trainer plans "
                f"{planned}: the grace period stays {report.grace_steps} steps.",
                stacklevel=2,
            )
        if grades.all_frozen and not any(p.requires_grad for p in kwargs["model"].parameters()):
            raise RuntimeError(
                f"all {len(report.units)} units were frozen when this run was saved, and no other "
                "parameter can be trained: the run had finished. Use its model as it is."
            )
        if is_finished(grades):
            self._finished_at = state.global_step, state.epoch or 0.0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave all as it is if the run had finished: the Trainer can stop only after a step."""
        if self._finished_at is not None:
            kwargs["model"].zero_grad()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop when all units are frozen."""
        if self._finished_at is not None:
            state.global_step, state.epoch = self._finished_at
            control.should_training_stop = True
        elif is_finished(unwrap_optimizer(kwargs["optimizer"])):
            logger.warning("step %d: all units are frozen, training stops", state.global_step)
            control.should_training_stop = True
            control.should_log |= args.logging_strategy != IntervalStrategy.NO
            if args.eval_strategy == IntervalStrategy.STEPS:
                control.should_evaluate |= args.eval_delay <= state.global_step
            control.should_save |= args.save_strategy == SaveStrategy.STEPS

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the measurements to a training log, but not to an evaluation log."""
        if "loss" in kwargs["logs"]:
            found = measurements(unwrap_optimizer(kwargs["optimizer"]))
            kwargs["logs"].update(found)
            state.log_history[-1].update(found)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save the report and its plot."""
        if args.should_save and args.output_dir is not None:
            save_report(unwrap_optimizer(kwargs["optimizer"]), args.output_dir, self.cut)
