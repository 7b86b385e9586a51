"""Steps of parameters whose programs need other processes: in waves, of which several are under way.

A wave goes through these phases. It starts: what lies before the owner's work is computed on the shards
and sent to the owners. In the middle the owners work and send back; where there are several copies of
the parts, what has come back to one is relayed to the others. It ends: what lies behind is computed on
the shards, and all is written. Every process goes through the same phases with the same sizes, whether
or not it has elements of a parameter, and also where it has failed.
"""

from collections.abc import Callable, Sequence

from heavyball.distributed.cut import CutWave
from heavyball.distributed.entire import EntireWave

Wave = CutWave | EntireWave


def in_flight(waves: Sequence[Wave], meanwhile: Callable[[], object]) -> None:
    """Run waves, each phase of one beside the next phase of the wave before it.

    In every turn one wave is sent to the owners before they work on the one sent in the turn before, and
    what they had sent back by then goes on its way to other copies beside that work.

    meanwhile: what else is to do, while the first exchange is under way.
    """
    for turn in range(len(waves) + 2):
        if turn < len(waves):
            waves[turn].start()
        if turn == 0:
            meanwhile()
        if 0 <= turn - 2 < len(waves):
            waves[turn - 2].relay()
        if 0 <= turn - 1 < len(waves):
            waves[turn - 1].middle()
        if 0 <= turn - 2 < len(waves):
            waves[turn - 2].end()
