"""Conditions and live numbers in every operation that knows both, for kernels of either kind."""

from collections.abc import Callable

import torch
from torch import Tensor

from heavyball.chainable import Live, transform, zeros

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

    @transform(previous=zeros)
    def chosen(update, previous, *, grad, strength: Live = 0.3):
        condition = grad * previous < 0
        return sum(CONDITIONS[name](update, condition, strength) for name in names), grad

    return chosen
