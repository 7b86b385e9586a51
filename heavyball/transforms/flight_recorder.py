"""Asks for a file of the last steps where one goes wrong."""

from torch import Tensor

from heavyball.core.hyper import Interval
from heavyball.core.transform import transform


@transform(domains={"keep": Interval(1, 100)})
def flight_recorder(update: Tensor, *, dir: str = "", keep: int = 3) -> Tensor:
    """Write the last steps to a file when one is not finite or far too large; updates pass as they are.

    A step is written when the change of any parameter is not finite, or 100 times the median of its
    last 50 (of two or more). The file has the state, the gradients and what every element gave, of this
    step and those before it; `heavyball replay FILE` computes it again, element by element. Numbers
    that follow schedules are in it as they were, and so are a loss, what was fed and first gradients.

    dir: the folder for the files, made where it is missing; an empty one keeps and writes nothing.
    keep: how many steps a file has, and how many files an optimizer writes at most. Of steps in a row
        that go wrong, the first is written.

    It keeps copies of parameters, gradients and state of `keep` steps and waits for the device in each:
    it is for finding a fault. What the disk refuses is a warning and never ends a step. Not with
    `fuse_backward` nor for parameters in parts, where no process has all of this at once.

    Shapes: all (*).
    """
    return update
