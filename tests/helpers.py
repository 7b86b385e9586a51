"""What the suites share: models and parameters, the optimizers that all are tried with, inputs of
golden values, runs that record, and comparisons whose bounds are counted in roundings.

Golden values have ten significant digits, and the inputs that they belong to have names here:

E  p = [[1, -2], [3, 4]], gradient at step t: cos(t (2i + j) + 0.5)
M  p[i, j] = sin(1 + 6i + j), 8 x 6, gradient cos(t (6i + j) + 0.5)
H  p as M, gradient sin(1 + 0.37 (6i + j + 7 (t - 1))^2)

All of them are float64, and their gradients do not depend on the parameter.
"""

import contextlib
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

import heavyball
from heavyball import chainable as C
from heavyball import utils
from heavyball.compiler.run.engine import Engine
from heavyball.compiler.run.plan import Plan
from heavyball.core.transform import CONTEXT, WHOLE_CONTEXT, WRITTEN_CONTEXT, Transform

# Whether this is `make test`, which runs a part of the cases.
QUICK = os.environ.get("HEAVYBALL_TESTS") == "quick"

# where the parameters of the suites are; `make test-cuda` says "cuda"
DEVICE = torch.device(os.environ.get("HEAVYBALL_TEST_DEVICE", "cpu"))


@pytest.fixture(scope="module", autouse=True)
def eager() -> Iterator[None]:
    """Run chains as written, without kernels, in a module that imports this."""
    before = getattr(utils, "compile_mode", None)
    utils.compile_mode = None
    yield
    utils.compile_mode = before


class Tiny(nn.Module):
    """A regression whose parameters have 2, 1, 0 and 3 dimensions."""

    def __init__(
        self, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device = DEVICE
    ):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in (("matrix", (4, 3)), ("vector", (4,)), ("kernel", (2, 3, 2))):
            values = 0.7 * torch.randn(shape, generator=generator, dtype=torch.float64)
            setattr(self, name, nn.Parameter(values.to(device, dtype)))
        self.number = nn.Parameter(torch.tensor(0.9, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(x @ self.matrix.T + self.vector).unflatten(-1, (2, 2))
        return self.number * torch.einsum("nac,abc->nb", hidden, self.kernel)


def batch(seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Inputs, and what another `Tiny` makes of them."""
    generator = torch.Generator().manual_seed(1000 + seed)
    x = torch.randn(16, 3, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        y = Tiny(seed=99, dtype=torch.float64, device=torch.device("cpu"))(x)
        return x.to(DEVICE, dtype), y.to(DEVICE, dtype)


def loss_of(model: nn.Module, seed: int = 0) -> Tensor:
    x, y = batch(seed, next(model.parameters()).dtype)
    return (model(x) - y).square().mean()


def fill_gradients(params: Iterable[Tensor], seed: int) -> None:
    """Give every parameter new normal gradients that depend on its place, its shape and `seed`."""
    for place, p in enumerate(params):
        generator = torch.Generator().manual_seed(10_000 * (seed + 1) + place)
        values = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.grad = values.to(p.device, p.dtype)


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Parameters of the given shapes, by default of those of `Tiny`, with normal values."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for shape in shapes or ((4, 3), (4,), (2, 3, 2), ()):
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        made.append(nn.Parameter(values.to(DEVICE, dtype)))
    return made


def one_step(opt: Any) -> Any:
    """One step, with a loss for a chain that reads one, and a closure for one that needs it."""
    if not isinstance(opt, C.ChainOpt):
        return opt.step()
    closure = {"closure": lambda: None} if opt.chain.perturbs else {}
    return opt.step(**closure, **({"loss": 1.0} if opt.chain.reads_loss else {}))


def train(opt: torch.optim.Optimizer, steps: Iterable[int], scheduler: Any = None) -> None:
    """One step for each seed in `steps`, every parameter with a gradient."""
    for seed in steps:
        fill_gradients(all_params(opt), seed)
        one_step(opt)
        if scheduler is not None:
            scheduler.step()


def all_params(opt: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in opt.param_groups for p in group["params"]]


def clones(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


def copies(params: Iterable[Tensor]) -> list[nn.Parameter]:
    """New parameters with the same values."""
    return [nn.Parameter(p.detach().clone()) for p in params]


def snapshot(opt: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of every parameter and of every state tensor, by place and name."""
    found = {}
    for place, p in enumerate(all_params(opt)):
        found[f"{place}"] = p.detach().clone()
        for key, value in opt.state.get(p, {}).items():
            found[f"{place}.{key}"] = value.detach().clone()
    return found


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def differences(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """The names under which two snapshots do not hold the same bits."""
    return [k for k in {**a, **b} if k not in a or k not in b or not same_bits(a[k], b[k])]


def assert_same(a: Iterable[Tensor], b: Iterable[Tensor]) -> None:
    """Two sequences of tensors hold the same bits."""
    pairs = list(zip(a, b, strict=True))
    wrong = [place for place, (x, y) in enumerate(pairs) if not same_bits(x, y)]
    assert not wrong, f"tensors {wrong} differ: {[pairs[place] for place in wrong]}"


def assert_same_optimizers(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    """Two optimizers hold the same bits in parameters and state, and the same groups."""
    wrong = differences(snapshot(a), snapshot(b))
    assert not wrong, f"differ in {wrong}"
    assert [plain_group(g) for g in a.param_groups] == [plain_group(g) for g in b.param_groups]


def plain_group(group: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in group.items() if k != "params"}


@dataclass(frozen=True)
class Case:
    """An optimizer that the suites try out.

    per_parameter: no parameter's step depends on another parameter.
    idle: entries of the group that have no effect as the optimizer is configured.
    skips: a step with a NaN in a gradient changes nothing.
    noisy: random numbers are drawn by a parameter's place in the optimizer.
    low: how the names of states begin that are asked to be held in bfloat16.
    still: states that a few steps may leave as they are.
    """

    name: str
    make: Callable[..., torch.optim.Optimizer]
    per_parameter: bool = True
    idle: tuple[str, ...] = ()
    skips: bool = False
    noisy: bool = False
    low: str = ""
    still: tuple[str, ...] = ()

    def __call__(self, params: Any, *args: Any, **options: Any) -> Any:
        return self.make(params, *args, **options)

    def __repr__(self) -> str:
        return self.name


# What a preset needs so that everything in it acts on a model this small.
PRESET_ARGUMENTS: dict[str, dict[str, Any]] = {
    "SGD": {"weight_decay": 0.1},
    "NAdam": {"weight_decay": 0.1},
    "RMSprop": {"weight_decay": 0.1},
    "LaProp": {"weight_decay": 0.1},
    "ADOPT": {"weight_decay": 0.1},
    "AdEMAMix": {"weight_decay": 0.1},
    "Lion": {"weight_decay": 0.1},
    "Focus": {"weight_decay": 0.1},
    "SFAdamW": {"weight_decay": 0.1},
    "PaLMSFAdamW": {"weight_decay": 0.1},
    "FactoredAdamW": {"min_dim": 2},
    **{
        name: {"weight_decay": 0.1}
        for name in (
            *("Adam", "RAdam", "Adagrad", "Adadelta", "Adamax", "ASGD", "Adafactor", "AdaBelief"),
            *("Adan", "Yogi", "NovoGrad", "Signum", "AdamS", "StableSPAM"),
        )
    },
    "LARS": {"weight_decay": 0.1, "momentum": 0.9, "trust_coefficient": 0.1},
    "PSGDKron": {"weight_decay": 0.1},
    "PSGDLRA": {"rank": 2, "precond_init_scale": 2.0},
    "Shampoo": {"weight_decay": 0.1, "eps": 0.01},
    "KLSOAP": {"precondition_frequency": 1},
    "APOLLO": {"rank": 2},
    "KLShampoo": {"precondition_frequency": 1},
    "SPlus": {"inverse_every": 1},
    "AdaGO": {"gamma": 0.1},
    "Prodigy": {"weight_decay": 0.1, "d0": 1e-2},
    **{name: {"reps": 0.1} for name in ("DoG", "LDoG")},
    "DoWG": {"eps": 0.1},
    **{name: {"d0": 0.1} for name in ("DAdaptAdam", "DAdaptSGD", "DAdaptLion")},
    "PrecondScheduleProdigySOAP": {"weight_decay": 0.1, "d0": 0.3},
    "ProdigyPlusScheduleFree": {"weight_decay": 0.1, "d0": 0.1},
}
# Entries that have no effect: PaLM's schedule stands in for beta2
PRESET_IDLE = {
    "SGD": ("dampening",),
    "RMSprop": ("dampening",),
    "LARS": ("dampening", "eps"),
    # a few steps are momentum alone
    "RAdam": ("betas[1]", "eps"),
    # the first step's size alone; bounds that are not reached
    "Rprop": ("lr", "warmup_steps", "step_sizes[0]", "step_sizes[1]"),
    "Adafactor": ("beta2", "momentum"),
    **{name: ("betas[1]",) for name in heavyball.PRESETS if "PaLM" in name},
    # the test model's matrices have no names, and are hidden
    "Scion": ("head_radius", "embedding_radius"),
    # half of infinity; what acts on d alone, one step later, or where d has moved
    "Prodigy": ("growth_rate",),
    "PrecondScheduleProdigySOAP": ("growth_rate", "d_coef"),
    "ProdigyPlusScheduleFree": ("d_coef", "threshold"),
    # where the first step begins; the growth that nothing has reached
    **dict.fromkeys(("DoG", "LDoG"), ("reps", "eps", "init_lr")),
    "DoWG": ("eps",),
    "DAdaptAdam": ("d0", "growth_rate"),
    "DAdaptSGD": ("d0", "growth_rate"),
    # m holds lr' g, and is little beside g
    "DAdaptLion": ("d0", "betas[0]"),
    # the first step's floor; its writer has no learning rate
    "COCOB": ("lr", "eps", "warmup_steps"),
}
# States that a few steps may leave as they are: the first weights, the d of the last step while d has
# not moved, and the largest so far.
PRESET_STILL = {"LDoG": ("dog_rate.r",), "COCOB": ("largest",)}


def _preset(name: str) -> Case:
    make = partial(heavyball.PRESETS[name], **PRESET_ARGUMENTS.get(name, {}))
    chain = make([nn.Parameter(torch.ones(2, 2))]).chain
    rates = any(
        node.transform.kind == "rate" for program in chain.programs for node in program.flat
    )
    return Case(
        name,
        make,
        idle=PRESET_IDLE.get(name, ()),
        noisy="PSGD" in name or name in ("Dion", "APOLLO", "APOLLOMini", "LATHER"),
        per_parameter=not rates and not chain.total_keys,
        still=("p0", "unit", *PRESET_STILL.get(name, ())),
    )


PRESETS = [*map(_preset, heavyball.PRESETS)]


def _variant(
    name: str,
    preset: str,
    *,
    noisy: bool = False,
    low: str = "",
    properties: dict[str, Any] | None = None,
    **arguments: Any,
) -> Case:
    make = partial(heavyball.PRESETS[preset], **arguments)
    return Case(name, make, noisy=noisy, low=low, **(properties or {}))


VARIANTS = [
    _variant("SGD-momentum", "SGD", momentum=0.9, dampening=0.1, weight_decay=0.1),
    _variant("SGD-nesterov", "SGD", momentum=0.9, nesterov=True, maximize=True),
    _variant("AdamW-amsgrad", "AdamW", amsgrad=True, caution=True, warmup_steps=3),
    _variant("RMSprop-centered", "RMSprop", momentum=0.9, centered=True),
    _variant(
        "PSGDKron-small",
        "PSGDKron",
        noisy=True,
        low="psgd_kron.",
        q_dtype="bfloat16",
        merge_dims=True,
        momentum_into_precond_update=False,
        max_size_triangular=3,
        precond_init_scale=2.0,
        preconditioner_update_probability=0.6,
        cached=True,
    ),
    _variant(
        "PSGDPRO-quad", "PSGDPRO", noisy=True, method="quad", split=True, max_size_triangular=3
    ),
    _variant(
        "ProdigyPlus-progress",
        "ProdigyPlusScheduleFree",
        properties={
            "per_parameter": False,
            "idle": ("d0", "d_coef"),
            "still": ("p0", "unit"),
        },
        use_speed="progress",
        weight_decay=0.1,
        d0=0.1,
    ),
    _variant("ADOPT-decouple", "ADOPT", decouple=True, weight_decay=0.1, mars=True),
]


def _custom(
    params: Any, lr: Any = 0.01, *, elements: tuple[Any, ...], **options: Any
) -> C.ChainOpt:
    return C.ChainOpt(params, lr, *elements, **options)


def _chain(name: str, *elements: Any, **properties: Any) -> Case:
    return Case(name, partial(_custom, elements=elements), **properties)


CHAINS = [
    _chain("cautious-ema", C.scale_by_adam, C.cautious, C.parameter_ema(beta=0.9)),
    _chain(
        "router",
        C.centralize,
        C.route(
            C.when(C.scale_by_lion, max_ndim=1),
            C.when(C.exp_avg, C.clip_by_norm, ndim=2),
            otherwise=C.scale_by_adam,
        ),
    ),
    _chain("graft", C.graft(C.exp_avg, C.scale_by_adam)),
    _chain("parallel", C.parallel([C.exp_avg, C.sign], C.scale_by_laprop, weights=(0.5, 1.5))),
    _chain("accumulate", C.accumulate(k=2), C.scale_by_adam),
    _chain(
        "guarded",
        C.skip_not_finite,
        C.clip_by_global_norm,
        C.scale_by_adam,
        C.parameter_ema(beta=0.9),
        per_parameter=False,
        skips=True,
    ),
    _chain(
        "two-global-clips",
        C.clip_by_global_norm(max_norm=2.0),
        C.scale_by_adam,
        C.clip_by_global_norm(max_norm=0.5),
        per_parameter=False,
    ),
    _chain(
        "mars-laprop",
        C.mars,
        C.scale_by_laprop(lr_in_momentum=True),
        C.independent(weight_decay=0.05),
    ),
    _chain(
        "stable",
        C.orthograd(single_element="passthrough"),
        C.stable_adamw,
        C.adamc(weight_decay=0.05),
    ),
    _chain("schedule-free-sign", C.exp_avg, C.sign, C.schedule_free(caution="cautious")),
    _chain(
        "psgd-schedule-free",
        C.mars,
        C.psgd_kron(decision="cumulative"),
        C.cautious,
        C.schedule_free,
        noisy=True,
    ),
    _chain(
        "psgd-routed",
        C.route(
            C.when(C.exp_avg, C.psgd_kron(delayed=True), min_ndim=2), otherwise=C.scale_by_adam
        ),
        C.clip_by_global_norm,
        per_parameter=False,
        noisy=True,
    ),
    _chain("shampoo", C.exp_avg, C.shampoo(beta2=0.9, precondition_frequency=2)),
    _chain("twice", C.exp_avg, C.exp_avg(beta=0.5), C.decay_to_ema(weight_decay=0.1)),
]
CASES = [*PRESETS, *VARIANTS, *CHAINS]
# One of each kind, for what is of the optimizer rather than of its chain.
_KINDS = ("SGD-momentum", "AdamW", "SFAdamW", "FactoredAdamW", "SOAP", "PSGDKron-small", "Muon")
_KINDS += ("ProdigyPlusScheduleFree", "router", "parallel", "accumulate", "guarded")
KINDS = [case for case in CASES if case.name in _KINDS]
assert len(KINDS) == len(_KINDS)

FORMATS: dict[str, dict[str, Any]] = {
    "storage bfloat16": {"storage_dtype": "bfloat16"},
    "storage float16": {"storage_dtype": "float16"},
    "storage 8bit": {"storage_dtype": "8bit"},
    "storage 4bit": {"storage_dtype": "4bit"},
    "storage rank1": {"storage_dtype": "rank1"},
    "storage bf16+8": {"ecc": "bf16+8"},
    "storage fp16+16": {"ecc": "fp16+16"},
    "storage param": {"param_ecc": "bf16+8", "ecc": "bf16+16"},
}


def _in_format(params: Any, *, options: dict[str, Any], **more: Any) -> C.ChainOpt:
    return heavyball.SFAdamW(params, **options, **more)


STORED = [Case(name, partial(_in_format, options=given)) for name, given in FORMATS.items()]

HEADS = (
    C.centralize,
    C.orthograd,
    C.mars,
    C.maximize,
    C.palm_beta2,
    C.skip_not_finite,
    C.accumulate(k=2),
    C.clip_by_global_norm(max_norm=0.5),
    C.adaptive_gradient_clip,
    C.coupled(weight_decay=0.05),
)
MIDDLES = (
    C.exp_avg,
    C.focus,
    C.heavyball_momentum,
    C.nesterov_momentum,
    C.scale_by_adam,
    C.scale_by_adam(amsgrad=True),
    C.scale_by_adopt,
    C.scale_by_ademamix,
    C.scale_by_laprop(centered=True),
    C.scale_by_lion,
    C.scale_by_nadam,
    C.scale_by_rms,
    C.factored_rms(min_dim=2),
    C.graft(C.exp_avg, C.scale_by_adam),
    C.parallel(C.scale_by_lion, (C.exp_avg, C.sign)),
    C.route(C.when(C.scale_by_adam_atan2, min_ndim=2), otherwise=C.exp_avg(beta=0.8)),
)
TAILS = (
    C.cautious,
    C.grams,
    C.trust_region,
    C.clip_update_rms,
    C.stable_adamw,
    C.parameter_ema(beta=0.9),
    C.decay_to_ema(weight_decay=0.1),
    C.adamc(weight_decay=0.1),
    C.schedule_free,
)


def random_chain(seed: int) -> Case:
    """A chain drawn at random, the same for the same seed in every process."""
    draw = random.Random(seed)
    while True:
        parts = ((HEADS, 2), (MIDDLES, 2), (TAILS, 2))
        elements = tuple(e for few, most in parts for e in draw.sample(few, draw.randint(0, most)))
        try:
            C.ChainOpt(parameters((2, 2)), 0.01, *elements)
        except ValueError:  # elements that cannot stand together
            continue
        return _chain(f"random-{seed}", *elements)


def drawn(name: str, count: int, *choices: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """Random picks of each of the choices, others for every name and the same in every run."""
    draw = random.Random(name)
    for _ in range(count):
        yield tuple(draw.choice(each) for each in choices)


def made_plans(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """The plans that engines make from now on, in order."""
    plans: list[Plan] = []
    make = Engine.make

    def noted(*args: Any) -> Plan:
        plans.append(make(*args))
        return plans[-1]

    monkeypatch.setattr(Engine, "make", noted)
    return plans


def averages(opt: Any) -> bool:
    """Whether the optimizer evaluates at other weights than those it trains."""
    return "train_mode" in opt.defaults


def live_keys(opt: torch.optim.Optimizer) -> list[str]:
    """The hyper-parameters of a group, floats and tuples of floats: all may change at any step."""
    return [k for k, v in opt.defaults.items() if isinstance(v, (float, tuple))]


def changed_values(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Other values of a hyper-parameter, one for each number it holds, far enough to be felt."""
    if isinstance(value, tuple):
        for index, number in enumerate(value):
            for _, other in changed_values(key, number):
                yield f"{key}[{index}]", (*value[:index], other, *value[index + 1 :])
    elif key == "eps" or key.endswith(".eps"):
        yield key, 10.0
    elif key == "warmup_steps":
        yield key, 100.0
    elif key == "max_rms":  # above what is found here
        yield key, value / 100
    elif key.startswith("beta") and value > 0.9:
        yield key, 0.9
    else:
        yield key, 2 * value if value > 1 else value / 2 if value else 0.5


EPS = 2.0**-53  # the unit roundoff of float64
SHAPES = ((), (5,), (3, 4), (2, 3, 2, 2))
Make = Callable[[list[Tensor]], torch.optim.Optimizer]
Path = list[list[Tensor]]


def examples(count: int) -> settings:
    """Hypothesis without a clock, a database or a random seed: every run is the same."""
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


# ---- inputs


def grid(rows: int, cols: int, width: int) -> Tensor:
    """`width` i + j."""
    i = torch.arange(rows, dtype=torch.float64)[:, None]
    return width * i + torch.arange(cols, dtype=torch.float64)


def e_start() -> Tensor:
    return torch.tensor([[1.0, -2.0], [3.0, 4.0]], dtype=torch.float64)


def e_grads(steps: int) -> list[Tensor]:
    return [torch.cos(t * grid(2, 2, 2) + 0.5) for t in range(1, steps + 1)]


def m_start() -> Tensor:
    return torch.sin(1 + grid(8, 6, 6))


def m_grads(steps: int) -> list[Tensor]:
    return [torch.cos(t * grid(8, 6, 6) + 0.5) for t in range(1, steps + 1)]


def h_grads(steps: int) -> list[Tensor]:
    return [torch.sin(1 + 0.37 * (grid(8, 6, 6) + 7 * (t - 1)) ** 2) for t in range(1, steps + 1)]


def summary(p: Tensor) -> Tensor:
    """What the golden values give of a matrix: p[0, 0], p[3, 2], the last, sum, sum of squares."""
    return torch.stack([p[0, 0], p[3, 2], p[-1, -1], p.sum(), p.square().sum()])


def starts(shapes: Sequence[tuple[int, ...]] = SHAPES, seed: int = 0) -> list[Tensor]:
    """Random float64 parameters."""
    made = torch.Generator().manual_seed(1000 + seed)
    return [torch.randn(shape, dtype=torch.float64, generator=made) for shape in shapes]


def gradients(
    steps: int, shapes: Sequence[tuple[int, ...]] = SHAPES, seed: int = 0, least: float = 0.0
) -> list[list[Tensor]]:
    """Random float64 gradients per step and parameter, whose size changes from step to step.

    least: no entry is smaller than that times the size of its step.
    """
    made = torch.Generator().manual_seed(seed)

    def one(shape: tuple[int, ...], size: float) -> Tensor:
        draw = torch.randn(shape, dtype=torch.float64, generator=made)
        return size * (draw + least * draw.sign())

    sizes = (1.0, 3.0, 0.3, 1.5)
    return [[one(shape, sizes[t % 4]) for shape in shapes] for t in range(steps)]


def of_one(grads: Sequence[Tensor]) -> list[list[Tensor]]:
    """A sequence of gradients as that of an optimizer with one parameter."""
    return [[g] for g in grads]


# ---- running


def chain(*transforms: object, lr: float = 0.1, **options: object) -> Make:
    """How to make our optimizer, for `walk`."""
    return lambda params: C.ChainOpt(params, lr, *transforms, **options)


def chain_of(t: Transform) -> tuple[object, ...]:
    """A chain in which a transform of the library does something."""
    if isinstance(t, C.Rate):
        return (t,) if t.kind == "writer" else (t, C.scale_by_adam)
    known = {*CONTEXT, *WHOLE_CONTEXT, *WRITTEN_CONTEXT, "total"}
    missing = [n for n in t.context if n not in known]
    before = [
        other
        for other in C.TRANSFORMS.values()
        if set(missing) & {*other.provides, *getattr(other, "opaque", ())}
    ]
    if missing and isinstance(before[0], C.Whole):
        return (C.within(before[0], C.exp_avg, leave=t),)
    if t.kind == "decay":
        return (C.exp_avg, *before[:1], t(weight_decay=0.1) if "weight_decay" in t.hyper else t)
    if t.kind == "post":
        return (C.exp_avg, anywhere(t(weight_decay=0.1) if "weight_decay" in t.hyper else t))
    if t.kind in ("writer", "observer"):
        return (C.exp_avg, *before[:1], t)
    asking = [
        other
        for other in C.TRANSFORMS.values()
        if t.rules.modifier and set(t.provides) & set(other.context + other.optional)
    ]
    t = t(rank=1) if "rank" in t.options and t.rules.requires else t
    element = anywhere(t) if t.rules.requires else t
    return (*before[:1], element, *asking[:1], *([] if t.states or asking else [C.exp_avg]))


# By the name of a mistake: the transform, how it is made wrong, and the tests that must notice. Tests of
# transforms plant theirs with `mutant`.
Wrong = Callable[..., Any]
MUTANTS: dict[str, tuple[str, Callable[[Wrong], Wrong], tuple[Callable[[], object], ...]]] = {}


def mutant(name: str, *tests: Callable[[], object]) -> Callable:
    """Register a wrong version of a transform: a function of the right one, and who must notice."""

    def register(make: Callable[[Wrong], Wrong]) -> Callable:
        MUTANTS[make.__name__] = name, make, tests
        return make

    return register


def anywhere(element: Transform) -> object:
    """A transform for the shapes that it takes; the update passes for others."""
    requires, options = element.rules.requires, element.options
    if requires is None:
        return element
    fits = C.when(element, predicate=lambda name, param: requires(param.shape, options) is None)
    return C.route(fits, otherwise=())


def walk(
    make: Make,
    begin: Sequence[Tensor],
    grads: Sequence[Sequence[Tensor | None]],
    before: Callable[[torch.optim.Optimizer, int], None] | None = None,
) -> Path:
    """Step an optimizer through given gradients; the parameters after every step."""
    params = [torch.nn.Parameter(p.clone()) for p in begin]
    optimizer = make(params)
    if hasattr(optimizer, "train"):
        optimizer.train()
    path = []
    for t, step in enumerate(grads, start=1):
        for p, g in zip(params, step, strict=True):
            p.grad = None if g is None else g.clone()
        if before is not None:
            before(optimizer, t)
        one_step(optimizer)
        path.append([p.detach().clone() for p in params])
    return path


def set_lr(rates: Sequence[float]) -> Callable[[torch.optim.Optimizer, int], None]:
    """For `walk`: the learning rate of every step."""

    def before(optimizer: torch.optim.Optimizer, t: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rates[t - 1]

    return before


def updates(
    elements: Sequence[object],
    grads: Sequence[Tensor],
    start: Tensor | None = None,
    lr: float = 0.1,
    rates: Sequence[float] | None = None,
) -> list[Tensor]:
    """What comes out of `elements` at every step, taken right before the write."""
    param = torch.nn.Parameter((torch.zeros_like(grads[0]) if start is None else start).clone())
    optimizer = C.ChainOpt([param], lr, *elements, reveal)
    seen = []
    for t, g in enumerate(grads, start=1):
        param.grad = g.clone()
        if rates is not None:
            set_lr(rates)(optimizer, t)
        one_step(optimizer)
        seen.append(optimizer.state[param]["reveal"].clone())
    return seen


def states(
    elements: Sequence[object], grads: Sequence[Tensor], start: Tensor | None = None
) -> dict[str, Tensor]:
    """The state of one parameter after the gradients."""
    param = torch.nn.Parameter(torch.zeros_like(grads[0]) if start is None else start.clone())
    optimizer = C.ChainOpt([param], 0.1, *elements)
    for g in grads:
        param.grad = g.clone()
        one_step(optimizer)
    return dict(optimizer.state[param])


@contextlib.contextmanager
def double_default() -> Iterator[None]:
    """torch keeps some scalars of its optimizers in the default dtype: NAdam its product of mu."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


# ---- transforms for tests


@C.transform(reveal=C.zeros)
def reveal(update: Tensor, reveal: Tensor) -> tuple[Tensor, Tensor]:
    """u itself, kept as state for a test to look at."""
    return update, update


@C.transform()
def param_as_update(update: Tensor, *, param: Tensor) -> Tensor:
    """p in place of u, so that a test can choose the update and the gradient."""
    return param


@C.transform(provides=("scheduled_beta2",))
def fixed_beta2(update: Tensor, *, beta2: float = 0.99) -> tuple[Tensor, Tensor]:
    """Second moments without any bias correction: u itself, and a schedule that never changes."""
    return update, torch.as_tensor(beta2, dtype=torch.float64)


# ---- other formulations


def weighted_mean(xs: Sequence[Tensor], beta: float) -> Tensor:
    """sum_i beta^(t-i) x_i / sum_i beta^(t-i), as two explicit sums."""
    weights = [beta ** (len(xs) - i) if len(xs) > i else 1.0 for i in range(1, len(xs) + 1)]
    return sum(w * x for w, x in zip(weights, xs, strict=True)) / sum(weights)


def decayed_sum(xs: Sequence[Tensor], beta: float) -> Tensor:
    """sum_i beta^(t-i) x_i."""
    return sum(beta ** (len(xs) - i) * x for i, x in enumerate(xs, start=1))


def prefixes(xs: Sequence[Tensor]) -> list[list[Tensor]]:
    """[x_1], [x_1, x_2], ..."""
    return [list(xs[:t]) for t in range(1, len(xs) + 1)]


# The denominators made of an unbiased second moment v, with bias = 1 - beta2^t. The last is
# sqrt(bias) / (sqrt(bias v) + eps) of the end of section 2 of the Adam paper.
ROOTS = {
    "outside": lambda v, eps, bias: v.sqrt() + eps,
    "maximum": lambda v, eps, bias: v.sqrt().clamp(min=eps),
    "inside": lambda v, eps, bias: (v + eps**2).sqrt(),
    "biased": lambda v, eps, bias: ((bias * v).sqrt() + eps) / bias**0.5,
}


# ---- comparing


def close(actual: Tensor, expected: Tensor, *, atol: float, rtol: float = 0.0) -> None:
    """assert_close with bounds that the caller has derived."""
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)


def bound(
    steps: int, *, lr: float = 0.1, update: float = 10.0, param: float = 10.0, beta: float = 0.0
) -> float:
    """How far two float64 evaluations of the same recurrence may be apart after `steps`.

    An update is made with fewer than 40 roundings and is not larger than `update`. Where it divides
    by 1 - beta^t, one rounding of the power counts 1 / (1 - beta) times at most. The write takes
    fewer than 4 roundings of numbers up to `param`. The gradients do not depend on the parameter,
    so that errors add up and do not grow.
    """
    return steps * EPS * (40 * lr * update / (1 - beta) + 4 * param)


def same_path(actual: Path, expected: Path, atol: float, rtol: float = 0.0) -> None:
    """Every parameter agrees after every step."""
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            close(a, b, atol=atol, rtol=rtol)


def moves(path: Path, begin: Sequence[Tensor]) -> bool:
    """Whether every parameter changes at every step: two that stand still would agree as well."""
    return all(
        not torch.equal(a, b)
        for old, new in pairwise([list(begin), *path])
        for a, b in zip(old, new, strict=True)
    )


def golden(text: str) -> list[Tensor]:
    """Lists of numbers separated by |, as printed with ten significant digits."""
    parts = [re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", part) for part in text.split("|")]
    return [torch.tensor([float(x) for x in part], dtype=torch.float64) for part in parts]


def matches_golden(actual: Sequence[Tensor], text: str, roundings: float = 5e-15) -> None:
    """Half a unit in the tenth digit; `roundings` for entries near 0 that are differences of larger
    numbers (a parameter of size 4 carries 4.4e-16 per step)."""
    expected = golden(text)
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        close(a.flatten(), b, rtol=5e-10, atol=roundings)


def golden_path(
    make: Make, steps: int, before: Callable[[torch.optim.Optimizer, int], None] | None = None
) -> list[Tensor]:
    """The parameter of input E after every step."""
    return [p for (p,) in walk(make, [e_start()], of_one(e_grads(steps)), before)]


# ---- conditions in kernels

# of the update u, a condition c of its shape and a live number s: what the update becomes
CONDITIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "times": lambda u, c, s: u * (1 - s * c),
    "times number": lambda u, c, s: c * s * u,
    "plus": lambda u, c, s: u * (c + s),
    "minus": lambda u, c, s: u - (s * c - 0.25),
    "divided": lambda u, c, s: u + c / s,
    "divides": lambda u, c, s: u + s / (c + s),
    "power": lambda u, c, s: u * s**c,
    "raised": lambda u, c, s: u * c**s,
    "maximum": lambda u, c, s: u * torch.maximum(c, s),
    "minimum": lambda u, c, s: u + torch.minimum(s, c),
    "where": lambda u, c, s: u * torch.where(c, s, 1.0),
    "where of numbers": lambda u, c, s: u * torch.where(c, 2 * s, 1 - s),
    "where of elements": lambda u, c, s: torch.where(c, s, u),
    "less": lambda u, c, s: u * (c < s),
    "not less": lambda u, c, s: u + (s >= c),
    "equal": lambda u, c, s: u + (c == s) + (s != c),
    "greater": lambda u, c, s: u * (c > s) + (s <= c),
    "and": lambda u, c, s: u * (c & (s > 0.25)),
    "logical and": lambda u, c, s: u * torch.logical_and(c, s),
    "logical or": lambda u, c, s: u * torch.logical_or(c, s - s),
    "either": lambda u, c, s: u * (c ^ (s > 0.25)) + torch.logical_xor(c, s),
    "not": lambda u, c, s: u * ~c + torch.logical_not(s) + torch.logical_not(u),
    "sum": lambda u, c, s: u + s * c.sum() / 100,
    "mean": lambda u, c, s: u + (s * c).mean() + c.double().mean() * s,
    "any": lambda u, c, s: u * (c.any() + s) + c.all() * s,
    "whole numbers": lambda u, c, s: u * (2 * c + 1) * s - (c * 3 + c) % 3,
    "signs": lambda u, c, s: u + (-(s * c)).abs() + torch.sign(c * s),
    "roots": lambda u, c, s: u * torch.exp(-s * c) + torch.sqrt(c * s),
    "angle": lambda u, c, s: torch.atan2(c * s, u.abs() + 1),
    "remainder": lambda u, c, s: u + (c + s) % 0.4 + (c + 0.3) % s,
    "bounds": lambda u, c, s: u * (c * s).clamp(min=0.1, max=0.3) + torch.clamp(c * 1.0, max=s),
    "arithmetic": lambda u, c, s: u + (c + (u > 0)) * s + c * (u < 0),
    "casts": lambda u, c, s: u * c.double() * s + c.to(u.dtype) * s + (c * s).to(u.dtype),
    "spread": lambda u, c, s: u * s.expand_as(u) * c,
    "moved": lambda u, c, s: torch.lerp(u, u * c, (s * c).to(u.dtype)),
}


def conditional(*names: str):
    """The sum of what some of them make, as one transform."""

    @C.transform(previous=C.zeros)
    def chosen(update, previous, *, grad, strength: C.Live = 0.3):
        condition = grad * previous < 0
        return sum(CONDITIONS[name](update, condition, strength) for name in names), grad

    return chosen


def modifies(transform: Any) -> bool:
    """Whether a transform changes another behind it, so that it cannot stand in a chain alone."""
    return transform.rules.modifier and transform.kind == "transform"
