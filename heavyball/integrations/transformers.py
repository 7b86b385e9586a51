"""Callbacks for the Trainer of transformers."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from heavyball.integrations import averaging, plain_metrics


class AveragedWeights(TrainerCallback):
    """Evaluate and save at the average of a schedule-free optimizer (or of `parameter_ema`).

    Evaluation, checkpoints, `load_best_model_at_end` and the model after `train()` use x.
    Checkpoints also contain the training weights, in the optimizer's state, so resuming is
    bit-identical. Call `optimizer.train()` after training to restore y. Other optimizers are ignored.
    """

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        for opt in averaging(more.get("optimizer")):
            opt.train()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        if control.should_evaluate or control.should_save or control.should_training_stop:
            self._show(more)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        # behind the last step of an epoch nothing is trained until the next step begins
        self._show(more)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        self._show(more)

    def _show(self, more: dict[str, Any]) -> None:
        for opt in averaging(more.get("optimizer")):
            opt.eval()


class Metrics(TrainerCallback):
    """Add `opt.metrics()` to the Trainer's logs, as plain numbers under `optimizer/`."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        plain_metrics(more.get("optimizer"), "optimizer/")  # a first call asks for them

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Any = None,
        **more: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        numbers = plain_metrics(more.get("optimizer"), "optimizer/")
        logs.update(numbers)
        if state.log_history:
            state.log_history[-1].update(numbers)
