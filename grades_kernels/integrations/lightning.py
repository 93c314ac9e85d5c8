"""GradES in Lightning: the optimizer in `configure_optimizers`, and a callback.

def configure_optimizers(self):
    steps = self.trainer.estimated_stepping_batches
    return GradESAdamW(self.named_parameters(), lr=2e-5, tau=1.8, total_steps=steps)

trainer = Trainer(max_epochs=3, callbacks=[GradESCallback()])
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy

from ..optimizer import GradESAdamW
from . import is_finished, measurements, save_report

__all__ = ["GradESCallback"]


class GradESCallback(Callback):
    """Stops training when everything is frozen, and shows in log and files what froze.

    It serves every GradESAdamW that `configure_optimizers` returns, and stops when each of them has
    frozen all it monitors; `min_epochs` and `min_steps` of the Trainer still hold. Loggers get the
    numbers of `grades_kernels.integrations.measurements` every `log_every_n_steps` steps. At the
    end "grades_report.json" and "grades_report.png" are written to the folder of the first logger,
    or to `default_root_dir`; with several optimizers, to "optimizer0", "optimizer1", ... in it.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raise under a strategy that hands the optimizer flat pieces of the parameters."""
        if stage == "fit" and isinstance(trainer.strategy, (DeepSpeedStrategy, FSDPStrategy)):
            raise ValueError(
                f"{type(trainer.strategy).__name__} hands the optimizer flat pieces of the "
                "parameters, in which no matrix can be measured or frozen. Use "
                "ModelParallelStrategy (FSDP2) or DDPStrategy."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise, before the first step, if no optimizer can freeze anything."""
        found = _optimizers(trainer)
        if not any(optimizer.monitored_units for optimizer in found):
            raise ValueError(
                "GradESCallback: no optimizer of configure_optimizers is a GradESAdamW that "
                f"monitors something; there are {[type(x).__name__ for x in trainer.optimizers]}. "
                "Return a GradESAdamW with tau, or leave the callback away."
            )

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log, and stop when everything is frozen."""
        found = _optimizers(trainer)
        finished = all([is_finished(optimizer) for optimizer in found])
        every = getattr(trainer, "log_every_n_steps", 0)
        if every and (finished or trainer.global_step % every == 0):
            numbers: dict[str, float] = {}
            for k, optimizer in enumerate(found):
                of_which = f"/optimizer{k}" if len(found) > 1 else ""
                numbers |= {name + of_which: x for name, x in measurements(optimizer).items()}
            for log in trainer.loggers:
                log.log_metrics(numbers, step=trainer.global_step)
        if finished:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the report and its picture."""
        folder = trainer.log_dir or trainer.default_root_dir  # on all ranks: log_dir is broadcast
        found = _optimizers(trainer)
        if trainer.is_global_zero:
            for k, optimizer in enumerate(found):
                save_report(optimizer, f"{folder}/optimizer{k}" if len(found) > 1 else folder)


def _optimizers(trainer: Trainer) -> list[GradESAdamW]:
    """Those that can freeze something."""
    found = [x for x in trainer.optimizers if isinstance(x, GradESAdamW)]
    return [optimizer for optimizer in found if optimizer.monitored_units]
