"""Scion: a linear minimization oracle for each kind of parameter."""

from typing import Any, Literal, Unpack, get_args

from torch import Tensor

from heavyball import chainable as C
from heavyball.core.hyper import check_live, nonnegative, shared
from heavyball.core.transform import Transform
from heavyball.linalg.matrices import Blocks
from heavyball.linalg.orthogonalize import Products
from heavyball.presets.base import Preset, PresetOptions, flag
from heavyball.presets.muon import IsNamed, Predicate, which_are_hidden
from heavyball.transforms.muon import Method

Oracle = Literal["sign", "row", "column"]
# Of what is no hidden layer: output layers. The others are embeddings.
HEAD_NAMES = (
    *("head.*", "*.head.*", "*_head.*", "*logits*", "*classifier.*"),
    *("fc.*", "output.*", "score.*", "*.fc.*", "*.output.*", "*.score.*"),
)


class Scion(Preset):
    """Steps of unit norm: spectral for hidden matrices, others for embeddings, heads and vectors.

    m <- (1 - alpha) m + alpha g;  p <- (1 - lr) p - lr radius LMO(m), or p - lr radius LMO(m) with
    constrained=False, where LMO(m) is

    hidden matrices   sqrt(R / C) times the orthogonal factor; kernels sqrt(R / C_in) / k^d times that
    head, embedding   "sign": sign(m) / C;  "row": m / (||row|| sqrt(C));  "column": rows of root mean
                      square 1, for vocabulary x width
    vectors           m / RMS(m)

    Constrained weights stay within the radius in LMO's norm if they start there; see `scion_init_`.
    Hidden matrices are identified as in `Muon`. Of the rest, matrices named like an output layer are
    heads (`heavyball.presets.scion.HEAD_NAMES`), other matrices are embeddings.

    radius, head_radius, embedding_radius, vector_radius: the factor of each kind's update.
    other_names: name patterns of parameters that are not hidden, instead of Muon's ADAMW_NAMES.
    use_spectral: `fn(name, parameter) -> bool`, decides instead of names and shapes.
    ns_steps, method, eps, products, blocks, axis: as in `orthogonalize`.

    Units: `lr` is the step relative to the radius; 2^-12 for a language model.
    Errors: ValueError for an alpha outside of (0, 1].
    Source: Pethick et al. 2025, Algorithms 1 and 2, https://arxiv.org/abs/2502.07529; radii, alpha and
        lr of the authors' GPT, whose head is its embedding too.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 2.0**-12,
        *,
        alpha: float = 0.1,
        radius: float = 50.0,
        head_radius: float = 3000.0,
        embedding_radius: float = 3000.0,
        vector_radius: float = 1.0,
        head: Oracle = "sign",
        embedding: Oracle = "sign",
        constrained: bool = True,
        ns_steps: int = 5,
        method: Method = "quintic",
        eps: float = 1e-7,
        products: Products = "auto",
        blocks: Blocks = None,
        axis: Literal[0, 1] = 0,
        other_names: tuple[str, ...] | None = None,
        use_spectral: Predicate | None = None,
        **options: Unpack[PresetOptions],
    ):
        if isinstance(alpha, bool) or not 0 < alpha <= 1:
            raise ValueError(f"alpha={alpha!r}: expected in (0, 1]")
        beta = shared("beta", 1 - alpha)
        spectral = C.orthogonalize(
            scale="spectral_conv",
            method=method,
            steps=ns_steps,
            eps=eps,
            products=products,
            blocks=blocks,
            axis=axis,
        )
        chosen = {"other_names": other_names, "use_spectral": use_spectral}
        hidden = which_are_hidden(params, chosen, ("other_names", "use_spectral"))
        kinds = C.route(
            C.when(spectral, _scaled("radius", radius), predicate=hidden),
            C.when(C.rms_normalize(eps=1e-8), _scaled("vector_radius", vector_radius), max_ndim=1),
            C.when(
                _oracle("head", head),
                _scaled("head_radius", head_radius),
                predicate=IsNamed(HEAD_NAMES),
            ),
            otherwise=(
                _oracle("embedding", embedding),
                _scaled("embedding_radius", embedding_radius),
            ),
        )
        self.build(
            params,
            lr,
            (C.exp_avg(beta=beta, correct_bias=False), kinds),
            options,
            beta1=beta,
            weight_decay=1.0 if flag("constrained", constrained) else 0.0,
        )


def _scaled(name: str, radius: float) -> Transform:
    return C.scale_update(factor=shared(name, check_live(name, radius, 1.0, nonnegative)))


def _oracle(option: str, value: Oracle) -> Transform:
    if value not in get_args(Oracle):
        expected = ", ".join(map(repr, get_args(Oracle)))
        raise ValueError(f"{option}={value!r}: expected one of {expected}")
    made = {"sign": C.sign_normalize, "row": C.row_normalize, "column": C.column_normalize(axis=1)}
    return made[value]
