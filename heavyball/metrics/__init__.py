"""Measurements of an optimizer: `opt.metrics()` and `C.probe`.

`opt.metrics()` returns a dict of 0-d tensors on the device, without synchronizing. Keys are
`group_<number>/<name>`; each number covers all parameters of the group, in its last step:

lr              the group's learning rate
effective_lr    lr times d, where the chain estimates d
grad_norm       Euclidean norm of the raw gradients
update_norm     of the change of the parameters, decay included, before it is rounded to 16 bits
param_norm      of the parameters after the step
update_to_param update_norm / param_norm
skipped_steps   the number of steps that `skip_not_finite` has skipped so far
d               Prodigy's estimate after the step, if there is one

`C.probe("name")` adds, for the update at its position in the chain, `group_<number>/<name>/<what>`:

rms             root mean square
norm            Euclidean norm
max             the largest absolute value
cosine          between the update and the gradient at the start of the chain
zeros           the number of entries that are 0

Measuring is turned on by `metrics=True` of `ChainOpt` and every preset, or by the first call of
`opt.metrics()`, which returns NaN until the next step. The measurements are sums inside the step's
kernels. They do not change steps and are not saved in checkpoints.

To log them:

    for name, value in opt.metrics().items():
        writer.add_scalar(f"optimizer/{name}", value, step)     # tensorboard
    wandb.log({f"optimizer/{name}": value.item() for name, value in opt.metrics().items()})
"""

from heavyball.metrics.elements import before_step, behind_step
from heavyball.metrics.totals import NAMES, PROBED, totals

__all__ = ["NAMES", "PROBED", "before_step", "behind_step", "totals"]
