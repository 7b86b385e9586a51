"""Matrix methods against golden values of twelve digits, and against other formulations in float64.

Inputs of the golden values:

P  p[i, j] = cos(1 + 2i + 3j), gradient at step t: sin(1 + i + 2j + ij + 3t) / t
V  p[k] = cos(2 + k), k = 0..4, gradient sin(1 + 2k + 3t) / t

A matrix is given as (p[0, 0], p[1, 2], p[-1, -1], sum, sum of squares), a vector as (first, last, sum,
sum of squares). States after the steps are separated by |, `..` leaves out the steps in between.
"""

import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from helpers import (  # noqa: F401
    Wrong,
    close,
    eager,
    gradients,
    mutant,
    starts,
    states,
    updates,
    walk,
)
from torch import Tensor

import heavyball
from heavyball import chainable as C
from heavyball.linalg.orthogonalize import newton_schulz, table
from heavyball.runtime import serve


def inputs(n: int, m: int, steps: int) -> tuple[Tensor, list[Tensor]]:
    """P, or V for m = 0."""
    i = torch.arange(n, dtype=torch.float64)[:, None]
    j = torch.arange(max(m, 1), dtype=torch.float64)
    if not m:
        grads = [torch.sin(1 + 2 * i[:, 0] + 3 * t) / t for t in range(1, steps + 1)]
        return torch.cos(2 + i[:, 0]), grads
    grads = [torch.sin(1 + i + 2 * j + i * j + 3 * t) / t for t in range(1, steps + 1)]
    return torch.cos(1 + 2 * i + 3 * j), grads


def shown(p: Tensor) -> list[float]:
    ends = (p[0], p[-1]) if p.ndim == 1 else (p[0, 0], p[1, 2], p[-1, -1])
    return [float(x) for x in (*ends, p.sum(), p.square().sum())]


@dataclass
class Golden:
    """A run: the chain, what is different from the defaults, and the values."""

    chain: Callable[[], tuple]
    values: str
    shape: tuple[int, int] = (3, 4)
    lr: float = 0.05
    weight_decay: float = 0.0
    state: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    behind: float = 0.0  # the share by which the weights decay behind the step

    @property
    def expected(self) -> list[list[float]]:
        parts = self.values.split("|")
        number = r"-?\d+\.?\d*(?:e-?\d+)?"
        return [[float(x) for x in re.findall(number, part)] for part in parts]


def run(case: Golden, steps: int) -> list[Tensor]:
    start, grads = inputs(*case.shape, steps)
    param = torch.nn.Parameter(start.clone())
    options: dict[str, Any] = {"weight_decay": case.weight_decay} if case.weight_decay else {}
    opt = C.ChainOpt([param], case.lr, *case.chain(), **options)
    opt.init_state()
    for key, make in case.state.items():
        opt.state[param][key].copy_(make(opt.state[param][key]))
    path = []
    for g in grads:
        param.grad = g
        opt.step()
        param.data.mul_(1 - case.behind)
        path.append(param.detach().clone())
    return path


GOLDEN = {
    "orthogonalize, heads": Golden(
        lambda: (C.muon(blocks=2),),
        """0.567008325796, -0.892154693054, -0.954520262001, -0.0787369462795, 8.36384072826 | .. | ..
        | 0.624786482462, -0.865450574187, -0.903496979875, -0.00148902042964, 8.05453774022""",
        (4, 4),
    ),
    "orthogonalize, heads, spectral": Golden(
        lambda: (C.muon_momentum, C.orthogonalize(blocks=2, scale="spectral")),
        """0.559186313658, -0.897712508488, -0.95543971776, -0.100097374084, 8.42253388041 | .. | ..
        | 0.600041640041, -0.878829844952, -0.91936080897, -0.0454748418827, 8.19311104331""",
        (4, 4),
    ),
    "orthogonalize, fused": Golden(
        lambda: (C.muon(blocks=(1, 1, 2), scale="match_rms_adamw"),),
        """0.547898746179, -0.90405876532, -0.956403792994, -0.124572529667, 8.49290813887 | .. | ..
        | 0.56677013211, -0.895528722822, -0.935994480144, -0.100876149596, 8.37944523046""",
        (4, 4),
    ),
    "orthogonalize, interleaved": Golden(
        lambda: (C.muon(blocks=("interleaved", 2, (1, 1, 1)), scale="none"),),
        """0.55670498949, -0.885009657498, 0.448055379647, 0.0421657629808, 11.086606181 | .. | ..
        | 0.624450929021, -0.853195250402, 0.49106193924, 0.195945500754, 10.7323957401""",
        (6, 4),
    ),
    "scale_by_adamuon": Golden(
        lambda: (C.scale_by_adamuon,),
        """0.550302306557, -0.901130261584, 0.146737217624, 0.0237159660738, 5.45457756553
        | 0.557008919764, -0.905559615742, 0.140112649398, 0.0636652029378, 5.52404085024
        | 0.569851256325, -0.892049148784, 0.1529871642, 0.119322959421, 5.43597662874
        | 0.578258077289, -0.879960550876, 0.167726257219, 0.121578993745, 5.36958877307""",
    ),
    "scale_by_adamuon, no sign": Golden(
        lambda: (C.scale_by_adamuon(sign=False),),
        """0.55030232318, -0.901130245081, 0.146737235564, 0.00371581348728, 5.51446311152 | .. | ..
        | 0.568891509472, -0.893471822455, 0.147454727866, 0.0198655454254, 5.4465659019""",
    ),
    "scale_by_gradient_rms": Golden(
        lambda: (
            C.muon_momentum,
            C.scale_by_gradient_rms,
            C.orthogonalize(scale="original", method="newton-schulz", steps=12),
        ),
        """0.564127821231, -0.891676810069, 0.151818603294, 0.0790180263753, 5.35351578461
        | 0.556609485044, -0.919329725519, 0.13339699361, -0.00498188182153, 5.52747768501
        | 0.577523944224, -0.899498501455, 0.170527635588, 0.0899387084929, 5.34560132724
        | 0.609927631847, -0.884663193481, 0.172081472007, 0.192088769192, 5.17827447844""",
    ),
    "scale_by_gradient_rms, quintic": Golden(
        lambda: (C.muon_momentum, C.scale_by_gradient_rms, C.orthogonalize(scale="original")),
        """0.562744056504, -0.894981062526, 0.146593865953, 0.0734829674581, 5.38320444621 | .. | ..
        | 0.6132279134, -0.887065559124, 0.16368185131, 0.175915285891, 5.23120422984""",
    ),
    "adagrad_norm_rate": Golden(
        lambda: (
            C.muon_momentum(nesterov=False),
            C.orthogonalize,
            C.adagrad_norm_rate(gamma=0.5),
        ),
        """0.565019323392, -0.895310135614, 0.162727945014, 0.0515621801896, 5.41979690199
        | 0.584834221178, -0.888300716556, 0.150014138593, 0.0784446427931, 5.30878435693
        | 0.598691600832, -0.878384533437, 0.176457839294, 0.119414330309, 5.24365856895
        | 0.612825071395, -0.873386788269, 0.168070768067, 0.137981338903, 5.17034531682""",
    ),
    "spectral_normalize": Golden(
        lambda: (C.spectral_normalize,),
        """0.563426742742, -0.880575116322, 0.159683967577, 0.0189661389347, 5.28694304061 | .. | ..
        | 0.550697640075, -0.902542013503, 0.139291283632, -0.00942585780973, 5.48147786445""",
        state={"spectral_normalize.left": lambda s: torch.full_like(s, 3**-0.5)},
    ),
    "scion, spectral, constrained": Golden(
        lambda: (*scion(C.orthogonalize(scale="spectral")), C.decoupled(weight_decay=1.0)),
        """.. | .. | ..
        | 0.701590629329, -0.613036600373, 0.232287027749, 0.469255784006, 2.88154221872""",
    ),
    "scion, spectral": Golden(
        lambda: scion(C.orthogonalize(scale="spectral")),
        """.. | .. | ..
        | 0.821544635501, -0.771426568333, 0.269956958616, 0.508866215722, 4.43284680924""",
    ),
    "sign_normalize": Golden(
        lambda: (*scion(C.sign_normalize), C.decoupled(weight_decay=1.0)),
        """.. | .. | ..
        | 0.579199917519, -0.603000980369, 0.250493631338, 0.543217801733, 2.75325269904""",
    ),
    "row_normalize": Golden(
        lambda: (*scion(C.row_normalize), C.decoupled(weight_decay=1.0)),
        """.. | .. | ..
        | 0.597512916897, -0.600060262426, 0.250689589759, 0.207371426864, 2.79788106425""",
    ),
    "column_normalize": Golden(
        lambda: (*scion(C.column_normalize), C.decoupled(weight_decay=1.0)),
        """.. | .. | ..
        | 1.06070356393, -0.181980768514, 0.600940130883, 1.00820489848, 2.33715204793""",
    ),
    "column_normalize of the transpose": Golden(
        lambda: (*scion(C.column_normalize(axis=1)), C.decoupled(weight_decay=1.0)),
        """.. | .. | ..
        | 1.06981272683, -0.173877254211, 0.668638291879, 0.869275877694, 2.89949631758""",
    ),
    "rms_normalize": Golden(
        lambda: (*scion(C.rms_normalize(eps=1e-8)), C.decoupled(weight_decay=1.0)),
        ".. | .. | .. | 0.32966184759, 1.16687203693, 0.253687406028, 4.21559503261",
        (5, 0),
    ),
    "hyperball, adam": Golden(
        lambda: (C.scale_by_adam(betas=(0.9, 0.95)), C.hyperball),
        """0.592516075142, -0.904889027326, 0.176168505908, 0.123601328989, 5.55619733426
        | 0.652089414217, -0.896553573218, 0.210702794506, 0.244727761548, 5.55619733426
        | 0.7060605224, -0.886698537287, 0.251684103396, 0.38889821917, 5.55619733426
        | 0.767110182619, -0.874970635065, 0.285106872094, 0.512884968461, 5.55619733426""",
    ),
    "hyperball, muon": Golden(
        lambda: (C.muon(nesterov=False, eps=1e-20), C.hyperball),
        """0.593523504767, -0.902958576537, 0.183814284725, 0.0989178918547, 5.55619733426
        | 0.646278755163, -0.906527599608, 0.161243327163, 0.156381332845, 5.55619733426 | ..
        | 0.743163941475, -0.894824918408, 0.207913183419, 0.319502069349, 5.55619733426""",
    ),
    "hyperball, nesterov": Golden(
        lambda: (C.muon(eps=1e-20), C.hyperball),
        """.. | .. | ..
        | 0.667610168048, -0.903612038751, 0.198420768162, 0.130779085996, 5.55619733426""",
    ),
    "hyperball, no first moment": Golden(
        lambda: (C.scale_by_exp_avg_sq(beta2=0.99), C.hyperball),
        """.. | .. | ..
        | 0.554540906207, -0.910174111138, 0.13681987369, -0.00882815637864, 5.55619733426""",
    ),
    "spectral_sphere": Golden(
        lambda: sphere(retract="before"),
        """0.238723248987, -0.304595981655, 0.0800589537728, 0.108486760742, 0.778431526263
        | 0.210801498684, -0.338739522841, 0.053822473303, 0.0130751560008, 0.768091885491
        | 0.248338800333, -0.307809326488, 0.0859730196835, 0.101875496275, 0.773004856123
        | 0.279644456693, -0.324165739409, 0.0885065392591, 0.00948022715902, 0.774191812345""",
    ),
    "spectral_sphere, after": Golden(
        lambda: sphere(),
        """0.238136013776, -0.303846706139, 0.0798620167891, 0.108219894209, 0.774606509925 | .. | ..
        | 0.279124236453, -0.323562696599, 0.0883418912855, 0.00946259117185, 0.771314046492""",
    ),
    "spectral_sphere, muon": Golden(
        lambda: sphere(retract="before", solve=False),
        """0.220894716138, -0.318584673051, 0.0824219638947, 0.0654956156957, 0.718783374155 | .. | ..
        | 0.271014940178, -0.322401958001, 0.0844537247698, 0.0694059707221, 0.728482503877""",
    ),
    "spectral_sphere, tall": Golden(
        lambda: sphere(retract="before"),
        """0.303131724902, -0.412659971588, 0.474747566362, 0.467944530501, 1.3598926658 | .. | ..
        | 0.354426958052, -0.373131743634, 0.494091914804, 0.398931953211, 1.37355443079""",
        (4, 3),
    ),
    "muown": Golden(
        lambda: (C.muown(weight_decay=0.1),),
        """0.592614829754, -0.908474838301, 0.211223968902, -0.000388129794868, 5.21909326239
        | 0.647100842719, -0.87116101569, 0.239638500812, 0.054485517916, 5.07122627173
        | 0.693455237527, -0.901767930009, 0.265647357683, -0.0852070321805, 4.91226099318
        | 0.738001972045, -0.835792065825, 0.266067956881, 0.0749819735416, 4.79937634378""",
    ),
    "to_eigenbasis, kl": Golden(
        lambda: (kl(),),
        """.. | 0.541487106827, -0.911295899808, -0.954879814927, -0.154611327568, 8.57352377631
        | 0.540491806556, -0.911571972675, -0.956609676893, -0.157531171184, 8.57824545239
        | 0.540632522249, -0.911325424117, -0.956669005685, -0.160544585414, 8.58705810195
        | 0.539967783286, -0.911662177254, -0.958867888033, -0.164454955408, 8.59516680793""",
        (4, 4),
        lr=0.01,
    ),
    "to_eigenbasis, kl, unbiased": Golden(
        lambda: (kl(correct_bias=True),),
        """.. | 0.547795672763, -0.912178001601, -0.940078906687, -0.170293552515, 8.59800598268
        | .. | .. | 0.541758084391, -0.913576885503, -0.95498095194, -0.206708653199, 8.67704425834""",
        (4, 4),
        lr=0.01,
    ),
    "to_eigenbasis, kl, every other step": Golden(
        lambda: (kl(2),),
        """.. | .. | .. | ..
        | 0.540147134832, -0.910627493386, -0.959030347778, -0.163283032653, 8.60119927874""",
        (4, 4),
        lr=0.01,
    ),
    "kl_shampoo": Golden(
        lambda: (C.kl_shampoo(betas=(0.95, 0.9), precondition_frequency=1),),
        """.. | 0.538659839536, -0.913606780026, -0.957328600981, -0.156921667353, 8.59178076262
        | 0.538321533304, -0.91376747039, -0.957522285382, -0.158151289368, 8.59367045471
        | 0.537750444855, -0.914198951552, -0.957430463859, -0.161670351527, 8.59787542109
        | 0.537312662243, -0.914411875332, -0.95768399583, -0.163195038157, 8.60035108326""",
        (4, 4),
        lr=0.01,
    ),
    "to_eigenbasis, before": Golden(
        lambda: (
            C.muon_momentum(nesterov=False),
            C.soap_precond(
                C.scale_by_rms(alpha=0.95),
                sides="smaller",
                precondition_frequency=1,
                refresh="before",
            ),
        ),
        """0.526870854122, -0.8964265664, 0.181740287199, -0.0838857227574, 5.22669599857
        | 0.556181259034, -0.893959016265, 0.168503644486, -0.0950222744634, 5.08510799577 | .. | ..
        | 0.560314283431, -0.874958191927, 0.205578239893, -0.204405500614, 4.61839887085""",
        lr=0.01,
    ),
    "shampoo, one side": Golden(
        lambda: (C.exp_avg, C.shampoo(beta2=0.95, eps=1e-8, sides="smaller", order=2)),
        """0.544801342745, -0.906265393555, 0.144000095144, 0.000243403007839, 5.519974868
        | .. | .. | ..
        | 0.554891843872, -0.902357587718, 0.146126475209, 0.00916384660942, 5.48347063997""",
        lr=0.01,
    ),
    "to_eigenbasis, muon": Golden(
        lambda: (
            C.muon_momentum,
            C.soap_precond(
                C.scale_by_exp_avg_sq(beta2=0.9, eps_placement="maximum", correct_bias=False),
                shampoo_beta=0.9,
                precondition_frequency=1,
                first="pass",
                gram_of="grad",
            ),
            C.orthogonalize(method="newton-schulz", steps=12, scale="original"),
        ),
        """0.546747999571, -0.90575902199, -0.956434894917, -0.114051598236, 8.53238034136
        | 0.548197525592, -0.902752585176, -0.950133416362, -0.115243506474, 8.54514319297
        | 0.550007919101, -0.903719300245, -0.953268669945, -0.0911805806782, 8.50773825033
        | 0.557344679162, -0.89654020834, -0.943992557535, -0.0615924931603, 8.49026049006
        | 0.557432112041, -0.897112688774, -0.945234845633, -0.0452291927253, 8.44222671549""",
        (4, 4),
        lr=0.01,
    ),
    "splus": Golden(
        lambda: (C.splus(inverse_every=2), C.parameter_ema),
        """0.565160980292, -0.885908729319, -0.932426315453, -0.00166559208458, 8.23585010027
        | 0.615169620484, -0.864434230702, -0.879278323858, 0.132734915716, 8.11563289378
        | 0.595763219188, -0.853893391342, -0.888442930867, 0.186507446229, 7.80743677092
        | 0.645838779559, -0.831875827938, -0.835035096517, 0.321874577121, 7.69479826764
        | 0.645658139439, -0.814727242991, -0.789109364251, 0.424298481662, 7.50371945835""",
        (4, 4),
        lr=0.1,
        behind=0.1 * 2 / 8 * 0.01,
    ),
    "dion": Golden(
        lambda: (C.dion(rank=2), C.decoupled(weight_decay=0.01)),
        """0.554103209181, -0.896208252223, -0.957262220448, -0.149811878058, 8.35961566456
        | 0.571879353498, -0.876367315344, -0.958821542281, -0.150310897456, 8.16579075116
        | 0.5852886313, -0.854299634218, -0.960166726432, -0.151929572545, 7.95363300232
        | 0.602926352974, -0.834527028644, -0.958544211261, -0.153236422593, 7.75164758033""",
        (4, 4),
        state={"dion.directions": lambda q: directions(*q.shape)},
    ),
    "dion, wide": Golden(
        lambda: (C.dion(rank=2), C.decoupled(weight_decay=0.01)),
        """0.568233465138, -0.89382826001, 0.15252665011, 0.0533560117789, 5.3879326844 | .. | ..
        | 0.642967837516, -0.840485128, 0.196052666011, 0.13509883157, 4.91636397778""",
        state={"dion.directions": lambda q: directions(*q.shape)},
    ),
    "partial_orthogonalize": Golden(
        lambda: (
            C.partial_orthogonalize(fraction=0.5, method="quintic"),
            C.decoupled(weight_decay=0.01),
        ),
        """0.563160224093, -0.894241446944, 0.136668849599, 0.000742085181289, 5.38254318979
        | 0.562878643981, -0.888810714467, 0.145916404626, 0.0318436582575, 5.27606635372
        | 0.562597204659, -0.881023101544, 0.161444403194, 0.0686809073606, 5.17986028786
        | 0.582114156494, -0.857391275544, 0.161363680992, 0.083231843605, 4.97872858141""",
    ),
    "sinkhorn_normalize": Golden(
        lambda: (C.muon_momentum(momentum=0.9, nesterov=False), C.sinkhorn_normalize),
        """0.605659022637, -0.875871702927, 0.194944506565, 0.120993737938, 5.11214175427 | .. | ..
        | 0.808306427457, -0.76539248133, 0.352563343115, 0.499303333556, 4.15095187742""",
    ),
    "galore": Golden(
        lambda: (C.galore(rank=2, gap=2),),
        """0.54373522166, -0.910068443602, 0.139559933741, -0.0576376134595, 5.45093108548 | .. | ..
        | 0.545010124141, -0.909173477706, 0.148653201531, -0.0643318566174, 5.36336057371""",
    ),
    "fira": Golden(
        lambda: (C.fira(rank=2, gap=2),),
        """0.553483807985, -0.906491265693, 0.149334844019, -0.179165128599, 5.15144962179 | .. | ..
        | 0.559624850212, -0.902985715262, 0.18494993042, -0.20660129805, 4.83236308355""",
    ),
    "update_floor": Golden(
        lambda: (C.muon(scale="none"), C.update_floor(floor=1.5)),
        """0.602164894983, -0.871535153608, 0.201787725962, 0.153523935816, 5.23357649039 | .. | ..
        | 0.692233236887, -0.846905253156, 0.218505787479, 0.197551527142, 4.9557134564""",
    ),
}


def scion(oracle: object, alpha: float = 0.1, radius: float = 3.0) -> tuple:
    momentum = C.muon_momentum(momentum=1 - alpha, nesterov=False)
    return momentum, oracle, C.scale_update(factor=radius)


def directions(n: int, rank: int) -> Tensor:
    """Q_0 of Dion's golden values: cos(1 + i (j + 1) + j)."""
    i, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(rank, dtype=torch.float64)
    return torch.cos(1 + i * (j + 1) + j)


def kl(frequency: int = 1, correct_bias: bool = False) -> object:
    adam = C.scale_by_adam(betas=(0.95, 0.9), correct_bias=correct_bias)
    options = {"shampoo_beta": 0.9, "precondition_frequency": frequency}
    return C.soap_precond(adam, gram="kl", **options)


def sphere(**options: Any) -> tuple:
    exact = {"method": "svd", "power_iterations": 3000, "tolerance": 1e-15, **options}
    return C.muon_momentum(momentum=0.9), C.spectral_sphere(**exact)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values(name: str) -> None:
    case = GOLDEN[name]
    expected = case.expected
    path = run(case, len(expected))
    for p, values in zip(path, expected, strict=True):
        # half a unit in the twelfth digit, and the roundings of entries near zero
        if values:
            found = torch.tensor(shown(p), dtype=torch.float64)
            close(found, torch.tensor(values, dtype=torch.float64), rtol=6e-12, atol=2e-14)


# What a table makes of the singular values 1, .5, .1, .01 and .001, and their range on [.01, 1].
POLYNOMIALS = {
    ("quintic", 5): (
        "0.69643640947 0.765438530454 0.712120081658 0.698917063322 0.470543951216",
        (0.6818, 1.1344),
    ),
    ("quintic-5", 5): (
        "0.978345560294 0.985869354097 1.01904988875 1.01802522497 0.474981563989",
        (0.9778, 1.0318),
    ),
    ("polar_express", 5): (
        "1.02875144947 0.9343310005 0.874932469893 1.0660004994 0.846177373482",
        (0.8703, 1.1236),
    ),
    ("cans", 5): (
        "1.00506942498 1.09641445897 0.916308780136 1.11316922764 0.886527524503",
        (0.8844, 1.1198),
    ),
    ("deepseekv4", 10): (
        "1.00001430958 1.00016322869 1.00006070635 1.00001916167 1.00000120575",
        (1.0, 1.0005),
    ),
    ("cubic", 5): (
        "0.774106046454 1.09707180531 0.801990201988 1.02162307942 0.119139570304",
        (0.7741, 1.3),
    ),
    ("newton-schulz", 12): ("1 1 1 1 1.00000495365", (1.0, 1.0)),
}


@pytest.mark.parametrize(("method", "steps"), POLYNOMIALS)
def test_a_table_is_the_polynomial_that_was_published(method: str, steps: int) -> None:
    text, (low, high) = POLYNOMIALS[method, steps]
    ends = torch.tensor([float(x) for x in text.split()], dtype=torch.float64)
    values = torch.tensor([1, 0.5, 0.1, 0.01, 0.001], dtype=torch.float64)
    # one singular value beside those that give the matrix the norm 1
    wide = torch.linspace(0.01, 1, 2001, dtype=torch.float64)
    for sigma, expected in ((values, ends), (wide, None)):
        x = torch.zeros(len(sigma), 2, 9, dtype=torch.float64)
        x[:, 0, 0], x[:, 1, 1] = sigma, (1 - sigma.square()).clamp(min=0).sqrt()
        found = newton_schulz(x, method, steps, 0.0)[:, 0, 0]
        if expected is None:
            close(found.min(), torch.tensor(low, dtype=torch.float64), atol=6e-5)
            close(found.max(), torch.tensor(high, dtype=torch.float64), atol=6e-5)
        else:
            close(found, expected, atol=1e-11)


def test_a_table_of_ones_own_repeats_its_last_row() -> None:
    rows = ((3.0, -3.0, 1.0), (2.0, -1.5, 0.5))
    assert table(rows, 4) == (*rows, rows[1], rows[1])
    (x,) = starts([(4, 6)])
    own, known = (
        updates([C.orthogonalize(method=m, steps=12)], [x])
        for m in (((2.0, -1.5, 0.5),), "newton-schulz")
    )
    assert torch.equal(own[0], known[0])
    for wrong in ((), ((1.0, 2.0),), (1.0, 2.0, 3.0), ((1.0, 2.0, "x"),)):
        with pytest.raises(ValueError, match=r"method=.*: expected a name or a tuple of \(a, b, c"):
            C.ChainOpt([x], 0.1, C.muon(method=wrong))
    with pytest.raises(ValueError, match="method='aol': expected one of 'quintic'"):
        C.muon(method="aol")


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (5, 5)])
def test_almost_orthogonal_scaling_is_of_the_rows_of_the_shorter_side(shape: tuple) -> None:
    (x,) = starts([shape])
    (found,) = updates([C.orthogonalize(normalize="aol", method="newton-schulz", steps=40)], [x])
    wide = x if shape[0] <= shape[1] else x.mT
    scaled = wide / (wide @ wide.mT).abs().sum(1, keepdim=True).sqrt()
    assert torch.linalg.matrix_norm(scaled, 2) <= 1
    u, _, vh = torch.linalg.svd(scaled, full_matrices=False)
    close(found, u @ vh if wide is x else (u @ vh).mT, atol=1e-12)
    with pytest.raises(ValueError, match="normalize='aol' has no effect with method='svd'"):
        C.ChainOpt([x], 0.1, C.muon(normalize="aol", method="svd"))


# ---- other formulations


def muon_of(g: Tensor, method: str = "quintic", steps: int = 5) -> Tensor:
    """Newton-Schulz written out."""
    x = g / (g.norm() + 1e-7)
    for a, b, c in table(method, steps):
        x = a * x + b * x @ x.mT @ x + c * x @ x.mT @ x @ x.mT @ x
    return x


SHAPES = ((3, 7), (7, 3), (5, 5))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sign", [True, False])
def test_adamuon_is_its_recurrence(shape: tuple[int, int], sign: bool) -> None:
    grads = [g for (g,) in gradients(5, [shape])]
    t = C.scale_by_adamuon(momentum=0.8, beta2=0.7, nesterov=False, sign=sign)
    b = v = torch.zeros(shape, dtype=torch.float64)
    for found, g in zip(updates([t], grads), grads, strict=True):
        b = 0.8 * b + 0.2 * g
        o = muon_of(b.sign() if sign else b)
        v = 0.7 * v + 0.3 * o * o
        w = o / (v**0.5 + 1e-8)
        close(found, 0.2 * w * (w.numel() / (w.norm() + 1e-8) ** 2) ** 0.5, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_namo_is_its_recurrence(shape: tuple[int, int]) -> None:
    grads = [g for (g,) in gradients(5, [shape])]
    t = C.scale_by_adamuon(momentum=0.8, beta2=0.7, sign=False, second_moment="norm")
    b, s = torch.zeros(shape, dtype=torch.float64), 0.0
    for found, g in zip(updates([t], grads), grads, strict=True):
        b = 0.8 * b + 0.2 * g
        o = 0.2 * g + 0.8 * b
        s = 0.7 * s + 0.3 * float((g * g).sum())
        close(found, muon_of(o) * o.norm() / (s**0.5 + 1e-8), atol=1e-12)


def test_adagos_share_is_the_root_of_a_sum_of_clamped_squares() -> None:
    grads = [g for (g,) in gradients(6, [(4, 3)])]
    lr, gamma, eps = 0.1, 2.0, 0.02
    found = updates([C.adagrad_norm_rate(gamma=gamma, eps=eps)], grads, lr=lr)
    norms = [min(float(g.norm()), gamma) for g in grads]
    for t, (u, g) in enumerate(zip(found, grads, strict=True)):
        step = max(eps, lr * norms[t] / sum(n * n for n in norms[: t + 1]) ** 0.5)
        close(u * lr, step * g, atol=1e-14)


@pytest.mark.parametrize("shape", [*SHAPES, (4, 3, 2, 2)])
def test_many_power_iterations_give_the_spectral_norm(shape: tuple[int, ...]) -> None:
    (x,) = starts([shape])
    (found,) = updates([C.spectral_normalize(iterations=400)], [x])
    flat = x.flatten(1)
    goal = (flat.shape[0] / flat.shape[1]) ** 0.5
    close(
        torch.linalg.matrix_norm(found.flatten(1), 2),
        torch.tensor(goal, dtype=torch.float64),
        atol=1e-7,
    )
    # from step to step one iteration goes on with the vector of before
    later = updates([C.spectral_normalize], [x] * 200)[-1]
    close(later, found, atol=1e-7)


@pytest.mark.parametrize("shape", [(6, 3, 2, 2), (4, 5, 3), (3, 8)])
def test_a_kernel_has_the_scale_of_its_inputs_and_its_window(shape: tuple[int, ...]) -> None:
    (x,) = starts([shape])
    plain, scaled = (updates([C.orthogonalize(scale=s)], [x])[0] for s in ("none", "spectral_conv"))
    window = torch.tensor(shape[2:]).prod().item() if len(shape) > 2 else 1
    close(scaled, plain * (shape[0] / shape[1]) ** 0.5 / window, atol=1e-14)


def test_scions_oracles_are_their_norms() -> None:
    for (x,) in gradients(3, [(4, 6)]) + gradients(1, [(4, 3, 2)]):
        rows = x.flatten(1)
        (row,), (column,), (sign,), (turned,) = (
            updates([t], [x])
            for t in (
                C.row_normalize(normalized=False, eps=0.0),
                C.column_normalize(normalized=True, eps=0.0),
                C.sign_normalize,
                C.column_normalize(normalized=True, axis=1, eps=0.0),
            )
        )
        r, c = rows.shape
        close(row.flatten(1), torch.stack([a / a.norm() for a in rows]), atol=1e-14)
        columns = torch.stack([a / a.square().mean().sqrt() for a in rows.mT], 1)
        close(column.flatten(1), columns / c, atol=1e-14)
        close(sign.flatten(1), rows.sign() / c, atol=0)
        lines = torch.stack([a / a.square().mean().sqrt() for a in rows])
        close(turned.flatten(1), lines / r, atol=1e-14)


def test_scions_first_weights_lie_on_the_sphere() -> None:
    for norm in ("spectral", "row", "column", "sign"):
        p = torch.nn.Parameter(torch.zeros(6, 2, 2))
        heavyball.scion_init_([p], norm, radius=3.0)
        flat = p.detach().flatten(1)
        found = {
            "spectral": torch.linalg.svdvals(flat) / (6 / 4) ** 0.5,
            "row": flat.norm(dim=1) * 4**0.5,
            "column": flat.square().mean(0).sqrt(),
            "sign": flat.abs() * 4,
        }[norm]
        torch.testing.assert_close(found, torch.full_like(found, 3.0))
    q = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"shape \(3,\) is not a matrix"):
        heavyball.scion_init_([p, q])
    with pytest.raises(ValueError, match="norm='x': expected one of 'spectral'"):
        heavyball.scion_init_(p, "x")
    assert torch.equal(q, torch.ones(3))


@pytest.mark.parametrize(("outward", "inward"), [(0.5, 1.0), (0.0, 0.25)])
def test_the_brake_scales_the_part_along_the_weights(outward: float, inward: float) -> None:
    start, (u,) = starts([(3, 4)])[0], gradients(1, [(3, 4)])[0]
    for g in (u, -u):
        t = C.radial_brake(outward=outward, inward=inward)
        (found,) = updates([t], [g], start)
        unit = start / start.norm()
        along = (g * unit).sum()
        keep = outward if along < 0 else inward
        close(found, g - along * unit + keep * along * unit, atol=1e-14)


def test_a_floor_by_rows_and_the_share_of_the_weights() -> None:
    start, (g,) = starts([(3, 4)])[0], gradients(1, [(3, 4)])[0]
    g[1] *= 100
    (found,) = updates([C.update_floor(floor=2.0, rows=True)], [g], start)
    for u, x, p in zip(found, g, start, strict=True):
        close(u, x * max(1, 2 * float(p.norm()) / float(x.norm())), atol=1e-13)
    (relative,) = updates([C.relative_update], [g], start)
    close(relative, g * start.norm() / g.norm(), atol=1e-14)


# ---- fixed norms


def walked(chain: tuple, start: Tensor, grads: list[Tensor], lr: float = 0.05) -> list[Tensor]:
    """The parameter after every step."""
    return [
        p for (p,) in walk(lambda ps: C.ChainOpt(ps, lr, *chain), [start], [[g] for g in grads])
    ]


@pytest.mark.parametrize("radius", ["initial", 2.5, "spectral"])
@pytest.mark.parametrize("shape", [(3, 5), (4, 2, 3)])
def test_on_the_hyperball_the_norm_stays(radius: Any, shape: tuple[int, ...]) -> None:
    (start,), grads = starts([shape]), [g for (g,) in gradients(4, [shape])]
    order = 2 if radius == "spectral" else "fro"

    def size(p: Tensor) -> Tensor:
        return torch.linalg.matrix_norm(p.flatten(1), order)

    goal = torch.tensor(radius, dtype=torch.float64) if radius == 2.5 else size(start)
    p = start
    for found, g in zip(walked((C.hyperball(radius=radius),), start, grads), grads, strict=True):
        close(size(found), goal, atol=1e-12)
        p = p - 0.05 * goal * g / g.norm()
        p = p * goal / size(p)
        close(found, p, atol=1e-12)


def test_the_size_of_the_update_and_a_decay_are_no_matter_on_the_hyperball() -> None:
    (start,), grads = starts([(4, 4)]), [g for (g,) in gradients(3, [(4, 4)])]
    one, other = (walked((C.hyperball,), start, [k * g for g in grads])[-1] for k in (1, 1e3))
    close(one, other, atol=1e-13)
    for t in (C.hyperball, C.spectral_sphere, C.muown):
        with pytest.raises(ValueError, match=f"decoupled and {t.name} exclude each other"):
            C.ChainOpt([start], 0.1, C.decoupled, t)
    with pytest.raises(ValueError, match=r"shape \(2, 2\) is all zero, so its norm cannot be kept"):
        C.ChainOpt([torch.nn.Parameter(torch.zeros(2, 2))], 0.1, C.hyperball).init_state()
    with pytest.raises(ValueError, match="hyperball needs two or more dimensions"):
        C.ChainOpt([torch.ones(3)], 0.1, C.hyperball)
    with pytest.raises(ValueError, match=r"radius=-1\.0: expected 'initial', 'spectral', or"):
        C.ChainOpt([start], 0.1, C.hyperball(radius=-1.0))


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_a_step_on_the_spectral_sphere_is_tangent_and_of_unit_norm(shape: tuple[int, int]) -> None:
    (start,), grads = starts([shape]), [g for (g,) in gradients(3, [shape])]
    lr, size = 0.01, 1.5 * (shape[0] / shape[1]) ** 0.5
    t = C.spectral_sphere(
        scaler=1.5, retract="before", method="svd", power_iterations=2000, tolerance=1e-13
    )
    before = start
    for found in walked((t,), start, grads, lr):
        u, s, vh = torch.linalg.svd(before)
        step = (before * size / s[0] - found) / (lr * size)
        close(torch.linalg.matrix_norm(step, 2), torch.tensor(1.0, dtype=torch.float64), atol=1e-9)
        # to first order the largest singular value stays
        close(u[:, 0] @ step @ vh[0], torch.tensor(0.0, dtype=torch.float64), atol=1e-9)
        before = found
    ends = walked((C.spectral_sphere(scaler=1.5, power_iterations=400),), start, grads, lr)
    for found in ends:
        close(
            torch.linalg.matrix_norm(found, 2), torch.tensor(size, dtype=torch.float64), atol=1e-9
        )


def test_a_root_beyond_the_authors_bracket_is_found() -> None:
    # M = [[-3, 1], [1, 1]] / sqrt 12 and Theta = e1 e1^T: k = 1.1547
    start = torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64))
    grad = torch.tensor([[-3.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    param = torch.nn.Parameter(start)
    exact = {"method": "svd", "power_iterations": 500, "tolerance": 1e-12}
    opt = C.ChainOpt([param], 0.01, C.spectral_sphere(**exact))
    param.grad = grad
    opt.step()
    found = opt.state[param]["spectral_sphere.multiplier"]
    close(found.squeeze(), torch.tensor(2 / 3**0.5, dtype=torch.float64), atol=1e-9)


def muown_by_hand(p: Tensor, grads: list[Tensor], lr: float, wd: float) -> list[Tensor]:
    mu, b1, b2, scale = 0.8, 0.7, 0.6, max(p.shape) ** 0.5
    gain = p.norm(dim=1)
    v, m = p.clone(), torch.zeros_like(p)
    first = second = torch.zeros_like(gain)
    found = []
    for t, grad in enumerate(grads, start=1):
        n = v.norm(dim=1)
        w = v / n[:, None]
        dg = (grad * w).sum(1)
        m = mu * m + (1 - mu) * (gain / n)[:, None] * (grad - dg[:, None] * w)
        v = v - lr * scale * muon_of(m, "quintic-5")
        first, second = b1 * first + (1 - b1) * dg, b2 * second + (1 - b2) * dg**2
        adam = first / (1 - b1**t) / ((second / (1 - b2**t)) ** 0.5 + 1e-8)
        gain = (gain - lr * adam) * (1 - lr * wd)
        found.append(gain[:, None] * v / v.norm(dim=1)[:, None])
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_muown_is_weight_normalization_with_v_kept(shape: tuple[int, int]) -> None:
    (start,), grads = starts([shape]), [g for (g,) in gradients(5, [shape])]
    t = C.muown(momentum=0.8, betas=(0.7, 0.6), weight_decay=0.3)
    hand = muown_by_hand(start, grads, 0.05, 0.3)
    for found, expected in zip(walked((t,), start, grads), hand, strict=True):
        close(found, expected, atol=1e-6)  # the norms of the products begin with 1e-7 there


@pytest.mark.parametrize("blocks", [2, (1, 3), ("interleaved", 2, (1, 1))], ids=str)
def test_blocks_on_the_spectral_sphere_are_spheres_of_their_own(blocks: Any) -> None:
    (start,), grads = starts([(4, 4)]), [g for (g,) in gradients(3, [(4, 4)])]
    for axis in (0, 1):
        for radius in ("mup", "initial"):
            options = {"solve": False, "power_iterations": 300, "radius": radius}
            t = C.spectral_sphere(blocks=blocks, axis=axis, **options)
            together = walked((t,), start, grads)
            for k, piece in enumerate(pieces(start, blocks, axis)):
                cut = [pieces(g, blocks, axis)[k].contiguous() for g in grads]
                alone = walked((C.spectral_sphere(**options),), piece.contiguous(), cut)
                for ours, single in zip(together, alone, strict=True):
                    close(pieces(ours, blocks, axis)[k], single, atol=1e-10)


# ---- low rank


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 2, 3)])
def test_dion_of_full_rank_comes_to_the_polar_factor(shape: tuple[int, ...]) -> None:
    (g,) = starts([shape])
    found = updates([C.dion(momentum=0.9)], [g] * 200)[-1].flatten(1)
    u, _, vh = torch.linalg.svd(g.flatten(1), full_matrices=False)
    close(found, (found.shape[0] / found.shape[1]) ** 0.5 * u @ vh, atol=1e-6)


def test_the_rank_of_dion_is_a_share_of_the_shorter_side() -> None:
    (p,) = starts([(10, 30)])
    for options, rank in (
        ({}, 10),
        ({"rank_fraction": 0.25}, 3),
        ({"rank_fraction": 0.25, "rank_multiple": 4}, 4),
        ({"rank_multiple": 4}, 10),
        ({"rank": 7}, 7),
    ):
        held = states([C.dion(**options)], [p])
        assert held["dion.directions"].shape == (10, rank)
    with pytest.raises(ValueError, match="dion has rank=11, which is larger than the shorter side"):
        C.ChainOpt([p], 0.1, C.dion(rank=11))
    with pytest.raises(ValueError, match="exclude each other: dion has its own momentum"):
        C.ChainOpt([p], 0.1, C.muon_momentum, C.dion)


@pytest.mark.parametrize("select", ["top", "random"])
@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
def test_what_is_not_selected_does_not_move_and_grows(shape: tuple[int, int], select: str) -> None:
    grads = [g for (g,) in gradients(3, [shape])]
    t = C.partial_orthogonalize(momentum=0.5, select=select, method="newton-schulz", steps=30)
    m = torch.zeros(4, 6, dtype=torch.float64)
    for k, u in enumerate(updates([t], grads)):
        g, moved = (x if shape[0] < shape[1] else x.mT for x in (grads[k], u))
        m = m + g
        rows = moved.abs().sum(1) > 0
        assert rows.sum() == 1
        if select == "top":
            assert rows[m.abs().sum(1).argmax()]
        scale = (shape[0] / shape[1]) ** 0.5
        close(moved[rows], scale * m[rows] / m[rows].norm(), atol=1e-9)
        m[rows] *= 0.5
    close(
        states([t], grads)["partial_orthogonalize.momentum_buffer"],
        m if shape[0] < shape[1] else m.mT,
        atol=1e-12,
    )


def image(shape: tuple[int, ...], salt: int = 0) -> Tensor:
    """S of the golden values, times sqrt(2), in place of noise."""
    i, j = torch.arange(2.0, dtype=torch.float64)[:, None], torch.arange(3.0, dtype=torch.float64)
    found = torch.cos(1 + (i + 1) * (j + 2))
    return (found if shape[-1] == 3 else found.mT).expand(shape)


APOLLO = {
    ((3, 4), "channel"): """0.591935768402, -0.83852315974, 0.193767057777, 0.0587869266282,
        4.92312173439 | .. | .. | 0.578074754882, -0.845732979017, 0.189668810248, 0.0197196011483,
        5.07130706361""",
    ((4, 3), "channel"): """0.582407306364, -0.839021040226, 1.01769430659, 0.823393574502,
        5.78344522072 | .. | .. | 0.578070733622, -0.843911382013, 0.963869668383, 0.745721750385,
        5.8189731569""",
    ((3, 4), "tensor"): """0.595923551076, -0.837635921117, 0.191931071373, 0.0685032650353,
        4.93293715349 | .. | .. | 0.584781778986, -0.856685679132, 0.174349532438, 0.0439623197031,
        5.08854058719""",
}


@pytest.mark.parametrize(("shape", "scale_type"), APOLLO)
def test_the_golden_values_of_apollo(shape: tuple[int, int], scale_type: str) -> None:
    start, grads = inputs(*shape, 4)
    case = Golden(lambda: (), APOLLO[shape, scale_type])
    p, states = (
        start,
        (*[torch.zeros(1, *((2, 4) if shape[0] < shape[1] else (4, 2))).double()] * 2,),
    )
    last = torch.zeros(1, dtype=torch.float64)
    numbers = {"scale": torch.tensor(1.0), "betas": (0.9, 0.999), "eps": 1e-6}
    numbers["betas"] = tuple(torch.tensor(b, dtype=torch.float64) for b in (0.9, 0.999))
    for t, (g, values) in enumerate(zip(grads, case.expected, strict=True), start=1):
        step = torch.tensor(float(t), dtype=torch.float64)
        u, *states, last = C.apollo.update(
            g[None], *states, last, step=step, noise=image, rank=2, scale_type=scale_type, **numbers
        )
        p = p - 0.05 * u[0]
        if values:
            found = torch.tensor(shown(p), dtype=torch.float64)
            close(found, torch.tensor(values, dtype=torch.float64), rtol=6e-12, atol=2e-14)


@pytest.mark.parametrize("shape", [(3, 6), (6, 3), (4, 4), (4, 2, 3)])
def test_apollo_scales_the_channels_of_the_gradient(shape: tuple[int, ...]) -> None:
    grads = [g for (g,) in gradients(3, [shape])]
    rows = shape[0] >= grads[0][0].numel()
    for scale_type in ("channel", "tensor"):
        for u, g in zip(
            updates([C.apollo(rank=2, scale_type=scale_type)], grads), grads, strict=True
        ):
            ratio = (u / g).flatten(1)
            assert (ratio > 0).all()
            dim = (0, 1) if scale_type == "tensor" else 1 if rows else 0
            close(ratio.amax(dim), ratio.amin(dim), atol=1e-12, rtol=1e-10)


def test_apollos_image_is_the_same_for_a_gap_and_another_behind_it() -> None:
    (g,) = starts([(4, 6)])
    kept = [states([C.apollo(rank=2, gap=3)], [g] * n)["apollo.exp_avg"] for n in (1, 3, 4)]
    close(kept[1], kept[0] * (1 - 0.9**3) / 0.1, atol=1e-12)
    assert not torch.allclose(kept[2], kept[0] * (1 - 0.9**4) / 0.1, atol=1e-2)


@pytest.mark.parametrize("shape", [(3, 6), (6, 3), (4, 4), (4, 2, 3)])
@pytest.mark.parametrize("name", ["galore", "fira"])
def test_a_chain_in_low_rank_is_written_out(name: str, shape: tuple[int, ...]) -> None:
    grads = [g for (g,) in gradients(5, [shape])]
    inner = (C.exp_avg(beta=0.7), C.scale_by_exp_avg_sq(beta2=0.9), C.sign)
    found = updates([getattr(C, name)(*inner, rank=2, gap=2, scale=0.5)], grads)
    images, last, q = [], 0.0, None
    for t, (u, grad) in enumerate(zip(found, grads, strict=True)):
        g = grad.flatten(1)
        tall = g.shape[0] >= g.shape[1]
        if t % 2 == 0:
            left, _, right = torch.linalg.svd(g, full_matrices=False)
            q = right[:2].mT if tall else left[:, :2]
        images.append(g @ q if tall else q.mT @ g)
        mean = sum(0.7 ** (t - k) * z for k, z in enumerate(images)) * 0.3 / (1 - 0.7 ** (t + 1))
        n, dim = mean.sign(), 1 if tall else 0
        back = [x @ q.mT if tall else q @ x for x in (n, images[-1])]
        rest = torch.zeros_like(g)
        if name == "fira":
            size = n.norm(dim=dim, keepdim=True) / (images[-1].norm(dim=dim, keepdim=True) + 1e-8)
            rest = size * (g - back[1])
            excess = max(float(rest.norm()) / (last + 1e-8), 1.01) / 1.01 if t else 1.0
            rest, last = rest / excess, float(rest.norm()) / excess
        # a small entry may have the other sign
        close(u.flatten(1), 0.5 * (back[0] + rest), atol=1e-9)


def test_the_states_of_a_chain_in_another_shape_have_that_shape() -> None:
    params = [torch.nn.Parameter(torch.ones(6, 4)), torch.nn.Parameter(torch.ones(3, 5))]
    chain = C.galore(C.muon, rank=2)
    opt = C.ChainOpt(params, 0.1, chain)
    plan = heavyball.memory_plan(params, chain)
    for p in params:
        p.grad = torch.randn_like(p)
    opt.step()
    shapes = [{k: tuple(v.shape) for k, v in opt.state[p].items()} for p in params]
    assert shapes[0]["galore.momentum_buffer"] == (6, 2)
    assert shapes[1]["galore.momentum_buffer"] == (2, 5)
    held = sum(v.numel() * v.element_size() for p in params for v in opt.state[p].values())
    assert plan.state_bytes == held
    assert repr(C.galore(C.sign, rank=2)) == "galore(sign, rank=2)"
    assert repr(pickle.loads(pickle.dumps(C.fira(rank=2)))) == "fira(rank=2)"


def test_what_cannot_work_in_another_shape_is_refused() -> None:
    (p,) = starts([(3, 3)])
    for element, message in (
        (C.galore(rank=4), r"galore has rank=4, which is larger than the shorter side .*, 3"),
        (C.apollo, "apollo has rank=256, which is larger than the shorter side"),
        (
            C.galore(C.cautious, rank=2),
            "cautious reads 'grad', so it cannot be inside galore",
        ),
        (C.fira(C.stable_adamw, rank=2), "stable_adamw provides more than the update"),
        (C.galore(C.muon(blocks=2), rank=1), r"in the shape \(3, 1\), of which muon has blocks=2"),
    ):
        with pytest.raises(ValueError, match=message):
            C.ChainOpt([p], 0.1, element)
    with pytest.raises(TypeError, match="galore has no option 'rnk'"):
        C.galore(rnk=2)


def test_sinkhorns_turns_end_at_equal_rows_and_columns() -> None:
    for shape, values in (
        ((3, 4), "-1.30717321347, -0.705151741116, -1.16412475817, -2.7455745263, 12"),
        ((4, 3), "-1.25942263573, -0.693775383691, -0.98658166189, -2.63050664646, 12"),
    ):
        _, (g,) = inputs(*shape, 1)
        (found,) = updates([C.sinkhorn_normalize], [g])
        expected = torch.tensor([float(x) for x in values.split(",")], dtype=torch.float64)
        close(torch.tensor(shown(found), dtype=torch.float64), expected, rtol=6e-12, atol=1e-14)
    (x,), (v,) = starts([(5, 3)]), starts([(7,)])
    for turned in (x, x.mT.contiguous()):
        (found,) = updates([C.sinkhorn_normalize(iterations=200)], [turned])
        for axis in (0, 1):
            sizes = found.square().mean(axis).sqrt()
            close(sizes, torch.ones_like(sizes), atol=1e-12)
    close(updates([C.sinkhorn_normalize], [v])[0], v / v.square().mean().sqrt(), atol=1e-14)


# ---- bases


def test_kl_factors_fit_gradients_of_a_kronecker_covariance() -> None:
    """With gradients A Z B^T the factors come to A A^T and B B^T, up to a scale."""
    a, b = starts([(4, 4), (3, 3)])
    made = torch.Generator().manual_seed(0)
    draws = torch.randn(1200, 4, 3, generator=made, dtype=torch.float64)
    param = torch.nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
    rule = C.soap_precond(C.sign, gram="kl", shampoo_beta=0.995, precondition_frequency=5)
    opt = C.ChainOpt([param], 1e-9, rule)
    for z in draws:
        param.grad = a @ z @ b.mT
        opt.step()
    for axis, side in enumerate((a, b)):
        found = opt.state[param][f"to_eigenbasis.gram.{axis}"]
        goal = side @ side.mT
        # a memory of some 200 gradients: entries to a part in 24, three times over
        close(found / found.trace(), goal / goal.trace(), atol=0.05)
    kept, q = (opt.state[param][f"to_eigenbasis.{n}.0"] for n in ("eigenvalues", "basis"))
    gram = opt.state[param]["to_eigenbasis.gram.0"]
    close(kept / kept.sum(), (q @ gram @ q.mT).diagonal() / gram.trace(), atol=0.05)


def test_the_first_step_of_asgo_is_the_polar_factor() -> None:
    for shape in SHAPES:
        (g,) = starts([shape])
        (found,) = updates(
            [C.exp_avg, C.shampoo(beta2=0.9, eps=0.0, sides="smaller", order=2)], [g]
        )
        u, _, vh = torch.linalg.svd(g, full_matrices=False)
        close(found, u @ vh, atol=1e-10)


# others have a null space at first, of which any basis will do
@pytest.mark.parametrize("shape", [(4, 4), (5, 5)])
def test_splus_is_the_sign_in_the_eigenvectors(shape: tuple[int, int]) -> None:
    grads = [g for (g,) in gradients(6, [shape])]
    found = updates([C.splus(betas=(0.8, 0.7), inverse_every=3)], grads)
    left = right = q = r = None
    m = torch.zeros(shape, dtype=torch.float64)
    for t, (u, g) in enumerate(zip(found, grads, strict=True), start=1):
        m = 0.8 * m + 0.2 * g
        if q is None:
            close(u, m.sign(), atol=1e-14)
            left, right = 0.3 * g @ g.mT, 0.3 * g.mT @ g
        else:
            close(u, q @ (q.mT @ m @ r).sign() @ r.mT, atol=1e-10)
            left, right = 0.7 * left + 0.3 * g @ g.mT, 0.7 * right + 0.3 * g.mT @ g
        if t == 1 or t % 3 == 0:
            q, r = (torch.linalg.eigh(x)[1] for x in (left, right))


def test_what_splus_leaves_alone_takes_signs_at_a_lower_rate() -> None:
    for shape in ((5,), (4, 9)):
        (start,), grads = starts([shape]), [g for (g,) in gradients(2, [shape])]
        t = C.splus(max_dim=9, nonstandard_constant=0.01)
        ours = walked((t, C.decoupled(weight_decay=0.1)), start, grads)
        hand = walked((C.muon_momentum(momentum=0.9, nesterov=False), C.sign), start, grads, 5e-4)
        assert not torch.equal(ours[0], hand[0])
        p, m = start, torch.zeros_like(start)
        for found, g in zip(ours, grads, strict=True):
            m = 0.9 * m + 0.1 * g
            p = p - 0.05 * 0.01 * (m.sign() + 0.1 * p)
            close(found, p, atol=1e-14)


@pytest.mark.parametrize("sides", ["smaller", "larger"])
def test_one_side_of_a_basis_is_soap_with_the_other_side_too_long(sides: str) -> None:
    grads = [g for (g,) in gradients(5, [(3, 6)])]
    one = updates([C.soap_precond(sides=sides, precondition_frequency=1)], grads)
    if sides == "smaller":
        other = updates([C.soap_precond(max_precond_dim=3, precondition_frequency=1)], grads)
        for a, b in zip(one, other, strict=True):
            close(a, b, atol=1e-12)
    opt_keys = states([C.soap_precond(sides=sides)], grads)
    kept = [k for k in opt_keys if "gram" in k]
    assert kept == [f"to_eigenbasis.gram.{int(sides == 'larger')}"]


def test_options_of_a_basis_that_exclude_each_other_are_refused() -> None:
    p = torch.zeros(4, 4)
    for options, message in (
        ({"gram": "kl", "gram_of": "grad"}, "gram_of='grad' is not supported with gram='kl'"),
        ({"gram": "kl", "first": "pass"}, "first='pass' is not supported with gram='kl'"),
        (
            {"refresh": "before", "first": "sign"},
            "first='sign' has no effect with refresh='before'",
        ),
        ({"blocks": 3}, "has blocks=3, but axis 0 has 4 elements"),
        ({"blocks": 2, "axis": 0, "merge_dims": "left"}, "which is merged with others"),
    ):
        with pytest.raises(ValueError, match=message):
            C.ChainOpt([p], 0.1, C.soap_precond(C.sign, **options))
    with pytest.raises(ValueError, match="scale_by_adam has a first moment"):
        C.soap_precond(refresh="before")


PRESETS = {
    "AdaMuon": lambda: (C.scale_by_adamuon, C.decoupled(weight_decay=0.01)),
    "Muon2": lambda: (
        C.muon_momentum,
        C.scale_by_gradient_rms,
        C.orthogonalize(scale="original"),
    ),
    "AdaGO": lambda: (C.muon_momentum(nesterov=False), C.orthogonalize, C.adagrad_norm_rate),
    "AdamH": lambda: (C.scale_by_adam(betas=(0.9, 0.95)), C.hyperball),
    "MuonH": lambda: (C.muon, C.hyperball),
    "MuonSphere": lambda: (C.muon_momentum(momentum=0.9), C.spectral_sphere(solve=False)),
    "Muown": lambda: (C.muown(weight_decay=0.1),),
    "Dion": lambda: (C.dion, C.decoupled(weight_decay=0.01)),
    "Dion2": lambda: (C.partial_orthogonalize, C.decoupled(weight_decay=0.01)),
}
ALONE = {
    "KLSOAP": lambda: (
        C.soap_precond(
            C.scale_by_adam(betas=(0.9, 0.98)),
            gram="kl",
            shampoo_beta=0.98,
            precondition_frequency=10,
        ),
        C.decoupled(weight_decay=0.01),
    ),
    "KLShampoo": lambda: (C.kl_shampoo, C.decoupled(weight_decay=0.01)),
    "MOSO": lambda: (*GOLDEN["to_eigenbasis, before"].chain(), C.decoupled(weight_decay=0.01)),
    "ASGO": lambda: (
        C.exp_avg,
        C.shampoo(beta2=0.95, eps=1e-8, sides="smaller", order=2, max_precond_dim=10000),
    ),
    "SPlus": lambda: (C.splus, C.decoupled(weight_decay=0.01), C.parameter_ema),
}


@pytest.mark.parametrize("name", ALONE)
def test_a_preset_for_every_parameter_is_its_chain(name: str) -> None:
    shapes = [(4, 3), (3,)]
    begin, grads = starts(shapes), gradients(4, shapes)
    ours = walk(lambda ps: heavyball.PRESETS[name](ps, 0.05), begin, grads)
    theirs = walk(lambda ps: C.ChainOpt(ps, 0.05, *ALONE[name]()), begin, grads)
    for one, other in zip(ours, theirs, strict=True):
        for p, q in zip(one, other, strict=True):
            close(p, q, atol=1e-13)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_its_chain_beside_adamw(name: str) -> None:
    cls, shapes = heavyball.PRESETS[name], [(4, 3), (3,)]
    more = {"weight_decay": 0.1} if name == "Muown" else {}
    begin, grads = starts(shapes), gradients(3, shapes)
    ours = walk(lambda ps: cls(ps, 0.05, adamw_lr=0.01, **more), begin, grads)
    hidden = walked(PRESETS[name](), begin[0], [g for g, _ in grads])
    decay = dict.fromkeys(("AdaMuon", "Dion", "Dion2"), 0.01).get(name, 0.0)
    rest = walk(
        lambda ps: torch.optim.AdamW(ps, 0.01, (0.9, 0.95), weight_decay=decay),
        begin[1:],
        [[g] for _, g in grads],
    )
    for (p, q), expected, (other,) in zip(ours, hidden, rest, strict=True):
        close(p, expected, atol=1e-13)
        close(q, other, atol=1e-13)


# ---- blocks

METHODS = {
    "orthogonalize": lambda **k: C.orthogonalize(**k),
    "muon": lambda **k: C.muon(products="full", **k),
    "muon, spectral": lambda **k: C.muon(scale="spectral", **k),
    "normuon": lambda **k: C.scale_by_normuon(**k),
    "adamuon": lambda **k: C.scale_by_adamuon(**k),
    "namo": lambda **k: C.scale_by_adamuon(second_moment="norm", **k),
}
CUTS = (2, (1, 3, 2), (2, 2, 2), ("interleaved", 2, (1, 2)), ("interleaved", 3, (1, 1)))


def pieces(x: Tensor, blocks: Any, axis: int) -> list[Tensor]:
    """The blocks as a loop over rows gives them."""
    x = x.mT if axis else x
    n = len(x)
    if isinstance(blocks, int):
        rows = [range(k * n // blocks, (k + 1) * n // blocks) for k in range(blocks)]
    elif blocks[0] == "interleaved":
        _, groups, sizes = blocks
        each, ends = sum(sizes), [sum(sizes[:k]) for k in range(len(sizes))]
        rows = [
            [g * each + low + i for g in range(groups) for i in range(size)]
            for low, size in zip(ends, sizes, strict=True)
        ]
    else:
        rows = [range(sum(blocks[:k]), sum(blocks[: k + 1])) for k in range(len(blocks))]
    found = [torch.stack([x[i] for i in part]) for part in rows]
    return [part.mT if axis else part for part in found]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("blocks", CUTS, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_a_block_is_a_parameter_of_its_own(name: str, blocks: Any, axis: int) -> None:
    grads = [g for (g,) in gradients(3, [(6, 6)])]
    make = METHODS[name]
    together = updates([make(blocks=blocks, axis=axis)], grads)
    cut = [pieces(g, blocks, axis) for g in grads]
    for k in range(len(cut[0])):
        alone = updates([make()], [c[k].contiguous() for c in cut])
        for ours, single in zip(together, alone, strict=True):
            close(pieces(ours, blocks, axis)[k], single, atol=1e-13)


@pytest.mark.parametrize("blocks", CUTS, ids=str)
def test_bases_of_blocks_are_those_of_parameters_of_their_own(blocks: Any) -> None:
    grads = [g for (g,) in gradients(4, [(6, 6)])]
    for make in (
        lambda **k: C.soap_precond(precondition_frequency=1, **k),
        lambda **k: C.soap_precond(gram="kl", **k),
        lambda **k: C.shampoo(beta2=0.9, eps=1e-3, **k),
        lambda **k: C.splus(inverse_every=1, **k),
    ):
        for axis in (0, 1):
            together = updates([make(blocks=blocks, axis=axis)], grads)
            cut = [pieces(g, blocks, axis) for g in grads]
            for k in range(len(cut[0])):
                alone = updates([make()], [c[k].contiguous() for c in cut])
                for ours, single in zip(together, alone, strict=True):
                    close(pieces(ours, blocks, axis)[k], single, atol=1e-8)


# Methods that draw random numbers, by the parameter's place and the block's.
DRAWING: dict[str, tuple[Callable[..., Any], float]] = {
    "dion": (lambda **k: C.dion(rank_fraction=0.5, **k), 1e-10),
    "dion, rank": (lambda **k: C.dion(rank=1, **k), 1e-10),
    "partial": (lambda **k: C.partial_orthogonalize(fraction=0.5, **k), 1e-13),
    "partial, random": (
        lambda **k: C.partial_orthogonalize(fraction=0.5, select="random", **k),
        1e-13,
    ),
    "apollo": (lambda **k: C.apollo(rank=1, **k), 1e-13),
    "apollo, tensor": (lambda **k: C.apollo(rank=1, gap=2, scale_type="tensor", **k), 1e-13),
    "galore": (lambda **k: C.galore(rank=1, gap=2, **k), 1e-9),
    "fira": (lambda **k: C.fira(rank=1, gap=2, **k), 1e-9),
    "fira, sign": (lambda **k: C.fira(C.sign, rank=1, **k), 1e-9),
    "psgd_kron": (lambda **k: C.psgd_kron(**k), 1e-12),
    "psgd_kron, cached": (lambda **k: C.psgd_kron(cached=True, delayed=True, **k), 1e-12),
    "psgd_pro": (lambda **k: C.psgd_pro(**k), 1e-12),
    "lather": (lambda **k: C.lather_precond(**k), 1e-9),
}


def alike(self: Any, shape: tuple[int, ...], salt: int = 0) -> Tensor:
    """In place of noise: numbers that depend on the shape and the step alone."""
    index = torch.arange(torch.Size(shape[1:]).numel(), dtype=torch.float64)
    return torch.cos(1 + (index + 2 * self._group[0].count) ** 2).reshape(shape[1:]).expand(shape)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("blocks", CUTS, ids=str)
@pytest.mark.parametrize("name", DRAWING)
def test_a_block_that_draws_as_a_parameter_is_one(
    monkeypatch: pytest.MonkeyPatch, name: str, blocks: Any, axis: int
) -> None:
    monkeypatch.setattr(serve.Noise, "__call__", alike)
    grads = [g for (g,) in gradients(4, [(6, 6)])]
    make, atol = DRAWING[name]
    together = updates([make(blocks=blocks, axis=axis)], grads)
    cut = [pieces(g, blocks, axis) for g in grads]
    for k in range(len(cut[0])):
        alone = updates([make()], [c[k].contiguous() for c in cut])
        for ours, single in zip(together, alone, strict=True):
            close(pieces(ours, blocks, axis)[k], single, atol=atol)


@pytest.mark.parametrize("radius", ["initial", "spectral", 2.0])
@pytest.mark.parametrize("blocks", [2, (1, 3), ("interleaved", 2, (1, 1))], ids=str)
def test_blocks_on_hyperballs_have_norms_of_their_own(blocks: Any, radius: Any) -> None:
    (start,), grads = starts([(4, 4)]), [g for (g,) in gradients(3, [(4, 4)])]
    for axis in (0, 1):
        together = walked((C.hyperball(radius=radius, blocks=blocks, axis=axis),), start, grads)
        for k, piece in enumerate(pieces(start, blocks, axis)):
            cut = [pieces(g, blocks, axis)[k].contiguous() for g in grads]
            alone = walked((C.hyperball(radius=radius),), piece.contiguous(), cut)
            for ours, single in zip(together, alone, strict=True):
                close(pieces(ours, blocks, axis)[k], single, atol=1e-13)


BY_NAME = {
    "dion": C.dion(rank=1, blocks={"a": 2}),
    "apollo": C.apollo(rank=1, blocks={"a": 2}),
    "galore": C.galore(rank=1, blocks={"a": 2}),
    "fira": C.fira(rank=1, blocks={"a": 2}),
    "psgd_kron": C.psgd_kron(blocks={"a": 2}),
    "lather": C.lather_precond(blocks={"a": 2}),
    "hyperball": C.hyperball(blocks={"a": 2}),
    "partial_orthogonalize": C.partial_orthogonalize(blocks={"a": 2}),
}


@pytest.mark.parametrize("name", BY_NAME)
def test_blocks_by_names_are_those_of_a_chain_for_each(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(serve.Noise, "__call__", alike)
    begin, grads = starts([(4, 4)])[0], [g for (g,) in gradients(3, [(4, 4)])]
    params = [torch.nn.Parameter(begin.clone()) for _ in "ab"]
    opt = C.ChainOpt(list(zip("ab", params, strict=True)), 0.01, BY_NAME[name], foreach=False)
    alone = []
    for blocks in (2, None):
        if name in ("galore", "fira"):
            t = getattr(C, name)(rank=1, **({} if blocks is None else {"blocks": blocks}))
        elif name == "lather":
            t = C.lather_precond(blocks=blocks)
        else:
            t = getattr(C, name)(
                blocks=blocks, **({"rank": 1} if name in ("dion", "apollo") else {})
            )
        alone.append(walked((t,), begin, grads, lr=0.01))
    for i, g in enumerate(grads):
        for p in params:
            p.grad = g.clone()
        opt.step()
        for p, path in zip(params, alone, strict=True):
            close(p.detach(), path[i], atol=1e-12)
    again = pickle.loads(pickle.dumps(opt))
    assert str(again.chain) == str(opt.chain)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_rank_of_a_block_is_at_most_its_shorter_side(axis: int) -> None:
    for t in (C.dion, C.apollo, C.galore, C.fira):
        with pytest.raises(
            ValueError, match=r"rank=3, which is larger than the shorter side of a block, 2"
        ):
            C.ChainOpt([torch.zeros(6, 6)], 0.1, t(rank=3, blocks=(2, 4), axis=axis))
        with pytest.raises(ValueError, match="has blocks=5, but axis"):
            C.ChainOpt([torch.zeros(6, 6)], 0.1, t(rank=1, blocks=5, axis=axis))
    for t in (C.psgd_kron, C.psgd_pro, C.lather_precond, C.partial_orthogonalize, C.hyperball):
        with pytest.raises(ValueError, match="has blocks=5, but axis"):
            C.ChainOpt([torch.ones(6, 6)], 0.1, t(blocks=5, axis=axis))
    for t in (C.psgd_kron, C.psgd_pro, C.lather_precond, C.soap_precond, C.shampoo):
        with pytest.raises(ValueError, match="has blocks=2 of axis 1, which it does not have"):
            C.ChainOpt([torch.ones(6)], 0.1, t(blocks=2, axis=1))
    with pytest.raises(ValueError, match="which is merged with others"):
        C.ChainOpt([torch.ones(4, 2, 2)], 0.1, C.psgd_kron(blocks=2, axis=1, merge_dims=True))


def test_blocks_of_stacked_matrices_are_those_of_each() -> None:
    grads = [g for (g,) in gradients(2, [(3, 4, 6)])]
    for name in ("muon", "normuon", "namo"):
        together = updates([METHODS[name](blocks=(1, 3), stacked=True)], grads)
        for i in range(3):
            alone = updates([METHODS[name](blocks=(1, 3))], [g[i] for g in grads])
            for ours, single in zip(together, alone, strict=True):
                close(ours[i], single, atol=1e-13)


def test_blocks_by_the_names_of_parameters() -> None:
    named = [("a.qkv.weight", torch.zeros(6, 4)), ("a.out.weight", torch.zeros(6, 4))]
    (g,) = gradients(1, [(6, 4)])[0]
    opt = C.ChainOpt(named, 1.0, C.muon(blocks={"*.qkv.weight": (1, 2, 3)}), C.descend)
    for _, p in named:
        p.grad = g.float()
    opt.step()
    for (_, p), blocks in zip(named, ((1, 2, 3), None), strict=True):
        (expected,) = updates([C.muon(blocks=blocks)], [g])
        close(p.double(), -expected, atol=1e-5)
    assert set(opt.state[named[0][1]]) == set(opt.state[named[1][1]])
    assert "momentum" in opt.param_groups[0]
    with pytest.raises(ValueError, match=r"asks for names, but a parameter of shape \(6, 4\)"):
        C.ChainOpt([named[0][1]], 1.0, C.muon(blocks={"*.qkv.weight": 2}))


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (4, "has blocks=4, but axis 0 has 6 elements: expected a divisor"),
        ((1, 2), r"has blocks=\(1, 2\), but axis 0 has 6 elements: expected blocks that add up"),
        (("interleaved", 4, (1, 1)), "but axis 0 has 6 elements: expected blocks that add up"),
        ((0, 6), r"has blocks=\(0, 6\): expected None, a number of blocks"),
        ({"w": 5}, "has blocks=5, but axis 0 has 6 elements"),
    ],
)
def test_blocks_that_do_not_add_up_are_refused(blocks: Any, message: str) -> None:
    for t in (C.muon, C.orthogonalize, C.scale_by_normuon, C.scale_by_adamuon):
        with pytest.raises(ValueError, match=rf"'w' of shape \(6, 4\).*{message}"):
            C.ChainOpt([("w", torch.zeros(6, 4))], 1.0, t(blocks=blocks))


# ---- planted mistakes


def golden_of(*names: str) -> tuple[Callable[[], object], ...]:
    """Golden values of matrix methods that must notice a mistake."""
    return tuple(
        lambda name=name: test_golden_values(name)  # type: ignore[misc]
        for name in names
    )


@mutant("scale_by_adamuon", *golden_of("scale_by_adamuon", "scale_by_adamuon, no sign"))
def a_second_moment_of_an_update_that_is_lost(right: Wrong) -> Wrong:
    return lambda u, square, **kw: (right(u, square, **kw)[0], square)


@mutant("scale_by_gradient_rms", *golden_of("scale_by_gradient_rms"))
def the_square_of_the_momentum(right: Wrong) -> Wrong:
    return lambda u, *squares, grad, **kw: right(u, *squares, grad=u, **kw)


@mutant("adagrad_norm_rate", *golden_of("adagrad_norm_rate"))
def a_sum_without_its_root(right: Wrong) -> Wrong:
    def wrong(u: Any, s: Any, *, grad: Any, lr: Any, gamma: Any, eps: Any) -> Any:
        n = grad.norm().clamp(max=gamma)
        return u * torch.maximum(eps / lr, n / (s + n * n)), s + n * n

    return wrong


@mutant("spectral_normalize", *golden_of("spectral_normalize"))
def a_power_iteration_that_forgets(right: Wrong) -> Wrong:
    return lambda u, left, **kw: (right(u, left, **kw)[0], torch.ones_like(left))


@mutant("scale_update", *golden_of("scion, spectral"))
def an_update_that_stays(right: Wrong) -> Wrong:
    return lambda u, *, factor: u


@mutant("row_normalize", *golden_of("row_normalize"))
def rows_without_their_length(right: Wrong) -> Wrong:
    return lambda u, **kw: right(u, **{**kw, "normalized": False})


@mutant("column_normalize", *golden_of("column_normalize", "column_normalize of the transpose"))
def the_other_axis(right: Wrong) -> Wrong:
    return lambda u, *, axis, **kw: right(u, axis=1 - axis, **kw)


@mutant("sign_normalize", *golden_of("sign_normalize"))
def signs_that_are_not_shared(right: Wrong) -> Wrong:
    return lambda u, **kw: u.sign()


@mutant(
    "radial_brake",
    lambda: test_the_brake_scales_the_part_along_the_weights(0.5, 1.0),
)
def a_brake_that_holds_the_way_in(right: Wrong) -> Wrong:
    return lambda u, *, outward, inward, **kw: right(u, outward=inward, inward=outward, **kw)


@mutant(
    "update_floor",
    *golden_of("update_floor"),
    test_a_floor_by_rows_and_the_share_of_the_weights,
)
def a_ceiling(right: Wrong) -> Wrong:
    return lambda u, *, floor, **kw: right(u, floor=floor / 2, **kw)


@mutant("relative_update", test_a_floor_by_rows_and_the_share_of_the_weights)
def a_size_of_one(right: Wrong) -> Wrong:
    return lambda u, *, param: u / u.norm()


@mutant("hyperball", *golden_of("hyperball, adam"))
def a_sphere_that_is_left(right: Wrong) -> Wrong:
    def wrong(u: Any, norm: Any, *, param: Any, lr: Any, **kw: Any) -> Any:
        return param - lr * norm * u / u.norm(), norm

    return wrong


@mutant("spectral_sphere", *golden_of("spectral_sphere", "spectral_sphere, tall"))
def a_step_that_is_not_tangent(right: Wrong) -> Wrong:
    return lambda *args, solve, **kw: right(*args, solve=False, **kw)


@mutant("muown", *golden_of("muown"))
def gains_that_are_not_kept(right: Wrong) -> Wrong:
    def wrong(u: Any, m: Any, gain: Any, *rest: Any, **kw: Any) -> Any:
        new, buffer, _, *others = right(u, m, gain, *rest, **kw)
        return new, buffer, gain, *others

    return wrong


@mutant("kl_shampoo", *golden_of("kl_shampoo"))
def eigenvalues_that_stay(right: Wrong) -> Wrong:
    def wrong(u: Any, m: Any, gram: Any, basis: Any, values: Any, **kw: Any) -> Any:
        kept = tuple(v.clone() for v in values)
        new, mean, grams, bases, _, *others = right(u, m, gram, basis, values, **kw)
        return new, mean, grams, bases, kept, *others

    return wrong


@mutant("splus", *golden_of("splus"))
def a_rate_that_does_not_know_the_shape(right: Wrong) -> Wrong:
    return lambda *args, lr, **kw: (*right(*args, lr=lr, **kw)[:-1], lr * 0.25 * 1.1)


@mutant("dion", *golden_of("dion", "dion, wide"))
def a_momentum_without_feedback(right: Wrong) -> Wrong:
    return lambda u, m, q, *, momentum, **kw: right(u, m, q, momentum=torch.ones(()), **kw)


@mutant("partial_orthogonalize", *golden_of("partial_orthogonalize"))
def slices_that_do_not_decay(right: Wrong) -> Wrong:
    return lambda u, m, *, momentum, **kw: right(u, m, momentum=torch.ones(()), **kw)


def cut_in_two(name: str) -> None:
    with pytest.MonkeyPatch.context() as patched:
        test_a_block_that_draws_as_a_parameter_is_one(patched, name, 2, 0)


@mutant("partial_orthogonalize", lambda: cut_in_two("partial"))
def slices_of_the_whole_matrix(right: Wrong) -> Wrong:
    return lambda *args, blocks, **kw: right(*args, blocks=None, **kw)


@mutant("dion", lambda: cut_in_two("dion, rank"))
def scales_of_the_whole_matrix(right: Wrong) -> Wrong:
    def wrong(u: Any, *args: Any, blocks: Any, **kw: Any) -> Any:
        update, *rest = right(u, *args, blocks=blocks, **kw)
        return update * (1.0 if blocks is None else 2**0.5), *rest

    return wrong


@mutant("sinkhorn_normalize", *golden_of("sinkhorn_normalize"))
def a_turn_too_few(right: Wrong) -> Wrong:
    return lambda u, *, iterations: right(u, iterations=iterations - 1)


@mutant("apollo", lambda: test_the_golden_values_of_apollo((3, 4), "channel"))
def a_limiter_that_forgets(right: Wrong) -> Wrong:
    return lambda u, m, v, last, **kw: right(u, m, v, torch.zeros_like(last), **kw)
