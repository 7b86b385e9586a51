"""Merging and cutting of axes, and their inverse."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from heavyball.linalg.view import (
    WorkingShape,
    merged_from_left,
    merged_from_right,
    merged_to_two,
    working_shape,
)


def test_merging_from_the_right_never_touches_the_first_axis() -> None:
    assert merged_from_right((128, 64, 3, 3), 2048) == (128, 576)
    assert merged_from_right((128, 512, 3, 3), 2048) == (128, 512, 9)
    assert merged_from_right((4, 3), 2048) == (4, 3)
    assert merged_from_right((2, 3, 4, 5, 6), 100) == (2, 12, 30)
    assert merged_from_right((2, 3, 4, 5, 6), 10_000) == (2, 360)
    assert merged_from_right((7,), 2048) == (7,)
    assert merged_from_right((), 2048) == ()
    assert merged_from_right((1, 9), 2048) == (1, 9)
    assert merged_from_right((5000, 1, 3000), 2048) == (5000, 3000)


def test_merging_from_the_left_is_greedy() -> None:
    assert merged_from_left((64, 3, 3, 3), 200) == (192, 9)
    assert merged_from_left((128, 64, 3, 3), 2048) == (128, 576)
    assert merged_from_left((4, 3), 2048) == (12,)
    assert merged_from_left((5000, 2, 3), 2048) == (5000, 6)
    assert merged_from_left((2, 2, 2), 4) == (4, 2)


def test_merging_to_two_takes_the_smaller_difference_in_size() -> None:
    # signed differences would pick (6144, 3), whose is negative
    assert merged_to_two((64, 32, 3, 3)) == (64, 288)
    assert merged_to_two((3, 3, 32, 64)) == (288, 64)
    assert merged_to_two((2, 3, 4)) == (6, 4)
    assert merged_to_two((9, 2, 2)) == (9, 4)
    assert merged_to_two((4, 3)) == (4, 3)
    assert merged_to_two((5,)) == (5,)


def test_cut_axes_give_blocks_of_at_most_the_limit() -> None:
    shape = working_shape((5, 7), "none", 3, True)
    assert shape.pieces == ((3, 2), (3, 3, 1))
    assert shape.blocks == ((3, 3), (3, 3), (3, 1), (2, 3), (2, 3), (2, 1))
    assert shape.is_cut
    x = torch.arange(35.0).reshape(5, 7)
    blocks = shape.blocks_of(x)
    assert torch.equal(blocks[2], x[:3, 6:])
    assert torch.equal(blocks[3], x[3:, :3])
    memory = x.untyped_storage().data_ptr()
    assert all(b.untyped_storage().data_ptr() == memory for b in blocks)


SHAPES = [
    (),
    (1,),
    (6,),
    (4, 5),
    (1, 9),
    (9, 1),
    (4, 3, 5),
    (4, 3, 2, 5),
    (4, 3, 2, 2, 3),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("merging", ["none", "right", "left", "two"])
@pytest.mark.parametrize("limit", [1, 2, 4, 6, 100])
@pytest.mark.parametrize("split", [False, True])
def test_blocks_are_put_together_again(shape: tuple, merging: str, limit: int, split: bool) -> None:
    working = working_shape(shape, merging, limit, split)  # type: ignore[arg-type]
    assert math.prod(working.merged) == math.prod(shape)
    if split:
        assert all(size <= max(limit, 1) for block in working.blocks for size in block)
    elif merging in ("right", "left"):
        assert all(size <= limit or size in shape for size in working.merged)
    for batch in ((), (3,)):
        x = torch.arange(math.prod(batch + shape)).reshape(batch + shape)
        blocks = working.blocks_of(x)
        assert [tuple(b.shape) for b in blocks] == [batch + b for b in working.blocks]
        assert sorted(torch.cat([b.reshape(-1) for b in blocks]).tolist()) == list(range(x.numel()))
        assert torch.equal(working.whole_of(blocks), x)


def test_a_contiguous_tensor_is_viewed_and_others_are_copied_only_where_they_must_be() -> None:
    kernel = torch.randn(8, 4, 3, 3)
    (view,) = working_shape((8, 4, 3, 3), "right").blocks_of(kernel)
    assert view.shape == (8, 36)
    assert view.data_ptr() == kernel.data_ptr()
    last = kernel.to(memory_format=torch.channels_last)
    (copied,) = working_shape((8, 4, 3, 3), "right").blocks_of(last)
    assert torch.equal(copied, view)
    (kept,) = working_shape((8, 4, 3, 3), "none").blocks_of(last)
    assert kept.data_ptr() == last.data_ptr()
    transposed = torch.randn(5, 4).t()
    (kept,) = working_shape((4, 5), "right").blocks_of(transposed)
    assert kept.data_ptr() == transposed.data_ptr()


@given(st.lists(st.integers(1, 12), max_size=5), st.integers(1, 200))
def test_merging_keeps_the_order_of_the_elements(shape: list[int], limit: int) -> None:
    for merged in (merged_from_left(shape, limit), merged_from_right(shape, limit)):
        edges, own = {1}, {1}
        product = 1
        for size in merged:
            product *= size
            edges.add(product)
        product = 1
        for size in shape:
            product *= size
            own.add(product)
        assert edges <= own
        assert product in edges


def test_a_tensor_of_another_shape_is_refused() -> None:
    shape = working_shape((4, 6), "none", 3, True)
    with pytest.raises(ValueError, match=r"a tensor of shape \(6, 4\), expected \(4, 6\)"):
        shape.blocks_of(torch.zeros(6, 4))
    with pytest.raises(ValueError, match=r"1 blocks given, \(4, 6\) as \(4, 6\) in 4 block"):
        shape.whole_of([torch.zeros(3, 3)])
    blocks = shape.blocks_of(torch.zeros(4, 6))
    with pytest.raises(ValueError, match=r"a tensor of shape \(1, 3\), expected \(3, 3\)"):
        shape.whole_of(blocks[::-1])


def test_a_shape_is_worked_out_once() -> None:
    assert working_shape((4, 6), "right", 8) is working_shape((4, 6), "right", 8)
    assert isinstance(working_shape((4, 6), "right", 8), WorkingShape)
