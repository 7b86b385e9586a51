"""Presets and random chains under everything that a gradient may hold; the rules of docs/robustness.md.

Every run is the same: hypothesis draws without a clock, a database or a random seed.
"""

import functools
import warnings

import pytest
import torch
from helpers import (
    CASES,
    all_params,
    averages,
    clones,
    differences,
    drawn,
    fill_gradients,
    one_step,
    parameters,
    snapshot,
)
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import heavyball
from heavyball import chainable as C
from heavyball.presets import CLIPPINGS

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = (
    *((), (1,), (7,), (0,), (3, 0), (300,)),
    *((3, 4), (1, 6), (6, 1), (1, 1), (36, 33)),
    *((2, 3, 4), (4, 3, 2, 2), (1, 3, 1, 1), (2, 1, 3, 2, 2)),
)
RULE = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)


# ---- tensors


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def transposed(x: Tensor) -> Tensor:
    order = [*range(x.ndim)][::-1]
    return x.permute(order).contiguous().permute(order)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def sliced(x: Tensor) -> Tensor:
    wide = torch.zeros([2 * n for n in x.shape], dtype=x.dtype)
    view = wide[tuple(slice(0, None, 2) for _ in x.shape)]
    return view.copy_(x)


def expanded(x: Tensor) -> Tensor:
    """One value for all elements, as `sum` gives it to autograd."""
    return x.reshape(-1)[:1].reshape([1] * x.ndim).expand(x.shape) if x.numel() else x


LAYOUTS = {f.__name__: f for f in (contiguous, transposed, channels_last, sliced)}
GRADIENT_LAYOUTS = {**LAYOUTS, "expanded": expanded}


def powers(shape: tuple[int, ...], made: torch.Generator) -> Tensor:
    exponents = torch.randint(-40, 41, shape, generator=made)
    return torch.randn(shape, generator=made, dtype=torch.float64).sign() * 10.0**exponents


def filled(kind: str, shape: tuple[int, ...], dtype: torch.dtype, made: torch.Generator) -> Tensor:
    """Values of a kind, finite in `dtype`."""
    info = torch.finfo(dtype)
    draw = torch.randn(shape, generator=made, dtype=torch.float64)
    found = {
        "zero": lambda: 0 * draw,
        "1e-30": lambda: 1e-30 * draw,
        "1e30": lambda: 1e30 * draw,
        "subnormal": lambda: draw.sign() * info.smallest_normal / 4,
        "smallest": lambda: draw.sign() * info.smallest_normal * info.eps,
        "largest": lambda: draw.sign() * info.max,
        "one sign": lambda: torch.full(shape, info.max, dtype=torch.float64),
        "mixed": lambda: powers(shape, made),
        "normal": lambda: draw,
    }[kind]()
    return found.clamp(info.min, info.max).to(dtype)


KINDS = ("zero", "1e-30", "1e30", "subnormal", "smallest", "largest", "one sign", "mixed", "normal")
WEIGHTS = ("normal", "zero", "subnormal", "1e-30")
runs = st.fixed_dictionaries(
    {
        "shape": st.sampled_from(SHAPES),
        "layout": st.sampled_from(sorted(LAYOUTS)),
        "grad_layout": st.sampled_from(sorted(GRADIENT_LAYOUTS)),
        "dtype": st.sampled_from(DTYPES),
        "weights": st.sampled_from(WEIGHTS),
        "kinds": st.lists(st.sampled_from(KINDS), min_size=1, max_size=5),
        "seed": st.integers(0, 1000),
    }
)


def quietly(make, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a chain without a kernel
        return make(*args, **options)


def not_finite(opt: torch.optim.Optimizer) -> list[str]:
    """The names under which a snapshot holds an infinity or a NaN."""
    return [k for k, v in snapshot(opt).items() if not torch.isfinite(v.double()).all()]


def run_and_check(make, run: dict) -> None:
    """Steps with the gradients of a run: all stays finite, and nothing else is touched.

    float16 ends at 65,504. The updates of these chains are at most 50 times a gradient (momentum and
    Nesterov's look-ahead), or bounded, so that with lr <= 1e-3 five steps move a weight by less than
    5 * 1e-3 * 50 * 65,504 = 16,376.
    """
    made = torch.Generator().manual_seed(run["seed"])
    dtype, shape = run["dtype"], run["shape"]
    param = nn.Parameter(LAYOUTS[run["layout"]](filled(run["weights"], shape, dtype, made)))
    try:
        opt = make([param])
    except ValueError as error:  # a shape that a matrix method is not defined for
        assume("needs a matrix" not in str(error))
        raise
    if dtype == torch.float16:
        opt.param_groups[0]["lr"] = min(opt.param_groups[0]["lr"], 1e-3)
    strides, place = param.stride(), param.data_ptr()
    for kind in run["kinds"]:
        gradient = GRADIENT_LAYOUTS[run["grad_layout"]](filled(kind, shape, dtype, made))
        before = gradient.clone()
        param.grad = gradient
        try:
            quietly(one_step, opt)
        except ValueError as error:  # weights without a norm to keep are refused by name
            if "is all zero" not in str(error) or param.any():
                raise
            return
        assert param.grad is gradient
        assert torch.equal(gradient, before)
        assert (param.dtype, param.stride(), param.data_ptr()) == (dtype, strides, place)
        assert not not_finite(opt), (kind, opt)
    if averages(opt):
        opt.eval()
        assert not not_finite(opt)


# ---- finite gradients


# Kernels do what plain torch does, as other suites see; one in three is tried here too.
HOSTILE = [(case, False, 4) for case in CASES] + [(case, "auto", 1) for case in CASES[::3]]


@pytest.mark.parametrize(("case", "compile", "count"), HOSTILE, ids=repr)
def test_finite_gradients_leave_all_finite(case, compile, count):
    layouts = [*LAYOUTS], [*GRADIENT_LAYOUTS]
    given = (SHAPES, *layouts, DTYPES, WEIGHTS, KINDS, KINDS, KINDS)
    for shape, layout, grad_layout, dtype, weights, *kinds in drawn(f"{case}", count, *given):
        run = {"shape": shape, "layout": layout, "grad_layout": grad_layout, "dtype": dtype}
        run |= {"weights": weights, "kinds": kinds, "seed": 0}
        run_and_check(lambda params: case(params, compile=compile), run)


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "caution": st.booleans(),
        "mars": st.booleans(),
        "palm": st.booleans(),
        "warmup_steps": st.just(3),
        "gradient_clipping": st.sampled_from(sorted(CLIPPINGS)),
        "update_clipping": st.sampled_from(sorted(CLIPPINGS)),
        "weight_decay": st.sampled_from([0.1, 1.0]),
        "lr": st.sampled_from([0.0, 1e-20, 1e-3, 0.1]),
    },
)


@settings(RULE, max_examples=60)
@given(name=st.sampled_from(sorted(heavyball.PRESETS)), options=OPTIONS, run=runs)
def test_finite_gradients_leave_all_finite_with_any_options(name, options, run):
    def make(params):
        try:
            return heavyball.PRESETS[name](params, compile=False, **options)
        except ValueError:
            assume(False)  # options that exclude each other

    run_and_check(make, run)


FORMATS = [
    *(
        {"storage_dtype": name}
        for name in ("bfloat16", "float16", "8bit", "4bit", "rank1", "float32")
    ),
    *({"ecc": name} for name in ("bf16+8", "bf16+16", "fp16+8", "fp16+16")),
]
PARAM_FORMATS = {torch.bfloat16: ("bf16+8", "bf16+16"), torch.float16: ("fp16+8", "fp16+16")}


@settings(RULE, max_examples=60)
@given(
    case=st.sampled_from(CASES),
    options=st.sampled_from(FORMATS),
    corrected=st.booleans(),
    run=runs,
    shape=st.sampled_from((*SHAPES, (4097,), (64, 66))),  # codes begin at 4,096 elements
)
def test_finite_gradients_leave_all_finite_in_every_format(case, options, corrected, run, shape):
    formats = PARAM_FORMATS.get(run["dtype"], ())

    def make(params):
        if corrected and formats:
            options["param_ecc"] = formats[run["seed"] % 2]
        try:
            return case(params, compile=False, **options)
        except ValueError:
            assume(False)  # a format that a preset has already, or not for this dtype

    options = dict(options)
    run_and_check(make, {**run, "shape": shape})


@pytest.mark.parametrize("options", FORMATS, ids=str)
def test_float64_weights_with_state_of_fewer_bits_take_any_gradient(options):
    """With kernels too: their second moment would be 2^1008 otherwise."""
    opt = heavyball.AdamW(parameters((64, 70), dtype=torch.float64), **options)
    for kind in ("largest", "normal", "1e30", "one sign"):
        made = torch.Generator().manual_seed(0)
        opt.param_groups[0]["params"][0].grad = filled(kind, (64, 70), torch.float64, made)
        quietly(opt.step)
        assert not not_finite(opt), kind


def kinds_of(kind: str) -> list[C.Transform]:
    return [t for t in C.TRANSFORMS.values() if t.kind == kind]


# u rms(p): weights grow with themselves, and a huge gradient takes them out of any range in a few steps
MULTIPLIES = "scale_by_parameter_rms"
# what reads a loss, or a second gradient, is stepped otherwise
ORDINARY = [t for t in kinds_of("transform") if t.perturb is None and "loss" not in t.context]
plain = st.sampled_from([t for t in ORDINARY if t.name != MULTIPLIES])
chains = st.lists(plain, min_size=1, max_size=3)


@st.composite
def random_chain(draw) -> list:
    """Up to three transforms, perhaps in two branches or behind a router, with a decay and a writer."""
    chain = list(draw(chains))
    form = draw(st.sampled_from(["plain", "plain", "parallel", "graft", "route"]))
    if form == "parallel":
        chain = [C.parallel(chain, draw(chains), weights=(0.5, -1.5))]
    elif form == "graft":
        chain = [C.graft(chain, draw(chains))]
    elif form == "route":
        chain = [C.route(C.when(*chain, min_ndim=2), otherwise=tuple(draw(chains)))]
    chain += draw(st.lists(st.sampled_from(kinds_of("decay")), max_size=1))
    chain += draw(st.lists(st.sampled_from(kinds_of("writer")), max_size=1))
    chain += draw(st.lists(st.sampled_from(kinds_of("observer")), max_size=1))
    return chain


def built(params, chain, **options):
    try:
        return C.ChainOpt(params, 1e-3, *chain, **options)
    except ValueError:
        assume(False)  # a chain that excludes itself, or not for this shape


@settings(RULE, max_examples=80)
@given(chain=random_chain(), run=runs, decay=st.sampled_from([0.0, 0.1]))
def test_finite_gradients_leave_random_chains_finite(chain, run, decay):
    def make(params):
        opt = built(params, chain, compile=False)
        if "weight_decay" in opt.defaults:
            opt.param_groups[0]["weight_decay"] = decay
        return opt

    run_and_check(make, run)


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_after_any_gradients_training_goes_on(case):
    """Whatever came before, some steps of ordinary gradients move the weights and stay finite."""
    opt = case(parameters((4, 3), (5,)), compile=False)
    for kind in KINDS:
        made = torch.Generator().manual_seed(0)
        for p in all_params(opt):
            p.grad = filled(kind, tuple(p.shape), p.dtype, made)
        quietly(opt.step)
    with torch.no_grad():
        for p in all_params(opt):
            p.zero_()  # a step of 0.01 is lost beside a weight of 1e15
    before = clones(all_params(opt))
    for seed in range(3):
        fill_gradients(all_params(opt), seed)
        quietly(opt.step)
    assert not not_finite(opt)
    moved = [not torch.equal(p, q) for p, q in zip(all_params(opt), before, strict=True)]
    # with both factors' whole inverses, 1e-76 of a matrix's gradient is left after one of 1e38
    assert all(moved[1:] if case.name == "KLShampoo" else moved)


# ---- gradients that are not finite


@pytest.mark.parametrize(
    ("dtype", "compile"),
    [(torch.float32, "auto"), (torch.float64, False)],
    ids=["kernels, float32", "eager, float64"],
)
@pytest.mark.parametrize("case", [c for c in CASES if not c.skips], ids=repr)
def test_an_infinity_counts_as_the_bound_of_its_dtype(case, dtype, compile):
    bound = 2.0**504 if dtype == torch.float64 else 2.0**56
    ends = []
    for value in (torch.inf, bound):
        opt = case(parameters((4, 3), (5,), dtype=dtype), compile=compile)
        for seed in range(3):
            fill_gradients(all_params(opt), seed)
            if seed == 1:
                all_params(opt)[0].grad[1, 2] = value
                all_params(opt)[1].grad[0] = -value
            quietly(opt.step)
        ends.append(snapshot(opt))
        assert not not_finite(opt)
    assert not differences(*ends)


@functools.cache
def trained(case, compile, poison=None):
    """Three steps; `poison` is one entry of the first parameter's second gradient. To be read only."""
    opt = case(parameters((4, 3), (5,)), compile=compile)
    for seed in range(3):
        fill_gradients(all_params(opt), seed)
        if seed == 1 and poison is not None:
            all_params(opt)[0].grad[1, 2] = poison
        quietly(opt.step)
    return opt


alone = [case for case in CASES if case.per_parameter]
# What looks at more than one entry of a tensor at a time.
REDUCING = {
    *("centralize", "orthograd", "mars", "cautious", "graft", "factored_rms", "stable_adamw"),
    *(t.name for t in CLIPPINGS.values() if "norm" in t.name or "rms" in t.name),
    *(
        "adaptive_gradient_clip",
        "l2_normalize",
        "rms_normalize",
        "scale_by_novograd",
        "stable_spam",
    ),
    *("dog_rate", "dowg_rate", "hyperball", "lars_ratio", "scale_by_came", "scale_by_sm3"),
}


def elementwise(opt) -> bool:
    nodes = opt.chain.program_for(None, all_params(opt)[0]).flat
    cautious = any(node.transform.options.get("caution", "none") != "none" for node in nodes)
    names = {node.transform.name for node in nodes}
    return not (cautious or names & REDUCING or any(node.transform.whole for node in nodes))


@pytest.mark.parametrize("case", alone, ids=repr)
def test_a_nan_reaches_no_other_parameter_and_no_other_entry_of_an_elementwise_chain(case):
    bad, good = trained(case, "auto", torch.nan), trained(case, "auto")
    wrong = differences(snapshot(bad), snapshot(good))
    assert wrong
    assert not [key for key in wrong if key.startswith("1")]
    if elementwise(bad):
        shots = snapshot(bad), snapshot(good)
        for key in wrong:
            changed = (shots[0][key] != shots[1][key]).nonzero().tolist()
            assert changed == [[1, 2]], key


def test_the_elementwise_chains_are_found():
    found = {case.name for case in alone if elementwise(case(parameters((4, 3))))}
    assert {"SGD", "AdamW", "NAdam", "RMSprop", "Lion", "SFAdamW", "parallel"} <= found
    assert not {"FactoredAdamW", "cautious-ema", "graft", "mars-laprop", "stable"} & found


@pytest.mark.parametrize("case", [c for c in CASES if not c.skips], ids=repr)
def test_a_nan_stays_a_nan_unless_only_its_sign_is_used(case):
    """What is computed from a NaN is one, and the sign of one is 0: that entry is not moved."""
    opt = trained(case, "auto", torch.nan)
    found = snapshot(opt)
    names = {node.transform.name for node in opt.chain.program_for(None, all_params(opt)[0]).flat}
    signs = {"scale_by_lion", "focus", "sign", "scale_by_rprop", "d_adapt_lion", "splus"}
    signs |= {"scale_by_adamuon"}
    if names & signs and "scale_by_laprop" not in names:
        assert not found["0"].isnan().any()
        states = [v for k, v in found.items() if k.startswith("0.") and v.ndim == 2]
        # Rprop knows the last gradient alone
        assert "scale_by_rprop" in names or any(state[1, 2].isnan() for state in states)
    else:
        assert found["0"][1, 2].isnan()


def nans(opt):
    return {k: v.isnan().nonzero().tolist() for k, v in snapshot(opt).items()}


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_kernels_and_plain_torch_agree_on_what_is_a_nan(case):
    with_kernels, eager = trained(case, "auto", torch.nan), trained(case, False, torch.nan)
    assert nans(with_kernels) == nans(eager)


@pytest.mark.parametrize("compile", ["auto", False], ids=["kernels", "eager"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if c.skips], ids=repr)
def test_skip_not_finite_leaves_out_the_step(case, poison, compile):
    params = parameters((4, 3), (5,))
    opt = case(params, compile=compile)
    fill_gradients(params, 0)
    opt.step()
    before = snapshot(opt)
    fill_gradients(params, 1)
    params[0].grad[1, 2] = poison
    opt.step()
    changed = differences(before, snapshot(opt))
    # the parameters' own counts of calls, and of the steps left out
    assert {key.split(".", 1)[-1] for key in changed} == {"step", "skip_not_finite.skipped"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("first", [0.0, 1e-30, 1e-300])
def test_a_first_gradient_of_nothing_divides_none_out_of_the_range(dtype, first) -> None:
    largest = torch.finfo(dtype).max
    for behind in (C.graft(C.sign, C.muon_momentum), C.scale_by_adam, C.muon, C.soap_precond()):
        for later in ((largest,), (0.0, largest), (largest / 1e100, 1.0), (largest, 0.0, 1e-30)):
            p = torch.nn.Parameter(torch.ones(3, 4, dtype=dtype))
            front = C.scale_by_tensor_rms(first_only=True)
            opt = C.ChainOpt([p], 1e-3, front, behind, compile=False)
            for value in (first, *later):
                p.grad = torch.full_like(p, value)
                opt.step()
                assert p.isfinite().all()
                assert all(v.isfinite().all() for v in opt.state[p].values())


# ---- sums over many steps

MATRICES = [
    name
    for name, preset in heavyball.PRESETS.items()
    if any(p.has_whole for p in preset(parameters((2, 2)), lr=1e-3).chain.programs)
]
GRAFTS = {
    "graft, normalized": (C.graft(C.sign, C.muon_momentum),),
    "graft, behind a division": (C.scale_by_tensor_rms, C.graft(C.sign, C.muon_momentum)),
    "graft, Shampoo": (C.graft(C.shampoo(beta2=1.0), C.scale_by_adam),),
    "Shampoo's sums": (C.shampoo(beta2=1.0, precondition_frequency=10),),
    "graft, SGD": (C.graft(C.scale_by_adam, C.exp_avg),),
}
# in every order: what a step keeps meets the next one's
ORDERS = [("largest", "1e-30", "zero"), ("zero", "largest"), ("1e30",), ("smallest", "1e30")]


@pytest.mark.parametrize("name", [*MATRICES, *GRAFTS])
def test_many_huge_and_tiny_gradients_leave_all_finite(name):
    """What matrix methods sum up and graft, over many more steps than a short run takes."""
    made = torch.Generator().manual_seed(2)
    for place, kinds in enumerate(ORDERS):
        for dtype in (torch.float32, torch.float64)[: 2 if place == 0 else 1]:
            params = parameters((4, 3), (5,), dtype=dtype)
            if name in GRAFTS:
                opt = quietly(C.ChainOpt, params, 1e-3, *GRAFTS[name], compile=False)
            else:
                opt = quietly(heavyball.PRESETS[name], params, lr=1e-3, compile=False)
            for step in range(16):
                for p in params:
                    p.grad = filled(kinds[step % len(kinds)], tuple(p.shape), dtype, made)
                opt.step()
            assert not not_finite(opt), (dtype, kinds)
            fill_gradients(params, 0)
            opt.step()
            assert not not_finite(opt), (dtype, kinds)


@pytest.mark.parametrize(
    "element",
    [C.apollo(rank=2), C.apollo(rank=2, scale_type="tensor"), C.galore(rank=2), C.fira(rank=2)],
    ids=repr,
)
def test_the_squares_of_large_low_rank_methods_stay_in_range(element):
    """Half a million of the largest squares that a step takes are beyond float32."""
    param = nn.Parameter(torch.ones(512, 1024))
    opt = C.ChainOpt([param], 1e-3, element, compile=False)
    for scale in (1.0, 1e30, 1.0):
        param.grad = torch.full_like(param, scale)
        opt.step()
        assert not not_finite(opt), scale
