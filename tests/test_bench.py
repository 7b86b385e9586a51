"""The measurements of optimizer steps: shape sets, counted bytes, and the document they write."""

import math
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from rich import box

import heavyball
from benchmarks import cases, cli, duels, measure, report, shapes, worker


@pytest.mark.parametrize(
    ("name", "tensors", "numbers"),
    [("gpt", 43, 17_062_400), ("gpt-124M", 148, 124_439_808), ("convnet", 62, 11_689_512)],
)
def test_a_shape_set_has_the_stated_size(name, tensors, numbers):
    found = shapes.SETS[name]()
    assert (len(found), shapes.elements(found)) == (tensors, numbers)


def test_many_small_tensors_are_small_and_always_the_same():
    found = shapes.many_small()
    sizes = [math.prod(shape) for shape in found]
    assert len(found) == 400
    assert min(sizes) >= 1024
    assert max(sizes) <= 65_536
    assert sum(sizes) == pytest.approx(6.5e6, rel=0.01)
    assert found == shapes.many_small()


SMALL, LARGE = 1000, 70_000
STEP = 2 * 8  # the number of steps, a float64, is read and written


def counted(build, sizes, dtype=torch.float32, **names):
    params = [torch.nn.Parameter(torch.zeros(size, dtype=dtype)) for size in sizes]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = build(params, compile=False)
    optimizer.step()
    return worker.traffic(params, optimizer.state, **names)


def test_adamw_moves_seven_numbers_per_element():
    found = counted(heavyball.AdamW, [SMALL, LARGE])
    assert found["once"] == found["passes"] == 7 * 4 * (SMALL + LARGE) + 2 * STEP


def test_a_number_over_a_tensor_reads_large_tensors_again():
    case = cases.CHAINS["adam-cautious"]
    found = counted(heavyball.AdamW, [SMALL, LARGE], again=case.again)
    assert found["passes"] - found["once"] == 3 * 4 * LARGE


def test_a_number_over_all_tensors_reads_every_tensor_again():
    case = cases.CHAINS["adamw-global-clip"]
    found = counted(heavyball.AdamW, [SMALL, LARGE], over_all=case.over_all)
    assert found["passes"] - found["once"] == 4 * (SMALL + LARGE)


def test_bytes_follow_the_dtype_of_each_tensor():
    # parameter read and written and gradient at 2 bytes, two float32 moments read and written
    found = counted(heavyball.AdamW, [SMALL], torch.bfloat16)
    assert found["once"] == (3 * 2 + 4 * 4) * SMALL + STEP


def test_factored_state_counts_rows_and_columns():
    # momentum in full, a second moment of 64 rows and 100 columns
    found = counted(heavyball.FactoredAdamW, [(64, 100)])
    assert found["once"] == 5 * 4 * 6400 + 2 * 4 * (64 + 100) + STEP


@pytest.mark.parametrize("name", [n for n, c in cases.CHAINS.items() if c.again or c.over_all])
def test_what_is_read_again_is_there(name):
    case = cases.CHAINS[name]
    function = worker.builder(case.target, case.arguments)
    param = torch.nn.Parameter(torch.zeros(300, 300))
    param.grad = torch.ones_like(param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heavyball.utils, "compile_mode", None)
        optimizer = function([param])
        optimizer.step()
    found = worker.traffic([param], optimizer.state, case.again, case.over_all)
    again = len(case.again) + len(case.over_all)
    assert found["passes"] - found["once"] == 4 * 90_000 * again


def test_the_middle_mean_leaves_the_outer_quarters_out():
    assert measure.middle_mean([100.0, 2.0, 4.0, 0.0]) == 3.0
    assert measure.middle_mean([5.0]) == 5.0


def test_ratios_and_distances_are_those_of_the_medians():
    result = measure.Result(
        cases.CHAINS["adamw"],
        "gpt-124M",
        times=[3.0, 1.0, 2.0],
        reference=[4.0, 4.0, 40.0],
        stream=[10.0, 10.0],
        once=10,
        passes=16,
    )
    assert result.ratio == 0.5
    assert result.over_floor(result.once) == 2.0
    assert report.verdict(result.ratio, 0.95) == "<= 0.95 reached"
    assert report.verdict(1.1, 1.0) == "<= 1.00 missed by 10.0%"
    # 2 s for what 16 bytes at 10 bytes per second allow in 1.6 s
    assert any("1.25 times the floor" in line for line in report.remarks([result]))


def test_steps_are_by_turns_and_grads_are_given_back():
    calls = []

    class Forgetful(torch.optim.SGD):
        def step(self):
            calls.append(all(p.grad is not None for g in self.param_groups for p in g["params"]))
            self.zero_grad()

    runs = [worker.Run(Forgetful, [(2,)], "float32") for _ in range(2)]
    times = worker.alternate(runs, steps=3, warmup=2)
    assert [len(found) for found in times] == [3, 3]
    assert calls == [True] * 10


def test_a_failing_process_says_its_last_line(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\ncat > /dev/null; echo first >&2; echo the reason >&2; exit 1\n")
    python.chmod(0o700)
    with pytest.raises(measure.MeasureError, match=r"^the reason$"):
        measure.ask({}, str(python))


def test_a_section_replaces_itself_and_nothing_else(tmp_path):
    path = tmp_path / "docs" / "measurements.md"
    report.write_section(path, "bench", "first")
    path.write_text(path.read_text() + "\nprose\n")
    report.write_section(path, "bench-peers", "others")
    report.write_section(path, "bench", "second")
    text = path.read_text()
    assert "first" not in text
    assert re.findall("second|prose|others", text) == ["second", "prose", "others"]
    path.write_text("<!-- bench -->")
    with pytest.raises(ValueError, match="neither"):
        report.write_section(path, "bench", "third")


def test_a_quick_run_prints_a_table_and_writes_its_section(tmp_path, monkeypatch):
    path = tmp_path / "measurements.md"
    command = ["--quick", "--set", "convnet", "--chain", "adamw", "--threads", "1"]
    command += ["--starts", "0", "--out", str(path)]
    kept = []
    monkeypatch.setattr(cli, "measure", lambda *a: kept.extend(measure.measure(*a)) or kept)
    done = CliRunner().invoke(cli.bench, command)
    assert done.exit_code == 0, done.output
    assert re.search(r"AdamW\s+3\s+\d+\.\d\d", done.output)
    text = path.read_text()
    assert "convnet: 62 tensors" in text
    assert "not a measurement" in text
    row = next(line for line in text.splitlines() if line.startswith("| AdamW"))
    assert row.count("|") == len(report.STEP_COLUMNS) + 1
    # once more with the same figures, which the second section shows instead of beside the first's
    monkeypatch.setattr(cli, "measure", lambda *a: kept)
    again = CliRunner().invoke(cli.bench, command)
    assert again.exit_code == 0, again.output
    text = path.read_text()
    assert text.count("<!-- bench -->") == text.count("\n## Steps") == 1


def test_first_steps_are_eager_then_cold_then_warm(monkeypatch):
    asked = []

    def ask(request, python="", env=None):
        folder = Path((env or {}).get("HEAVYBALL_CACHE", "."))
        asked.append((request["task"], request.get("eager", False), folder, any(folder.iterdir())))
        if folder != Path("."):
            (folder / "kernel").touch()
        return {"seconds": float(len(asked)), "bytes": 2**21}

    monkeypatch.setattr(measure, "ask", ask)
    result = measure.Result(cases.CHAINS["adamw"], "gpt", times=[1.0], reference=[2.0])
    measure.measure_starts(result, measure.Settings(threads=1, quick=True))
    assert [(task, eager) for task, eager, *_ in asked] == [
        ("first", True),
        ("first", False),
        ("first", False),
        ("memory", False),
    ]
    assert asked[1][2] == asked[2][2]
    assert [filled for *_, filled in asked[1:3]] == [False, True]
    assert (result.eager, result.cold, result.warm) == (1.0, 1.0, 2.0)
    missed = " ".join(report.remarks([result]))
    assert "2.00 MB of temporary" in missed
    assert "warm first step" in missed
    assert "cold" not in missed
    assert "AdamW" in report.rendered(report.starts_table([result], box.MARKDOWN))


def test_temporary_memory_is_that_of_the_step():
    held = 2**22

    class Greedy(torch.optim.SGD):
        def step(self):
            torch.ones(held)

    def greedy(params):
        return Greedy(params)

    found = worker.memory(greedy, [(2,)], "float32")["bytes"]
    if found is None:
        pytest.skip("the system keeps no high-water mark that can be reset")
    # the kernel counts pages in batches, per core
    assert found == pytest.approx(4 * held, abs=2**20)


def test_peers_need_their_environment(tmp_path):
    done = CliRunner().invoke(cli.bench, ["--peers", "--peers-python", str(tmp_path / "python")])
    assert done.exit_code == 2
    assert "make bench-peers" in done.output


def duel(ours, **options):
    theirs = cases.Case("Muon", "torch.optim:Muon", library="torch")
    case = cases.Case("ours", ours)
    return duels.Duel("try", case, theirs, {"gpt": 1.0}, **options)


def held(chosen):
    settings = measure.Settings(threads=1, quick=True)
    (outcome,) = duels.hold([chosen], ["gpt"], settings, lambda _: None)
    return outcome


def test_a_duel_is_two_processes_that_step_by_turns():
    outcome = held(duel("heavyball:SGD", period=2, matrices=True))
    assert not outcome.failure
    assert [len(times) for times in outcome.times] == [2, 2]
    assert outcome.versions == (heavyball.__version__, torch.__version__)
    # torch's Muon keeps one float32 momentum of every matrix, plain gradient descent only its step
    matrices = [s for s in shapes.shrunk(shapes.gpt()) if len(s) == 2]
    ours, theirs = outcome.state
    assert theirs == 4 * shapes.elements(matrices)
    assert ours < theirs / 10
    text = duels.section("Beside", ["command: x"], [outcome])
    assert f"torch {torch.__version__} Muon" in text


def test_a_duel_that_cannot_be_held_says_why():
    # torch's Muon takes matrices only
    outcome = held(duel("heavyball:SGD"))
    assert "2D" in outcome.failure
    assert outcome.failure in duels.section("Beside", [], [outcome])


def test_products_are_noted_and_done_again():
    a, b = torch.ones(3, 4), torch.ones(4, 5)
    noted = worker.Products()
    with noted:
        a @ b
        a + a
        torch.addmm(torch.ones(3, 5), a, b, beta=0.5)
    assert [product().shape for product in noted.again] == [(3, 5), (3, 5)]
    assert a.equal(torch.ones(3, 4))


def test_an_optimizer_that_takes_a_model_gets_the_parameters_themselves():
    params = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))]
    module = worker.module_of(params)
    assert all(a is b for a, b in zip(module.parameters(), params, strict=True))


def test_a_mean_counts_whole_periods_and_a_median_leaves_the_outlier_out():
    times = ([1.0, 1.0, 4.0], [2.0, 2.0, 2.0])
    assert duels.Outcome(duel("x"), "gpt", times=times).ratio == 0.5
    assert duels.Outcome(duel("x", period=3), "gpt", times=times).ratio == 1.0


def test_every_duel_is_for_a_shape_set_and_names_its_library():
    known = Path(cases.__file__).with_name("peers.txt").read_text()
    for chosen in duels.DUELS.values():
        assert set(chosen.goals) <= set(shapes.SETS)
        library = chosen.theirs.library
        pinned = any(f"\n{library.lower()}{sign}" in known for sign in ("==", " @ git+"))
        assert library == "torch" or pinned


def test_the_ways_to_keep_psgd_factors_are_measured_and_drawn(tmp_path):
    from benchmarks import psgd

    page = tmp_path / "page.md"
    options = ["--size", "24", "--size", "40", "--steps", "1", "--out", str(page)]
    done = CliRunner().invoke(psgd.main, [*options, "--assets", str(tmp_path)])
    assert done.exit_code == 0, done.output
    text = page.read_text()
    for size in (24, 40):
        triangle, full = size * (size + 1), 2 * size * size
        # numbers of four bytes, or of two
        for way, expected in (
            ("square matrices", 4 * full),
            ("lines (default)", 4 * triangle),
            ("lines, bfloat16", 2 * triangle),
            ("square matrices, cached", 8 * full),
            ("lines, cached", 4 * (triangle + full)),
            ("all diagonal", 8 * size),
        ):
            assert f"| {size} | {way} | {expected / 1e6:.3g} | {expected / 4 / full:.3f} |" in text
    assert all((tmp_path / f"psgd_{name}.png").stat().st_size > 5000 for name in ("memory", "time"))
