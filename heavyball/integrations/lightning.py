"""Callbacks for Lightning."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from heavyball.integrations import averaging, plain_metrics, unwrapped


class AveragedWeights(Callback):
    """Validates and saves at the average of schedule-free optimizers (or of `parameter_ema`).

    Validation, checkpoints and the model after `fit()` hold x. A checkpoint holds the weights to train
    with as well, in the optimizer's state, so a resume from it is bit-identical. `optimizer.train()`
    after the training gives y back. Several optimizers, manual optimization and optimizers of others
    beside ours are fine; those are left alone.
    """

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

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save x in the model, and the optimizers as they are in evaluation mode."""
        ours = list(averaging(trainer.optimizers))
        if not ours or ("optimizer_states" not in checkpoint and "state_dict" not in checkpoint):
            return
        trained = [opt for opt in ours if all(g["train_mode"] for g in opt.param_groups)]
        try:
            for opt in ours:
                opt.eval()
            if "state_dict" in checkpoint:
                weights = trainer.strategy.lightning_module_state_dict()
                checkpoint["state_dict"] = {
                    key: value.detach().clone() if isinstance(value, torch.Tensor) else value
                    for key, value in weights.items()
                }
            for number, opt in enumerate(trainer.optimizers):
                if unwrapped(opt) in ours and "optimizer_states" in checkpoint:
                    checkpoint["optimizer_states"][number] = trainer.strategy.optimizer_state(opt)
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
