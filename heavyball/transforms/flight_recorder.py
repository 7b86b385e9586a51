"""Asks for a file of the last steps where one goes wrong."""

from torch import Tensor

from heavyball.core.hyper import Interval
from heavyball.core.transform import transform


@transform(domains={"keep": Interval(1, 100)})
def flight_recorder(update: Tensor, *, dir: str = "", keep: int = 3) -> Tensor:
    """Write the last steps to a file when one is not finite or far too large; updates are unchanged.

    A file is written when the change of any parameter is not finite, or 100 times the median of its last
    50 changes (of at least two). It contains the state, the gradients and the output of every
    element, for this step and those before it; `heavyball replay FILE` recomputes it element by
    element. Scheduled numbers, the loss, fed signals and first gradients are included with their values.

    dir: the folder for the files, created if missing; "" disables the recorder.
    keep: the number of steps in a file, and the largest number of files per optimizer. If several
        consecutive steps fail, only the first is written.

    It copies parameters, gradients and state of `keep` steps and waits for the device in each step,
    so use it to find a fault. Disk errors are warnings and never stop a step. It cannot be used with
    `fuse_backward` or sharded parameters, where all of this does not exist at once in one process.

    Shapes: all (*).
    """
    return update
