"""Callbacks for Lightning."""

from collections.abc import Callable
from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from heavyball.integrations import averaging, plain_metrics


class AveragedWeights(Callback):
    """Validate and save at the average of schedule-free optimizers (or of `parameter_ema`).

    Validation, checkpoints and the model after `fit()` use x. Checkpoints also contain the training
    weights, in the optimizer's state, so resuming is bit-identical. Call `optimizer.train()` after
    training to restore y. Several optimizers and manual optimization are supported; optimizers of
    other libraries are ignored.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # a callback's `on_save_checkpoint` is not called for a checkpoint of the weights alone
        if getattr(trainer.save_checkpoint, "func", None) is not _save_averaged:
            trainer.save_checkpoint = partial(_save_averaged, trainer, trainer.save_checkpoint)

    def on_train_batch_start(self, trainer: Trainer, *more: Any) -> None:
        for opt in averaging(trainer.optimizers):
            opt.train()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # in the sanity check before the first step, and in `trainer.validate()` after the last one, too
        for opt in averaging(trainer.optimizers):
            opt.eval()

    on_test_start = on_validation_start
    on_predict_start = on_validation_start

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for opt in averaging(trainer.optimizers):
            opt.eval()


def _save_averaged(trainer: Trainer, save: Callable[..., None], *args: Any, **options: Any) -> None:
    """Save a checkpoint with x in the model and the optimizers in evaluation mode."""
    ours = list(averaging(trainer.optimizers))
    trained = [opt for opt in ours if all(g["train_mode"] for g in opt.param_groups)]
    try:
        for opt in ours:
            opt.eval()
        save(*args, **options)
    finally:
        for opt in trained:
            opt.train()


class Metrics(Callback):
    """Log `opt.metrics()` with the module's logger, under `optimizer/`.

    every: the interval in batches.
    """

    def __init__(self, every: int = 50):
        self.every = every

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        plain_metrics(trainer.optimizers, "optimizer/")  # a first call asks for them

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % self.every == 0:
            pl_module.log_dict(plain_metrics(trainer.optimizers, "optimizer/"))
