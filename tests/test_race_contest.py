import copy
import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import image

from heavyball.errors import RaceError
from heavyball.race import contest
from heavyball.race.contest import hold
from heavyball.race.plan import Plan, open_race
from heavyball.race.plot import draw
from heavyball.race.report import notes, result_table, spread
from heavyball.race.store import Store, fingerprint, finite
from heavyball.race.summary import arrival, results
from heavyball.race.tasks.surfaces import Rosenbrock


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tests that run beside each other would wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Silent:
    """A watcher that only keeps what it is told."""

    def __init__(self):
        self.done, self.ran, self.ended = None, [], []

    def begin(self, race, done):
        self.done = done

    def run(self, label, lr, seed):
        self.ran.append((label, lr, seed))

    def step(self, step):
        pass

    def end(self, record):
        self.ended.append(record)


PLAN = Plan(
    task="rosenbrock",
    optimizers=("AdamW", "torch.SGD:lr=1e-3"),
    chains=("exp_avg | sign",),
    lrs=(0.01, 0.1),
    seeds=(0, 4),
    steps=30,
    eval_every=10,
)


def held(plan, folder, picture=False, **options):
    watcher = Silent()
    with pytest.MonkeyPatch.context() as patch:
        if not picture:  # it takes longer than these races
            patch.setattr(contest, "draw", lambda race, results, records, path: path.touch())
        return hold(plan, Store(folder), watcher, **options), watcher


@pytest.fixture(scope="module")
def once(one_thread, tmp_path_factory):
    folder = tmp_path_factory.mktemp("race")
    content, _ = held(PLAN, folder)
    return content, folder


@pytest.fixture
def raced(once, tmp_path):
    """What the race of PLAN gave; `tmp_path` holds it."""
    content, folder = once
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return copy.deepcopy(content)


def strict(path):
    """JSON, where NaN and Infinity are errors."""
    return json.loads(Path(path).read_text(), parse_constant=lambda name: 1 / 0)


def numbers(content):
    """What must be the same for the same arguments: everything but the times."""
    cut = [{k: v for k, v in r.items() if k not in ("seconds", "step_ms")} for r in content["runs"]]
    for run in cut:
        run["curve"] = {k: v for k, v in run["curve"].items() if k != "seconds"}
    return cut


class StopError(Exception):
    pass


def interrupt_after(monkeypatch, count):
    """Let `count` runs end, then stop in the midst of the next one."""
    original, calls = contest.train, []

    def train(task, contender, lr, seed, settings, on_step):
        calls.append((contender.label, lr, seed))
        if len(calls) > count:
            raise StopError
        return original(task, contender, lr, seed, settings, on_step)

    monkeypatch.setattr(contest, "train", train)
    return calls


def test_the_same_race_gives_the_same_numbers(raced, tmp_path):
    first = raced
    again, _ = held(PLAN, tmp_path / "again")
    assert numbers(first) == numbers(again)
    assert len({tuple(run["curve"]["test_loss"]) for run in first["runs"]}) == 10


def test_a_contender_does_not_notice_who_else_races(raced, tmp_path):
    alone = Plan(task="rosenbrock", optimizers=("AdamW",), lrs=(0.1,), seeds=(4,), steps=30)
    one, _ = held(alone, tmp_path / "one")
    wanted = [r for r in raced["runs"] if (r["contender"], r["lr"], r["seed"]) == ("AdamW", 0.1, 4)]
    assert one["runs"][0]["test_loss"] == wanted[0]["test_loss"]


def test_the_json_has_everything_that_is_needed_to_repeat_the_race(raced, tmp_path):
    content = raced
    saved = strict(tmp_path / "race.json")
    assert saved["format"] == 1
    assert saved["state"] == "finished"
    assert Plan.from_json(saved["arguments"]) == PLAN
    assert saved["command"].startswith("heavyball race --task rosenbrock --optimizer AdamW ")
    assert saved["seeds"] == [0, 4]
    (environment,) = saved["environments"]
    assert environment["torch"] == torch.__version__
    assert environment["threads"] == 1
    assert {"heavyball", "python", "platform", "cpus", "started"} <= environment.keys()
    assert saved["task"]["name"] == "rosenbrock"
    assert saved["task"]["minimum"] == [1.0, 1.0]
    assert saved["settings"]["steps"] == 30
    assert len(saved["runs"]) == 10
    for run in saved["runs"]:
        assert run["curve"]["step"] == [0, 10, 20, 30]
        assert {len(values) for values in run["curve"].values()} == {4}
        assert run["curve"]["test_loss"][-1] == run["test_loss"]
    assert [r["label"] for r in saved["results"]] == [
        "AdamW",
        "torch.SGD",
        "exp_avg | sign",
    ]
    assert [[e["lr"] for e in r["by_lr"]] for r in saved["results"]] == [
        [0.01, 0.1],
        [1e-3],
        [0.01, 0.1],
    ]
    assert numbers(saved) == json.loads(json.dumps(numbers(content)))


def test_an_interrupted_race_is_finished_without_repeating_a_run(raced, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(StopError):
            held(PLAN, tmp_path / "cut")
    saved = strict(tmp_path / "cut" / "race.json")
    assert saved["state"] == "unfinished"
    assert len(list((tmp_path / "cut" / "runs").iterdir())) == 3
    store = Store(tmp_path / "cut")
    with monkeypatch.context() as patch:
        calls = interrupt_after(patch, 100)
        watcher = Silent()
        content = hold(store.plan(), store, watcher, resume=True)
    assert watcher.done == 3
    assert len(calls) == 7
    assert len(set(calls)) == 7
    assert numbers(content) == numbers(raced)
    assert content["results"][0]["best_lr"] == raced["results"][0]["best_lr"]
    assert len(content["environments"]) == 2
    assert store.picture.exists()


def test_a_finished_race_is_only_drawn_again(raced, tmp_path, monkeypatch):
    first = raced
    (tmp_path / "race.png").unlink()
    calls = interrupt_after(monkeypatch, 0)
    content, watcher = held(PLAN, tmp_path, resume=True)
    assert calls == []
    assert watcher.done == 10
    assert content["runs"] == first["runs"]
    assert content["environments"] == first["environments"]
    assert (tmp_path / "race.png").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"contender": "AdamW"}', "\0"])
def test_a_damaged_record_is_run_again(raced, tmp_path, monkeypatch, text):
    (tmp_path / "runs" / "00-AdamW-lr0.1-seed4.json").write_text(text)
    calls = interrupt_after(monkeypatch, 100)
    content, _ = held(PLAN, tmp_path, resume=True)
    assert calls == [("AdamW", 0.1, 4)]
    assert numbers(content) == numbers(raced)


def test_records_of_another_race_are_not_taken(raced, tmp_path, monkeypatch):
    (tmp_path / "race.json").unlink()
    calls = interrupt_after(monkeypatch, 100)
    held(PLAN, tmp_path)
    assert len(calls) == 10
    other = Plan(**{**PLAN.to_json(), "steps": 20})
    assert Store(tmp_path).finished(open_race(PLAN))
    assert not Store(tmp_path).finished(open_race(other))


def test_changed_data_make_another_race(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("abcd" * 300)
    plan = Plan(task="chars", data=str(text), optimizers=("SGD",), seeds=(0,), steps=1)
    before = fingerprint(open_race(plan))
    assert fingerprint(open_race(plan)) == before
    text.write_text("abce" * 300)
    assert fingerprint(open_race(plan)) != before


def test_a_folder_that_holds_a_race_is_not_overwritten_unasked(raced, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    before = (tmp_path / "race.json").read_bytes()
    other = Plan(task="beale", optimizers=("SGD",), seeds=(0,), steps=5)
    for plan in (PLAN, other):
        with pytest.raises(RaceError, match=r"holds a race already.*--resume.*--overwrite"):
            held(plan, tmp_path)
    wrong = Plan(task="mnist", data=str(tmp_path), optimizers=("SGD",))
    with pytest.raises(RaceError, match="train-images"):
        held(wrong, tmp_path, overwrite=True)
    assert (tmp_path / "race.json").read_bytes() == before
    held(other, tmp_path, overwrite=True)
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["00-SGD-lr0.001-seed0.json"]
    assert (tmp_path / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize("text", ["", "[1]", '{"format": 2}', '{"format": 1}', "[" * 100_000])
def test_what_is_no_saved_race_cannot_be_resumed(tmp_path, text):
    with pytest.raises(RaceError, match="holds no race"):
        Store(tmp_path).plan()
    (tmp_path / "race.json").write_text(text)
    with pytest.raises(RaceError):
        Store(tmp_path).plan()


def test_runs_that_diverge_lose_and_are_valid_json(tmp_path):
    plan = Plan(
        task="rosenbrock",
        optimizers=("torch.SGD:lr=(1e-4,10.0)", "torch.SGD:lr=10.0"),
        seeds=(0, 1),
        steps=30,
    )
    content, _ = held(plan, tmp_path)
    saved = strict(tmp_path / "race.json")
    partly, wholly = saved["results"]
    assert partly["best_lr"] == 1e-4
    assert [entry["diverged"] for entry in partly["by_lr"]] == [0, 2]
    assert wholly["best"] is None
    assert "torch.SGD:lr=10.0: at lr 10 2 of 2 runs diverged" in notes(content)
    table = result_table(content)
    assert list(table.columns[0].cells)[-1].plain == "torch.SGD:lr=10.0"
    assert list(table.columns[2].cells)[-1].plain == "diverged"


def test_a_race_in_which_all_diverge_is_still_shown(tmp_path):
    plan = Plan(task="rosenbrock", optimizers=("torch.SGD:lr=(9.0,10.0)",), seeds=(0,), steps=30)
    content, _ = held(plan, tmp_path, picture=True)
    assert content["results"][0]["best_lr"] is None
    assert image.imread(tmp_path / "race.png").std() > 0


def fabricated(**changes):
    """A race of two learning rates and two seeds, with records as `training.train` gives them."""
    race = open_race(
        Plan(task="rosenbrock", optimizers=("SGD:lr=(1.0,2.0)",), seeds=(0, 1), **changes)
    )
    records = {}
    for lr in (1.0, 2.0):
        for seed in (0, 1):
            records["SGD", lr, seed] = {
                "status": "finished",
                "test_loss": lr + seed,
                "measure": 7.0,
                "step_ms": lr * 10 + seed,
                "seconds": 3.0,
                "state_bytes": 12,
                "parameters": 2,
                "curve": {
                    "step": [0, 10, 20],
                    "seconds": [0.0, 1.5, 3.0],
                    "test_loss": [9.0, 0.5 + seed, lr + seed],
                    "measure": [9.0, 8.0, 7.0],
                },
            }
    return race, records


def test_the_best_learning_rate_has_the_lowest_mean_and_no_divergence():
    race, records = fabricated()
    (result,) = results(race, records)
    assert result["best_lr"] == 1.0
    assert result["best"]["test_loss"] == {
        "mean": 1.5,
        "std": math.sqrt(0.5),
        "min": 1.0,
        "max": 2.0,
    }
    assert result["best"]["step_ms"] == 10.5
    assert result["best"]["state_bytes_per_parameter"] == 6.0
    diverged = {"status": "diverged", "test_loss": None, "measure": None}
    key = ("SGD", 1.0, 0)
    (result,) = results(race, {**records, key: {**records[key], **diverged}})
    assert result["best_lr"] == 2.0
    assert result["by_lr"][0]["diverged"] == 1
    assert result["by_lr"][0]["test_loss"]["mean"] == 2.0


def test_the_target_is_reached_at_the_first_evaluation_that_meets_it():
    race, records = fabricated(target=1.5)
    first, second = (records["SGD", 2.0, seed] for seed in (0, 1))
    assert arrival(race, first) == (10, 1.5)
    assert arrival(race, second) == (10, 1.5)
    race, _ = fabricated(target=0.4)
    assert arrival(race, first) is None
    (result,) = results(fabricated(target=1.0)[0], records)
    assert result["best"]["reached_target"] == 1
    assert result["best"]["steps_to_target"]["mean"] == 10


def test_an_accuracy_is_reached_from_below():
    race = open_race(Plan(task="digits", optimizers=("SGD",), steps=1, target=0.5))
    curve = {"step": [0, 1, 2], "seconds": [0.0, 1.0, 2.0], "measure": [0.1, 0.5, 0.9]}
    assert arrival(race, {"curve": curve}) == (1, 1.0)


def test_an_ablation_lists_what_could_not_be_built(tmp_path):
    plan = Plan(
        kind="ablate",
        task="rosenbrock",
        chains=("palm_beta2 | scale_by_adam | cautious",),
        seeds=(0,),
        steps=5,
    )
    content, _ = held(plan, tmp_path)
    labels = [r["label"] for r in content["results"]]
    assert labels == ["the full chain", "without palm_beta2", "without cautious"]
    (left_out,) = content["left_out"]
    assert left_out["label"] == "without scale_by_adam"
    assert "palm_beta2 has no effect" in left_out["reason"]
    assert any("without scale_by_adam: left out" in note for note in notes(content))
    assert strict(tmp_path / "race.json")["left_out"] == [left_out]


def test_an_ablation_of_a_chain_that_is_itself_refused_is_an_error(tmp_path):
    with pytest.raises(RaceError, match="the full chain cannot be built"):
        held(Plan(kind="ablate", task="beale", chains=("schedule_free | sign",)), tmp_path)
    assert not (tmp_path / "race.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizers": (), "chains": ()}, "nothing to race"),
        ({"epochs": 1}, "exclude each other"),
        ({"steps": 0}, "--steps 0"),
        ({"threads": -1}, "--threads -1"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"seeds": ()}, "--seeds"),
        ({"seeds": (1, 1)}, "each once"),
        ({"seeds": (-1,)}, "--seeds -1"),
        ({"seeds": (2**31,)}, "--seeds 2147483648"),
        ({"weight_decay": math.nan}, "--weight-decay nan"),
        ({"target": math.inf}, "--target inf"),
        ({"task": "digits", "target": 97.0}, "at most 1"),
        ({"optimizers": ("SGD", "SGD")}, "'SGD' is given twice"),
        ({"lrs": (0.0,)}, "above 0"),
        ({"lrs": (math.nan,)}, "finite"),
        ({"kind": "ablate"}, "needs a chain"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(RaceError, match=message):
        open_race(Plan(**{**PLAN.to_json(), **changes}))


def test_epochs_and_defaults_become_steps():
    def settings(**options):
        return open_race(Plan(optimizers=("SGD",), **options)).settings

    assert settings(epochs=2, batch_size=100).steps == 28
    assert settings().steps == 12 * 22
    assert settings(task="beale").steps == 2000
    assert settings(task="beale", epochs=3).steps == 3
    assert settings(steps=7).eval_every == 1
    assert settings(steps=600).eval_every == 20


def test_the_number_of_threads_is_set_for_the_race_only(tmp_path):
    before = torch.get_num_threads()
    for asked, used in ((None, 1), (before + 1, before + 1)):
        plan = Plan(task="beale", optimizers=("SGD",), threads=asked, steps=2)
        content, _ = held(plan, tmp_path / str(asked))
        assert content["environments"][0]["threads"] == used
        assert torch.get_num_threads() == before


def test_the_picture_is_an_image_with_every_contender(raced, tmp_path):
    content, _ = held(PLAN, tmp_path, picture=True, resume=True)
    pixels = image.imread(tmp_path / "race.png")
    height, width = pixels.shape[:2]
    assert 1200 < width < 3000
    assert 500 < height < 2000
    colors = {tuple(c) for c in np.round(pixels[..., :3] * 255).astype(int).reshape(-1, 3)}
    for color in ("#0072B2", "#D55E00", "#009E73"):
        assert tuple(bytes.fromhex(color[1:])) in colors
    assert [r["best"] is not None for r in content["results"]] == [True] * 3


def test_names_with_signs_of_mathematics_are_drawn_as_they_are(tmp_path):
    race, records = fabricated()
    (result,) = results(race, records)
    twin = {**result, "label": r"$\frac{ $ _x^ %s {} \n"}
    for (_, lr, seed), record in list(records.items()):
        records[twin["label"], lr, seed] = record
    draw(race, [result, twin] * 6, records, tmp_path / "picture.png")
    assert image.imread(tmp_path / "picture.png").ndim == 3


def test_numbers_that_json_does_not_know_become_null():
    value = {"a": [math.nan, 1.0, (math.inf,)], "b": -math.inf, "c": True, "d": "NaN"}
    assert finite(value) == {"a": [None, 1.0, [None]], "b": None, "c": True, "d": "NaN"}


@pytest.mark.parametrize(
    ("mean", "std", "shown"),
    [
        (0.04279, 0.0082, "0.0428 ± 0.0082"),
        (123.456, 12.3, "123 ± 12"),
        (1.5, 0.0, "1.5"),
        (2.874e-05, 4.2e-06, "2.874e-05 ± 4.2e-06"),
    ],
)
def test_a_mean_is_shown_to_the_precision_of_its_deviation(mean, std, shown):
    assert spread({"mean": mean, "std": std}, seeds=3) == shown


def test_a_best_rate_at_the_end_of_its_grid_is_noted(raced):
    content = raced
    for result in content["results"]:
        on_edge = len(result["by_lr"]) > 1
        noted = any(n.startswith(result["label"] + ": the best lr is the") for n in notes(content))
        assert noted == on_edge


def test_a_race_that_went_on_elsewhere_says_so(raced):
    content = raced
    (one,) = content["environments"]
    assert not any("resumed" in note for note in notes(content))
    content["environments"] = [one, {**one, "torch": "0.1"}]
    assert any("resumed under another torch" in note for note in notes(content))


def test_the_surface_is_looked_at_in_double_precision():
    task = Rosenbrock(None)
    model = task.model(0)
    with torch.no_grad():
        model.at.copy_(torch.tensor([1.0 + 2**-20, 1.0]))
    x = 1.0 + 2**-20
    assert task.evaluate(model)[0] == pytest.approx((1 - x) ** 2 + 100 * (1 - x * x) ** 2, rel=1e-9)


def test_a_device_that_is_not_there_is_refused():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(RaceError, match="--device cuda: torch sees no CUDA device"):
        Plan(optimizers=("AdamW",), device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["digits", "rosenbrock"])
def test_a_race_on_a_gpu_gives_the_numbers_of_the_cpu(name, tmp_path):
    found = []
    for device in ("cpu", "cuda"):
        plan = Plan(
            task=name, optimizers=("AdamW",), lrs=(0.01,), seeds=(0,), steps=5, device=device
        )
        content = hold(plan, Store(tmp_path / device), Silent())
        found.append(content["runs"][0]["test_loss"])
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_the_grid_is_for_some_seeds_and_the_others_run_at_the_best_rate(tmp_path):
    optimizers = ("AdamW:lr=(0.01,0.1)", "SGD:lr=(0.00001,0.0005)")
    plan = Plan(task="rosenbrock", optimizers=optimizers, steps=20, grid_seeds=1)
    content = hold(plan, Store(tmp_path), Silent())
    made = [(run["contender"], run["lr"], run["seed"]) for run in content["runs"]]
    best = {result["label"]: result["best_lr"] for result in content["results"]}
    grid = [(label, lr, 0) for label, lrs in GRIDS.items() for lr in lrs]
    assert sorted(made) == sorted(grid + [(k, lr, s) for k, lr in best.items() for s in (1, 2)])
    by_lr = {r["label"]: {e["lr"]: e["runs"] for e in r["by_lr"]} for r in content["results"]}
    for label, lrs in GRIDS.items():
        assert by_lr[label] == {lr: 3 if lr == best[label] else 1 for lr in lrs}
    # the rate is the one that the first seed has chosen
    first = {(r["contender"], r["lr"]): r["test_loss"] for r in content["runs"] if r["seed"] == 0}
    for label, lrs in GRIDS.items():
        assert first[label, best[label]] == min(first[label, lr] for lr in lrs)
    (tmp_path / "runs" / sorted(p.name for p in (tmp_path / "runs").iterdir())[-1]).unlink()
    again = hold(plan, Store(tmp_path), Silent(), resume=True)
    assert [r["test_loss"] for r in again["runs"]] == [r["test_loss"] for r in content["runs"]]


GRIDS = {"AdamW": (0.01, 0.1), "SGD": (1e-5, 5e-4)}


def test_a_contender_may_set_the_target(tmp_path):
    optimizers = ("AdamW:lr=0.01", "SGD:lr=0.0005")
    plan = Plan(task="rosenbrock", optimizers=optimizers, steps=40, eval_every=4, target="AdamW")
    content = hold(plan, Store(tmp_path), Silent())
    ends = [run["test_loss"] for run in content["runs"] if run["contender"] == "AdamW"]
    assert content["task"]["target"] == pytest.approx(sum(ends) / 3)
    assert content["task"]["target_on"] == "loss"
    sgd = next(r for r in content["results"] if r["label"] == "SGD")["best"]
    met = [
        r for r in content["runs"] if r["contender"] == "SGD" and r["test_loss"] <= sum(ends) / 3
    ]
    assert sgd["reached_target"] >= len(met)
    assert "AdamW's at the end" in str(result_table(content).title)
    with pytest.raises(RaceError, match="no contender 'AdmW'; nearest: AdamW, or give a number"):
        open_race(Plan(task="rosenbrock", optimizers=optimizers, target="AdmW"))


def test_more_seeds_for_the_grid_than_there_are_are_refused():
    with pytest.raises(RaceError, match="--grid-seeds 4: there are 3 seeds"):
        Plan(optimizers=("AdamW",), grid_seeds=4)


def test_a_metric_is_kept_and_drawn(tmp_path):
    chains = ("sign | probe(name='signs')",)
    names = ("update_norm", "signs/rms", "group_0/lr")
    plan = dataclasses.replace(PLAN, chains=chains, seeds=(0,), metrics=names, lrs=(0.01,))
    content, _ = held(plan, tmp_path, picture=True)
    ours = next(run for run in content["runs"] if run["contender"] == chains[0])
    # a step of signs of two weights, none of which has a gradient of zero
    assert ours["metrics"] == {
        "update_norm": [None, *[pytest.approx(0.01 * 2**0.5, rel=1e-5)] * 3],
        "signs/rms": [None, 1.0, 1.0, 1.0],
        "group_0/lr": [0.01] * 4,
    }
    torchs = next(run for run in content["runs"] if run["contender"] == "torch.SGD")
    assert torchs["metrics"] == {name: [None] * 4 for name in names}
    assert Plan.from_json(strict(tmp_path / "race.json")["arguments"]) == plan
    assert "--metric signs/rms" in content["command"]
    plain, _ = held(dataclasses.replace(plan, metrics=()), tmp_path / "plain", picture=True)
    assert "metrics" not in plain["runs"][0]
    widths = [image.imread(f / "race.png").shape[1] for f in (tmp_path, tmp_path / "plain")]
    assert widths[0] == pytest.approx(widths[1] * 5 / 2, rel=0.01)
    # measuring changes no run
    for one, other in zip(content["runs"], plain["runs"], strict=True):
        assert one["curve"]["test_loss"] == other["curve"]["test_loss"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("updatenorm", "nearest: update_norm"),
        ("rms", "PROBE/rms"),
        ("grad_norm/other", "no metric"),
        ("d", "no contender has it"),
        ("nothing/rms", "no contender has it"),
    ],
)
def test_a_metric_that_nobody_has_is_refused(name, message):
    with pytest.raises(RaceError, match=re.escape(message)):
        open_race(dataclasses.replace(PLAN, metrics=(name,)))
