"""Memory that temporary tensors of one step share."""

import threading

import torch

from heavyball.linalg.scratch import reused, scratch

LIKE = torch.zeros(1)


def test_a_place_is_the_same_memory_while_it_is_reused() -> None:
    with reused():
        one, other = scratch("here", LIKE, (3, 4), (5,))
        assert (one.shape, other.shape) == ((3, 4), (5,))
        assert other.data_ptr() == one.data_ptr() + 12 * 4
        assert scratch("here", LIKE, (7,))[0].data_ptr() == one.data_ptr()
        assert scratch("there", LIKE, (7,))[0].data_ptr() != one.data_ptr()
        assert scratch("here", LIKE.double(), (2,))[0].dtype == torch.float64
        with reused():
            assert scratch("here", LIKE, (2, 2))[0].data_ptr() == one.data_ptr()
        assert scratch("here", LIKE, (2, 2))[0].data_ptr() == one.data_ptr()
        assert scratch("here", LIKE, (9, 9))[0].shape == (9, 9)
    assert scratch("here", LIKE) == []


def test_tensors_are_their_own_otherwise() -> None:
    one, other = (scratch("here", LIKE, (3,))[0] for _ in range(2))
    assert one.data_ptr() != other.data_ptr()
    found = []
    with reused():
        mine = scratch("here", LIKE, (3,))[0]
        thread = threading.Thread(target=lambda: found.append(scratch("here", LIKE, (3,))[0]))
        thread.start()
        thread.join()
    assert found[0].data_ptr() != mine.data_ptr()
