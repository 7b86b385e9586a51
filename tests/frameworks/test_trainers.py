"""Recipes of docs/frameworks.md for averaged weights, as they stand there (`make test-frameworks`)."""

from functools import partial

import pytest
import torch
from pages import recipe
from torch import nn

import heavyball


class Seen(nn.Module):
    """A linear model that notes with which weights it was called, in training and in evaluation."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)
        self.called = {True: [], False: []}

    def forward(self, x):
        self.called[torch.is_grad_enabled()].append(self.layer.weight.detach().clone())
        return self.layer(x)


def data():
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
    return x, x.sum(1, keepdim=True)


def check(model, opt, evaluations):
    """Trained at y as in a plain loop, evaluated at x, and left at x."""
    plain = Seen()
    other = heavyball.SFAdamW(plain.parameters(), lr=0.05, compile=False)
    x, y = data()
    batches = list(zip(x.split(8), y.split(8), strict=True))
    steps = len(model.called[True])
    averages = []
    for step in range(steps):
        batch, target = batches[step % len(batches)]
        other.zero_grad()
        nn.functional.mse_loss(plain(batch), target).backward()
        other.step()
        if (step + 1) % len(batches) == 0:
            with other.averaged():
                averages.append(plain.layer.weight.detach().clone())
    for ours, theirs in zip(model.called[True], plain.called[True], strict=True):
        torch.testing.assert_close(ours, theirs)
    shown = model.called[False]
    assert len(shown) >= evaluations
    for weight in shown:
        assert any(torch.allclose(weight, average) for average in averages)
    torch.testing.assert_close(model.layer.weight.detach(), averages[-1])
    opt.train()
    torch.testing.assert_close(model.layer.weight.detach(), plain.layer.weight.detach())


def test_accelerate(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = Seen()
    opt = heavyball.SFAdamW(model.parameters(), lr=0.05, compile=False)
    model, opt = accelerator.prepare(model, opt)
    x, y = data()
    for _ in range(2):
        for batch, target in zip(x.split(8), y.split(8), strict=True):
            opt.zero_grad()
            accelerator.backward(nn.functional.mse_loss(model(batch), target))
            opt.step()
        recipe("accelerate")["evaluated"](accelerator, opt, model, x.split(8))
    saved = torch.load("average.pt")["layer.weight"]
    opt.optimizer.eval()
    assert torch.equal(saved, model.layer.weight)
    check(model, opt.optimizer, 8)


def test_skorch():
    names = recipe("skorch")
    from skorch.helper import predefined_split

    model = Seen()
    x, y = data()
    net = names["skorch"].NeuralNetRegressor(
        model,
        optimizer=heavyball.SFAdamW,
        optimizer__compile=False,
        lr=0.05,
        max_epochs=2,
        batch_size=8,
        train_split=predefined_split(torch.utils.data.TensorDataset(x, y)),
        callbacks=[names["AveragedWeights"]()],
        verbose=0,
    )
    net.fit(x.numpy(), y.numpy())
    model = net.module_
    net.predict(x.numpy())
    check(model, net.optimizer_, 8)


def test_fastai():
    names = recipe("fastai")
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper

    x, y = data()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
    model = Seen()
    learner = Learner(
        DataLoaders(loader, loader, device="cpu"),
        model,
        loss_func=nn.functional.mse_loss,
        opt_func=partial(OptimWrapper, opt=partial(heavyball.SFAdamW, compile=False)),
        cbs=[names["AveragedWeights"]()],
    )
    learner.fit(2, lr=0.05)
    check(model, learner.opt.opt, 8)


def test_ignite():
    names = recipe("ignite")
    from ignite.engine import Engine, Events

    x, y = data()
    model = Seen()
    opt = heavyball.SFAdamW(model.parameters(), lr=0.05, compile=False)

    def update(engine, batch):
        opt.zero_grad()
        nn.functional.mse_loss(model(batch[0]), batch[1]).backward()
        opt.step()

    def evaluate(engine, batch):
        with torch.no_grad():
            return model(batch[0])

    trainer, evaluator = Engine(update), Engine(evaluate)
    names["average_weights"](trainer, evaluator, opt)
    batches = list(zip(x.split(8), y.split(8), strict=True))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: evaluator.run(batches))
    trainer.run(batches, max_epochs=2)
    check(model, opt, 8)
