"""The tests of the transforms can fail: each of these mistakes turns one of them red.

A mutant takes the place of a transform in the library, and the tests that are meant to catch it run
as they are.
"""

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import test_more_transforms
import torch
import transforms
from helpers import MUTANTS, Wrong, eager, mutant  # noqa: F401
from transforms import (
    test_accumulate,
    test_adam,
    test_ademamix,
    test_adopt,
    test_apply,
    test_atan2,
    test_cautious,
    test_centralize,
    test_clip,
    test_clip_last_norm,
    test_combine,
    test_decay,
    test_descend,
    test_exp_avg,
    test_factored,
    test_focus,
    test_laprop,
    test_laws,
    test_lion,
    test_mars,
    test_momentum,
    test_muon,
    test_muon_pp,
    test_nadam,
    test_orthograd,
    test_palm,
    test_parameter_ema,
    test_probe,
    test_prodigy,
    test_prodigy_progress,
    test_psgd,
    test_psgd_others,
    test_rms,
    test_scale_lr,
    test_schedule_free,
    test_sign,
    test_skip,
    test_soap,
    test_stable,
)

from heavyball import chainable as C
from heavyball.core import chain as chain_module
from heavyball.linalg import basis as basis_module
from heavyball.linalg.modes import rotate
from heavyball.transforms import lather as lather_module
from heavyball.transforms import soap as soap_module

# Tests of transforms may plant mistakes of their own.
for _module in pkgutil.iter_modules(transforms.__path__):
    importlib.import_module(f"transforms.{_module.name}")


def adam_tests() -> tuple[Callable[[], object], ...]:
    return (
        lambda: test_adam.test_it_is_torch_adamw_step_by_step((0.9, 0.999), 1e-8, 0.0),
        lambda: test_adam.test_the_golden_values(0.0, test_adam.GOLDEN_ADAM),
        lambda: test_adam.test_the_update_is_a_ratio_of_weighted_means((3, 4)),
    )


@mutant("scale_by_adam", *adam_tests())
def a_first_moment_that_is_never_updated(right: Wrong) -> Wrong:
    def wrong(u: Any, m: Any, *squares: Any, **kw: Any) -> tuple:
        update, _, *new = right(u, m, *squares, **kw)
        return update, m, *new

    return wrong


@mutant("scale_by_adam", *adam_tests())
def a_second_moment_that_is_never_updated(right: Wrong) -> Wrong:
    def wrong(u: Any, m: Any, v: Any, *more: Any, **kw: Any) -> tuple:
        update, mean, _, *new = right(u, m, v, *more, **kw)
        return update, mean, v, *new

    return wrong


@mutant("scale_by_adam", *adam_tests())
def betas_in_the_wrong_order(right: Wrong) -> Wrong:
    return lambda *args, betas, **kw: right(*args, betas=betas[::-1], **kw)


@mutant("scale_by_adam", *adam_tests())
def no_bias_correction(right: Wrong) -> Wrong:
    # weights of a step far away
    return lambda *args, step, **kw: right(*args, step=step + 1e9, **kw)


@mutant("scale_by_adam", *adam_tests())
def a_count_of_steps_that_begins_one_late(right: Wrong) -> Wrong:
    return lambda *args, step, **kw: right(*args, step=step + 1, **kw)


@mutant(
    "scale_by_adam",
    lambda: test_adam.test_eps_has_four_places("outside"),
    lambda: test_adam.test_it_is_torch_adamw_step_by_step((0.9, 0.99), 1e-3, 0.0),
    test_adam.test_eps_is_the_one_given,
)
def eps_in_another_place(right: Wrong) -> Wrong:
    return lambda *args, eps_placement, **kw: right(*args, eps_placement="inside", **kw)


@mutant("scale_by_adam", test_adam.test_eps_is_the_one_given)
def eps_of_its_own(right: Wrong) -> Wrong:
    return lambda *args, eps, **kw: right(*args, eps=1e-8, **kw)


@mutant(
    "scale_by_adam",
    lambda: test_adam.test_amsgrad_is_torchs_where_the_gradient_shrinks((0.9, 0.999)),
)
def amsgrad_that_forgets(right: Wrong) -> Wrong:
    def wrong(u: Any, m: Any, v: Any, vmax: Any, *more: Any, **kw: Any) -> tuple:
        return right(u, m, v, None if vmax is None else torch.zeros_like(vmax), *more, **kw)

    return wrong


@mutant(
    "exp_avg",
    test_exp_avg.test_the_golden_updates,
    test_exp_avg.test_the_update_is_the_weighted_mean_of_all_so_far,
    lambda: test_schedule_free.test_cautious_before_it_masks_the_direction_of_y_and_z_alike(),
)
def a_mean_that_lags_by_one_step(right: Wrong) -> Wrong:
    return lambda u, m, *rates, **kw: (m, *right(u, m, *rates, **kw)[1:])


@mutant(
    "scale_by_exp_avg_sq",
    test_rms.test_the_golden_values,
    lambda: test_rms.test_exp_avg_sq_is_torch_adamw_without_first_moment(0.999, 1e-8),
    lambda: test_schedule_free.test_adamw_is_the_packages_at_y_and_at_x((0.9, 0.999), {}),
)
def state_and_gradient_swapped(right: Wrong) -> Wrong:
    return lambda u, v, **kw: right(v.sqrt(), u**2, **kw)


@mutant("scale_by_exp_avg_sq", test_rms.test_the_golden_values)
def a_first_step_that_is_dropped(right: Wrong) -> Wrong:
    def wrong(u: Any, v: Any, *, step: Any, **kw: Any) -> tuple:
        update, square = right(u, v, step=step, **kw)
        return update * (step > 1), square

    return wrong


@mutant(
    "scale_by_rms",
    test_rms.test_the_golden_values,
    lambda: test_rms.test_rms_is_torch_rmsprop(0.99, 1e-8, True, 0.0),
)
def rms_with_a_weight_of_alpha_for_the_new(right: Wrong) -> Wrong:
    return lambda *args, alpha, **kw: right(*args, alpha=1 - alpha, **kw)


@mutant(
    "scale_by_nadam",
    lambda: test_nadam.test_it_is_torch_nadam_with_its_product_in_float64((0.9, 0.999), 4e-3),
    lambda: test_nadam.test_the_update_is_the_formula_with_explicit_sums_and_products("outside"),
)
def nadam_whose_product_stands_still(right: Wrong) -> Wrong:
    def wrong(u: Any, m: Any, v: Any, product: Any, **kw: Any) -> tuple:
        return (*right(u, m, v, product, **kw)[:3], product)

    return wrong


@mutant(
    "scale_by_laprop",
    test_laprop.test_the_golden_values,
    lambda: test_laprop.test_it_is_pytorch_optimizers_laprop((0.9, 0.999)),
    lambda: test_laprop.test_the_update_is_a_weighted_mean_of_normalized_gradients("outside"),
)
def laprop_that_applies_the_normalized_gradient(right: Wrong) -> Wrong:
    def wrong(*args: Any, betas: Any, **kw: Any) -> tuple:
        return right(*args, betas=(0 * betas[0], betas[1]), **kw)

    return wrong


@mutant(
    "scale_by_laprop",
    test_laprop.test_with_the_lr_in_the_momentum_it_is_that_laprop_under_a_schedule,
    test_laprop.test_the_lr_of_each_gradients_own_step_weighs_it,
)
def laprop_that_forgets_the_rates(right: Wrong) -> Wrong:
    def wrong(u: Any, m: Any, v: Any, a: Any, rates: Any, *, lr: Any, **kw: Any) -> tuple:
        return right(u, m, v, a, rates, lr=torch.ones_like(torch.as_tensor(lr)), **kw)

    return wrong


def adopt_tests() -> tuple[Callable[[], object], ...]:
    compare = test_adopt.test_it_is_pytorch_optimizers_adopt_with_the_authors_clip_and_first_step
    return (
        test_adopt.test_the_golden_values,
        lambda: compare((0.9, 0.9999), 1e-6, 0.25, False),
        test_adopt.test_the_update_is_an_explicit_sum_of_clipped_quotients,
    )


@mutant("scale_by_adopt", *adopt_tests())
def adopt_with_the_new_second_moment(right: Wrong) -> Wrong:
    def wrong(u: Any, m: Any, v: Any, *, betas: Any, **kw: Any) -> tuple:
        new = betas[1] * v + (1 - betas[1]) * u**2
        _, _, square, *rest = right(u, m, v, betas=betas, **kw)
        update, mean, *_ = right(u, m, new, betas=betas, **kw)
        return update, mean, square, *rest

    return wrong


@mutant("scale_by_adopt", *adopt_tests())
def adopt_whose_momentum_is_a_step_late(right: Wrong) -> Wrong:
    return lambda u, m, v, **kw: (m, *right(u, m, v, **kw)[1:])


@mutant("scale_by_adopt", *adopt_tests())
def adopt_without_a_clip(right: Wrong) -> Wrong:
    return lambda *args, clip_exponent, **kw: right(*args, clip_exponent=None, **kw)


@mutant("scale_by_adopt", *adopt_tests())
def adopt_with_bias_corrected_momentum(right: Wrong) -> Wrong:
    def wrong(u: Any, m: Any, v: Any, *, betas: Any, step: Any, **kw: Any) -> tuple:
        update, *rest = right(u, m, v, betas=betas, step=step, **kw)
        return update / (1 - betas[0] ** (step - 1).clamp(min=1)), *rest

    return wrong


@mutant(
    "scale_by_adam_atan2",
    test_atan2.test_the_golden_values_are_ours_and_those_of_the_package,
    lambda: test_atan2.test_it_is_the_package_step_by_step((0.0, 0.999), 1.0, 2.0, 0.0),
    lambda: test_atan2.test_it_is_the_angle_of_two_weighted_means((5,)),
)
def atan2_without_its_factor(right: Wrong) -> Wrong:
    return lambda *args, a, **kw: right(*args, a=0.9 * a, **kw)


@mutant(
    "scale_by_ademamix",
    test_ademamix.test_the_golden_values,
    test_ademamix.test_the_slow_mean_is_not_bias_corrected,
    lambda: test_ademamix.test_it_is_pytorch_optimizers_ademamix((0.5, 0.9, 0.95), 5.0, 0.1, 0.0),
)
def ademamix_with_a_bias_corrected_slow_mean(right: Wrong) -> Wrong:
    def wrong(*args: Any, alpha: Any, betas: Any, step: Any, **kw: Any) -> tuple:
        corrected = alpha / (1 - betas[2] ** step)
        return right(*args, alpha=corrected, betas=betas, step=step, **kw)

    return wrong


@mutant(
    "scale_by_ademamix",
    test_ademamix.test_both_warm_ups_are_pytorch_optimizers,
    lambda: test_ademamix.test_the_update_is_the_formula_with_explicit_sums("outside"),
)
def ademamix_without_the_warm_up_of_beta3(right: Wrong) -> Wrong:
    return lambda *args, beta3_warmup, **kw: right(*args, beta3_warmup=None, **kw)


@mutant(
    "scale_by_lion",
    test_lion.test_the_golden_values,
    lambda: test_lion.test_it_is_lion_pytorch_step_by_step((0.9, 0.99), 0.0),
    test_lion.test_the_update_is_the_sign_of_an_explicit_sum_and_lags_by_no_step,
)
def lion_that_takes_the_sign_of_its_state(right: Wrong) -> Wrong:
    def wrong(u: Any, m: Any, **kw: Any) -> tuple:
        _, state = right(u, m, **kw)
        return m.sign(), state

    return wrong


@mutant("probe", test_probe.test_zeros_are_counted)
def a_probe_that_counts_what_is_not_zero(right: Wrong) -> Wrong:
    def wrong(u: Any, *states: Any, **kw: Any) -> tuple:
        *rest, zeros = right(u, *states, **kw)
        return *rest, u.numel() - zeros

    return wrong


@mutant("sign", *(lambda s=s: test_sign.test_graft_keeps_the_norm(s) for s in ((5,), (3, 4))))
def a_sign_that_ignores_the_graft(right: Wrong) -> Wrong:
    return lambda u, graft: right(u, graft=False)


@mutant(
    "nesterov_momentum",
    test_momentum.test_the_golden_values_after_three_steps,
    lambda: test_momentum.test_nesterov_is_torch_sgd(0.9),
    test_momentum.test_both_are_explicit_sums,
)
def nesterov_without_the_look_ahead(right: Wrong) -> Wrong:
    def wrong(u: Any, buffer: Any, **kw: Any) -> tuple:
        _, new = right(u, buffer, **kw)
        return new, new

    return wrong


@mutant(
    "heavyball_momentum",
    lambda: test_momentum.test_heavyball_is_torch_sgd(0.5, 0.3, False),
    test_momentum.test_both_are_explicit_sums,
)
def a_first_gradient_that_is_dampened(right: Wrong) -> Wrong:
    def wrong(u: Any, buffer: Any, begun: Any, **kw: Any) -> tuple:
        return right(u, buffer, begun if begun is None else begun + 1, **kw)

    return wrong


@mutant(
    "heavyball_momentum",
    test_momentum.test_the_golden_values_after_three_steps,
    lambda: test_momentum.test_heavyball_is_torch_sgd(0.9, 0.0, False),
)
def a_momentum_that_ends_the_chain(right: Wrong) -> Wrong:
    return lambda u, *args, **kw: (torch.zeros_like(u), *right(u, *args, **kw)[1:])


@mutant(
    "palm_beta2",
    test_palm.test_the_schedule_has_the_papers_values,
    lambda: test_palm.test_it_rules_every_second_moment_behind_it("scale_by_adam", 0.8),
)
def palm_that_is_always_corrected_twice(right: Wrong) -> Wrong:
    return lambda u, *, debias, **kw: right(u, debias=True, **kw)


@mutant(
    "mars",
    test_mars.test_the_golden_values,
    lambda: test_mars.test_mars_adamw_is_pytorch_optimizers((0.95, 0.99), 0.5),
    lambda: test_mars.test_it_is_the_gradient_plus_its_change_shortened_to_the_norm(None),
    test_mars.test_the_last_gradient_is_a_copy_that_zero_grad_does_not_reach,
)
def mars_that_remembers_the_corrected_gradient(right: Wrong) -> Wrong:
    def wrong(u: Any, last: Any, **kw: Any) -> tuple:
        corrected, _ = right(u, last, **kw)
        return corrected, corrected

    return wrong


CAUTIOUS = (
    test_cautious.test_the_golden_values_of_cautious,
    lambda: test_cautious.test_cautious_atan2_is_the_packages((0.9, 0.99)),
    test_cautious.test_cautious_lion_is_pytorch_optimizers_with_the_papers_scale,
    lambda: test_cautious.test_the_gradient_that_decides_is_the_raw_one("cautious"),
)


@mutant("cautious", *CAUTIOUS)
def cautious_against_the_update_itself(right: Wrong) -> Wrong:
    return lambda u, *, grad, **kw: right(u, grad=u, **kw)


@mutant("cautious", *CAUTIOUS[:3])
def cautious_without_a_scale(right: Wrong) -> Wrong:
    return lambda u, *, scale, **kw: right(u, scale="none", **kw)


@mutant("cautious", CAUTIOUS[0], CAUTIOUS[1], test_cautious.test_one_entry_is_kept_whole_or_dropped)
def cautious_with_the_old_scale(right: Wrong) -> Wrong:
    return lambda u, *, scale, **kw: right(u, scale="sum_plus_one", **kw)


@mutant(
    "grams",
    test_cautious.test_grams_is_pytorch_optimizers,
    lambda: test_cautious.test_the_gradient_that_decides_is_the_raw_one("grams"),
)
def grams_that_keeps_the_signs_of_the_update(right: Wrong) -> Wrong:
    return lambda u, *, grad: right(u, grad=u)


@mutant(
    "centralize",
    lambda: test_centralize.test_it_is_pytorch_optimizers((3, 4)),
    lambda: test_centralize.test_every_unit_gets_the_mean_zero_and_keeps_its_differences((3, 4)),
)
def centralize_over_the_output_axis(right: Wrong) -> Wrong:
    return lambda u: u - u.mean(0, keepdim=True)


@mutant(
    "clip_by_norm",
    lambda: test_clip.test_a_clip_bounds_what_is_larger_and_leaves_what_is_smaller(
        "clip_by_norm", (3, 4)
    ),
)
def a_clip_that_normalizes(right: Wrong) -> Wrong:
    return lambda u, max_norm: u * (max_norm / u.norm())


@mutant(
    "clip_by_global_norm",
    lambda: test_clip.test_the_global_clip_is_torchs(0.5, True),
    lambda: test_clip.test_the_global_clip_is_torchs(0.5, False),
    test_clip.test_the_global_clip_has_one_factor_for_all_groups,
)
def a_global_clip_for_each_tensor_alone(right: Wrong) -> Wrong:
    return lambda u, *, total, **kw: right(u, total=u.square().sum(), **kw)


@mutant(
    "adaptive_gradient_clip",
    test_clip.test_the_golden_values_of_agc,
    lambda: test_clip.test_agc_is_pytorch_optimizers((3, 4), 0.01),
)
def agc_of_the_whole_tensor(right: Wrong) -> Wrong:
    return lambda u, *, unit_wise, **kw: right(u, unit_wise=False, **kw)


@mutant(
    "mu_law",
    test_laws.test_the_golden_values,
    lambda: test_laws.test_each_law_is_odd_and_grows_and_keeps_the_sign("mu_law", (5,)),
)
def a_law_that_loses_the_sign(right: Wrong) -> Wrong:
    return lambda u, mu: right(u.abs(), mu=mu)


@mutant(
    "stable_adamw",
    test_stable.test_the_golden_values,
    lambda: test_stable.test_it_is_pytorch_optimizers_decay_included((0.9, 0.99), 1e-8, 0.3),
    test_stable.test_the_learning_rate_of_everything_behind_drops_by_the_surprise,
)
def stable_adamw_that_keeps_the_learning_rate(right: Wrong) -> Wrong:
    return lambda *args, lr, **kw: (*right(*args, lr=lr, **kw)[:3], lr)


@mutant(
    "clip_update_rms",
    lambda: test_stable.test_clip_update_rms_divides_by_what_is_above_the_threshold((3, 4), 0.3),
    lambda: test_factored.test_it_is_torch_adafactor_with_a_fixed_step_size(1.0),
)
def an_update_clip_by_the_root_of_the_rms(right: Wrong) -> Wrong:
    def wrong(u: Any, threshold: Any, **kw: Any) -> Any:
        size = u.square().mean().sqrt() / threshold
        return u / size.clamp(min=1).sqrt()

    return wrong


@mutant(
    "factored_rms",
    lambda: test_factored.test_the_golden_denominators_of_one_step_without_bias_correction(
        (40, 36),
        "(0.07171645361, 0.2076342384, 2.589336584, 1883.760864, 3243.043641)",
    ),
    lambda: test_factored.test_it_is_torch_adafactor_with_a_fixed_step_size(1.0),
    lambda: test_factored.test_the_denominator_is_an_outer_product_of_weighted_means((40, 36)),
    test_factored.test_a_second_moment_of_rank_one_is_kept_exactly,
)
def a_factored_moment_without_its_rows(right: Wrong) -> Wrong:
    def wrong(u: Any, row: Any, col: Any, full: Any, *rest: Any, **kw: Any) -> tuple:
        update, *new = right(u, row, col, full, *rest, **kw)
        if full is None:
            update = u / (new[1].sqrt() + kw["eps"])
        return update, *new

    return wrong


@mutant(
    "focus",
    test_focus.test_the_golden_values,
    lambda: test_focus.test_it_is_pytorch_optimizers((0.9, 0.5), 0.1),
    lambda: test_focus.test_the_step_is_two_signs_of_explicit_sums(0.2),
    test_focus.test_the_first_step_is_the_sign_of_the_gradient_for_any_beta2,
)
def focus_that_flees_the_mean(right: Wrong) -> Wrong:
    return lambda *args, step, **kw: right(*args, step=step + 1, **kw)


@mutant(
    "orthograd",
    test_orthograd.test_the_golden_values,
    test_orthograd.test_it_is_pytorch_optimizers_around_sgd,
)
def orthograd_that_measures_the_gradient_too_late(right: Wrong) -> Wrong:
    def wrong(u: Any, *, param: Any, **kw: Any) -> Any:
        return u - (param * u).sum() / (param * param).sum() * param

    return wrong


@mutant("orthograd", test_orthograd.test_what_is_parallel_to_the_weights_gives_zero_not_noise)
def orthograd_that_blows_up_noise(right: Wrong) -> Wrong:
    def wrong(u: Any, *, param: Any, **kw: Any) -> Any:
        rest = u - (param * u).sum() / ((param * param).sum() + 1e-30) * param
        return rest * u.norm() / (rest.norm() + 1e-30)

    return wrong


@mutant(
    "parameter_ema",
    test_parameter_ema.test_the_golden_values,
    test_parameter_ema.test_the_first_mean_is_the_parameter_and_not_a_thousandth_of_it,
)
def a_parameter_mean_with_its_weight_inverted(right: Wrong) -> Wrong:
    def wrong(u: Any, mean: Any, *, param: Any, beta: Any, step: Any, **others: Any) -> tuple:
        weight = 1 - (1 - beta) / (1 - beta**step)
        return u, mean + weight * (param - mean)

    return wrong


SCHEDULE_FREE = (
    test_schedule_free.test_the_golden_values_of_sgd,
    lambda: test_schedule_free.test_sgd_is_the_packages(0.9, 0.0),
    test_schedule_free.test_falling_rates_are_weighed_by_the_largest_so_far,
    test_schedule_free.test_both_identities_of_the_average_hold,
)


@mutant("schedule_free", *SCHEDULE_FREE)
def an_average_that_never_moves(right: Wrong) -> Wrong:
    def wrong(u: Any, z: Any, total: Any, *numbers: Any, **kw: Any) -> tuple:
        param, new_z, *_ = right(u, z, total + 1e30, *numbers, **kw)
        return param, new_z, *right(u, z, total, *numbers, **kw)[2:]

    return wrong


@mutant("schedule_free", *SCHEDULE_FREE[2:])
def an_average_weighed_by_the_present_rate(right: Wrong) -> Wrong:
    return lambda u, z, total, lr_max, last, **kw: right(u, z, total, 0 * lr_max, last, **kw)


@mutant("schedule_free", *SCHEDULE_FREE[:3])
def a_base_point_that_takes_the_new_z(right: Wrong) -> Wrong:
    def wrong(u: Any, z: Any, *numbers: Any, lr: Any, **kw: Any) -> tuple:
        param, *_ = right(u, z - lr * u, *numbers, lr=lr, **kw)
        return param, *right(u, z, *numbers, lr=lr, **kw)[1:]

    return wrong


@mutant(
    "schedule_free",
    lambda: test_schedule_free.test_caution_is_about_the_whole_change_of_y_and_never_about_z(
        "cautious"
    ),
)
def a_caution_that_is_not_heard(right: Wrong) -> Wrong:
    return lambda *args, caution, **kw: right(*args, caution="none", **kw)


@mutant("schedule_free", test_schedule_free.test_an_average_is_never_longer_than_the_last_point)
def a_share_above_one(right: Wrong) -> Wrong:
    # (1 - c_t) x + c_t z with c_t = c (1 - beta) / t, whatever that is
    def wrong(
        u: Any, z: Any, *args: Any, step: Any, param: Any, beta: Any, c: Any, **kw: Any
    ) -> Any:
        _, new, *rest = right(u, z, *args, step=step, param=param, beta=beta, c=c, **kw)
        share = c * (1 - beta) / step
        return param - share * (param - z) + (1 - beta * (1 - share)) * (new - z), new, *rest

    return wrong


@mutant(
    "accumulate",
    lambda: test_accumulate.test_it_is_the_inner_chain_on_mean_gradients("mean", 3),
    lambda: test_accumulate.test_it_is_the_inner_chain_on_mean_gradients("palm", 2),
)
def steps_behind_that_count_every_gradient(right: Wrong) -> Wrong:
    return lambda *args, step, **kw: (*right(*args, step=step, **kw)[:4], step)


@mutant(
    "accumulate",
    lambda: test_accumulate.test_it_is_the_inner_chain_on_mean_gradients("cautious", 3),
    test_accumulate.test_cautious_compares_with_the_mean_and_not_with_the_last_gradient,
)
def a_mask_by_the_last_gradient(right: Wrong) -> Wrong:
    def wrong(u: Any, *args: Any, **kw: Any) -> tuple:
        update, state, _, gate, step = right(u, *args, **kw)
        return update, state, u, gate, step

    return wrong


@mutant(
    "accumulate",
    lambda: test_accumulate.test_it_is_the_inner_chain_on_mean_gradients("mean", 2),
    test_accumulate.test_between_two_steps_only_the_mean_and_the_count_change,
)
def accumulation_of_a_sum(right: Wrong) -> Wrong:
    def wrong(u: Any, acc: Any, *, step: Any, k: int) -> tuple:
        _, _, _, gate, inner = right(u, acc, step=step, k=k)
        total = acc + u
        return total, torch.where(gate, 0.0, total), total, gate, inner

    return wrong


@mutant(
    "skip_not_finite",
    lambda: test_skip.test_training_goes_on_as_if_the_bad_step_had_not_been("adam", None),
    lambda: test_skip.test_a_bad_step_changes_no_state_but_the_two_counters("momentum"),
)
def a_skip_that_lets_all_through(right: Wrong) -> Wrong:
    return lambda *args, total, **kw: right(*args, total=0 * total, **kw)


@mutant(
    "skip_not_finite",
    lambda: test_skip.test_training_goes_on_as_if_the_bad_step_had_not_been("adam", None),
)
def a_skipped_step_that_counts_for_the_bias(right: Wrong) -> Wrong:
    return lambda *args, step, **kw: (*right(*args, step=step, **kw)[:3], step)


@mutant(
    "maximize",
    lambda: test_apply.test_maximize_is_the_chain_on_negative_gradients(
        lambda: (C.exp_avg, C.cautious)
    ),
)
def maximizing_without_telling_those_behind(right: Wrong) -> Wrong:
    return lambda u, *, grad: (-u, grad)


@mutant(
    "orthogonalize", test_muon.test_the_golden_values_of_orthogonalize, test_muon.test_the_scales
)
def a_transposed_shape_for_the_scale(right: Wrong) -> Wrong:
    return lambda u, *, scale, **kw: right(u, scale="spectral", **kw)


@mutant(
    "orthogonalize",
    test_muon.test_the_gram_form_has_as_many_digits_in_float32_as_products_with_the_matrix,
)
def a_gram_form_that_never_begins_anew(right: Wrong) -> Wrong:
    return lambda u, *, restart, **kw: right(u, restart=(), **kw)


@mutant(
    "orthogonalize",
    lambda: test_muon.test_kernels_are_matrices_of_their_first_axis_and_the_rest((6, 3, 2, 2)),
)
def kernels_as_stacks_of_matrices(right: Wrong) -> Wrong:
    return lambda u, *, stacked, **kw: right(u, stacked=True, **kw)


@mutant(
    "muon",
    test_muon.test_the_golden_values_of_muon,
    lambda: test_muon.test_it_is_torchs_muon_but_for_bfloat16(True, "match_rms_adamw"),
)
def one_step_too_few(right: Wrong) -> Wrong:
    return lambda u, *, steps, **kw: right(u, steps=steps - 1, **kw)


@mutant("muon_momentum", lambda: test_muon.test_the_momentum_is_an_explicit_sum(True))
def momentum_that_is_debiased(right: Wrong) -> Wrong:
    return lambda u, b, *, momentum, nesterov: (
        right(u, b, momentum=momentum, nesterov=False)[0],
        b,
    )


@mutant("scale_lr", test_scale_lr.test_the_factor_is_live_and_follows_the_groups_lr)
def an_lr_that_stays(right: Wrong) -> Wrong:
    return lambda u, *, lr, factor: (u, lr)


@mutant(
    "scale_by_normuon",
    test_muon.test_the_golden_values_of_normuon,
    test_muon.test_normuon_is_its_definition_written_out,
)
def row_squares_that_are_not_kept(right: Wrong) -> Wrong:
    return lambda u, state, **kw: (right(u, state, **kw)[0], 2 * state)


@mutant(
    "scale_by_normuon",
    lambda: test_muon.test_a_grafted_normuon_has_the_size_of_the_momentum((6, 4), False),
    lambda: test_muon.test_a_grafted_normuon_has_the_size_of_the_momentum((3, 5, 4), True),
)
def a_graft_of_the_size_of_the_orthogonal_factor(right: Wrong) -> Wrong:
    return lambda u, *args, scale, **kw: right(u, *args, scale="none", **kw)


@mutant(
    "psgd_kron",
    lambda: test_psgd.test_factors_are_balanced_at_one_fit_in_a_hundred((5, 4), True, 0.005),
)
def factors_that_are_never_balanced(right: Wrong) -> Wrong:
    return lambda *a, chance, **kw: right(*a, chance=lambda salt=0: 1.0 if salt else chance(), **kw)


@mutant(
    "psgd_kron",
    lambda: test_psgd.test_factors_are_balanced_at_one_fit_in_a_hundred((5, 4), True, 0.5),
)
def factors_that_are_always_balanced(right: Wrong) -> Wrong:
    return lambda *a, chance, **kw: right(*a, chance=lambda salt=0: 0.0, **kw)


def large_squares(element: str) -> Callable[[], None]:
    return lambda: test_clip.test_a_sum_of_squares_does_not_overflow(
        getattr(C, element), 1.0, False
    )


@mutant("clip_by_norm", large_squares("clip_by_norm"))
def squares_summed_in_float32(right: Wrong) -> Wrong:
    return lambda u, *, max_norm: u * (max_norm / u.square().sum().sqrt()).clamp(max=1)


def update_is_p_times_what_came_in() -> None:
    test_psgd.test_update_is_p_times_what_came_in(True, False)


@mutant("psgd_kron", update_is_p_times_what_came_in)
def factors_that_are_used_a_step_late(right: Wrong) -> Wrong:
    return lambda *a, delayed, **kw: right(*a, delayed=True, **kw)


@mutant("psgd_kron", update_is_p_times_what_came_in)
def noise_in_the_update(right: Wrong) -> Wrong:
    return lambda u, *a, noise, **kw: right(u + 1e-6 * noise(u.shape), *a, noise=noise, **kw)


@mutant("psgd_kron", lambda: test_psgd.test_every_parameter_is_fitted_at_the_same_steps(True))
def a_draw_for_every_parameter(right: Wrong) -> Wrong:
    def wrong(u: Any, *a: Any, chance: Any, **kw: Any) -> tuple:
        return right(u, *a, chance=lambda salt=0: (chance(salt) + u.numel() / 7) % 1, **kw)

    return wrong


@mutant("psgd_lra", test_psgd_others.test_low_rank_update_is_p_times_what_came_in)
def a_product_with_the_diagonal_alone(right: Wrong) -> Wrong:
    return lambda u, left, *a, **kw: (right(u, 0 * left, *a, **kw)[0], left, *a)


@mutant(
    "psgd_pro",
    lambda: test_psgd_others.test_updates_become_white(
        C.psgd_pro(precond_lr=0.1, preconditioner_update_probability=1.0)
    ),
)
def square_factors_that_are_never_fitted(right: Wrong) -> Wrong:
    return lambda u, factors, loads, **kw: (right(u, factors, loads, **kw)[0], factors, loads)


@mutant(
    "shampoo", lambda: test_psgd_others.test_shampoo_is_the_roots_of_sums_of_gradients(1.0, (4, 3))
)
def sums_that_are_not_kept(right: Wrong) -> Wrong:
    return lambda u, grams, roots, **kw: (right(u, grams, roots, **kw)[0], grams, roots)


def soap_tests() -> tuple[Callable[[], object], ...]:
    shape, options, working, rotated = test_soap.CASES[0]
    return (
        lambda: test_soap.test_golden_values(1),
        lambda: test_soap.test_the_dense_formulation(shape, options, working, rotated, "qr"),
    )


@mutant("from_eigenbasis", *soap_tests())
def the_way_there_in_place_of_the_way_back(right: Wrong) -> Wrong:
    def wrong(u: Any, *, bases: Any, working: Any, **kw: Any) -> Any:
        return basis_module.each_block(working, u, rotate, bases)

    return wrong


@mutant("to_eigenbasis", *soap_tests())
def steps_that_count_the_first_gradient(right: Wrong) -> Wrong:
    def wrong(*states: Any, count: int, **kw: Any) -> tuple:
        update, gram, basis, gate, step, *handed = right(*states, count=count, **kw)
        return update, gram, basis, gate, step + 1, *handed

    return wrong


@mutant("to_eigenbasis", *soap_tests(), test_soap.test_the_first_gradient_only_sets_up_the_basis)
def a_first_gradient_that_is_used(right: Wrong) -> Wrong:
    def wrong(*states: Any, count: int, **kw: Any) -> tuple:
        return right(*right(*states, count=1, **kw)[:3] if count == 1 else states, count=2, **kw)

    return wrong


@mutant("to_eigenbasis", test_soap.test_the_first_gradient_only_sets_up_the_basis)
def a_preconditioner_with_another_memory(right: Wrong) -> Wrong:
    return lambda *a, shampoo_beta, **kw: right(*a, shampoo_beta=0.5, **kw)


# What a refresh does to the moments is not in the function, and is replaced where it stands.
IN_REFRESHES: dict[str, tuple[Any, str, Any]] = {
    "a first moment left in the old basis": (basis_module, "carry", lambda x, old, new: x),
    "a second moment left in the old order": (basis_module, "reorder", lambda x, orders: x),
    "bases that are never refreshed": (
        soap_module,
        "refresh_pieces",
        lambda gram, basis, *how: (basis, tuple(None for _ in basis)),
    ),
    "refreshes a step late": (
        soap_module,
        "_schedule",
        lambda *a: soap_module.as_schedule(3, None),
    ),
}


@pytest.mark.parametrize("mistake", IN_REFRESHES)
def test_a_mistake_in_a_refresh_is_noticed(monkeypatch: pytest.MonkeyPatch, mistake: str) -> None:
    module, name, wrong = IN_REFRESHES[mistake]
    # the order of the columns changes only where the spectrum does
    test = soap_tests()[1 if name == "reorder" else 0]
    test()
    monkeypatch.setattr(module, name, wrong)
    with pytest.raises(AssertionError):
        test()


def plus(**options: Any) -> Callable[[], None]:
    """One comparison with prodigy-plus-schedule-free."""
    return lambda: test_prodigy.test_it_is_prodigy_plus_schedule_free_step_by_step(options, 1)


@mutant("clip_by_last_norm", test_clip_last_norm.test_steps_that_are_accumulated_count_once)
def a_clip_that_knows_its_own_tensor_alone(right: Wrong) -> Wrong:
    return lambda u, *, last_norm, **kw: right(u, last_norm=last_norm * 0, **kw)


@mutant(
    "prodigy_d",
    lambda: test_prodigy.test_the_golden_values_of_the_authors_form(1),
    lambda: test_prodigy.test_it_is_prodigyopt_step_by_step({"slice_p": 11}),
)
def sums_of_prodigy_that_stay_zero(right: Wrong) -> Wrong:
    return lambda u, p0, s, *rest, **kw: _with(right(u, p0, s, *rest, **kw), 2, s)


@mutant(
    "prodigy_plus_d",
    lambda: test_prodigy.test_the_golden_values_of_the_plus_form("stableadamw"),
    plus(),
    test_prodigy.test_d_moves_with_float32_weights_and_by_how_much_it_should,
)
def sums_of_the_plus_form_that_stay_zero(right: Wrong) -> Wrong:
    return lambda u, p0, s, *rest, **kw: _with(right(u, p0, s, *rest, **kw), 2, s)


@mutant(
    "prodigy_progress_d",
    lambda: test_prodigy_progress.test_it_is_its_recurrence(3, 1.0),
    lambda: test_prodigy_progress.test_it_is_the_original_without_schedule_free(
        *test_prodigy_progress.GOLDEN[0]
    ),
)
def progress_without_a_memory(right: Wrong) -> Wrong:
    return lambda u, p0, along, *rest, **kw: _with(right(u, p0, along, *rest, **kw), 2, along)


def _with(result: tuple, place: int, value: Any) -> tuple:
    return *result[:place], value, *result[place + 1 :]


@mutant("delayed_rms", plus(use_adopt=True), plus(use_adopt=True, factored=False))
def an_adopt_that_steps_at_once(right: Wrong) -> Wrong:
    return lambda *args, **kw: _with(result := right(*args, **kw), 4, result[4] | True)


@mutant("scale_by_tensor_rms", test_prodigy.test_muon_pp_is_its_equations_in_float64)
def a_size_of_the_tensor_that_is_forgotten(right: Wrong) -> Wrong:
    return lambda u, square, **kw: right(u, 0 * square, **kw)


@mutant(
    "adaptive_orthogonalize",
    lambda: test_muon_pp.test_a_small_matrix_gives_a_small_result(False),
    test_prodigy.test_muon_pp_is_its_equations_in_float64,
)
def signs_in_place_of_an_orthogonal_factor(right: Wrong) -> Wrong:
    return lambda u, **kw: right(u, **kw | {"steps": kw["steps"] - 1}).sign()


@mutant(
    "regularized",
    lambda: test_prodigy.test_it_is_prodigyopt_step_by_step(
        {"weight_decay": 0.1, "decouple": False}
    ),
)
def an_estimate_that_does_not_see_the_decay(right: Wrong) -> Wrong:
    return lambda u, *, grad, **kw: (right(u, grad=grad, **kw)[0], grad)


@mutant(
    "in_new_unit", lambda: test_prodigy.test_it_is_prodigyopt_step_by_step({"betas": (0.0, 0.99)})
)
def a_direction_in_the_old_unit(right: Wrong) -> Wrong:
    return lambda u, **kw: u


@mutant("separate_decay", plus(weight_decay=0.1), plus(weight_decay=0.01, weight_decay_by_lr=False))
def a_separate_decay_that_grows_the_weights(right: Wrong) -> Wrong:
    return lambda u, **kw: (u, -right(u, **kw)[1])


@mutant(
    "cautious_decay",
    lambda: test_decay.test_cautious_decay_takes_the_entries_that_do_not_move(False),
)
def a_cautious_decay_of_what_moves_alone(right: Wrong) -> Wrong:
    return lambda u, *, param, **kw: torch.where(u * param == 0, u, right(u, param=param, **kw))


DECAYS = {
    "decoupled": lambda: test_decay.test_with_gradients_each_step_is_decay_and_descent("decoupled"),
    "independent": lambda: test_decay.test_without_a_gradient_the_weights_shrink_by_a_product(
        "independent"
    ),
    "adamc": lambda: test_decay.test_without_a_gradient_the_weights_shrink_by_a_product("adamc"),
    "palm_decay": lambda: test_decay.test_without_a_gradient_the_weights_shrink_by_a_product(
        "palm_decay"
    ),
    "l1_decay": test_decay.test_l1_takes_the_same_off_every_weight,
    "cautious_decay": test_decay.test_cautious_decay_touches_only_what_also_moves_towards_zero,
    "decay_to_ema": test_decay.test_decay_to_the_mean_of_the_weights,
    "coupled": test_decay.test_coupled_decay_is_part_of_the_gradient,
}


def a_hundredth_more(right: Wrong) -> Wrong:
    """What gives a hundredth too much: the update, and the first of what else it returns."""

    def wrong(*args: Any, **kw: Any) -> Any:
        result = right(*args, **kw)
        return tuple(map(_more, result)) if isinstance(result, tuple) else _more(result)

    return wrong


def _more(result: Any) -> Any:
    if not isinstance(result, torch.Tensor) or result.dtype == torch.bool:
        return result
    return 1.01 * result


for _case, _about, _test in test_more_transforms.shown():
    for _name in _about:
        MUTANTS[f"{_name} in {_case}"] = _name, a_hundredth_more, (_test,)


def install(monkeypatch: pytest.MonkeyPatch, name: str, wrong: Wrong) -> None:
    # the runner gives a function what its signature asks for
    wrong.__signature__ = inspect.signature(getattr(C, name).update)  # type: ignore[attr-defined]
    changed = dataclasses.replace(getattr(C, name), update=wrong)
    monkeypatch.setattr(C, name, changed)
    monkeypatch.setitem(C.TRANSFORMS, name, changed)
    for module in (chain_module, soap_module, lather_module):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, changed)


def notice(monkeypatch: pytest.MonkeyPatch, name: str, wrong: Wrong, test: Callable) -> None:
    """The test passes, and fails with the mutant in the library."""
    test()
    install(monkeypatch, name, wrong)
    with pytest.raises(AssertionError):
        test()


CASES = [(which, i) for which, (_, _, tests) in MUTANTS.items() for i in range(len(tests))]


@pytest.mark.parametrize(("which", "number"), CASES, ids=lambda x: str(x))
def test_the_mistake_is_noticed(monkeypatch: pytest.MonkeyPatch, which: str, number: int) -> None:
    name, make, tests = MUTANTS[which]
    notice(monkeypatch, name, make(getattr(C, name).update), tests[number])


@pytest.mark.parametrize("name", DECAYS)
def test_a_decay_with_its_sign_turned_is_noticed(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    right = getattr(C, name).update

    def grows(update: torch.Tensor, *args: Any, **kw: Any) -> Any:
        result = right(update, *args, **kw)
        if isinstance(result, tuple):
            return 2 * update - result[0], *result[1:]
        return 2 * update - result

    notice(monkeypatch, name, grows, DECAYS[name])


def test_a_write_in_the_wrong_direction_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = C.descend.update
    notice(
        monkeypatch,
        "descend",
        lambda u, **kw: right(-u, **kw),
        test_descend.test_the_lr_is_the_slope_and_warms_up_from_the_first_step,
    )


def test_a_graft_without_the_size_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def test() -> None:
        test_combine.test_graft_has_the_direction_of_one_and_the_size_of_the_other((3, 4))

    test()
    wrong = dataclasses.replace(
        C.graft(C.sign, C.sign).merge, update=lambda updates, **_: updates[0]
    )
    right = C.graft
    monkeypatch.setattr(
        C, "graft", lambda *chains, **kw: dataclasses.replace(right(*chains, **kw), merge=wrong)
    )
    with pytest.raises(AssertionError):
        test()


def test_every_transform_with_mathematics_has_a_mutant() -> None:
    mutated = {name for name, _, _ in MUTANTS.values()} | set(DECAYS) | {"descend"}
    # compared with the formula entry by entry like mu_law and clip_by_norm, in the same tests
    same = {"a_law", "trust_region", "softsign", "clip_by_rms", "l2_normalize", "rms_normalize"}
    assert mutated | same | {"apply", "flight_recorder"} == set(C.TRANSFORMS)
