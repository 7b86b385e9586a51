"""Recipes: what is published, against its golden values, and in a race."""

import pytest
import torch
from click.testing import CliRunner
from helpers import double_default, eager  # noqa: F401
from test_more_transforms import PROBLEMS, summary

import heavyball
from heavyball.race.cli import cli
from heavyball.race.contenders import from_recipe

# By recipe: lr, the problem, options, and the weights after four steps.
GOLDEN = {
    "nanogpt-track3-46": (
        "P",
        {},
        (0.597821931838, -0.873859451484, 0.164240542607, 0.0646710137163, 5.15211196113),
    ),
    "nanogpt-track3-7": (
        "P",
        {"weight_decay": 0.0},
        (0.609927631847, -0.884663193481, 0.172081472007, 0.192088769192, 5.17827447844),
    ),
    "nanochat": (
        "P",
        {},
        (0.60470932791, -0.886982867195, 0.166375100205, 0.0656846516534, 5.30171219068),
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_golden_values(name: str) -> None:
    problem, options, expected = GOLDEN[name]
    start, grad = PROBLEMS[problem]
    param = torch.nn.Parameter(start())
    optimizer = heavyball.recipes.build(name, [("blocks.0.fc.weight", param)], 0.05, **options)
    for t in range(1, 5):
        param.grad = grad(t, param.detach())
        optimizer.step()
    for one, other in zip(summary(param.detach()), expected, strict=True):
        assert abs(one - other) <= 2e-11 * max(1.0, abs(other))


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = torch.nn.Embedding(7, 4)
        self.q_proj = torch.nn.Linear(4, 4)
        self.lm_head = torch.nn.Linear(4, 7)


@pytest.mark.parametrize("name", heavyball.recipes.RECIPES)
def test_each_steps_a_model_at_its_own_rate(name: str) -> None:
    model, recipe = Small(), heavyball.recipes.RECIPES[name]
    optimizer = heavyball.recipes.build(name, model)
    assert optimizer.param_groups[0]["lr"] == recipe.lr
    assert "http" in recipe.source or "record" in recipe.source or "report" in recipe.source
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_rates_of_nanochat_are_those_that_it_says() -> None:
    model = Small().double()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = heavyball.recipes.build("nanochat", model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for name, lr in (("wte.weight", 0.2), ("lm_head.weight", 0.004)):
        moved = before[name] - model.get_parameter(name).detach()
        torch.testing.assert_close(moved, torch.full_like(moved, lr), rtol=1e-9, atol=1e-12)


def test_a_race_takes_a_recipe_at_its_rate_and_lists_them() -> None:
    contender = from_recipe("kimi-k2")
    assert (contender.label, contender.lrs) == ("kimi-k2", (2e-4,))
    assert from_recipe("nanochat", (0.1, 0.2)).lrs == (0.1, 0.2)
    listed = CliRunner().invoke(cli, ["list", "--recipes"])
    assert listed.exit_code == 0
    assert all(name in listed.output for name in heavyball.recipes.RECIPES)
    with pytest.raises(ValueError, match=r"no recipe 'nanochap'.*nanochat"):
        heavyball.recipes.build("nanochap", Small())


def test_a_recipe_is_raced_from_the_command_line(tmp_path) -> None:
    words = ["race", "--recipe", "deepseek-v4", "--task", "digits", "--steps", "2", "--seeds", "1"]
    done = CliRunner().invoke(cli, [*words, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "deepseek-v4" in done.output
