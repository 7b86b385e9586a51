"""Callbacks for Lightning."""

from collections.abc import Callable
from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from heavyball.integrations import averaging, plain_metrics


class AveragedWeights(Callback):
    """Validates and saves at the average of schedule-free optimizers (or of `parameter_ema`).

    Validation, checkpoints and the model after `fit()` hold x. A checkpoint holds the weights to train
    with as well, in the optimizer's state, so a resume from it is bit-identical. `optimizer.train()`
    after the training gives y back. Several optimizers, manual optimization and optimizers of others
    beside ours are fine; those are left alone.
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
    """Save a checkpoint with x in the model, and the optimizers as they are in evaluation mode."""
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
    """Logs `opt.metrics()` with the module's logger, under `optimizer/`.

    every: so many batches.
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
