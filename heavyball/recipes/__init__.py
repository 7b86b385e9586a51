"""Published configurations with their hyper-parameters.

`RECIPES` lists them by name; `build` makes an optimizer from one. Hidden matrices are identified as in
`Muon`, so pass a model or `model.named_parameters()`.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from heavyball.errors import RaceError, unknown
from heavyball.optim.optimizer import ChainOpt
from heavyball.presets.create import create

__all__ = ["RECIPES", "Recipe", "build"]


@dataclass(frozen=True)
class Recipe:
    """A chain, or a preset with options, as text, and its source.

    lr: its learning rate. source: where it was published, and what is not part of it.
    """

    name: str
    summary: str
    text: str
    lr: float
    source: str

    @property
    def is_chain(self) -> bool:
        """Whether the text is a chain's, and not a preset's."""
        return "|" in self.text


def _adamw_beside(matrices: str, behind: str, adamw: str) -> str:
    """A chain for hidden matrices, the elements after their write, and AdamW for the rest."""
    hidden = f"when({matrices}, predicate=IsHidden())"
    last = f"when({behind}, predicate=IsHidden())"
    return f"route({hidden}, otherwise={adamw}) | route({last}, otherwise=())"


_ALL = (
    Recipe(
        "nanogpt-track3-46",
        "Muon with a radial brake, a floor for the update of each row, and a pinned radius",
        _adamw_beside(
            "muon(scale='none') | radial_brake | update_floor(floor=0.3825, rows=True)",
            "pin_radius | post_cautious_decay(weight_decay=0.025)",
            "scale_by_adam(betas=(0.9, 0.95)) | scale_lr(factor=0.015)",
        ),
        0.02,
        "record 46 of modded-nanogpt's third track, https://github.com/KellerJordan/modded-nanogpt, "
        "without its schedules and its SOAP basis; lr and AdamW's settings are those of Muon",
    ),
    Recipe(
        "nanogpt-track3-7",
        "Muon of the momentum over the root mean square of the gradient, with 12 Newton-Schulz steps",
        "Muon2:method='newton-schulz', ns_steps=12, weight_decay=0.0125",
        0.1,
        "record 7 of modded-nanogpt's third track, without its schedules",
    ),
    Recipe(
        "nanochat",
        "Muon for the blocks; AdamW with separate learning rates for embeddings and the head",
        "route(when(muon, predicate=IsHidden()), "
        "when(scale_by_adam(betas=(0.8, 0.95), eps=1e-10) | scale_lr(factor=0.2), name='*lm_head*'), "
        "otherwise=scale_by_adam(betas=(0.8, 0.95), eps=1e-10) | scale_lr(factor=10.0))",
        0.02,
        "https://github.com/karpathy/nanochat, read at commit cf587ac, 1 November 2025: matrices 0.02, "
        "head 0.004, embeddings 0.2, the last two at width 768 and scaled by its root elsewhere; betas "
        "(0.8, 0.95), eps 1e-10, no decay; without its schedules of lr and momentum and its clip of the "
        "norm at 1. In July 2026 it has head 0.008, embeddings 0.3, and normalized rows in Muon",
    ),
    Recipe(
        "kimi-k2",
        "Muon with AdamW's update size and clipped queries and keys",
        "MuonClip:weight_decay=0.1",
        2e-4,
        "Kimi K2, https://arxiv.org/abs/2507.20534, section 2.5 as read: lr 2e-4 after a warm-up of "
        "500 steps, weight decay 0.1; tau 100; without its cosine to 2e-5 after 10T of 15.5T tokens. "
        "Momentum and AdamW's settings are those of Muon. Pass `heads`, and feed max_logits before "
        "every step",
    ),
    Recipe(
        "deepseek-v4",
        "Muon with AdamW's update size and DeepSeek-V4's ten Newton-Schulz steps",
        "Muon:method='deepseekv4', ns_steps=10, scale='match_rms_adamw', weight_decay=0.1",
        2e-4,
        "the coefficients and steps of the DeepSeek-V4 report, as in NVIDIA's Emerging-Optimizers. The "
        "report itself was not available: scale, lr and decay are those of Kimi K2",
    ),
    Recipe(
        "scion-gpt",
        "Scion: spectral steps for the blocks, signs for head and embedding, with constrained norms",
        "Scion:radius=50.0, head_radius=3000.0, embedding_radius=3000.0, alpha=0.1",
        2.0**-12,
        "https://github.com/LIONS-EPFL/scion, read at commit f58a393: nanoGPT with weight sharing; "
        "without a schedule of lr, and without `scion_init_`",
    ),
)
# By name.
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _ALL}


def find(name: str) -> Recipe:
    """The recipe of a name.

    Errors: RaceError, a ValueError, with the nearest names.
    """
    if name not in RECIPES:
        raise RaceError(unknown("recipe", name, RECIPES))
    return RECIPES[name]


def build(
    name: str, model_or_params: Any, lr: float | Tensor | None = None, **options: Any
) -> ChainOpt:
    """Build an optimizer from a recipe.

    lr: replaces the recipe's. options: those of `ChainOpt`, and of the preset if it is one.

    Errors: ValueError for an unknown name; otherwise as in `heavyball.create`.
    """
    recipe = find(name)
    return create(model_or_params, recipe.text, recipe.lr if lr is None else lr, **options)
