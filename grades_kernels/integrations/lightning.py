"""GradES in Lightning: the user adds an optimizer in `configure_optimizers`, and a callback.

def configure_optimizers(self):
    steps = self.trainer.estimated_stepping_batches
    return GradESAdamW(self.named_parameters(), lr=2e-5, tau=1.8, total_steps=steps)

trainer = Trainer(max_epochs=3, callbacks=[GradESCallback()])
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torchmetrics import Metric

from ..cut.choose import choose_cut
from ..cut.cut import Cut
from ..optimizer import GradESAdamW
from .shared import (
    choice_options,
    is_finished,
    measurements,
    release_under_ddp,
    save_report,
    silent,
    within_an_epoch,
)

__all__ = ["GradESCallback"]


class GradESCallback(Callback):
    """Logs the progress of freezing, stops training when all units are frozen, saves the report.

    It reads every GradESAdamW that `configure_optimizers` returns, and stops when all units of each
    of them are frozen, but not before `min_epochs` and `min_steps` of the Trainer while something
    else trains. Loggers get the numbers of `grades_kernels.integrations.measurements` every
    `log_every_n_steps` steps. At the end "grades_report.json" and "grades_report.png" are written
    to the folder of the first logger, or to `default_root_dir`; with several optimizers, to
    "optimizer0", "optimizer1", ... in it.

    Args:
        cut: "auto" chooses which of the lowest blocks not to train at all, with `choose_cut` and 12
            of the Trainer's batches, before `configure_optimizers` is called; a dict does so with
            other options of `choose_cut`. A `Cut` is applied as it is, which is how a run is
            resumed. None: everything trains.
    """

    def __init__(self, cut: Cut | Mapping[str, Any] | str | None = None) -> None:
        choice_options(cut)
        self.cut = cut
        self._logged_at = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raise ValueError under a strategy that flattens the parameters."""
        if stage != "fit":
            return
        if isinstance(trainer.strategy, (DeepSpeedStrategy, FSDPStrategy)):
            raise ValueError(
                f"{type(trainer.strategy).__name__} flattens the parameters, so that no matrix can "
                "be measured or frozen. Use ModelParallelStrategy (FSDP2) or DDPStrategy."
            )
        options = choice_options(self.cut)
        if options is not None:
            self.cut = _chosen_cut(trainer, pl_module, options)
        if isinstance(self.cut, Cut):
            rank_zero_info(str(self.cut))
            self.cut.apply(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let a single optimizer release under DDP, before a checkpoint is loaded."""
        if len(trainer.optimizers) == 1:  # several toggle requires_grad
            for optimizer in _optimizers(trainer):
                release_under_ddp(optimizer, lambda: trainer.strategy.model)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise ValueError, before the first step, if no optimizer monitors a unit.

        A run in which all units were frozen when it was saved ends without a step.
        """
        self._logged_at = trainer.global_step
        leaves_blocks = not isinstance(self.cut, Cut) or self.cut.leaves_blocks
        if not _optimizers(trainer) and leaves_blocks:
            found = [type(x).__name__ for x in trainer.optimizers]
            raise ValueError(
                "no optimizer of configure_optimizers is a GradESAdamW that monitors a unit, but "
                f"{found}. Return a GradESAdamW with tau, or remove GradESCallback."
            )
        if _are_finished(trainer):
            _stop(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the measurements, and stop when all units are frozen."""
        found = _optimizers(trainer)
        finished = _are_finished(trainer)
        every, step = getattr(trainer, "log_every_n_steps", 0), trainer.global_step
        # Batches whose gradients are accumulated see the step of the batch before.
        if every and step != self._logged_at and (finished or step % every == 0):
            self._logged_at = step
            numbers = {
                f"{name}/optimizer{k}" if len(found) > 1 else name: x
                for k, optimizer in enumerate(found)
                for name, x in measurements(optimizer).items()
            }
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step=step)
        if finished:
            _stop(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the report and its plot."""
        folder = trainer.log_dir or trainer.default_root_dir  # a collective: log_dir is broadcast
        found = _optimizers(trainer)
        if trainer.is_global_zero:
            for k, optimizer in enumerate(found):
                own = f"{folder}/optimizer{k}" if len(found) > 1 else folder
                save_report(optimizer, own, self.cut if isinstance(self.cut, Cut) else None)
            if isinstance(self.cut, Cut):
                self.cut.save(f"{folder}/grades_cut.json")


def _chosen_cut(trainer: Trainer, pl_module: LightningModule, options: Mapping[str, Any]) -> Cut:
    """The cut that `choose_cut` chooses from the Trainer's batches and the module's loss."""
    if not pl_module.automatic_optimization:
        raise ValueError(
            "GradESCallback: cut='auto' cannot probe a training_step that takes the step itself "
            "(automatic_optimization=False). Pass the cut that choose_cut chooses for its loss."
        )
    device = trainer.strategy.root_device
    numbers = itertools.count()

    def loss(module: Any, batch: Any) -> Any:
        batch = trainer.strategy.batch_to_device(batch, device)  # with the module's own hooks
        with trainer.precision_plugin.forward_context():
            output = module.training_step(batch, next(numbers))
        return output["loss"] if isinstance(output, Mapping) else output

    loader = trainer.fit_loop._data_source.dataloader()
    if not isinstance(loader, CombinedLoader):
        loader = CombinedLoader(loader)  # there may be a dict or a list of them

    def batches() -> Iterator[Any]:
        for batch, *_ in loader:
            yield batch

    training = pl_module.training
    pl_module.to(device).train()
    try:
        with silent(pl_module, "log", "log_dict"):  # there is no loop yet that could log
            options = within_an_epoch(options, *loader.flattened)
            return choose_cut(pl_module, loss, batches(), **options)
    except ValueError as error:
        if "no repeated blocks" in str(error) and is_overridden("configure_model", pl_module):
            raise ValueError(
                f"{error} Lightning calls configure_model after the callbacks' setup: make the "
                "blocks in __init__, and only shard them there."
            ) from error
        raise
    finally:
        for module in pl_module.modules():
            if isinstance(module, Metric):  # of no step of the run
                module.reset()
        pl_module.train(training)


def _are_finished(trainer: Trainer) -> bool:
    """Whether all units of all optimizers are frozen."""
    optimizers = _optimizers(trainer)
    return bool(optimizers) and all(map(is_finished, optimizers))


def _stop(trainer: Trainer, pl_module: LightningModule) -> None:
    trainer.should_stop = True
    monitored = {p for x in _optimizers(trainer) for p, _ in x._freezer.unit_map.monitored}
    if not any(p.requires_grad and p not in monitored for p in pl_module.parameters()):
        # They are released, or about to be; a backward pass would fail after that.
        trainer.fit_loop.min_epochs = trainer.fit_loop.epoch_loop.min_steps = None


def _optimizers(trainer: Trainer) -> list[GradESAdamW]:
    """Return every GradESAdamW that monitors a unit."""
    found = [x for x in trainer.optimizers if isinstance(x, GradESAdamW)]
    return [optimizer for optimizer in found if optimizer.monitored_units]
