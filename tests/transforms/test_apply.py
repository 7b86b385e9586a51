"""apply and maximize: a function of the update, and going up."""

import pytest
import torch
from helpers import chain, gradients, of_one, same_path, starts, updates, walk

from heavyball import chainable as C


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 2, 2)])
def test_apply_is_its_function(shape: tuple[int, ...]) -> None:
    grads = [g for (g,) in gradients(3, [shape])]
    for fn in (torch.tanh, torch.neg, lambda u: u.clamp(-0.5, 0.5), lambda u: u * 2 + 1):
        for update, grad in zip(updates([C.apply(fn=fn)], grads), grads, strict=True):
            assert torch.equal(update, fn(grad))


def test_apply_without_a_function_changes_nothing() -> None:
    grads = [g for (g,) in gradients(3, [(3, 4)])]
    for update, grad in zip(updates([C.apply], grads), grads, strict=True):
        assert torch.equal(update, grad)


def test_apply_refuses_another_shape_and_no_tensor() -> None:
    (grad,) = gradients(1, [(3, 4)])[0]
    for fn in (torch.sum, torch.Tensor.tolist, lambda u: u[:1]):
        with pytest.raises(TypeError, match=r"expected a tensor of shape \(3, 4\)"):
            updates([C.apply(fn=fn)], [grad])


def test_a_function_that_works_in_place_reaches_no_state_before_it() -> None:
    begin, grads = starts(), gradients(5)
    pure = walk(chain(C.exp_avg, C.apply(fn=torch.neg)), begin, grads)
    in_place = walk(chain(C.exp_avg, C.apply(fn=torch.Tensor.neg_)), begin, grads)
    same_path(in_place, pure, atol=0.0)


@pytest.mark.parametrize(
    "elements",
    [
        lambda: (C.scale_by_adam,),
        lambda: (C.exp_avg, C.cautious),
        lambda: (C.exp_avg, C.grams),
        lambda: (C.scale_by_lion, C.schedule_free(caution="cautious")),
        lambda: (C.clip_by_global_norm, C.nesterov_momentum),
        lambda: (C.skip_not_finite, C.accumulate(k=2), C.exp_avg, C.cautious),
    ],
)
def test_maximize_is_the_chain_on_negative_gradients(elements: object) -> None:
    begin, grads = starts(), gradients(6)
    up = [[-g for g in step] for step in grads]
    # nothing but signs change, so not a bit may
    chained = elements()
    place = 1 if chained[0].name == "skip_not_finite" else 0
    maximizing = [*chained[:place], C.maximize, *chained[place:]]
    same_path(walk(chain(*maximizing), begin, grads), walk(chain(*chained), begin, up), atol=0.0)


def test_maximize_goes_up() -> None:
    start = torch.tensor([1.0, -2.0], dtype=torch.float64)
    ((p,),) = walk(chain(C.maximize), [start], of_one([torch.ones(2, dtype=torch.float64)]))
    assert (p > start).all()
