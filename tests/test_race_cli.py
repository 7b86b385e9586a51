import json
import os
import re
import shlex
import sys
import warnings

import fresh
import pytest
from click.testing import CliRunner
from helpers import modifies
from matplotlib import image

import heavyball
from heavyball import chainable as C
from heavyball import race
from heavyball.race import cli as command
from heavyball.race import contest
from heavyball.race.plan import Plan
from heavyball.race.store import Store
from heavyball.race.tasks import TASKS

CHAIN = "exp_avg | scale_by_adam(betas=(0.9, 0.95)) | cautious"
QUICK = ["--task", "rosenbrock", "--steps", "20", "--seeds", "2"]


def heavyball_command(*words):
    return CliRunner().invoke(command.cli, [str(w) for w in words])


def refused(result, *parts):
    """The error was one paragraph without a traceback, and names each part."""
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    message = result.stderr.rpartition("Error: ")[2]
    assert len(message.strip().splitlines()) == 1
    for part in parts:
        assert part in message
    return True


def subprocess_environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def test_a_race_from_the_command_line_to_the_picture(tmp_path):
    out = tmp_path / "out"
    words = ["race", "--task", "digits", "--optimizer", "AdamW:betas=(0.9,0.95)", "--chain", CHAIN]
    words += ["-o", "torch.SGD:lr=0.1,momentum=0.9", "--lr", "1e-3,3e-3", "--seeds", "2"]
    words += ["--epochs", "1", "--batch-size", "128", "--target", "0.1", "--out", out]
    result = heavyball_command(*words)
    assert result.exit_code == 0, result.output
    table = [line for line in result.stdout.splitlines() if "│" in line]
    assert len(table) == 3
    assert any(CHAIN in line for line in table)
    for head in ("best lr", "test loss", "accuracy", "steps to", "ms per", "state bytes"):
        assert head in result.stdout
    assert "[10/10]" in result.stderr
    assert f"picture: {out / 'race.png'}" in result.stdout
    assert image.imread(out / "race.png").shape[1] > 1200
    saved = json.loads((out / "race.json").read_text())
    assert saved["settings"] == {
        "steps": 11,
        "batch_size": 128,
        "eval_every": 1,
        "weight_decay": None,
    }
    assert len(saved["runs"]) == 10
    assert saved["task"]["target"] == 0.1
    assert all(0 < run["measure"] < 1 for run in saved["runs"])


def test_the_module_is_a_program_and_its_numbers_are_those_of_the_same_command(tmp_path):
    words = ["race", "-c", CHAIN, "-o", "SFAdamW", *QUICK, "--threads", "1", "--out"]
    # what `python -m heavyball.race` does
    program = (
        "import runpy; runpy.run_module('heavyball.race', run_name='__main__', alter_sys=True)"
    )
    done = fresh.run(program, *words, tmp_path / "a", env=subprocess_environment())
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert heavyball_command(*words, tmp_path / "b").exit_code == 0

    def losses(name):
        runs = json.loads((tmp_path / name / "race.json").read_text())["runs"]
        return [(run["contender"], run["curve"]["test_loss"]) for run in runs]

    assert losses("a") == losses("b")


def test_the_saved_command_asks_for_the_same_race(monkeypatch):
    plans = []
    monkeypatch.setattr(contest, "hold", lambda plan, *rest: plans.append(plan) or 1 / 0)
    plan = Plan(
        task="beale",
        data="/some folder/x",
        optimizers=("AdamW:betas=(0.9, 0.95)", "torch.SGD:lr=(0.1,0.2)"),
        chains=(CHAIN,),
        lrs=(1e-3, 0.1 + 0.2),
        seeds=(7,),
        epochs=3,
        batch_size=5,
        eval_every=2,
        target=1e-5,
        weight_decay=0.0,
        threads=2,
    )
    ablation = Plan(kind="ablate", chains=(CHAIN,), seeds=(0, 5), steps=4)
    for asked in (plan, ablation):
        result = heavyball_command(*shlex.split(asked.command())[1:])
        assert isinstance(result.exception, ZeroDivisionError)
    assert plans == [plan, ablation]


def test_options_may_be_repeated_or_listed(monkeypatch):
    plans = []
    monkeypatch.setattr(contest, "hold", lambda plan, *rest: plans.append(plan) or 1 / 0)
    heavyball_command("race", "-o", "SGD", "--lr", "1e-3", "--lr", "0.01,0.1", "--seeds", "4")
    heavyball_command("race", "-o", "SGD")
    assert plans[0].lrs == (1e-3, 0.01, 0.1)
    assert plans[0].seeds == (0, 1, 2, 3)
    assert plans[1] == Plan(optimizers=("SGD",))


def test_an_interrupted_race_says_how_to_finish_it_and_does(tmp_path, monkeypatch):
    out = tmp_path / "a folder"
    calls, original = [], contest.train

    def train(*arguments):
        calls.append(arguments[1:4])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(contest, "train", train)
    result = heavyball_command("race", "-o", "AdamW", "-o", "SGD", *QUICK, "--out", out)
    assert result.exit_code == 130
    hint = re.search(r"finish the race with: heavyball (.*)", result.stderr).group(1)
    assert json.loads((out / "race.json").read_text())["state"] == "unfinished"
    result = heavyball_command(*shlex.split(hint))
    assert result.exit_code == 0, result.output
    assert "2 of 4 runs were done before" in result.stderr
    assert len(calls) == 3 + 2
    assert json.loads((out / "race.json").read_text())["state"] == "finished"


def test_an_interruption_before_anything_was_written_promises_nothing(tmp_path, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(contest, "open_race", stop)
    result = heavyball_command("race", "-o", "SGD", *QUICK, "--out", tmp_path / "out")
    assert result.exit_code == 130
    assert result.stderr.strip() == "interrupted"


def test_resuming_takes_the_saved_arguments_and_refuses_others(tmp_path):
    assert heavyball_command("race", "-o", "SGD", *QUICK, "--out", tmp_path).exit_code == 0
    again = heavyball_command("race", "--resume", tmp_path)
    assert again.exit_code == 0
    same = ["--steps", "20", "-o", "SGD", "--out", tmp_path]
    assert heavyball_command("race", "--resume", tmp_path, *same).exit_code == 0
    for words, parts in (
        (["--steps", "21"], ["--steps 21", "20"]),
        (["-o", "AdamW"], ["--optimizer", "SGD"]),
        (["--task", "beale"], ["--task", "rosenbrock"]),
        (["--seeds", "3"], ["--seeds", "(0, 1)"]),
        (["--lr", "0.1"], ["--lr"]),
        (["--out", tmp_path / "elsewhere"], ["--resume"]),
        (["--overwrite"], ["--resume"]),
    ):
        assert refused(heavyball_command("race", "--resume", tmp_path, *words), *parts)
    assert refused(heavyball_command("race", "--resume", tmp_path / "none"), "holds no race")


def test_a_second_race_into_a_folder_is_refused_or_replaces_the_first(tmp_path):
    words = ["race", *QUICK, "--out", tmp_path]
    assert heavyball_command(*words, "-o", "SGD").exit_code == 0
    assert refused(heavyball_command(*words, "-o", "SGD"), "--resume", "--overwrite")
    assert refused(heavyball_command(*words, "-o", "Lion"), "holds a race already")
    assert heavyball_command(*words, "-o", "Lion", "--overwrite").exit_code == 0
    assert Store(tmp_path).plan().optimizers == ("Lion",)


def test_a_folder_is_named_for_the_task_when_none_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert heavyball_command("race", "-o", "SGD", *QUICK).exit_code == 0
    (folder,) = (tmp_path / "races").iterdir()
    assert re.fullmatch(r"rosenbrock-\d{8}-\d{6}", folder.name)


def test_an_ablation_shows_the_chain_without_each_element(tmp_path):
    result = heavyball_command("ablate", "palm_beta2 | scale_by_adam", *QUICK, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "│ the full chain " in result.stdout
    assert "│ without palm_beta2 " in result.stdout
    assert "- the full chain: palm_beta2 | scale_by_adam" in result.stdout
    assert "- without scale_by_adam: left out, cannot be built: palm_beta2" in result.stdout
    assert heavyball_command("ablate", "--resume", tmp_path).exit_code == 0
    assert heavyball_command("race", "--resume", tmp_path).exit_code == 0
    assert refused(heavyball_command("ablate", "sign", "--resume", tmp_path), "--chain")
    assert refused(heavyball_command("ablate"), "needs a chain")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["nothing to race"]),
        (["-o", "AdmW"], ["nearest", "AdamW"]),
        (["-o", "torch.AdmW"], ["nearest", "torch.AdamW"]),
        (["-o", "AdamW:lr=os.name"], ["attribute", "character 12"]),
        (["-o", "AdamW:bets=(0.9,0.95)"], ["bets", "betas"]),
        (["-c", "scale_by_adm"], ["nearest", "scale_by_adam"]),
        (["-c", "exp_avg | __import__('os')"], ["no transform '__import__'", "character 11"]),
        (["-c", "exp_avg |"], ["missing", "character 9"]),
        (["-c", "schedule_free | sign"], ["cannot be built", "writer"]),
        (["-c", "(" * 100_000], ["100000 characters"]),
        (["-c", "exp_avg(beta=2.0)"], ["beta=2.0"]),
        (["-o", "SGD", "-o", "SGD"], ["given twice"]),
        (["-o", "SGD", "--task", "mnst"], ["nearest", "mnist"]),
        (["-o", "SGD", "--task", "mnist", "--data", "/nonexistent"], ["/nonexistent"]),
        (["-o", "SGD", "--seeds", "0"], ["--seeds"]),
        (["-o", "SGD", "--seeds", "x"], ["--seeds"]),
        (["-o", "SGD", "--lr", ","], ["--lr"]),
        (["-o", "SGD", "--lr", "-1"], ["-1"]),
        (["-o", "SGD", "--steps", "1", "--epochs", "1"], ["exclude"]),
        (["-o", "SGD", "-o", "torch.LBFGS", "--task", "beale"], ["torch.LBFGS", "closure"]),
    ],
)
def test_mistakes_are_answered_in_one_paragraph(words, parts, tmp_path):
    result = heavyball_command("race", *words, "--out", tmp_path / "out")
    assert refused(result, *parts)
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    result = heavyball_command("race", "-o", "SGD", *QUICK, "--out", tmp_path / "file" / "out")
    assert refused(result, "cannot be written")


def test_the_list_has_every_name_with_its_first_sentence():
    result = heavyball_command("list")
    assert result.exit_code == 0
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    for name, transform in C.TRANSFORMS.items():
        assert f"{name} {' '.join(transform.summary.split())}" in lines
    for name in [*heavyball.PRESETS, *C.COMBINATORS, *TASKS]:
        assert any(line.startswith(name + " ") and len(line) > len(name) + 10 for line in lines)


@pytest.mark.parametrize("name", sorted(C.TRANSFORMS))
def test_every_transform_can_be_shown(name):
    alone_impossible = {"palm_beta2", "apply"}
    company = {
        **{n: f"{n} | scale_by_adam" for n, t in C.TRANSFORMS.items() if modifies(t)},
        "from_eigenbasis": "to_eigenbasis | from_eigenbasis",
    }
    text = company.get(name, name)
    if C.TRANSFORMS[name].rules.requires is not None:
        element = "apollo(rank=2)" if name == "apollo" else name
        text = f"route(when({element}, min_ndim=2), otherwise=sign)"
    result = heavyball_command("show", text)
    if name in alone_impossible and result.exit_code == 2:
        assert refused(result, name)
        return
    assert result.exit_code == 0, result.output
    transform = C.TRANSFORMS[name]
    for part in [*transform.all_states, *transform.hyper, *transform.options]:
        assert part in result.stdout
    assert "bytes for each parameter element" in result.stdout


def test_a_chain_is_shown_with_its_state_and_hyper_parameters():
    result = heavyball_command("show", CHAIN)
    assert result.exit_code == 0
    text = result.stdout
    assert f"completed: {CHAIN} | decoupled | descend" in text
    assert "1. exp_avg\n" in text
    assert C.exp_avg.summary in text
    assert "m_t = sum_i" in text
    assert re.search(r"state  exp_avg_sq: zeros.*; here float32 \(128, 256\)", text)
    assert "live   betas=(0.9, 0.95)" in text
    assert "fixed  scale='mean'" in text
    elements = 128 * 256 + 128
    # three moments, and a step of float64 for each of the two tensors
    assert f"{12 * elements + 16:,} bytes, 12.00 bytes for each parameter element" in text
    assert "Source" not in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_a_preset_and_a_routed_chain_are_shown():
    result = heavyball_command("show", "SFAdamW:betas=(0.8,0.95)")
    assert result.exit_code == 0
    assert 'beta=0.8, in the parameter group as "betas[0]"' in result.stdout
    result = heavyball_command("show", "route(when(exp_avg, min_ndim=2), otherwise=sign)")
    assert result.exit_code == 0
    assert re.search(r"weight +\(128, 256\).* exp_avg \|", result.stdout)
    assert re.search(r"bias +\(128,\).* sign \|", result.stdout)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("AdmW", ["no preset or transform", "AdamW"]),
        ("scale_by_adm", ["scale_by_adam"]),
        ("graft", ["needs arguments"]),
        ("", ["empty"]),
        ("exp_avg | 1", ["character 11"]),
        ("AdamW:lr=x", ["character 10"]),
        ("schedule_free | sign", ["writer"]),
    ],
)
def test_what_cannot_be_shown_is_said_in_one_paragraph(text, parts):
    assert refused(heavyball_command("show", text), *parts)


@pytest.mark.parametrize("module", race.EXTRAS)
def test_a_missing_library_is_named_with_the_install(module, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit) as caught:
        race.main()
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"not installed; pip install {race.EXTRAS[module]}")


def test_without_the_extra_the_package_imports_and_the_program_says_what_is_missing():
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({list(race.EXTRAS)}));"
        "import heavyball.race, heavyball.core.text;"
        "print(heavyball.core.text.parse_chain('exp_avg | sign'));"
        "heavyball.race.main()"
    )
    done = fresh.run(code, env=subprocess_environment())
    assert done.returncode == 2
    assert done.stdout.strip() == "(exp_avg, sign)"
    assert done.stderr.strip() == (
        "heavyball: click, rich, matplotlib, scikit-learn not installed; "
        "pip install click rich matplotlib scikit-learn"
    )


def test_a_warning_is_shown_as_a_note(tmp_path, monkeypatch):
    original = contest.train

    def train(*arguments):
        warnings.warn("something\nis slow", RuntimeWarning, stacklevel=1)
        return original(*arguments)

    monkeypatch.setattr(contest, "train", train)
    result = heavyball_command("race", "-o", "torch.SGD", *QUICK, "--out", tmp_path)
    assert result.exit_code == 0
    assert "note: something is slow\n" in result.stderr
    assert "contest.py" not in result.stderr


def test_help_needs_no_race():
    for words in ([], ["race"], ["ablate"], ["list"], ["show"]):
        result = heavyball_command(*words, "--help")
        assert result.exit_code == 0
        assert "Usage" in result.stdout
