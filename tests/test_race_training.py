import math
import time
from dataclasses import dataclass

import pytest
import torch

import heavyball
from heavyball.errors import ChainError, RaceError
from heavyball.race.contenders import (
    CHAIN_LR,
    Contender,
    ablations,
    distinct,
    find_optimizer,
    from_chain,
    from_optimizer,
    presets,
    state_bytes,
    torch_optimizers,
)
from heavyball.race.tasks import open_task
from heavyball.race.tasks.base import Task
from heavyball.race.training import Settings, rehearse, train

TIMES = ("seconds", "step_ms")


@pytest.fixture(autouse=True)
def one_thread():
    """Tests that run beside each other would wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Stub:
    """A contender made from a function of the parameters."""

    make: object
    label: str = "stub"
    lrs: tuple = (0.1,)

    def build(self, model, lr, weight_decay=None):
        return self.make(model.parameters(), lr)


class Slope(Task):
    """The loss is w times the mean of a batch under dropout; the batches count up from the seed."""

    name, summary, target_on, target, batch_size, epochs = "slope", "", "loss", 0.0, 1, 1

    def __init__(self, data=None):
        self.seen = []

    def facts(self):
        return {}

    def model(self, seed):
        self.dropout = torch.nn.Dropout(0.5)
        return torch.nn.Sequential(torch.nn.Linear(16, 4), self.dropout)

    def batches(self, seed, batch_size):
        count = seed
        while True:
            count += 1
            yield torch.full((batch_size, 16), float(count))

    def loss(self, model, batch):
        output = model(batch)
        self.seen.append((batch[0, 0].item(), (output == 0).tolist()))
        return output.sum()

    def evaluate(self, model):
        assert not model.training
        return model(torch.ones(1, 16)).sum().item(), 0.0


def without_times(record):
    curve = {k: v for k, v in record["curve"].items() if k not in TIMES}
    return {**{k: v for k, v in record.items() if k not in TIMES}, "curve": curve}


def test_a_run_repeats_exactly():
    task = open_task("digits")
    settings = Settings(steps=12, batch_size=32, eval_every=5)
    contender = from_optimizer("SFAdamW:lr=0.01")
    first = train(task, contender, 0.01, 3, settings)
    torch.rand(7)
    again = train(task, contender, 0.01, 3, settings)
    other = train(task, contender, 0.01, 4, settings)
    assert without_times(first) == without_times(again)
    assert first["curve"]["test_loss"] != other["curve"]["test_loss"]
    assert first["curve"]["step"] == [0, 5, 10, 12]


def test_a_run_leaves_the_random_numbers_of_its_surroundings_alone():
    task = open_task("rosenbrock")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(task, from_optimizer("SGD"), 1e-3, 1, Settings(3, 1, 1))
    assert torch.equal(torch.rand(3), expected)


def test_every_contender_meets_the_same_start_data_and_dropout():
    class Noisy(torch.optim.SGD):
        def step(self, closure=None):
            torch.rand(123)
            super().step()

    settings = Settings(steps=6, batch_size=2, eval_every=2)
    seen, curves = [], []
    for make in (torch.optim.SGD, Noisy, torch.optim.Adam):
        task = Slope()
        curves.append(train(task, Stub(make), 1e-3, 2, settings)["curve"])
        seen.append(task.seen)
    assert seen[0] == seen[1] == seen[2]
    assert [count for count, _ in seen[0]] == [3, 4, 5, 6, 7, 8]
    assert len({str(mask) for _, mask in seen[0]}) == 6
    assert curves[0]["test_loss"] == curves[1]["test_loss"]
    assert curves[0]["test_loss"][0] == curves[2]["test_loss"][0]
    assert curves[0]["test_loss"][-1] != curves[2]["test_loss"][-1]


def test_the_training_loss_is_the_mean_since_the_last_evaluation():
    class Fixed(Slope):
        def loss(self, model, batch):
            return batch[0, 0] + 0 * super().loss(model, batch)

    record = train(Fixed(), Stub(torch.optim.SGD), 0.1, 0, Settings(5, 1, 2))
    assert record["curve"]["train_loss"] == [None, 1.5, 3.5, 5.0]


def test_the_estimate_of_the_distance_is_kept_for_those_that_make_one():
    settings = Settings(steps=8, batch_size=32, eval_every=4)
    task = open_task("digits")
    prodigy, adam = (
        train(task, from_optimizer(name), lr, 0, settings)["curve"]["d"]
        for name, lr in (("Prodigy", 1.0), ("AdamW", 0.01))
    )
    assert adam == [None] * 3
    assert prodigy[0] == 1e-6 < prodigy[1] < prodigy[2]


def test_evaluation_is_at_the_averaged_weights_and_training_goes_on_from_the_others():
    task = open_task("rosenbrock")
    steps, lr = 20, 0.05
    record = train(task, from_optimizer("SFAdamW"), lr, 0, Settings(steps, 1, 4))
    model = task.model(0)
    optimizer = heavyball.SFAdamW(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        task.loss(model, None).backward()
        optimizer.step()
    at_y = task.evaluate(model)
    optimizer.eval()
    at_x = task.evaluate(model)
    assert at_x != at_y
    assert (record["test_loss"], record["measure"]) == at_x


@pytest.mark.parametrize("eval_every", [1, 1000])
def test_a_run_whose_loss_is_not_finite_stops_there(eval_every):
    task = open_task("rosenbrock")
    record = train(task, from_optimizer("torch.SGD"), 10.0, 0, Settings(1000, 1, eval_every))
    assert record["status"] == "diverged"
    assert record["test_loss"] is None
    assert record["measure"] is None
    assert record["stopped_at_step"] < 20
    assert all(map(math.isfinite, record["curve"]["test_loss"]))


def test_a_run_counts_the_state_and_times_the_step():
    class Slow(torch.optim.SGD):
        def step(self, closure=None):
            time.sleep(0.005)

    record = train(Slope(), Stub(Slow), 0.1, 0, Settings(4, 1, 4))
    assert 5 <= record["step_ms"] < 100
    assert record["seconds"] >= 0.02
    assert record["state_bytes"] == 0
    assert record["parameters"] == 68
    adam = train(Slope(), Stub(torch.optim.Adam), 0.1, 0, Settings(2, 1, 2))
    # two moments of float32, and a step of float32 for each of two tensors
    assert adam["state_bytes"] == 2 * 4 * 68 + 2 * 4


@pytest.mark.parametrize("name", sorted(heavyball.PRESETS))
def test_every_preset_can_race_at_its_own_learning_rate(name, monkeypatch):
    monkeypatch.setattr(heavyball.utils, "compile_mode", None)
    contender = from_optimizer(name)
    assert contender.lrs[0] > 0
    rehearse(open_task("digits"), contender, 0, Settings(1, 8, 1))


def test_the_state_of_a_preset_is_what_it_says_and_what_its_tensors_hold():
    layer = torch.nn.Linear(3, 2)
    for name in ("AdamW", "SFAdamW", "torch.Adam", "torch.SGD"):
        optimizer = from_optimizer(name).build(layer, 0.1)
        layer(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        tensors = [t for s in optimizer.state.values() for t in s.values()]
        held = sum(t.numel() * t.element_size() for t in tensors if torch.is_tensor(t))
        assert state_bytes(optimizer) == held


def test_a_chain_gets_the_documented_learning_rate_and_the_grid():
    assert from_chain("sign").lrs == (CHAIN_LR,) == (1e-3,)
    assert from_chain("sign", (0.1, 0.2)).lrs == (0.1, 0.2)
    optimizer = from_chain("exp_avg | sign").build(torch.nn.Linear(2, 2), 0.25, weight_decay=0.5)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["beta"]) == (0.25, 0.5, 0.9)
    assert "exp_avg | sign" in repr(optimizer)


def test_an_optimizer_takes_its_own_learning_rate_before_the_grid():
    assert from_optimizer("torch.AdamW").lrs == (1e-3,)
    assert from_optimizer("torch.AdamW", (0.1, 0.2)).lrs == (0.1, 0.2)
    assert from_optimizer("AdamW:lr=0.5", (0.1, 0.2)).lrs == (0.5,)
    assert from_optimizer("AdamW:lr=(0.5,1,0.5)", (0.1, 0.2)).lrs == (0.5, 1.0)


def test_contenders_that_differ_only_in_the_learning_rate_are_called_by_their_text():
    texts = [
        "AdamW:lr=0.1",
        "AdamW:lr=0.2",
        "SGD:lr=0.1,momentum=0.9",
        "Lion: lr=1,betas=(0.8,0.9)",
    ]
    named = distinct(map(from_optimizer, texts))
    assert [c.label for c in named] == [
        "AdamW:lr=0.1",
        "AdamW:lr=0.2",
        "SGD, momentum=0.9",
        "Lion, betas=(0.8, 0.9)",
    ]
    with pytest.raises(RaceError, match=r"'AdamW:lr=0\.1' is given twice"):
        distinct(map(from_optimizer, ["AdamW:lr=0.1", "AdamW:lr=0.1"]))


def test_arguments_reach_the_optimizer():
    layer = torch.nn.Linear(2, 2)
    built = from_optimizer("AdamW:betas=(0.8,0.9),weight_decay=0.3").build(layer, 0.5, 0.7)
    group = built.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.5, (0.8, 0.9), 0.3)
    built = from_optimizer("torch.SGD:momentum=0.25").build(layer, 0.5, 0.7)
    group = built.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.5, 0.25, 0.7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Adamw", "nearest: AdamW"),
        ("torch.Adamm", r"nearest: torch\.Adam"),
        ("SFAdam", "nearest: .*SFAdamW"),
        ("os.system", "no optimizer"),
        ("torch.Optimizer", "no optimizer"),
        ("torch.lr_scheduler", "no optimizer"),
        ("AdamW:bta=1", "bta"),
        ("torch.SGD:momentm=0.9", "nearest: momentum"),
        ("AdamW:lr='x'", "expected a number"),
        ("AdamW:lr=True", "expected a number"),
        ("AdamW:lr=()", "empty"),
        ("AdamW:lr=0", "above 0"),
        ("AdamW:lr=-1", "above 0"),
    ],
)
def test_what_is_no_optimizer_is_refused_with_the_reason(text, message):
    def build():
        contender = from_optimizer(text)
        contender.build(torch.nn.Linear(2, 2), contender.lrs[0])

    with pytest.raises(RaceError, match=message):
        build()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("AdamW:betas=(0.9,1.5)", r"AdamW, betas=\(0\.9, 1\.5\) cannot be built: .*1\.5"),
        ("torch.SGD:nesterov=True", "cannot be built: Nesterov"),
        ("torch.LBFGS", "cannot step: .*closure"),
        ("torch.SparseAdam", "cannot step: .*dense"),
        ("torch.Muon", "cannot be built: .*2D"),
    ],
)
def test_a_contender_that_cannot_take_part_is_found_before_the_race(text, message):
    with pytest.raises(RaceError, match=message):
        rehearse(open_task("digits"), from_optimizer(text), 0, Settings(1, 8, 1))


def test_a_chain_that_cannot_be_right_is_refused_without_a_traceback():
    contender = from_chain("schedule_free | sign")
    with pytest.raises(RaceError, match=r"schedule_free \| sign cannot be built: .*writer"):
        contender.build(torch.nn.Linear(2, 2), 0.1)
    with pytest.raises(ChainError):
        from_chain("schedule_fre")


def test_an_ablation_removes_each_element_once():
    text = "exp_avg | graft(sign, exp_avg | sign) |  exp_avg | clip_by_norm(max_norm=2.0)"
    full, *others = ablations(text, (0.1, 0.2))
    assert (full.label, full.text, full.lrs) == ("the full chain", text, (0.1, 0.2))
    graft, clip = "graft(sign, exp_avg | sign)", "clip_by_norm(max_norm=2.0)"
    assert [(c.label, c.text) for c in others] == [
        ("without exp_avg (element 1)", f"{graft} | exp_avg | {clip}"),
        (f"without {graft}", f"exp_avg | exp_avg | {clip}"),
        ("without exp_avg (element 3)", f"exp_avg | {graft} | {clip}"),
        (f"without {clip}", f"exp_avg | {graft} | exp_avg"),
    ]
    assert all(c.lrs == (0.1, 0.2) for c in others)
    (_, alone) = ablations("sign")
    with pytest.raises(RaceError, match="nothing is left"):
        alone.build(torch.nn.Linear(2, 2), 0.1)


def test_names_of_torch_are_its_optimizers():
    assert torch_optimizers()["AdamW"] is torch.optim.AdamW
    assert "Optimizer" not in torch_optimizers()
    assert find_optimizer("torch.SGD") is torch.optim.SGD
    assert find_optimizer("SGD") is presets()["SGD"] is not torch.optim.SGD


def test_a_contender_is_shown_on_one_line():
    assert from_chain(" exp_avg\n |  sign ").label == "exp_avg | sign"
    assert isinstance(from_chain("sign"), Contender)
