"""AveragedWeights and Metrics in Lightning; `make test-frameworks` runs it."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

import heavyball
from heavyball.integrations.lightning import AveragedWeights, Metrics


class Module(pl.LightningModule):
    def __init__(self, several=False):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
        self.other = nn.Linear(4, 1)
        self.several = several
        self.automatic_optimization = not several
        self.seen = []

    def loss(self, batch):
        x = batch[0]
        return (self.net(x) + self.other(x) - x.sum(1, keepdim=True)).square().mean()

    def training_step(self, batch, index):
        if not self.several:
            return self.loss(batch)
        for opt in self.optimizers():
            opt.zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss)
        for opt in self.optimizers():
            opt.step()

    def validation_step(self, batch, index):
        self.seen.append([p.detach().clone() for p in self.parameters()])

    def configure_optimizers(self):
        if not self.several:
            return heavyball.SFAdamW(self.parameters(), lr=0.05, compile=False)
        ours = heavyball.SFAdamW(self.net.parameters(), lr=0.05, compile=False)
        return [ours, torch.optim.SGD(self.other.parameters(), lr=0.01)]


def data():
    made = torch.Generator().manual_seed(1)
    x = torch.randn(32, 4, generator=made)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=8)


def fit(tmp_path, module, epochs, resume=None, callbacks=()):
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[
            AveragedWeights(),
            pl.callbacks.ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, filename="{epoch}"),
            *callbacks,
        ],
    )
    trainer.fit(module, data(), data(), ckpt_path=resume, weights_only=False)
    return trainer


@pytest.mark.parametrize("several", [False, True])
def test_what_is_validated_saved_and_left_is_the_average(tmp_path, several):
    module = Module(several)
    trainer = fit(tmp_path, module, 3)
    opt = trainer.optimizers[0]
    after = [p.detach().clone() for p in module.parameters()]
    saved = torch.load(tmp_path / "epoch=2.ckpt", weights_only=False)["state_dict"]
    for (name, p), x in zip(module.named_parameters(), after, strict=True):
        assert torch.equal(saved[name], x), name
        assert torch.equal(
            module.seen[-1][[n for n, _ in module.named_parameters()].index(name)], p
        )
    opt.train()
    assert any(not torch.equal(p, x) for p, x in zip(module.parameters(), after, strict=True))
    opt.eval()
    trainer.validate(module, data(), verbose=False)
    assert all(torch.equal(p, x) for p, x in zip(module.parameters(), after, strict=True))


def test_a_resume_is_bit_identical(tmp_path):
    whole, half = Module(), Module()
    fit(tmp_path / "a", whole, 4)
    fit(tmp_path / "b", half, 2)
    again = Module()
    fit(tmp_path / "c", again, 4, resume=tmp_path / "b" / "epoch=1.ckpt")
    for p, q in zip(whole.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("several", [False, True])
def test_weights_saved_alone_between_steps_are_the_average(tmp_path, several):
    """Lightning calls no callback for these files."""
    averages = {}

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, module, *more):
            with trainer.optimizers[0].averaged():
                averages[trainer.global_step] = copy.deepcopy(module.state_dict())

    module = Module(several)
    files = pl.callbacks.ModelCheckpoint(
        dirpath=tmp_path / "alone",
        save_top_k=-1,
        every_n_train_steps=4 if several else 2,  # both optimizers count
        filename="{step}",
        save_weights_only=True,
    )
    fit(tmp_path, module, 2, callbacks=[Look(), files])
    saved = sorted((tmp_path / "alone").glob("*.ckpt"))
    assert len(saved) >= 4
    for path in saved:
        found = torch.load(path, weights_only=False)["state_dict"]
        for name, x in averages[int(path.stem.partition("=")[2])].items():
            assert torch.equal(found[name], x), (path, name)


def test_metrics_are_logged(tmp_path):
    module = Module()
    trainer = fit(tmp_path, module, 1, callbacks=[Metrics(every=1)])
    names = {name for name in trainer.logged_metrics if name.startswith("optimizer/")}
    assert "optimizer/group_0/update_norm" in names
    assert copy.copy(trainer.logged_metrics)["optimizer/group_0/update_norm"] > 0
