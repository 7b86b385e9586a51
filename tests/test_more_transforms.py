"""Transforms and presets of the field against golden values, torch.optim and formulations of their own.

Golden values have twelve significant digits. Their inputs are

P(n, m)   p[i, j] = cos(1 + 2i + 3j), gradient at step t: sin(1 + i + 2j + i j + 3t) / t
PV        p[k] = cos(2 + k), 5 elements, gradient sin(1 + 2k + 3t) / t
spike     P(3, 4) whose third gradient has 1000 in its first entry

A matrix is given as (p[0, 0], p[1, 2], the last, sum, sum of squares), a vector as (the first, the last,
sum, sum of squares).
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from helpers import double_default, eager, gradients, starts, walk  # noqa: F401
from torch import Tensor

import heavyball
from heavyball import chainable as C

Numbers = tuple[float, ...]
LOSSES = (2.0, 1.5, 1.2, 1.0, 0.9, 0.8)


# ---- the inputs of the golden values


def matrix(rows: int, cols: int) -> Tensor:
    i, j = _grid(rows, cols)
    return torch.cos(1 + 2 * i + 3 * j)


def matrix_grad(t: int, rows: int, cols: int) -> Tensor:
    i, j = _grid(rows, cols)
    return torch.sin(1 + i + 2 * j + i * j + 3 * t) / t


def _grid(rows: int, cols: int) -> tuple[Tensor, Tensor]:
    i = torch.arange(rows, dtype=torch.float64)[:, None]
    return i, torch.arange(cols, dtype=torch.float64)


def vector() -> Tensor:
    return torch.cos(2 + torch.arange(5, dtype=torch.float64))


def vector_grad(t: int) -> Tensor:
    return torch.sin(1 + 2 * torch.arange(5, dtype=torch.float64) + 3 * t) / t


def spike_grad(t: int) -> Tensor:
    grad = matrix_grad(t, 3, 4)
    if t == 3:
        grad[0, 0] = 1000.0
    return grad


PROBLEMS: dict[str, tuple[Callable[[], Tensor], Callable[[int, Tensor], Tensor]]] = {
    "P": (lambda: matrix(3, 4), lambda t, p: matrix_grad(t, 3, 4)),
    "P43": (lambda: matrix(4, 3), lambda t, p: matrix_grad(t, 4, 3)),
    "P44": (lambda: matrix(4, 4), lambda t, p: matrix_grad(t, 4, 4)),
    "PV": (vector, lambda t, p: vector_grad(t)),
    "spike": (lambda: matrix(3, 4), lambda t, p: spike_grad(t)),
    # the gradient of half the sum of squares
    "qP": (lambda: matrix(3, 4), lambda t, p: p.clone()),
    "qPV": (vector, lambda t, p: p.clone()),
}


def summary(p: Tensor) -> list[float]:
    corner = [p[0], p[4]] if p.ndim == 1 else [p[0, 0], p[1, 2], p[-1, -1]]
    return [float(x) for x in (*corner, p.sum(), p.square().sum())]


# ---- golden values


@dataclasses.dataclass(frozen=True)
class Golden:
    """A run: an optimizer of parameters, the problems, and what they come to by step.

    values: by step, for each problem; a shorter tuple gives the first numbers alone.
    before: what is done to the optimizer before each step.
    seen: takes the parameters' place in what is compared, given optimizer and parameters.
    """

    make: Callable[[Any], torch.optim.Optimizer]
    values: dict[int, tuple[Numbers, ...]]
    problems: tuple[str, ...] = ("P",)
    about: tuple[str, ...] = ()  # the transforms that this shows right
    before: Callable[[Any, int], None] | None = None
    evaluated: bool = False
    losses: bool = False
    rtol: float = 2e-11


def chain(*elements: Any, lr: float = 0.05, **options: Any) -> Callable[[Any], C.ChainOpt]:
    """An optimizer of these transforms as they are in the library when it is made."""
    return lambda params: C.ChainOpt(params, lr, *map(present, elements), **options)


def present(element: Any) -> Any:
    values = {**element.hyper, **element.options}
    return C.TRANSFORMS[element.name](**{name: values[name] for name in element.given})


GOLDEN: dict[str, Golden] = {
    "parameter_ema, blended": Golden(
        chain(C.scale_by_adam, C.parameter_ema(beta=2 / 3, start=2, blend=0.6)),
        {6: ((0.651630365661, -0.805485180357, 0.236701579418, 0.38305105203, 4.60570494004),)},
        about=("parameter_ema",),
        evaluated=True,
    ),
    "parameter_ema, begun as a copy": Golden(
        chain(C.scale_by_adam, C.parameter_ema(beta=2 / 3, start=2, blend=0.6, start_as_copy=True)),
        {6: ((0.648983781176, -0.807812758823, 0.234689174862, 0.374928542038, 4.62376254127),)},
        about=("parameter_ema",),
        evaluated=True,
    ),
    "schedule-free plus": Golden(
        lambda ps: heavyball.ScheduleFreePlus(ps),
        {
            5: (
                (0.885089996905, -0.585590732847, 0.443026710597, 1.20616987293, 3.4611154915),
                (-0.0713591455103, 1.25167222608, 0.112423582185, 3.47819995407),
            )
        },
        ("P", "PV"),
        ("polyak_rate", "schedule_free"),
        losses=True,
    ),
    "schedule-free plus, x": Golden(
        lambda ps: heavyball.ScheduleFreePlus(ps),
        {5: ((0.875552237272, -0.594567011873, 0.434664812622, 1.17333618906, 3.48589117563),)},
        ("P", "PV"),
        evaluated=True,
        losses=True,
    ),
    "schedule-free plus, annealed": Golden(
        lambda ps: heavyball.ScheduleFreePlus(
            ps, weight_decay=5.0, r=2.0, polyak_beta=0.9, c_warmup=1, sf_beta_anneal_steps=4
        ),
        {
            5: (
                (0.576668600382, -0.40227125445, 0.286618926248, 0.768353287733, 1.56359030972),
                (-0.0616096575814, 0.828110428755, 0.0462542419388, 1.51353302475),
            )
        },
        ("P", "PV"),
        ("polyak_rate", "palm_decay"),
        losses=True,
    ),
    "qk_clip": Golden(
        chain(C.qk_clip(heads=2), lr=0.0),
        {1: ((0.540302305868, -0.911130261885, -0.478829740162, -0.223637555709, 6.21917921791),)},
        ("P44",),
        ("qk_clip",),
        before=lambda opt, t: opt.feed("max_logits", torch.tensor([50.0, 400.0])),
    ),
    "qk_clip, one side": Golden(
        chain(C.qk_clip(heads=2, exponent=1.0), lr=0.0),
        {1: ((0.540302305868, -0.911130261885, -0.239414870081, -0.25962332927, 5.63167944346),)},
        ("P44",),
        # two queries to a key
        before=lambda opt, t: opt.feed("max_logits", torch.tensor([[50.0, 7.0], [3.0, 400.0]])),
    ),
    "pin": Golden(
        chain(C.muon(scale="none"), C.radial_brake, C.update_floor(floor=0.3825), C.pin_radius),
        {4: ((0.598511417111, -0.877178719584, 0.164607387888, 0.0651388984782, 5.18504636136),)},
        about=("pin_radius", "radial_brake", "update_floor"),
    ),
    "pin, rows": Golden(
        chain(
            C.muon(scale="none"),
            C.radial_brake,
            C.update_floor(floor=3.0, rows=True),
            C.pin_radius,
            C.post_cautious_decay(weight_decay=0.025),
        ),
        {4: ((0.81421604851, -0.699217804785, 0.167926729844, 0.214115496049, 3.71989027544),)},
        about=("pin_radius", "post_cautious_decay", "update_floor"),
    ),
    "sm3": Golden(
        lambda ps: heavyball.SM3(ps, 0.05, momentum=0.0),
        {
            1: ((0.590302305868, -0.861130261885, 0.186737218208, 0.18371596502, 5.07209849122),),
            4: ((0.577754726723, -0.879166177559, 0.170262477469, 0.15590288208, 5.22468481511),),
        },
        about=("scale_by_sm3",),
    ),
    "sm3, momentum": Golden(
        lambda ps: heavyball.SM3(ps, 0.05),
        {4: ((-0.402924539277, 0.972384735653, -0.778169941564, 2.59761451003),)},
        ("PV",),
        ("scale_by_sm3",),
    ),
    "window_average": Golden(
        chain(C.scale_by_adam, C.window_average(k=3, every=2)),
        {6: ((0.633666818811, -0.822291205029, 0.22110556047, 0.321203096783, 4.73912633337),)},
        evaluated=True,
    ),
    "t5 adafactor": Golden(
        lambda ps: t5_adafactor(ps, C.relative_step),
        {
            4: (
                (0.544824838533, -0.90872714715, 0.139123313744, -0.00995666369416, 5.5281656563),
                (-0.412337534836, 0.962150921919, -0.807492263387, 2.58777238358),
            )
        },
        ("P", "PV"),
        ("relative_step", "scale_lr_by_parameter_rms"),
    ),
    "t5 adafactor, warm-up": Golden(
        lambda ps: t5_adafactor(ps, C.relative_step(warmup_init=True)),
        {
            4: (
                (0.540302262035, -0.911130545041, 0.13673650933, -0.0162850521947, 5.55620093385),
                (-0.416146909752, 0.960169525126, -0.8159517837, 2.58290481767),
            )
        },
        ("P", "PV"),
        ("relative_step",),
    ),
    "t5 adafactor, momentum": Golden(
        lambda ps: C.ChainOpt(
            ps,
            0.05,
            C.palm_beta2,
            C.factored_rms(axes="last", min_dim=1, eps=1e-30),
            C.clip_update_rms,
            C.exp_avg(correct_bias=False, lr_in_momentum=True),
            weight_decay=0.01,
        ),
        {
            4: (
                (0.553409874107, -0.900247792552, 0.147965896446, 0.00919565050069, 5.42788239491),
                (-0.403695763572, 0.968413272359, -0.782036042311, 2.58570381158),
            )
        },
        ("P", "PV"),
        ("factored_rms", "exp_avg"),
    ),
    "adabelief": Golden(
        chain(C.scale_by_adabelief),
        {
            1: ((0.595857861424, -0.855574706329, 0.192292773763, 0.205938187242, 5.02201343459),),
            4: ((0.645782235304, -0.810706653676, 0.232228738778, 0.366273409131, 4.64588973935),),
        },
        about=("scale_by_adabelief",),
    ),
    "adan, proximal": Golden(
        lambda ps: heavyball.Adan(ps, 0.05, weight_decay=0.02),
        {4: ((0.571392723338, -0.875674178724, 0.166807942072, 0.108671007869, 5.1979719837),)},
        about=("scale_by_adan", "proximal_decay"),
    ),
    "adan, decoupled": Golden(
        lambda ps: heavyball.Adan(ps, 0.05, weight_decay=0.02, no_prox=True),
        {4: ((0.571423694248, -0.875638849377, 0.16683789372, 0.108795482724, 5.19762842766),)},
    ),
    "yogi": Golden(
        chain(C.scale_by_yogi),
        {4: ((0.636562363825, -0.819425833261, 0.223831164582, 0.330726884477, 4.71622852759),)},
        about=("scale_by_yogi",),
    ),
    "novograd": Golden(
        lambda ps: heavyball.NovoGrad(ps, 0.05, weight_decay=0.01),
        {4: ((0.575732103144, -0.858525971233, 0.170877585335, 0.0383395196094, 5.08768831628),)},
        about=("scale_by_novograd",),
    ),
    "novograd, averaging": Golden(
        lambda ps: heavyball.NovoGrad(ps, 0.05, weight_decay=0.01, grad_averaging=True),
        {4: ((0.589105354909, -0.843491889512, 0.185818170316, 0.0596205937003, 4.97318069432),)},
    ),
    "tiger": Golden(
        lambda ps: heavyball.Tiger(ps, 0.05),
        {4: ((0.739072561433, -0.709459317607, 0.336313998803, 0.783148708647, 3.96254494548),)},
    ),
    "adams": Golden(
        lambda ps: heavyball.AdamS(ps, 0.05),
        {4: ((0.658351738817, -0.810111249592, 0.223160793249, 0.360269946804, 4.64109297088),)},
        about=("scale_by_adams",),
    ),
    "grokfast": Golden(
        chain(C.grokfast),
        {4: ((0.85786876831, -0.495229270774, 0.446268145329, 0.461324664462, 3.13137170981),)},
        about=("grokfast",),
    ),
    "grokfast, unbiased": Golden(
        chain(C.grokfast(start="unbiased")),
        {4: ((0.694113163879, -0.715550290818, 0.27782272238, 0.204812439756, 4.08613924713),)},
    ),
    "clip_spikes": Golden(
        chain(C.clip_spikes(theta=50.0, start=1), C.scale_by_adam(eps=1e-6)),
        {4: ((0.632012314657, -0.796812744688, 0.250865566398, 0.421532194687, 4.50550581787),)},
        ("spike",),
        ("clip_spikes",),
    ),
    "stable_spam": Golden(
        lambda ps: heavyball.StableSPAM(ps, 0.05),
        {
            1: ((0.590302304032, -0.861130263274, 0.186737216357, 0.183715949053, 5.07209850732),),
            4: ((0.539639057491, -0.871726250082, 0.166580618129, 0.0712989002594, 5.11228697542),),
        },
        ("spike",),
        ("stable_spam",),
    ),
    "stable_spam, reset": Golden(
        lambda ps: heavyball.StableSPAM(ps, 0.05, every=3),
        {5: ((0.664265496071, -0.794398356536, 0.248177151927, 0.449456730547, 4.51419807419),)},
    ),
    "adagc": Golden(
        chain(C.adagc(warmup=3), C.scale_by_adam),
        {4: ((0.533820910471, -0.878996214223, 0.159338396432, 0.0474343035019, 5.18106498447),)},
        ("spike",),
        ("adagc",),
    ),
    "kourkoutas": Golden(
        chain(C.kourkoutas_beta2(alpha=0.95, beta2_min=0.9, warmup=0), C.scale_by_adam),
        {4: ((0.554744199813, -0.819599031474, 0.223891242515, 0.250368042791, 4.62009577019),)},
        ("spike",),
        ("kourkoutas_beta2",),
    ),
    "kourkoutas, warm-up": Golden(
        chain(C.kourkoutas_beta2(warmup=2), C.scale_by_adam),
        {4: ((0.562506660148, -0.816459377941, 0.226334157622, 0.264919136362, 4.59856641036),)},
        ("spike",),
    ),
    "kourkoutas, not corrected": Golden(
        chain(C.kourkoutas_beta2(warmup=0), C.scale_by_adam(correct_bias=False)),
        {4: ((0.533587957785, -0.875195535961, 0.170406372307, 0.0733431308413, 5.15385514658),)},
        ("spike",),
    ),
    "lamb": Golden(
        lambda ps: heavyball.LAMB(ps, 0.05),
        {
            4: (
                (0.640700720124, -0.84157984941, 0.16324170603, 0.186636287978, 4.89661403755),
                (-0.30221633286, 0.966000959284, -0.629464693672, 2.74196299027),
            )
        },
        ("P", "PV"),
        ("trust_ratio",),
    ),
    "lambc": Golden(
        lambda ps: heavyball.LAMB(ps, 0.05, max_grad_norm=None, trust_clip=True),
        {
            4: (
                (0.619645149763, -0.833763146172, 0.207616578176, 0.268386978974, 4.82980300406),
                (-0.332946763945, 1.02812982292, -0.592059604778, 2.69560906346),
            )
        },
        ("P", "PV"),
    ),
    "lars": Golden(
        lambda ps: heavyball.LARS(ps, 0.5, momentum=0.9, weight_decay=0.01),
        {
            4: (
                (0.540864180645, -0.910358311197, 0.137178646713, -0.0155324550763, 5.54903519469),
                (-0.415334744988, 0.96044475873, -0.814877495906, 2.58371178582),
            )
        },
        ("P", "PV"),
        ("lars_ratio",),
    ),
    "lars, lr in momentum": Golden(
        chain(C.lars_ratio(weight_decay=0.01), C.heavyball_momentum(lr_in_momentum=True)),
        {4: ((0.540747111033, -0.910567158604, 0.137023004596, -0.0157643862564, 5.55099096094),)},
        about=("heavyball_momentum",),
        before=lambda opt, t: opt.param_groups[0].update(lr=0.5 if t < 3 else 0.25),
    ),
    "lookahead": Golden(
        chain(C.scale_by_adam, C.lookahead(k=2)),
        {
            1: ((0.590302305207, -0.861130262385, 0.186737217542, 0.183715959275, 5.07209849701),),
            2: ((0.573257102922, -0.87938111383, 0.167313206022, 0.106061818502, 5.24262062504),),
            4: ((0.588569716458, -0.865185460882, 0.180399681312, 0.158425042532, 5.11053263501),),
            5: ((0.600323742423, -0.853335265206, 0.19217055434, 0.203408841154, 5.00411402203),),
        },
        about=("lookahead",),
    ),
    "outer_nesterov": Golden(
        chain(C.scale_by_adam, C.outer_nesterov(k=2)),
        {
            2: ((0.609507379681, -0.844457050969, 0.200946792617, 0.240642257333, 4.92506163308),),
            4: ((0.653198047075, -0.80353397796, 0.239129986461, 0.393426076514, 4.59000487621),),
            5: ((0.66495207304, -0.791683782284, 0.250900859489, 0.438409875136, 4.50057128377),),
        },
        about=("outer_nesterov",),
    ),
    "primal_average, y": Golden(
        chain(C.scale_by_adam, C.primal_average),
        {4: ((0.569946559429, -0.882901440647, 0.163575010811, 0.0910999630273, 5.276522579),)},
        about=("primal_average",),
    ),
    "primal_average, x": Golden(
        chain(C.scale_by_adam, C.primal_average),
        {4: ((0.541279173307, -0.910184632404, 0.137651953552, -0.0126289614082, 5.54651456486),)},
        evaluated=True,
    ),
    "primal_average, decay at y": Golden(
        chain(C.scale_by_adam, C.primal_average, weight_decay=0.1),
        {4: ((0.541188620416, -0.910036814197, 0.137627740741, -0.0126333200303, 5.54470996032),)},
        evaluated=True,
    ),
    "primal_average, decay at z": Golden(
        chain(C.scale_by_adam, C.primal_average(decay_at="z"), weight_decay=0.1),
        {4: ((0.566363078938, -0.877667836709, 0.162455675771, 0.0900432307559, 5.21386145009),)},
    ),
    "primal_average, decay at z, x": Golden(
        chain(C.scale_by_adam, C.primal_average(decay_at="z"), weight_decay=0.1),
        {4: ((0.54118474162, -0.910041439794, 0.137623796495, -0.0126494051339, 5.54475833379),)},
        evaluated=True,
    ),
    "primal_average, mu_x": Golden(
        chain(C.scale_by_adam, C.primal_average(mu_x=0.5)),
        {4: ((0.625841634713, -0.829247167779, 0.215014934421, 0.296669951059, 4.79616441927),)},
    ),
    "came": Golden(
        lambda ps: heavyball.CAME(ps, 0.05, weight_decay=0.01),
        {
            1: ((1.25236523636, -0.501746175806, 0.779832118982, 1.4581080404, 3.91999192804),),
            4: (
                (1.60454833073, -0.352616275782, 0.93011141776, 1.93912880433, 5.39493239818),
                (-0.405661297874, 0.965592190115, -0.789547537204, 2.58431787876),
            ),
        },
        ("P", "PV"),
        ("scale_by_came",),
    ),
    "adam-mini, rows": Golden(
        chain(C.scale_by_adam(square="row")),
        {
            1: ((0.594840177551, -0.860361153918, 0.190944699289, 0.0673690026415, 5.08947772237),),
            4: ((0.644135244807, -0.817965173798, 0.232739415299, 0.135342231655, 4.74602746163),),
        },
        about=("scale_by_adam",),
    ),
    "adam-mini, heads": Golden(
        chain(C.scale_by_adam(square=2)),
        {
            1: (
                (0.584723137816, -0.852435427777, -0.956996346685, -0.0108114850007, 8.06906953195),
            ),
            4: ((0.624584669939, -0.803245790994, -0.951347481257, 0.102157848711, 7.70658083108),),
        },
        ("P44",),
    ),
    "dog": Golden(
        chain(C.dog_rate(reps=1e-2), lr=1.0),
        {6: ((0.547114339874, -0.902871671095, 0.14237752463, -0.00719629439179, 5.48232971588),)},
        ("P", "PV"),
        ("dog_rate",),
    ),
    "ldog": Golden(
        chain(C.dog_rate(reps=1e-2, layerwise=True), lr=1.0),
        {
            6: (
                (0.547034536548, -0.902969508223, 0.142309808694, -0.00730465632551, 5.48319911255),
                (-0.4063786474, 0.965500967731, -0.802788581592, 2.6004286511),
            )
        },
        ("P", "PV"),
    ),
    "dowg": Golden(
        chain(C.dowg_rate, lr=1.0),
        {6: ((0.542064553979, -0.908993899458, 0.138196186997, -0.0139332525959, 5.53698709148),)},
        ("P", "PV"),
        ("dowg_rate",),
    ),
    "d_adapt_adam": Golden(
        chain(C.d_adapt_adam(d0=1e-3), lr=1.0),
        {20: ((0.105834812071, -0.190244667741, -1.12346668508, -2.11527250653, 4.09292629096),)},
        ("qP", "qPV"),
        ("d_adapt_adam",),
        rtol=1e-10,
    ),
    "d_adapt_sgd": Golden(
        chain(C.d_adapt_sgd(momentum=0.9, d0=1e-3), lr=1.0),
        {20: ((-0.0870152649278, 0.146736818001, -0.0220214223382, 0.00262253113215),)},
        ("qP", "qPV"),
        ("d_adapt_sgd",),
        rtol=1e-10,
    ),
    "d_adapt_lion": Golden(
        chain(C.d_adapt_lion(d0=1e-3), lr=1.0),
        {20: ((0.152989650909, -0.107998510087, 0.124437388987, 0.373669237521, 0.190130145665),)},
        ("qP", "qPV"),
        ("d_adapt_lion",),
        rtol=1e-10,
    ),
    "mechanic": Golden(
        chain(C.scale_by_adam, C.mechanic(s_init=1e-3)),
        {
            12: (
                (0.529461769491, -0.900288355443, 0.125906848268, -0.0370980240415, 5.40446931281),
                (-0.405307309345, 0.949328278559, -0.805107240097, 2.51186214609),
            )
        },
        ("qP", "qPV"),
        ("mechanic",),
        rtol=1e-10,
    ),
    "cocob": Golden(
        chain(C.cocob),
        {6: ((0.547404247943, -0.904739301739, 0.142414801274, 0.00597846485278, 5.49177431598),)},
        ("P", "PV"),
        ("cocob",),
    ),
    "momo": Golden(
        chain(C.momo, lr=1.0),
        {6: ((0.750115074205, -0.634201457936, 0.344478949049, 0.303016671331, 3.64307830738),)},
        ("P", "PV"),
        ("momo",),
        losses=True,
    ),
    "momo, decay": Golden(
        chain(C.momo(weight_decay=0.1, bias_correction=True), lr=1.0),
        {6: ((0.832563612839, 0.149138012647, 0.549956366821, 0.736257071249, 1.80272517078),)},
        ("P", "PV"),
        losses=True,
    ),
    "momo_adam": Golden(
        lambda ps: heavyball.MoMoAdam(ps, 0.05, weight_decay=0.1),
        {6: ((0.639445779178, -0.775614093692, 0.234960480238, 0.393069607313, 4.29262852138),)},
        ("P", "PV"),
        ("momo_adam",),
        losses=True,
    ),
    "momentum_sam": Golden(
        chain(C.momentum_sam(norm="tensor", weight_decay=0.01)),
        {
            1: ((0.571046013603, -0.869694975693, 0.16744439889, 0.0310006710255, 5.19301144011),),
            4: ((0.580428399855, -0.861436263926, 0.167441341959, 0.0350829572316, 5.1226244765),),
        },
        about=("momentum_sam",),
    ),
    "momentum_sam, z": Golden(
        lambda ps: heavyball.MSAM(ps, 0.05, norm="tensor", weight_decay=0.01),
        {4: ((0.548973488211, -0.896933887827, 0.145372776238, -0.00227589445281, 5.42366928921),)},
        evaluated=True,
    ),
    "ema_nesterov": Golden(
        chain(C.scale_by_adam, C.ema_nesterov(gamma=0.9, start=1)),
        {5: ((0.656769347923, -0.799482085061, 0.243474538087, 0.408651274307, 4.559366298),)},
        about=("ema_nesterov",),
        evaluated=True,
    ),
}


def t5_adafactor(params: Any, rate: Any) -> C.ChainOpt:
    return C.ChainOpt(
        params,
        1.0,
        rate,
        C.palm_beta2,
        C.factored_rms(axes="last", min_dim=1, eps=1e-30),
        C.clip_update_rms,
        C.scale_lr_by_parameter_rms,
    )


def run(golden: Golden) -> Iterator[tuple[int, Any, list[Tensor]]]:
    """The steps of a golden run."""
    made = [PROBLEMS[name] for name in golden.problems]
    params = [torch.nn.Parameter(start()) for start, _ in made]
    optimizer = golden.make(params)
    for t in range(1, max(golden.values) + 1):
        for p, (_, grad) in zip(params, made, strict=True):
            p.grad = grad(t, p.detach())
        if golden.before is not None:
            golden.before(optimizer, t)
        optimizer.step(**({"loss": LOSSES[t - 1]} if golden.losses else {}))
        yield t, optimizer, params


def check_golden(name: str) -> None:
    golden = GOLDEN[name]
    for t, optimizer, params in run(golden):
        if t not in golden.values:
            continue
        if golden.evaluated:
            optimizer.eval()
        for p, expected in zip(params, golden.values[t], strict=False):
            found = summary(p.detach())
            for one, other in zip(found, expected, strict=False):
                assert abs(one - other) <= golden.rtol * max(1.0, abs(other)), (name, t, found)
        if golden.evaluated:
            optimizer.train()


@pytest.mark.parametrize("name", GOLDEN)
def test_the_golden_values(name: str) -> None:
    check_golden(name)


# ---- torch.optim, step by step

TORCH: dict[str, tuple[dict[str, Any], ...]] = {
    "Adam": (
        {},
        {"amsgrad": True, "weight_decay": 0.1},
        {"decoupled_weight_decay": True, "weight_decay": 0.1, "maximize": True},
        {"betas": (0.5, 0.9), "eps": 1e-3},
    ),
    "RAdam": (
        {},
        {"weight_decay": 0.1},
        {"decoupled_weight_decay": True, "weight_decay": 0.1, "maximize": True},
        {"betas": (0.5, 0.9), "eps": 1e-3, "lr": 0.1},
    ),
    "Adagrad": (
        {},
        {"lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.5, "eps": 1e-3},
        {"maximize": True, "weight_decay": 0.1},
    ),
    "Adadelta": (
        {},
        {"rho": 0.5, "weight_decay": 0.1, "eps": 1e-2, "maximize": True},
        {"rho": 1.0},
    ),
    "Adamax": ({}, {"weight_decay": 0.1, "maximize": True, "betas": (0.5, 0.8), "eps": 1e-2}),
    "ASGD": ({}, {"weight_decay": 0.1, "maximize": True, "lambd": 0.1, "alpha": 0.5, "t0": 3}),
    "Rprop": ({}, {"etas": (0.3, 1.5), "step_sizes": (1e-3, 0.1), "maximize": True}),
    "Adafactor": (
        {},
        {"weight_decay": 0.1, "maximize": True, "beta2_decay": -0.5, "eps": (1e-2, 0.1), "d": 2.0},
        {"lr": 0.3},
    ),
}
SETTINGS = [(name, options) for name, several in TORCH.items() for options in several]
ODD = ((), (5,), (3, 4), (1, 6), (6, 1), (2, 1, 5), (2, 3, 2, 2))


def check_torch(name: str, options: dict[str, Any], size: float = 1.0) -> None:
    begin = starts(ODD)
    grads = [[size * g for g in step] for step in gradients(14, ODD)]
    ours = walk(lambda ps: getattr(heavyball, name)(ps, **options), begin, grads)
    with double_default():  # ASGD keeps its learning rate in the default dtype
        theirs = walk(lambda ps: getattr(torch.optim, name)(ps, **options), begin, grads)
    for one, other in zip(ours, theirs, strict=True):
        for a, b in zip(one, other, strict=True):
            # some roundings of steps of up to 1 in each of 14 steps
            torch.testing.assert_close(a, b, rtol=1e-14, atol=2e-14)


@pytest.mark.parametrize("size", [1.0, 1e-5])
@pytest.mark.parametrize(("name", "options"), SETTINGS, ids=str)
def test_a_preset_of_torchs_name_is_torchs_step_by_step(
    name: str, options: dict[str, Any], size: float
) -> None:
    check_torch(name, options, size)


@pytest.mark.parametrize("start", [0, 2, 1e6])
def test_the_average_of_asgd_is_torchs(start: float) -> None:
    begin, grads = starts(ODD), gradients(8, ODD)
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in begin] for _ in range(2))
    one = heavyball.ASGD(ours, t0=start)
    with double_default():
        other = torch.optim.ASGD(theirs, t0=start)
        for step in grads:
            for p, q, g in zip(ours, theirs, step, strict=True):
                p.grad, q.grad = g.clone(), g.clone()
            one.step()
            other.step()
            with one.averaged():
                for p, q in zip(ours, theirs, strict=True):
                    torch.testing.assert_close(p.detach(), other.state[q]["ax"], rtol=0, atol=1e-15)


# ---- formulations of their own: plain loops over the steps of one tensor, on other shapes and settings

Path = Iterator[Tensor]


@dataclasses.dataclass(frozen=True)
class Own:
    """A chain, and its mathematics written out for one tensor: the weights after every step."""

    make: Callable[[Any], C.ChainOpt]
    path: Callable[[Tensor, list[Tensor]], Path]
    about: tuple[str, ...]
    steps: int = 9
    lr: float = 0.1


def zclip_path(p: Tensor, grads: list[Tensor]) -> Path:
    norms: list[float] = []
    mean = var = 0.0
    for g in grads:
        n = float(g.norm())
        target = n
        if len(norms) < 4:
            norms.append(n)
            mean = sum(norms) / len(norms)
            var = sum((x - mean) ** 2 for x in norms) / len(norms)
        else:
            z = (n - mean) / (var**0.5 + 1e-6)
            if z > 1.5:
                target = mean + 1.5 * var**0.5 / (z / 1.5)
            mean = 0.9 * mean + 0.1 * target
            var = 0.9 * var + 0.1 * (target - mean) ** 2
        p = p - 0.1 * g * target / n
        yield p


def anchored_path(p: Tensor, grads: list[Tensor]) -> Path:
    first = p
    for g in grads:
        p = p - 0.1 * (g + 0.3 * (p - first))
        yield p


def reset_path(p: Tensor, grads: list[Tensor]) -> Path:
    for t in range(len(grads)):
        past = grads[t - t % 4 : t + 1]
        weights = [0.9 ** (len(past) - 1 - i) for i in range(len(past))]
        p = p - 0.1 * sum(w * x for w, x in zip(weights, past, strict=True)) / sum(weights)
        yield p


def adan_path(p: Tensor, grads: list[Tensor]) -> Path:
    m = v = n = 0 * p
    last = grads[0]
    for t, g in enumerate(grads, 1):
        m = 0.9 * m + 0.1 * g
        v = 0.7 * v + 0.3 * (g - last)
        n = 0.95 * n + 0.05 * (g + 0.7 * (g - last)) ** 2
        u = (m / (1 - 0.9**t) + 0.7 * v / (1 - 0.7**t)) / ((n / (1 - 0.95**t)).sqrt() + 1e-3)
        p, last = (p - 0.1 * u) / (1 + 0.1 * 0.2), g
        yield p


def came_path(p: Tensor, grads: list[Tensor]) -> Path:
    """With full tensors of squares in place of means of rows and columns, for tensors of one axis."""
    row = col = row2 = col2 = full = 0.0
    m = 0 * p
    for g in grads:
        s = g**2 + 1e-30
        if p.ndim > 1:
            row, col = 0.9 * row + 0.1 * s.mean(-1), 0.9 * col + 0.1 * s.mean(-2)
            v = row[..., None] * col[..., None, :] / row.mean(-1)[..., None, None]
        else:
            v = full = 0.9 * full + 0.1 * s
        u = g / v.sqrt()
        u = u / max(1.0, float(u.square().mean().sqrt()) / 0.8)
        m = 0.5 * m + 0.5 * u
        step = m
        if p.ndim > 1:
            q = (u - m) ** 2 + 1e-16
            row2, col2 = 0.99 * row2 + 0.01 * q.mean(-1), 0.99 * col2 + 0.01 * q.mean(-2)
            step = (
                m / (row2[..., None] * col2[..., None, :] / row2.mean(-1)[..., None, None]).sqrt()
            )
        p = p - 0.01 * step
        yield p


def sm3_path(p: Tensor, grads: list[Tensor]) -> Path:
    bounds = [0.0 * p.amax([k for k in range(p.ndim) if k != i] or [], True) for i in range(p.ndim)]
    if p.ndim == 1:
        bounds = [0.0 * p]
    m = 0 * p
    for g in grads:
        v = torch.stack([b.expand(p.shape) for b in bounds]).amin(0)
        v = 0.7 * v + 0.3 * g**2
        for i, b in enumerate(bounds):
            others = [k for k in range(p.ndim) if k != i]
            bounds[i] = torch.maximum(b, v.amax(others, True) if others else v)
        m = 0.8 * m + 0.2 * g / v.sqrt()
        p = p - 0.1 * m
        yield p


def adagc_path(p: Tensor, grads: list[Tensor]) -> Path:
    y = None
    for t, g in enumerate(grads, 1):
        n = float(g.norm())
        if t < 4:
            h = min(1.0, 0.5 / (n + 1e-8))
            y = h * n if y is None else min(y, h * n)
        else:
            h = min(1.0, 1.2 * y / n)
            y = 0.9 * y + 0.1 * h * n
        p = p - 0.1 * h * g
        yield p


def yogi_path(p: Tensor, grads: list[Tensor]) -> Path:
    m, v = 0 * p, 0 * p + 0.5
    for t, g in enumerate(grads, 1):
        m = 0.8 * m + 0.2 * g
        v = v - 0.1 * torch.sign(v - g**2) * g**2
        p = p - 0.1 * m / (1 - 0.8**t) / ((v / (1 - 0.9**t)).sqrt() + 0.01)
        yield p


def mini_path(blocks: Callable[[Tensor], int]) -> Callable[[Tensor, list[Tensor]], Path]:
    def path(p: Tensor, grads: list[Tensor]) -> Path:
        count, m, v = blocks(p), 0 * p, 0.0
        for t, g in enumerate(grads, 1):
            m = 0.9 * m + 0.1 * g
            v = 0.99 * v + 0.01 * g.reshape(count, -1).square().mean(1)
            root = (v / (1 - 0.99**t)).sqrt() + 0.1
            p = p - 0.1 * (m.reshape(count, -1) / (1 - 0.9**t) / root[:, None]).reshape(p.shape)
            yield p

    return path


def outer_path(p: Tensor, grads: list[Tensor]) -> Path:
    """torch's SGD with Nesterov momentum on the way of every third step."""
    slow = torch.nn.Parameter(p.clone())
    sgd = torch.optim.SGD([slow], 0.8, momentum=0.6, nesterov=True)
    for t, g in enumerate(grads, 1):
        p = p - 0.1 * g
        if t % 3 == 0:
            slow.grad = slow.detach() - p
            sgd.step()
            p = slow.detach().clone()
        yield p


def primal_path(p: Tensor, grads: list[Tensor]) -> Path:
    """x, y and z of the paper, a decay of z as part of its step."""
    x = z = p
    for g in grads:
        z = z - 0.1 * (g + 0.3 * z)
        x = 0.8 * x + 0.2 * z
        yield 0.6 * x + 0.4 * z


OWN: dict[str, Own] = {
    "zclip": Own(chain(C.zclip(warmup=4, z=1.5, alpha=0.9), lr=0.1), zclip_path, ("zclip",)),
    "anchor_decay": Own(
        chain(C.anchor_decay(weight_decay=0.3), lr=0.1), anchored_path, ("anchor_decay",)
    ),
    "reset_moments": Own(
        chain(C.reset_moments(every=4), C.exp_avg, lr=0.1), reset_path, ("reset_moments",)
    ),
    "adan": Own(
        chain(
            C.scale_by_adan(betas=(0.9, 0.7, 0.95), eps=1e-3),
            C.proximal_decay(weight_decay=0.2),
            lr=0.1,
        ),
        adan_path,
        ("scale_by_adan", "proximal_decay"),
    ),
    "came": Own(
        chain(C.scale_by_came(betas=(0.5, 0.9, 0.99), threshold=0.8), lr=0.01),
        came_path,
        ("scale_by_came",),
    ),
    "adagc": Own(
        chain(C.adagc(warmup=4, relative=1.2, beta=0.9, absolute=0.5), lr=0.1),
        adagc_path,
        ("adagc",),
    ),
    "sm3": Own(chain(C.scale_by_sm3(momentum=0.8, beta=0.7), lr=0.1), sm3_path, ("scale_by_sm3",)),
    "yogi": Own(
        chain(C.scale_by_yogi(betas=(0.8, 0.9), eps=0.01, initial_accumulator_value=0.5), lr=0.1),
        yogi_path,
        ("scale_by_yogi",),
    ),
    "adam-mini, rows": Own(
        chain(C.scale_by_adam(betas=(0.9, 0.99), eps=0.1, square="row"), lr=0.1),
        mini_path(lambda p: p.shape[0]),
        ("scale_by_adam",),
    ),
    "adam-mini, tensor": Own(
        chain(C.scale_by_adam(betas=(0.9, 0.99), eps=0.1, square="tensor"), lr=0.1),
        mini_path(lambda p: 1),
        ("scale_by_adam",),
    ),
    "adam-mini, blocks": Own(
        chain(C.scale_by_adam(betas=(0.9, 0.99), eps=0.1, square=2), lr=0.1),
        mini_path(lambda p: 2),
        ("scale_by_adam",),
    ),
    "outer_nesterov": Own(
        chain(C.outer_nesterov(k=3, outer_lr=0.8, outer_momentum=0.6), lr=0.1),
        outer_path,
        ("outer_nesterov",),
    ),
    "primal_average": Own(
        chain(C.primal_average(mu_y=0.6, mu_x=0.8, decay_at="z"), lr=0.1, weight_decay=0.3),
        primal_path,
        ("primal_average",),
    ),
}
EVEN = ((4,), (6, 4), (2, 3, 2), (4, 1), (2, 5))


def check_own(name: str) -> None:
    own = OWN[name]
    for shape in EVEN:
        (begin,), grads = starts([shape]), gradients(own.steps, [shape])
        ours = walk(own.make, [begin], grads)
        for (one,), other in zip(ours, own.path(begin, [g for (g,) in grads]), strict=True):
            # some dozens of roundings of weights and steps below 10
            torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", OWN)
def test_a_formulation_of_its_own(name: str) -> None:
    check_own(name)


def test_the_noise_has_the_variance_that_is_said() -> None:
    size, eta, gamma = 40_000, 0.3, 0.7
    param = torch.nn.Parameter(torch.zeros(size, dtype=torch.float64))
    optimizer = C.ChainOpt([param], 1.0, C.TRANSFORMS["add_noise"](eta=eta, gamma=gamma))
    seen = []
    for t in (1, 2, 3):
        before = param.detach().clone()
        param.grad = torch.ones(size, dtype=torch.float64)
        optimizer.step()
        drawn = before - param.detach() - 1
        variance = eta / (1 + t) ** gamma
        # five deviations of the mean and of the variance of so many draws
        assert abs(drawn.mean()) < 5 * (variance / size) ** 0.5
        assert abs(drawn.var() / variance - 1) < 5 * (2 / size) ** 0.5
        seen.append(drawn / drawn.std())
    assert not torch.equal(seen[0], seen[1])


def momo_path(
    begin: list[Tensor], grads: list[list[Tensor]], losses: list[float], beta: float, lr: float
) -> Iterator[tuple[list[Tensor], float, bool]]:
    """MoMo that finds its bound, on one vector: weights and bound behind a step, and if it fell."""
    p, wd, d, f, c, bound = torch.cat([q.flatten() for q in begin]), 0.1, 0.0, 0.0, 0.0, -9.0
    for t, (step, loss) in enumerate(zip(grads, losses, strict=True), 1):
        g = torch.cat([x.flatten() for x in step])
        weight = 1.0 if t == 1 else 1 - beta
        d, f, c = (
            old + weight * (new - old) for old, new in ((d, g), (f, loss), (c, float(g @ p)))
        )
        size, along, k = float(d @ d), float(d @ p), 1 + lr * wd
        cap = k * (f - c) + along
        fell = cap < k * bound
        if fell:
            bound = max(cap / (2 * k), -9.0)
        tau = min(lr, max(cap - k * bound, 0.0) / size)
        bound = max(f - c + along - tau * size / 2, -9.0)
        p = (p - tau * d) / k
        parts = p.split([q.numel() for q in begin])
        yield [part.reshape(q.shape) for part, q in zip(parts, begin, strict=True)], bound, fell


def test_momo_finds_the_least_loss() -> None:
    shapes, losses = [(3, 4), (5,), ()], [2.0, 1.5, -4.0, -7.0, 3.0, 2.0, -20.0]
    begin, grads = starts(shapes), gradients(7, shapes)
    params = [torch.nn.Parameter(p.clone()) for p in begin]
    momo = C.TRANSFORMS["momo"](use_fstar=True, lower_bound=-9.0, beta=0.7, weight_decay=0.1)
    optimizer = C.ChainOpt(params, 0.3, momo)
    seen = set()
    path = momo_path(begin, grads, losses, 0.7, 0.3)
    for step, loss, (expected, bound, fell) in zip(grads, losses, path, strict=True):
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone()
        optimizer.step(loss=loss)
        assert abs(float(optimizer.param_groups[0]["momo_fstar"]) - bound) < 1e-11
        seen.add(fell)
        for one, other in zip(params, expected, strict=True):
            torch.testing.assert_close(one.detach(), other, rtol=1e-12, atol=1e-12)
    assert seen == {True, False}


def test_a_polyak_rate_is_the_loss_over_the_size_of_the_gradient() -> None:
    shapes = [(3, 4), (5,), ()]
    begin, grads = starts(shapes), gradients(4, shapes)
    params = [torch.nn.Parameter(p.clone()) for p in begin]
    optimizer = C.ChainOpt(params, 0.5, C.TRANSFORMS["polyak_rate"](polyak_beta=0.7))
    mean, path = 0.0, begin
    for t, (step, loss) in enumerate(zip(grads, (2.0, -1.0, 0.5, 3.0), strict=True), 1):
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone()
        optimizer.step(loss=loss)
        mean = 0.7 * mean + 0.3 * (torch.pi / 2) ** 0.5 * float(sum(g.abs().sum() for g in step))
        rate = 0.5 * max(0.0, loss) / (mean / (1 - 0.7**t))
        path = [p - rate * g for p, g in zip(path, step, strict=True)]
        for one, other in zip(params, path, strict=True):
            torch.testing.assert_close(one.detach(), other, rtol=1e-13, atol=1e-13)


# ---- what is refused


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: C.scale_by_radam(betas=(0.9, 0.6)), "number 1 in"),
        (lambda: C.scale_by_radam(threshold=4, betas=(0.9, 0.59)), "number 1 in"),
        (lambda: C.scale_by_rprop(etas=(1.2, 1.3)), "number 0 in"),
        (lambda: heavyball.Rprop([torch.zeros(2)], weight_decay=0.1), "weight_decay"),
        (lambda: chain(C.scale_by_rprop, C.l1_decay)([torch.zeros(2)]), "exclude each other"),
        (lambda: chain(C.scale_by_rprop, weight_decay=0.1)([torch.zeros(2)]), "nothing|no element"),
        (lambda: heavyball.Adafactor([torch.zeros(2)], beta2_decay=0.8), "beta2_decay=0.8"),
        (
            lambda: heavyball.Adagrad([torch.zeros(2)], initial_accumulator_value=-1.0),
            "expected in",
        ),
        (
            lambda: chain(C.scale_by_adam(square=4))([torch.zeros(6, 2)]),
            r"6 rows are not square=4 blocks",
        ),
        (
            lambda: chain(C.scale_by_adam(square="row", amsgrad=True))([torch.zeros(6, 2)]),
            "amsgrad=True",
        ),
        (lambda: C.scale_by_adam(square="rows"), "square='rows'.*'row'"),
        (lambda: C.outer_nesterov(k=0), "k=0"),
        (lambda: chain(C.scale_by_sm3)([torch.zeros((1,) * 9)]), "more than 8 dimensions"),
        (lambda: chain(C.maximize, C.sam)([torch.zeros(2)]), "negate the loss instead"),
        (lambda: chain(C.qk_clip(heads=4))([torch.zeros(6, 2)]), "heads=4|blocks=4"),
        (lambda: chain(C.schedule_free, C.qk_clip)([torch.zeros(6, 2)]), "exclude each other"),
        (lambda: chain(C.hyperball, C.pin_radius)([torch.zeros(6, 2)]), "exclude each other"),
        (lambda: chain(C.lookahead, C.schedule_free)([torch.zeros(2)]), "before the writer"),
        (lambda: chain(C.schedule_free, C.lookahead)([torch.zeros(2)]), "exclude each other"),
        (lambda: heavyball.LARS([torch.zeros(2)], nesterov=True), "momentum=0.0"),
        (lambda: heavyball.Adadelta([torch.zeros(2)], rho=1.1), "rho=1.1"),
    ],
)
def test_what_cannot_be_is_refused_by_name(make: Callable[[], object], words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        make()


def test_a_group_that_comes_to_lie_outside_is_refused_before_a_step() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = C.ChainOpt([param], 0.1, C.scale_by_radam)
    param.grad = torch.ones(3)
    optimizer.param_groups[0]["betas"] = (0.9, 0.5)
    with pytest.raises(ValueError, match="number 1 in"):
        optimizer.step()
    assert torch.equal(param, torch.ones(3))


def test_a_polynomial_average_weighs_late_steps_more() -> None:
    grads = gradients(6, [(3,)])
    (begin,) = starts([(3,)])
    param = torch.nn.Parameter(begin.clone())
    average = C.TRANSFORMS["polynomial_average"](gamma=3.0)
    optimizer = C.ChainOpt([param], 0.1, average)
    p, expected = begin, begin
    for t, (g,) in enumerate(grads, 1):
        param.grad = g.clone()
        optimizer.step()
        p = p - 0.1 * g
        share = 4 / (t + 3)
        expected = (1 - share) * expected + share * p
        with optimizer.averaged():
            torch.testing.assert_close(param.detach(), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("k", [2, 5])
def test_a_window_of_snapshots_is_filled_from_the_first_on(k: int) -> None:
    (begin,), grads = starts([(2, 3)]), gradients(13, [(2, 3)])
    param = torch.nn.Parameter(begin.clone())
    optimizer = C.ChainOpt([param], 0.1, C.TRANSFORMS["window_average"](k=k, every=2))
    path = [begin]
    for (g,) in grads:
        param.grad = g.clone()
        optimizer.step()
        path.append(path[-1] - 0.1 * g)
        taken = path[2::2][-k:] or path[-1:]
        with optimizer.averaged():
            expected = sum(taken) / len(taken)
            torch.testing.assert_close(param.detach(), expected, rtol=1e-13, atol=1e-13)


def query_and_key() -> list[tuple[str, torch.nn.Parameter]]:
    shapes = {"a.q_proj.weight": (8, 4), "a.k_proj.weight": (4, 4), "a.out.weight": (4, 8)}
    (params,) = [starts(list(shapes.values()))]
    return list(zip(shapes, map(torch.nn.Parameter, params), strict=True))


@pytest.mark.parametrize("fuse", [False, True])
def test_muon_clip_shrinks_heads_whose_logits_were_fed_and_else_is_muon(fuse: bool) -> None:
    heads = {"*q_proj*": 4, "*k_proj*": 2}
    named, plain = query_and_key(), query_and_key()
    clipped = heavyball.MuonClip(named, 0.1, heads=heads, tau=50.0, fuse_backward=fuse)
    muon = heavyball.Muon(plain, 0.1, scale="match_rms_adamw", weight_decay=0.1)
    for t in range(3):
        if t == 1:
            clipped.feed("max_logits", torch.tensor([10.0, 200.0, 50.0, torch.nan]))
        for optimizer, params in ((clipped, named), (muon, plain)):
            sum(p.square().sum() / 2 for _, p in params).backward()
            optimizer.step()
            optimizer.zero_grad()
        if t == 1:  # to the root of a quarter: the second head of q, the first pair's key
            with torch.no_grad():
                plain[0][1][2:4] /= 2
                plain[1][1][:2] /= 2
        for (name, p), (_, q) in zip(named, plain, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12, msg=f"{name} at {t}")


def test_a_signal_of_another_size_is_refused_before_anything_changes() -> None:
    named = query_and_key()
    optimizer = heavyball.MuonClip(named, 0.1, heads=4)
    optimizer.feed("max_logits", torch.ones(3))
    before = [p.detach().clone() for _, p in named]
    for _, p in named:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"'max_logits'\): 3 numbers.*q_proj.*expects 4 numbers"):
        optimizer.step()
    assert all(torch.equal(p, q) for (_, p), q in zip(named, before, strict=True))
    with pytest.raises(ValueError, match="nothing in the chain reads it"):
        optimizer.feed("max_logit", 1.0)


# ---- a second gradient

SLOPE = (1 + 4 * _grid(3, 4)[0] + _grid(3, 4)[1]) / 6
SHARP = {
    "sam": (0.522443283575, -0.711283825015, 0.0877456856309, -0.0752744994535, 3.90914690898),
    "asam": (0.522242692768, -0.673389737129, 0.0893119318694, -0.0708449568137, 3.68558809542),
    "looksam": (0.537240200882, -0.649353553733, 0.0413680161932, -0.212272171093, 3.7835945147),
}
SHARP_OPTIONS: dict[str, dict[str, int]] = {"looksam": {"k": 2}}


def quadratic(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """An optimizer of half the sum of SLOPE p^2, and its closure."""
    param = torch.nn.Parameter(matrix(3, 4).to(dtype))
    element = C.TRANSFORMS[name](**SHARP_OPTIONS.get(name, {}))
    optimizer = C.ChainOpt([param], 0.05, element, **options)
    seen = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        seen.append(param.detach().clone())
        loss = (SLOPE.to(dtype) * param * param).sum() / 2
        loss.backward()
        return loss

    return param, optimizer, closure, seen


def check_sharp(name: str) -> None:
    param, optimizer, closure, seen = quadratic(name)
    steps, every = (5, 2) if name == "looksam" else (4, 1)
    for _ in range(steps):
        optimizer.step(closure)
    assert len(seen) == steps + -(-steps // every)
    for one, other in zip(summary(param.detach()), SHARP[name], strict=True):
        assert abs(one - other) <= 2e-11 * max(1.0, abs(other))


@pytest.mark.parametrize("name", SHARP)
def test_the_gradient_is_taken_at_perturbed_weights(name: str) -> None:
    check_sharp(name)


@pytest.mark.parametrize("options", [{}, {"param_ecc": "bf16+8"}], ids=str)
def test_perturbed_weights_are_put_back_to_the_bit(options: dict[str, Any]) -> None:
    for raising in (False, True):
        param, optimizer, closure, seen = quadratic("sam", torch.bfloat16, **options)
        before = param.detach().clone()

        def raised(closure: Any = closure, seen: list = seen) -> Any:
            loss = closure()
            if len(seen) == 2:
                raise KeyboardInterrupt
            return loss

        optimizer.param_groups[0]["lr"] = 0.0
        if raising:
            with pytest.raises(KeyboardInterrupt):
                optimizer.step(raised)
        else:
            optimizer.step(closure)
        assert not torch.equal(seen[1], before)
        assert torch.equal(param, before)


@pytest.mark.parametrize("name", SHARP)
def test_weights_of_bfloat16_are_perturbed_by_what_they_cannot_hold(name: str) -> None:
    """On the average: 0.05 / 64 of a weight of 1, of which bfloat16 holds steps of 1 / 128."""
    weight = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    option = {} if name == "sam" else {"rho": 0.05}
    opt = C.ChainOpt([weight], 0.01, C.TRANSFORMS[name](**option), C.exp_avg, compile=False)
    seen: list[Tensor] = []

    def closure() -> Tensor:
        seen.append(weight.detach().double())
        weight.grad = torch.ones_like(weight)
        return torch.tensor(1.0)

    opt.step(closure)
    moved = seen[1] - seen[0]
    assert set(moved.tolist()) == {0.0, 1 / 128}
    # the mean of 4,096 draws of 1 / 128 with probability 0.1, within five deviations
    expected = 0.05 / 64 * (1.01 if name == "asam" else 1)
    assert abs(moved.mean() - expected) < 5 * (0.1 * 0.9 / 4096) ** 0.5 / 128


@pytest.mark.parametrize("size", [1e200, 1e-200])
def test_a_perturbation_is_of_its_length_whatever_the_size_of_the_gradient(size: float) -> None:
    weights = [torch.nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2)]
    opt = C.ChainOpt(weights, 0.0, C.sam(rho=0.5), C.sign, compile=False)
    seen = []

    def closure() -> Tensor:
        seen.append(torch.cat([w.detach() for w in weights]))
        for w in weights:
            w.grad = torch.full_like(w, size)
        return torch.tensor(1.0)

    opt.step(closure)
    # four equal entries; the authors' 1e-12 beside the norm leaves nothing of a tiny gradient
    expected = 0.25 if size > 1 else 0.0
    torch.testing.assert_close(seen[1] - seen[0], torch.full((4,), expected, dtype=torch.float64))


def test_a_second_gradient_needs_a_closure() -> None:
    _, optimizer, closure, _ = quadratic("sam")
    closure()
    with pytest.raises(ValueError, match=r"call step\(closure\)"):
        optimizer.step()


# ---- what mistakes must be seen by

OF_TORCH = {
    "RAdam": ("scale_by_radam",),
    "Adagrad": ("scale_by_adagrad", "inverse_time"),
    "Adadelta": ("scale_by_adadelta",),
    "Adamax": ("scale_by_adamax",),
    "ASGD": ("asgd_rate",),
    "Rprop": ("scale_by_rprop",),
    "Adafactor": ("scale_by_parameter_rms",),
}


def shown() -> Iterator[tuple[str, tuple[str, ...], Callable[[], None]]]:
    """Every comparison, the transforms that it shows right, and what runs it."""
    for name, golden in GOLDEN.items():
        yield f"golden {name}", golden.about, partial(check_golden, name)
    for name, about in OF_TORCH.items():
        yield f"torch {name}", about, partial(check_torch, name, TORCH[name][1])
    for name, own in OWN.items():
        yield f"own {name}", own.about, partial(check_own, name)
    for name in SHARP:
        yield f"sharp {name}", (name,), partial(check_sharp, name)
    yield (
        "polynomial average",
        ("polynomial_average",),
        test_a_polynomial_average_weighs_late_steps_more,
    )
    yield (
        "window",
        ("window_average",),
        partial(test_a_window_of_snapshots_is_filled_from_the_first_on, 5),
    )
    yield "fstar", ("momo",), test_momo_finds_the_least_loss
    yield (
        "polyak",
        ("polyak_rate",),
        test_a_polyak_rate_is_the_loss_over_the_size_of_the_gradient,
    )
    yield "noise", ("add_noise",), test_the_noise_has_the_variance_that_is_said
    yield "average", ("running_average",), partial(test_the_average_of_asgd_is_torchs, 2)
