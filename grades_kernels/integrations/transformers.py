"""GradES in the Trainer of transformers: one line for the trainer you have.

trainer = Trainer(model=model, args=args, train_dataset=dataset)
add_grades(trainer, tau=1.8)
trainer.train()
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..optimizer import GradESAdamW
from ..units import grades_param_groups
from . import is_finished, measurements, save_report, unwrap_optimizer

__all__ = ["GradESCallback", "GradESFactory", "add_grades", "unwrap_optimizer"]

logger = logging.getLogger(__name__)

_FROM_ARGUMENTS = {
    "lr": "learning_rate",
    "betas": "adam_beta1 and adam_beta2",
    "eps": "adam_epsilon",
    "weight_decay": "weight_decay",
}
"""Option of GradESAdamW -> where a Trainer has it."""


def add_grades(trainer: Trainer, **options: Any) -> GradESCallback:
    """Let a Trainer train with GradESAdamW, stop when all is frozen, and log what freezes.

    Learning rate, betas, eps and weight decay are those of the `TrainingArguments`, the planned
    length is the number of steps that the Trainer plans, and norms and biases are not decayed, as
    in the Trainer's own AdamW. A Trainer that was given a GradESAdamW keeps it; it gets the
    callback alone.

    Args:
        trainer: A Trainer, or one of a class derived from it (TRL's SFTTrainer), before `train()`.
        **options: `tau`, which is needed; `taus` and `verbose` of `grades_param_groups`; and any
            option of GradESAdamW that `TrainingArguments` does not have.

    Returns:
        The callback that was added. It comes before all others, so that every tracker of
        `args.report_to` sees what it adds to the log.

    Raises:
        ValueError: Under FSDP1 or DeepSpeed, for an option that has its place in
            `TrainingArguments`, without `tau`, or if the Trainer has another optimizer already.
    """
    _refuse_flat_shards(trainer)
    if trainer.optimizer is not None:
        unwrap_optimizer(trainer.optimizer)
        if options:
            raise ValueError(
                f"add_grades: this trainer already has an optimizer, which {sorted(options)} would "
                "not reach. Give the options to that optimizer, or the Trainer no `optimizers`."
            )
    elif trainer.optimizer_cls_and_kwargs is not None:
        raise ValueError(
            "add_grades: optimizer_cls_and_kwargs of this trainer is set already. One optimizer "
            "trains a model: build the Trainer without it."
        )
    else:
        _check_options(trainer.args, options)
        factory: Any = GradESFactory  # annotated as a class of optimizers, which it need not be
        trainer.optimizer_cls_and_kwargs = (factory, {"trainer": trainer, **options})
    callback = GradESCallback()
    trainer.callback_handler.callbacks.insert(0, callback)
    return callback


class GradESFactory:
    """Makes the optimizer of a Trainer: what `optimizer_cls_and_kwargs` takes in place of a class.

    The Trainer calls `GradESFactory()(model, **kwargs)` once it knows how many steps it will take.
    """

    def __call__(
        self,
        model: nn.Module,
        *,
        trainer: Trainer,
        tau: Any,
        taus: Mapping[str, float | None] | None = None,
        verbose: bool = False,
        **options: Any,
    ) -> GradESAdamW:
        """A GradESAdamW with names, the Trainer's groups for weight decay, and its planned steps.

        Args:
            model: The model as the Trainer will train it.
            trainer: The Trainer, in `train()`.
            tau, taus, verbose: As in `grades_param_groups`.
            **options: Of GradESAdamW. `total_steps` and `grace_steps` come before what the Trainer
                plans.

        Raises:
            ValueError: If nothing in the model can be monitored, or the Trainer plans no length.
        """
        args = trainer.args
        if options.get("total_steps") is None and options.get("grace_steps") is None:
            if trainer.state.max_steps < 1:
                raise ValueError(
                    f"the Trainer plans no number of steps (max_steps={trainer.state.max_steps}): "
                    "set max_steps in TrainingArguments, or give add_grades total_steps or "
                    "grace_steps."
                )
            options["total_steps"] = trainer.state.max_steps
        decayed = set(trainer.get_decay_parameter_names(model))
        groups: dict[tuple[Any, float], dict[str, Any]] = {}
        for monitored in grades_param_groups(model, tau=tau, taus=taus, verbose=verbose):
            for name, p in monitored["params"]:
                decay = args.weight_decay if name in decayed else 0.0
                group = groups.setdefault(
                    (monitored["tau"], decay),
                    {"params": [], "tau": monitored["tau"], "weight_decay": decay},
                )
                group["params"].append((name, p))
        return GradESAdamW(
            list(groups.values()),
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            tau=tau,
            **options,
        )


class GradESCallback(TrainerCallback):
    """Stops training when everything is frozen, and shows in log and files what froze.

    When it stops, the Trainer logs, evaluates and saves as at the planned end. The Trainer's log
    gets the numbers of `grades_kernels.integrations.measurements`; at the end "grades_report.json"
    and "grades_report.png" are written to `args.output_dir`. `add_grades` is the way to use it:
    given to the Trainer as one of its `callbacks`, it comes after the trackers, which then do not
    see the numbers.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Raise for what cannot work, before the first step."""
        grades = unwrap_optimizer(kwargs["optimizer"])
        report = grades.report()
        if not report.units:
            raise ValueError(
                "GradESCallback: the optimizer monitors nothing, so nothing can freeze. Set its "
                "tau, or leave the callback away."
            )
        if report.total_steps not in (None, state.max_steps):
            warnings.warn(
                f"the optimizer was planned for {report.total_steps} steps, the Trainer plans "
                f"{state.max_steps}: the grace period stays {report.grace_steps} steps.",
                stacklevel=2,
            )
        if grades.all_frozen and not any(p.requires_grad for p in kwargs["model"].parameters()):
            raise RuntimeError(
                f"all {len(report.units)} units were frozen when this run was saved, and nothing "
                "else can be trained: it had finished. Use its model as it is."
            )

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Stop when everything is frozen."""
        if not is_finished(unwrap_optimizer(kwargs["optimizer"])):
            return
        logger.info("step %d: everything is frozen, training stops", state.global_step)
        control.should_training_stop = True
        control.should_log |= args.logging_strategy != IntervalStrategy.NO
        control.should_evaluate |= (
            args.eval_strategy == IntervalStrategy.STEPS and args.eval_delay <= state.global_step
        )
        control.should_save |= args.save_strategy == SaveStrategy.STEPS

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Add the numbers to a training log; those of an evaluation stay as they are."""
        if "loss" in kwargs["logs"]:
            found = measurements(unwrap_optimizer(kwargs["optimizer"]))
            kwargs["logs"].update(found)
            state.log_history[-1].update(found)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Save the report and its picture."""
        if args.should_save and args.output_dir is not None:
            save_report(unwrap_optimizer(kwargs["optimizer"]), args.output_dir)


def _check_options(args: TrainingArguments, options: Mapping[str, Any]) -> None:
    if options.get("tau") is None:
        raise ValueError(
            "add_grades: tau is needed. Start with tau=0.0, which measures and never freezes, to "
            "learn its scale."
        )
    for option in _FROM_ARGUMENTS.keys() & options.keys():
        raise ValueError(
            f"add_grades: {option}={options[option]!r} has its place in TrainingArguments: set "
            f"{_FROM_ARGUMENTS[option]} there."
        )
    if not str(getattr(args.optim, "value", args.optim)).startswith("adamw_torch"):
        raise ValueError(
            f"TrainingArguments.optim={args.optim!r}: GradES freezes under AdamW. Leave optim away."
        )


def _refuse_flat_shards(trainer: Trainer) -> None:
    """Raise where the optimizer would be handed flat pieces of the parameters."""
    if trainer.is_deepspeed_enabled:
        wrapper = "DeepSpeed"
    elif trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.fsdp_version == 1:
        wrapper = "FSDP1"
    else:
        return
    raise ValueError(
        f"this Trainer runs under {wrapper}, which hands the optimizer flat pieces of the "
        "parameters, in which no matrix can be measured or frozen. Use FSDP2 (fsdp=True, "
        'fsdp_config={"version": 2}) or DDP.'
    )
