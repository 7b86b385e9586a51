"""What an optimizer does, as numbers: `opt.metrics()` and `C.probe`.

`opt.metrics()` gives a dict of 0-d tensors on the device, which it does not wait for. Keys are
`group_<number>/<name>`; each number is over all parameters of the group, as of its last step:

lr              the group's learning rate
effective_lr    lr times d, where the chain estimates d
grad_norm       Euclidean norm of the raw gradients
update_norm     of the change of the parameters, decay included, before it is rounded to 16 bits
param_norm      of the parameters after the step
update_to_param update_norm / param_norm
skipped_steps   how many steps `skip_not_finite` has left out so far
d               Prodigy's estimate, as after the step, where there is one

`C.probe("name")` adds, of the update at its place in the chain, `group_<number>/<name>/<what>`:

rms             root mean square
norm            Euclidean norm
max             the largest absolute value
cosine          between the update and the gradient that the chain started from
zeros           how many entries are 0

They are asked for by `metrics=True` of `ChainOpt` and every preset, or by a first call of
`opt.metrics()`, after which the numbers of steps are there from the next one on (NaN before). They are
sums inside the kernels that run anyway, change no step, and are in no checkpoint.

To log them:

    for name, value in opt.metrics().items():
        writer.add_scalar(f"optimizer/{name}", value, step)     # tensorboard
    wandb.log({f"optimizer/{name}": value.item() for name, value in opt.metrics().items()})
"""

from heavyball.metrics.elements import before_step, behind_step
from heavyball.metrics.totals import NAMES, PROBED, totals

__all__ = ["NAMES", "PROBED", "before_step", "behind_step", "totals"]
