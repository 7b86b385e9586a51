"""Kernels with values along some of the axes: against the eager path, for every arrangement of them."""

import math
import warnings

import pytest
import torch
from helpers import QUICK
from test_compiler import assert_near, pair, values

import heavyball
from heavyball.compiler.cpp.printer import SMALL
from heavyball.compiler.passes.axes import Frame, FrameText, along, first_axes, run_sizes
from heavyball.compiler.run import engine, kernels, printing
from heavyball.state.held import held

C = heavyball.chainable

# Two factored axes, and before, between and behind them others; the largest first and last; ties, axes
# of one element, long and short periods. The last have several blocks of rows, and pieces of a row.
SHAPES = (
    (8, 6, 3, 3),
    (6, 8, 3, 3),
    (6, 6, 3),
    (2, 8, 6),
    (7, 2, 3, 5),
    (2, 8, 3, 7, 2),
    (3, 6, 7, 2, 2),
    (1, 8, 1, 7, 3),
    (8, 7, 1, 1),
    (8, 1, 5, 5),
    (4, 5, 1100),
    (40, 90, 7, 5),
    (5, 160, 170),
)


# ---- where values lie


@pytest.mark.parametrize("present", [(0, 1, 2), (0, 2), (1, 2), (0,), (2,), ()])
@pytest.mark.parametrize("wanted", [(0, 1, 2), (0, 2), (0, 1), (1,), (2,), ()])
def test_places_are_those_of_contiguous_tensors(present: tuple, wanted: tuple) -> None:
    sizes = 3, 4, 5
    text_of = FrameText(Frame((0, 1, 2), []), lambda k: str(sizes[k]), "//")

    def numbered(runs: tuple) -> torch.Tensor:
        """The place of every value in an array along these runs, as a tensor of three axes."""
        shape = [n if k in runs else 1 for k, n in enumerate(sizes)]
        return torch.arange(math.prod(shape)).reshape(shape)

    source, target = numbered(present), numbered(wanted)
    # of what the source does not have, the first
    at_zero = target[tuple(slice(None) if k in present else slice(1) for k in range(3))]
    text = text_of.place("at", present, wanted)
    for at, place in zip(source.flatten(), at_zero.expand(source.shape).flatten(), strict=True):
        assert eval(text, {"at": int(at)}) == place


def test_neighbours_that_no_level_tells_apart_are_one_run() -> None:
    conv = [along((0, 2, 3)), along((1, 2, 3)), along((2, 3))]
    assert first_axes(conv, (0, 1, 2, 3)) == (0, 1, 2)
    assert run_sizes((0, 1, 2), (64, 32, 3, 5)) == [32, 15]
    assert first_axes([along((0,))], (0, 1, 2, 3)) == (0, 1)
    assert first_axes(["element", "scalar"], (0, 1)) is None
    # an axis of one element belongs to the run before it
    assert first_axes([along((3,))], (1, 3)) == (1, 3)
    assert run_sizes((1, 3), (1, 8, 1, 9)) == [9]


# ---- factored moments


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_two_axes_of_several(shape: tuple, dtype: torch.dtype) -> None:
    chain = (C.factored_rms(min_dim=4, min_dim_mode="any"), C.clip_update_rms)
    assert_near(pair(chain, (shape,), dtype, stochastic_rounding=False))


OTHERS = ((8, 6, 3, 3), (6, 7, 2), (4, 6, 5), (7, 6))


@pytest.mark.parametrize(
    "chain",
    [
        (C.centralize, C.factored_rms(min_dim=4), C.cautious),
        (C.adaptive_gradient_clip, C.delayed_rms(min_dim=4), C.cautious_decay(weight_decay=0.1)),
        (C.accumulate(k=2), C.factored_rms(min_dim=4, momentum=0.9), C.schedule_free),
        (C.factored_rms(min_dim=4), C.orthogonalize, C.parameter_ema(beta=0.5)),
        (C.exp_avg, C.orthogonalize, C.factored_rms(min_dim=4), C.cautious),
        (
            C.clip_by_global_norm,
            C.route(C.when(C.factored_rms(min_dim=4), min_ndim=2), otherwise=C.sign),
        ),
    ],
)
def test_together_with_others(chain: tuple) -> None:
    # an arrangement of axes is a kernel of its own: in `make test` a chain meets half of them
    half = slice(len(chain) % 2, None, 2)
    assert_near(pair(chain, OTHERS[half] if QUICK else OTHERS))


@C.transform()
def peaks(update):
    """The largest along each axis, of values of either sign."""
    for axis in range(update.ndim):
        others = tuple(k for k in range(update.ndim) if k != axis)
        update = update + 0.1 * update.amax(others, keepdim=True)
    return update


def test_the_largest_along_some_of_the_axes() -> None:
    shapes = ((8, 6, 3, 3), (700, 130), (7, 6)) + (() if QUICK else ((6, 7, 2),))
    assert_near(pair((peaks, C.scale_by_sm3(beta=0.5)), shapes))
    ends = []
    for compiled in (False, True):
        p = torch.nn.Parameter(values((7, 6), 0, torch.float32))
        opt = C.ChainOpt([p], 0.1, peaks, compile=compiled)
        p.grad = -values((7, 6), 1, torch.float32).abs()
        p.grad[2, 3] = torch.nan
        opt.step()
        ends.append(p.detach().isnan())
    assert torch.equal(*ends)


def test_closed_gates_leave_the_means_as_they_were() -> None:
    ends = []
    for compiled in (False, True):
        p = torch.nn.Parameter(values((8, 6, 3, 3), 0, torch.float32))
        chain = (C.skip_not_finite, C.factored_rms(min_dim=4))
        opt = C.ChainOpt([p], 0.1, *chain, compile=compiled)
        for step in range(4):
            p.grad = values((8, 6, 3, 3), step, torch.float32)
            if step == 2:
                p.grad[3, 2, 1, 1] = float("inf")
            opt.step()
        ends.append(([p], opt))
    assert_near(ends)


MEANS = (
    {"storage_dtype": "bfloat16"},
    {"storage_dtype": {"row": "float16"}},
    {"ecc": "bf16+8"},
    {"ecc": {"row": "fp16+16", "col": "bf16+16"}},
)


@pytest.mark.parametrize("formats", MEANS, ids=str)
def test_means_in_fewer_bits(formats: dict) -> None:
    shapes = ((8, 6, 3, 3), (2, 7, 6))
    if QUICK:
        # both kinds of format meet both
        shapes = shapes[MEANS.index(formats) % 2 :][:1]
    (eager, one), (compiled, two) = pair((C.factored_rms(min_dim=4), C.exp_avg), shapes, **formats)
    for p, q in zip(eager, compiled, strict=True):
        assert one.state[p].keys() == two.state[q].keys()
        pairs = [(p.detach(), q.detach())]
        holds = one.registry.programs()[p].holds
        for key in holds.keys() & one.state[p].keys():
            kept = (held(s, key, holds[key]) for s in (one.state[p], two.state[q]))
            pairs.append(tuple(k.load(torch.float32) for k in kept))
        for a, b in pairs:
            # the random bits are the same, but what lies on an edge may go the other way
            wrong = (a - b).abs() > 64 * torch.finfo(torch.float32).eps * a.abs().max()
            assert wrong.sum() <= a.numel() // 100


def test_parameters_of_bfloat16_are_rounded_with_the_same_bits() -> None:
    """The sign of a constant has no rounding of its own, so every bit must agree."""
    for shape in ((40, 90, 5, 5), (8, 6, 3, 3)):
        ends = []
        for compiled in (False, True):
            p = torch.nn.Parameter(values(shape, 0, torch.bfloat16))
            chain = (C.factored_rms(min_dim=4), C.sign)
            opt = C.ChainOpt([p], 1e-3, *chain, compile=compiled, seed=7)
            for _ in range(5):
                p.grad = torch.ones_like(p)
                opt.step()
            ends.append(p.detach().clone())
        assert torch.equal(*ends)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "sliced"])
def test_every_layout_gives_the_eager_result(layout: str) -> None:
    ends = []
    for compiled in (False, True):
        x = values((6, 8, 5, 5), 0, torch.float32)
        if layout == "channels_last":
            x = x.to(memory_format=torch.channels_last)
        if layout == "transposed":
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        if layout == "sliced":
            x = torch.zeros(6, 8, 5, 9)[..., :5].copy_(x)
        p = torch.nn.Parameter(x)
        opt = C.ChainOpt([p], 0.1, C.factored_rms(min_dim=4), C.cautious, compile=compiled)
        for step in range(3):
            p.grad = values((6, 8, 5, 5), step, torch.float32)
            opt.step()
        assert p.stride() == x.stride()
        ends.append(p.detach().clone())
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


def test_results_do_not_depend_on_threads_or_neighbours() -> None:
    shapes = ((90, 40, 7, 5), (5, 160, 170), (70, 4, 300))
    assert all(math.prod(shape) > SMALL for shape in shapes)
    ends, before = [], torch.get_num_threads()
    for threads, neighbours in ((1, 0), (2, 0), (2, 3)):
        torch.set_num_threads(threads)
        try:
            first = [values((9, 4, 3), 2, torch.float32) for _ in range(neighbours)]
            made = [values(shape, 1, torch.float32) for shape in shapes]
            params = [torch.nn.Parameter(t) for t in (*first, *made)]
            chain = (C.factored_rms(min_dim=4), C.clip_update_rms, C.cautious)
            opt = C.ChainOpt(params, 0.1, *chain, compile=True)
            for step in range(3):
                for p in params:
                    p.grad = values(tuple(p.shape), step, torch.float32)
                opt.step()
            ends.append([p.detach().clone() for p in params[neighbours:]])
        finally:
            torch.set_num_threads(before)
    for end in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(end, ends[0], strict=True))


def test_a_convolutional_network_needs_no_eager_steps() -> None:
    """The defaults of ProdigyPlusScheduleFree, whose `min_dim_mode` is "any"."""
    ends = []
    for compiled in (False, "auto"):
        torch.manual_seed(0)
        net = torch.nn.Sequential(
            torch.nn.Conv2d(3, 32, 3),
            torch.nn.BatchNorm2d(32),
            torch.nn.Conv2d(32, 40, 3),
            torch.nn.Conv2d(40, 40, 3, groups=40),
            torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(),
            torch.nn.Linear(40, 1),
        )
        params = list(net.parameters())
        opt = heavyball.ProdigyPlusScheduleFree(params, d0=0.01, compile=compiled)
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            for step in range(3):
                for i, p in enumerate(params):
                    p.grad = values(tuple(p.shape), 10 * step + i, torch.float32)
                opt.step()
        ends.append((params, opt))
    assert not ends[1][1].plan().eager
    # steps are of the size d, which is a quotient of sums over all parameters
    assert_near(ends, roundings=256)


# ---- any axes


@C.transform()
def less_each_mean(update):
    """Sums along every single axis, and along the others."""
    for axis in range(update.ndim):
        others = [other for other in range(update.ndim) if other != axis]
        rest = (update * update).mean(others, keepdim=True)
        update = update - update.mean(axis, keepdim=True) / (1 + rest)
    return update


@C.transform()
def over_norm_of_means(update):
    """Sums of values that are sums themselves, as they are and squared."""
    means = update.mean(-1, keepdim=True)
    norm = torch.linalg.vector_norm(means, dim=1, keepdim=True)
    largest = means.mean(0, keepdim=True) > 0
    return update / (1 + norm) + largest.to(update.dtype).mean(1, keepdim=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chain", [less_each_mean, over_norm_of_means])
def test_means_along_any_axes(chain, dtype: torch.dtype) -> None:
    several = (
        ((5, 6), (7, 1)),
        ((5, 6, 7), (50, 40, 60), (5, 1, 3)),
        ((2, 3, 4, 5), (4, 1, 3, 1)),
    )
    if QUICK:
        # one of the dtypes meets two and four axes, the other three
        several = several[1:2] if dtype == torch.float64 else several[::2]
    for shapes in several:
        assert_near(pair((chain,), shapes, dtype))


def test_the_same_code_may_be_for_other_axes() -> None:
    assert_near(pair((C.factored_rms(min_dim=4),), ((5, 6),)))
    assert_near(pair((C.factored_rms(min_dim=4),), ((1, 7, 9),)))
    assert_near(pair((C.factored_rms(min_dim=4),), ((7, 1, 9),)))


def _along_the_shorter(param, options):
    return (
        torch.ones(param.shape[0], 1) if len(param) < param.shape[1] else torch.ones_like(param[:1])
    )


@C.transform(scale=C.State(_along_the_shorter, "ones along the shorter axis"))
def scaled(update, scale):
    """Only the state says which axis it has; nothing here looks at a size."""
    scale = scale * 1.5
    return update * scale, scale


def test_states_of_one_kernel_have_the_same_axes() -> None:
    assert_near(pair((scaled,), ((5, 6), (7, 4), (8, 9), (3, 2))))


@C.transform()
def less_sum_of_spread(update):
    """The sum counts every mean as often as it is spread."""
    return update - update.mean(1, keepdim=True).expand_as(update).sum() / 100


def test_sums_of_what_was_spread_run_eagerly(monkeypatch) -> None:
    monkeypatch.setattr(kernels, "warned", set())
    p = torch.nn.Parameter(torch.zeros(3, 4))
    p.grad = torch.ones(3, 4)
    with pytest.warns(RuntimeWarning, match=r"sum\.default from along 0 to scalar"):
        C.ChainOpt([p], 1.0, less_sum_of_spread).step()
    torch.testing.assert_close(p.detach(), torch.full((3, 4), -0.88))


def test_one_recording_for_each_choice_of_axes(monkeypatch) -> None:
    recorded = []
    record = printing.record
    monkeypatch.setattr(printing, "record", lambda p, s, *a: recorded.append(s) or record(p, s, *a))
    engine.forget_kernels()
    shapes = [
        (n, 40) for n in (*range(20, 39), *range(41, 60))
    ]  # 40 is the largest, the second, neither
    shapes += [(n,) for n in range(3, 30)] + [(n, 50, 3, 3) for n in range(33, 49)]
    assert_near(pair((C.factored_rms(min_dim=32),), shapes, steps=2))
    # full matrices, rows or columns the longer, vectors, convolution kernels
    assert len(recorded) == 5
