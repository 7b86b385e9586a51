"""Named chains with the numbers with which they were published.

`RECIPES` has them by name; `build` makes an optimizer of one. Matrices are told from embeddings, heads
and norms as by `Muon`, so pass a model or `model.named_parameters()`.
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

    lr: the learning rate that goes with it. source: who has published it, and what is not part of it.
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
        "Muon with a brake along the weights, a floor for each row, and the radius pinned",
        _adamw_beside(
            "muon(scale='none') | radial_brake | update_floor(floor=0.3825, rows=True)",
            "pin_radius | post_cautious_decay(weight_decay=0.025)",
            "scale_by_adam(betas=(0.9, 0.95)) | scale_lr(factor=0.015)",
        ),
        0.02,
        "record 46 of modded-nanogpt's third track, https://github.com/KellerJordan/modded-nanogpt, "
        "without its schedules and its basis of SOAP; lr and what is AdamW's are Muon's",
    ),
    Recipe(
        "nanogpt-track3-7",
        "Muon of the momentum over the root mean square of the gradient, by 12 Newton-Schulz steps",
        "Muon2:method='newton-schulz', ns_steps=12, weight_decay=0.0125",
        0.1,
        "record 7 of modded-nanogpt's third track, without its schedules",
    ),
    Recipe(
        "nanochat",
        "Muon for the blocks; AdamW with its own rates for embeddings and the head",
        "route(when(muon, predicate=IsHidden()), "
        "when(scale_by_adam(betas=(0.8, 0.95), eps=1e-10) | scale_lr(factor=0.2), name='*lm_head*'), "
        "otherwise=scale_by_adam(betas=(0.8, 0.95), eps=1e-10) | scale_lr(factor=10.0))",
        0.02,
        "https://github.com/karpathy/nanochat, read at commit cf587ac, 1 November 2025: matrices 0.02, "
        "head 0.004, embeddings 0.2, the last two at a width of 768 and over its root elsewhere; betas "
        "(0.8, 0.95), eps 1e-10, no decay; without its schedules of lr and momentum and its clip of the "
        "norm at 1. In July 2026 it has head 0.008, embeddings 0.3, and Muon's rows of one size",
    ),
    Recipe(
        "kimi-k2",
        "Muon of AdamW's size with clipped queries and keys",
        "MuonClip:weight_decay=0.1",
        2e-4,
        "Kimi K2, https://arxiv.org/abs/2507.20534, section 2.5 as read: lr 2e-4 after a warm-up of "
        "500 steps, weight decay 0.1; tau 100; without its cosine to 2e-5 after 10T of 15.5T tokens. "
        "Momentum and AdamW's numbers are Muon's. Give `heads`, and feed max_logits before every step",
    ),
    Recipe(
        "deepseek-v4",
        "Muon of AdamW's size by the ten steps of DeepSeek-V4's coefficients",
        "Muon:method='deepseekv4', ns_steps=10, scale='match_rms_adamw', weight_decay=0.1",
        2e-4,
        "the coefficients and steps of the DeepSeek-V4 report, as in NVIDIA's Emerging-Optimizers. The "
        "report itself could not be read: scale, lr and decay are not its numbers, but those of Kimi K2",
    ),
    Recipe(
        "scion-gpt",
        "Spectral steps for the blocks and signs for the head and embedding, inside of their balls",
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
    """An optimizer by a recipe.

    lr: in place of the recipe's. options: those of `ChainOpt`, and of the preset where it is one.

    Errors: ValueError for a name that is no recipe's; else as `heavyball.create`.
    """
    recipe = find(name)
    return create(model_or_params, recipe.text, recipe.lr if lr is None else lr, **options)
