"""Small models, chains and comparisons that the suites share."""

import os
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import heavyball
from heavyball import chainable as C

# where the parameters of the suites are; `make test-cuda` says "cuda"
DEVICE = torch.device(os.environ.get("HEAVYBALL_TEST_DEVICE", "cpu"))


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


def train(opt: torch.optim.Optimizer, steps: Iterable[int], scheduler: Any = None) -> None:
    """One step for each seed in `steps`, every parameter with a gradient."""
    for seed in steps:
        fill_gradients(all_params(opt), seed)
        opt.step()
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
    "PSGDKron": {"weight_decay": 0.1},
    "PSGDLRA": {"rank": 2, "precond_init_scale": 2.0},
    "Shampoo": {"weight_decay": 0.1, "eps": 0.01},
    "Prodigy": {"weight_decay": 0.1, "d0": 1e-2},
    "PrecondScheduleProdigySOAP": {"weight_decay": 0.1, "d0": 0.3},
    "ProdigyPlusScheduleFree": {"weight_decay": 0.1, "d0": 0.1},
}
# one d for all parameters
PRESET_TOGETHER = ("Prodigy", "ProdigyPlusScheduleFree", "PrecondScheduleProdigySOAP")
# PaLM's schedule stands in for beta2
PRESET_IDLE = {
    "SGD": ("dampening",),
    "RMSprop": ("dampening",),
    **{name: ("betas[1]",) for name in heavyball.PRESETS if "PaLM" in name},
    # half of infinity; what acts on d alone, one step later, or where d has moved
    "Prodigy": ("growth_rate",),
    "PrecondScheduleProdigySOAP": ("growth_rate", "d_coef"),
    "ProdigyPlusScheduleFree": ("d_coef", "threshold"),
}
PRESETS = [
    Case(
        name,
        partial(preset, **PRESET_ARGUMENTS.get(name, {})),
        idle=PRESET_IDLE.get(name, ()),
        noisy="PSGD" in name,
        per_parameter=name not in PRESET_TOGETHER,
        # the first weights, and the d of the last step while d has not moved
        still=("p0", "unit") if name in PRESET_TOGETHER else (),
    )
    for name, preset in heavyball.PRESETS.items()
]


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
    else:
        yield key, value / 2 if value else 0.5
