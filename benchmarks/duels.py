"""Two optimizers of equal task by turns, each in a process of its own."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.table import Table

from benchmarks.cases import COLLECTION, ORIGINAL, Case
from benchmarks.measure import WORKER, MeasureError, Settings, environment
from benchmarks.report import rendered, verdict
from benchmarks.shapes import SETS, Shapes, elements
from heavyball import chainable as C

# a worker's threads spin for a moment after a step, in which they would be in the other's way
PAUSE = 0.01
WARMUP = 3
MEMORY_STEPS = 3

COLUMNS = (
    "ours",
    "beside",
    "steps",
    "ours ms",
    "theirs ms",
    "ratio",
    "goal",
    "longest over mean",
    "first step s, ours",
    "theirs",
    "temporary MB, ours",
    "theirs",
    "state MB, ours",
    "theirs",
    "over its products",
)
EXPLANATION = """\
Each row is two processes that alternate on parameters of the same shapes, with new normal gradients in \
every step, after a few untimed steps. "ms" is the median; for optimizers with periodic work it is the \
mean over whole periods, and "longest over mean" is the longest step relative to it. "Temporary" is the \
peak of memory during a step, minus what was resident before it. "Over its products" is the time of a \
step relative to its matrix products alone, which alternate with the steps."""


def muon_everywhere(params: Any, **options: Any) -> C.ChainOpt:
    """Muon without a router, for matrices only."""
    return C.ChainOpt(params, 0.02, C.muon(**options))


def apollo_everywhere(params: Any, **options: Any) -> C.ChainOpt:
    """APOLLO without a router, for matrices only."""
    return C.ChainOpt(params, 0.01, C.apollo(**options))


def adam_mini(params: Any) -> C.ChainOpt:
    """Adam with one second moment for each tensor."""
    return C.ChainOpt(params, 1e-3, C.scale_by_adam(square="tensor"), weight_decay=0.1)


def sink_sgd(params: Any) -> C.ChainOpt:
    """SinkGD with a momentum."""
    return C.ChainOpt(params, 1e-3, C.exp_avg(beta=0.9, correct_bias=False), C.sinkhorn_normalize)


def dion_everywhere(params: Any, **options: Any) -> C.ChainOpt:
    """Dion without a router, for matrices only."""
    return C.ChainOpt(params, 0.01, C.dion(**options), weight_decay=0.01)


@dataclass(frozen=True)
class Duel:
    """Two optimizers and what is expected of the first beside the second.

    period: steps after which both have done everything once; above 1 times are means, not medians.
    steps: of each, a multiple of the period.
    products: whether the first is a matter of matrix products.
    matrices: whether only the tensors with two dimensions take part.
    """

    name: str
    ours: Case
    theirs: Case
    goals: Mapping[str, float | None]
    steps: int = 20
    period: int = 1
    products: bool = False
    matrices: bool = False

    def shapes(self, name: str, settings: Settings) -> Shapes:
        """What both step."""
        found = settings.shapes(name)
        return [s for s in found if len(s) == 2] if self.matrices else found


@dataclass
class Outcome:
    """What a duel gave on one shape set: seconds and bytes, ours and theirs."""

    duel: Duel
    name: str
    times: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    first: tuple[float, float] = (0.0, 0.0)
    temporary: tuple[int | None, int | None] = (None, None)
    state: tuple[int, int] = (0, 0)
    products: list[float] = field(default_factory=list)
    versions: tuple[str, str] = ("", "")
    failure: str = ""

    def cost(self, side: int) -> float:
        """Seconds of a step: the median, or the mean over whole periods."""
        times = self.times[side]
        return statistics.fmean(times) if self.duel.period > 1 else statistics.median(times)

    @property
    def ratio(self) -> float:
        return self.cost(0) / self.cost(1)


def _soap(**options: Any) -> dict[str, Any]:
    return {"precondition_frequency": 10, "merge_dims": False, **options}


def _duels() -> Iterator[Duel]:
    target = "benchmarks.duels:muon_everywhere"
    full = Case("Muon, products in float32", target, {"products": "full"})
    others = (
        (Case("Muon", "torch.optim:Muon", library="torch"), 0.40),
        (
            Case(
                "Muon", "pytorch_optimizer:Muon", {"group": {"use_muon": True}}, library=COLLECTION
            ),
            0.45,
        ),
    )
    for side, (theirs, goal) in zip(("torch", "collection"), others, strict=True):
        for ending, ours in (("", Case("Muon", target)), ("-full", full)):
            yield Duel(
                f"muon-{side}{ending}",
                ours,
                theirs,
                {"gpt": goal},
                steps=12,
                products=True,
                matrices=True,
            )
    soap = Case("SOAP", "heavyball:SOAP", _soap(max_precond_dim=2048))
    limit = _soap(max_precondition_dim=2048)
    theirs = Case("SOAP", "pytorch_optimizer:SOAP", limit, library=COLLECTION)
    goals = {"gpt": 0.75, "convnet": 0.75}
    yield Duel("soap-collection", soap, theirs, goals, steps=20, period=10)
    spread = _soap(max_precond_dim=2048, spread_refreshes=True)
    spread_soap = Case("SOAP, refreshes spread", "heavyball:SOAP", spread)
    yield Duel("soap-spread", spread_soap, theirs, goals, steps=20, period=10)
    limit = _soap(max_precond_dim=2048, use_precond_schedule=False)
    theirs = Case("SOAP", "heavyball:SOAP", limit, library=ORIGINAL)
    goals = {"gpt": 0.5, "convnet": 0.5}
    yield Duel("soap-original", soap, theirs, goals, steps=20, period=10)
    still = _soap(precondition_frequency=10**6, max_precond_dim=2048)
    other_still = _soap(precondition_frequency=10**6, max_precondition_dim=2048)
    yield Duel(
        "soap-still",
        Case("SOAP, no refresh", "heavyball:SOAP", still),
        Case("SOAP, no refresh", "pytorch_optimizer:SOAP", other_still, library=COLLECTION),
        {},
        steps=8,
        products=True,
    )
    for label, probability in (("always", 1.0), ("late", 0.03)):
        ours = Case(
            f"PSGDKron, updates {label}",
            "heavyball:PSGDKron",
            {"preconditioner_update_probability": probability, "stochastic_schedule": False},
        )
        period, steps = (1, 10) if probability == 1 else (33, 33)
        for library, target, name in (
            (ORIGINAL, "heavyball:PSGDKron", "preconditioner_update_probability"),
            (COLLECTION, "pytorch_optimizer:Kron", "pre_conditioner_update_probability"),
        ):
            arguments = {name: probability}
            if library == COLLECTION:
                arguments["max_size_triangular"] = 2048
            theirs = Case(ours.label, target, arguments, library=library)
            goals = {"gpt": 0.5, "convnet": 0.5}
            side = "original" if library == ORIGINAL else "collection"
            yield Duel(f"kron-{label}-{side}", ours, theirs, goals, steps, period)
    yield from _memory_savers()
    yield from _prodigies()


def _memory_savers() -> Iterator[Duel]:
    came = Case("CAME", "pytorch_optimizer:CAME", library=COLLECTION)
    yield Duel("came", Case("CAME", "heavyball:CAME"), came, {"gpt": 0.5})
    ranks = {"rank": 128, "scale": 1.0, "update_proj_gap": 200, "projection_type": "std"}
    apollo = Case(
        "APOLLO, rank 128",
        "pytorch_optimizer:APOLLO",
        {"scale_type": "channel", "group": ranks},
        library=COLLECTION,
    )
    ours = Case(apollo.label, "benchmarks.duels:apollo_everywhere", {"rank": 128})
    yield Duel("apollo", ours, apollo, {"gpt": 0.5}, matrices=True)
    label = "Adam-mini, a number for each tensor"
    mini = Case(
        label, "pytorch_optimizer:AdamMini", {"lr": 1e-3, "model": True}, library=COLLECTION
    )
    yield Duel("adam-mini", Case(label, "benchmarks.duels:adam_mini"), mini, {"gpt": 0.5})
    sink = Case("SinkSGD", "adv_optm:SinkSGD_adv", {"momentum": 0.9}, library="adv_optm")
    ours = Case("SinkGD", "benchmarks.duels:sink_sgd")
    yield Duel("sinkgd", ours, sink, {"gpt": 0.5}, matrices=True)
    rank = {"rank": 128}
    dion = Case("Dion, rank 128", "dion:DionSimple", {"lr": 0.01, **rank}, library="dion")
    ours = Case(dion.label, "benchmarks.duels:dion_everywhere", rank)
    yield Duel("dion", ours, dion, {"gpt": None}, products=True, matrices=True)


def _prodigies() -> Iterator[Duel]:
    library, target = "prodigy-plus-schedule-free", "prodigyplus:ProdigyPlusScheduleFree"
    for label, arguments, goals in (
        ("defaults", {}, {"gpt": 0.20, "many-small": 0.12}),
        ("factored=False", {"factored": False}, {"gpt": 0.25, "many-small": 0.25}),
    ):
        ours = Case(
            f"ProdigyPlusScheduleFree, {label}", "heavyball:ProdigyPlusScheduleFree", arguments
        )
        theirs = Case(ours.label, target, arguments, library=library)
        yield Duel(f"prodigy-plus-{label.partition('=')[0]}", ours, theirs, goals)
    theirs = Case("Prodigy", "prodigyopt:Prodigy", library="prodigyopt")
    both = {"gpt": 0.40, "many-small": 0.40}
    yield Duel("prodigy", Case("Prodigy", "heavyball:Prodigy"), theirs, both)


DUELS: dict[str, Duel] = {duel.name: duel for duel in _duels()}


class Partner:
    """A worker process that holds one optimizer and steps it when asked."""

    def __init__(self, case: Case, shapes: Shapes, settings: Settings):
        python = "" if case.library in ("heavyball", "torch") else settings.peers_python
        request = {
            "task": "turns",
            "target": case.target,
            "arguments": dict(case.arguments),
            "library": case.library,
            "shapes": shapes,
            "dtype": case.dtype,
            "threads": settings.threads,
            "device": settings.device,
        }
        self._process = subprocess.Popen(
            [python or sys.executable, "-P", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=dict(environment(python, {})),
        )
        self.version = self.ask(json.dumps(request))["library"]

    def ask(self, line: str) -> dict[str, Any]:
        """Send a line and wait for the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        for answer in self._process.stdout:
            if answer.strip():
                return json.loads(answer)
        complaint = self._process.communicate()[1].strip().splitlines()
        raise MeasureError(complaint[-1] if complaint else "the process ended")

    def seconds(self, what: str = "step") -> float:
        """How long it took, when nobody else computes."""
        time.sleep(PAUSE)
        return self.ask(what)["seconds"]

    def end(self) -> None:
        """Stop the process."""
        self._process.kill()
        self._process.communicate()


def hold(
    duels: Sequence[Duel], sets: Sequence[str], settings: Settings, say: Callable[[Outcome], None]
) -> list[Outcome]:
    """Every duel on every shape set that it is for; a failure is part of its outcome."""
    found = []
    for duel in duels:
        for name in duel.goals or ("gpt",):
            if name in sets:
                outcome = Outcome(duel, name)
                try:
                    _meet(outcome, settings)
                except MeasureError as error:
                    outcome.failure = str(error)
                say(outcome)
                found.append(outcome)
    return found


def _meet(outcome: Outcome, settings: Settings) -> None:
    duel = outcome.duel
    shapes = duel.shapes(outcome.name, settings)
    partners: list[Partner] = []
    try:
        for case in (duel.ours, duel.theirs):
            partners.append(Partner(case, shapes, settings))
        ours, theirs = partners
        outcome.versions = ours.version, theirs.version
        outcome.first = ours.seconds(), theirs.seconds()
        steps = duel.period if settings.quick else settings.steps or duel.steps
        steps = -(-steps // duel.period) * duel.period
        for number in range((1 if settings.quick else WARMUP) + steps):
            for partner, times in zip(partners, outcome.times, strict=True):
                taken = partner.seconds()
                if number >= (1 if settings.quick else WARMUP):
                    times.append(taken)
        if duel.products:
            ours.ask("note")
            outcome.products = [ours.seconds("products") for _ in range(max(3, steps // 2))]
        outcome.state = ours.ask("state")["bytes"], theirs.ask("state")["bytes"]
        most = [[p.ask("memory")["bytes"] for _ in range(MEMORY_STEPS)] for p in partners]
        outcome.temporary = tuple(None if None in m else max(m) for m in most)  # type: ignore[assignment]
    finally:
        for partner in partners:
            partner.end()


def table(outcomes: Sequence[Outcome], style: box.Box) -> Table:
    """One row per duel."""
    made = Table(*COLUMNS, box=style)
    for outcome in outcomes:
        theirs = outcome.duel.theirs
        beside = f"{theirs.library} {outcome.versions[1]} {theirs.label}"
        cells = ("failed",) if outcome.failure else _cells(outcome)
        made.add_row(outcome.duel.ours.label, beside, *cells)
    return made


def _cells(outcome: Outcome) -> Iterator[str]:
    times = outcome.times[0]
    yield str(len(times))
    yield from (f"{1e3 * outcome.cost(side):.1f}" for side in (0, 1))
    yield f"{outcome.ratio:.3f}"
    yield verdict(outcome.ratio, outcome.duel.goals.get(outcome.name))
    yield f"{max(times) / statistics.fmean(times):.2f}"
    yield from (f"{seconds:.2f}" for seconds in outcome.first)
    for sizes in (outcome.temporary, outcome.state):
        yield from ("not known" if size is None else f"{size / 2**20:.1f}" for size in sizes)
    if outcome.products:
        yield f"{outcome.cost(0) / statistics.median(outcome.products):.2f}"
    else:
        yield "-"


def section(heading: str, facts: Sequence[str], outcomes: Sequence[Outcome]) -> str:
    """The section of a document for a run."""
    parts = [f"## {heading}", "\n".join(f"- {fact}" for fact in facts), EXPLANATION]
    for name in SETS:
        found = [o for o in outcomes if o.name == name]
        if found:
            shapes = SETS[name]()
            parts.append(f"### {name}: {len(shapes)} tensors, {elements(shapes):,} elements")
            parts.append(rendered(table(found, box.MARKDOWN)))
    failed = [f"- {o.duel.name} on {o.name}: failed, {o.failure}" for o in outcomes if o.failure]
    return "\n\n".join([*parts, "\n".join(failed)]).rstrip()
