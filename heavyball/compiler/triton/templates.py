"""The code around the loops of a Triton kernel."""

PRELUDE = '''\
@triton.jit
def divide(x, y):
    """The quotient, correctly rounded: `/` of float32 is not."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def root(x):
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def remainder_of(x, y):
    """With the sign of y, and exact, as torch's."""
    rest = libdevice.fmod(x, y)
    return tl.where((rest != 0) & ((rest < 0) != (y < 0)), rest + y, rest)


@triton.jit
def pointer(cell, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    """The tensor whose address is in a cell of the table."""
    found = tl.load(cell).to(tl.pointer_type(KIND))
    if ALIGNED:
        found = tl.multiple_of(found, 16)
    return found


@triton.jit
def nearest_bf16(x):
    """bfloat16, to nearest; a finite value stays finite."""
    word = x.to(tl.uint32, bitcast=True)
    rounded = (word + 0x7FFF + ((word >> 16) & 1)) >> 16
    finite = (word & 0x7F800000) != 0x7F800000
    over = (rounded & 0x7FFF) >= 0x7F80
    rounded = tl.where(finite & over, rounded - 1, rounded)
    rounded = tl.where(x != x, tl.full([], 0x7FC0, tl.uint32), rounded)
    return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def finite_half(x):
    """float16, to nearest; a finite value stays finite."""
    size = tl.abs(x)
    over = (size > 65504.0) & (size <= 3.4028234663852886e38)
    most = tl.full([], 65504.0, tl.float32)
    return tl.where(over, tl.where(x < 0, 0.0 - most, most), x).to(tl.float16)


@triton.jit
def larger(x, y):
    return tl.where(x < y, y, x)


@triton.jit
def add_up(parts, count, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Sum what the chunks left behind, in an order that depends on their number alone."""
    lane = tl.arange(0, BLOCK)
    total = tl.full([BLOCK], 0.0, tl.float64)
    for start in range(0, count, BLOCK):
        here = lane < count - start
        total += tl.load(parts + (start + lane) * STRIDE, here, other=0.0, cache_modifier=".cg")
    return tl.sum(total, 0)


@triton.jit
def find_largest(parts, count, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    found = tl.full([BLOCK], float("-inf"), tl.float64)
    for start in range(0, count, BLOCK):
        here = lane < count - start
        low = float("-inf")
        part = tl.load(parts + (start + lane) * STRIDE, here, other=low, cache_modifier=".cg")
        found = larger(found, part)
    return tl.max(found, 0)
'''

# The word from which a tensor that is rounded stochastically takes its bits in a step.
KEYS = """\
@triton.jit
def step_key(stream, step):
    word = step.to(tl.int64).to(tl.uint32) * tl.full([], 0x9E3779B1, tl.uint32)
    return mix(stream.to(tl.uint32) + word)
"""

# A program steps whole blocks of codes: `mask` is None or says which of its lanes are elements.
CODES = '''\
@triton.jit
def kept_lanes(mask, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """Which of COUNT groups of SIZE lanes have an element."""
    if mask is None:
        return tl.arange(0, COUNT) >= 0
    else:
        return tl.max(tl.reshape(mask.to(tl.int32), [COUNT, SIZE]), 1) > 0


@triton.jit
def unchanged(old, new, mask, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """Of which blocks no value is another one."""
    other = (old != new).to(tl.int32)
    if mask is not None:
        other = tl.where(mask, other, 0)
    return tl.max(tl.reshape(other, [COUNT, SIZE]), 1) == 0


@triton.jit
def largest_of(reach, mask, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """The largest magnitude of each block, as bits: among these NaN and infinity are the largest."""
    word = (reach.to(tl.uint32, bitcast=True) & 0x7FFFFFFF).to(tl.int32)
    if mask is not None:
        word = tl.where(mask, word, 0)
    return tl.max(tl.reshape(word, [COUNT, SIZE]), 1).to(tl.float32, bitcast=True)


@triton.jit
def spread(x, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """The value of each block for all of its lanes."""
    return tl.reshape(tl.broadcast_to(x[:, None], [COUNT, SIZE]), [COUNT * SIZE])


@triton.jit
def nibble(byte, number):
    """A code of 4 bits: of two in a byte the first is in the high half."""
    word = byte.to(tl.int32)
    return tl.where(number % 2 == 0, word >> 4, word & 15).to(tl.uint8)


@triton.jit
def bytes_of(codes, COUNT: tl.constexpr):
    """Two codes in each of COUNT bytes."""
    pairs = tl.reshape(codes.to(tl.int32), [COUNT, 2])
    weights = tl.where(tl.arange(0, 2) == 0, 16, 1)
    return tl.sum(pairs * weights[None, :], 1).to(tl.uint8)


@triton.jit
def byte_place(number, side):
    """Where the bit of a value is; every row of `side` values begins with a new byte."""
    return number // side * ((side + 7) // 8) + number % side // 8


@triton.jit
def bits_of(truth, mask, COUNT: tl.constexpr):
    """Eight truth values in each of COUNT bytes, the first in the lowest bit."""
    bits = truth.to(tl.int32)
    if mask is not None:
        bits = tl.where(mask, bits, 0)
    eight = tl.reshape(bits, [COUNT, 8]) << tl.arange(0, 8)[None, :]
    return tl.sum(eight, 1).to(tl.uint8)
'''

# What programs share: a chunk is (row of the table, number within the tensor). A pass ends with the
# last program of each tensor: it alone knows all partial sums, and that every other program has read
# the numbers which it may now overwrite.
KERNEL = """\
@triton.jit
def pass_{k}(table, chunks, hyper, scratch, parts, arrived, ALIGNED: tl.constexpr):
    piece = tl.program_id(0).to(tl.int64)
    index = tl.load(chunks + 2 * piece)
    part = tl.load(chunks + 2 * piece + 1)
    row = table + index * {columns}
    size = tl.load(row)
    kept = scratch + index * {slots}
    group = hyper + tl.load(row + 1) * {width}
{numbers}
{pointers}
{totals}
    low = part * {chunk}
    high = tl.minimum(low + {chunk}, size)
    even = low + (high - low) // {block} * {block}
    lane = tl.arange(0, {block})
{slices}
    for start in range(low, even, {block}):
        {call}
    if even < high:
        {masked_call}
{leave}
    tl.debug_barrier()
    pieces = (size + {chunk} - 1) // {chunk}
    if tl.atomic_add(arrived + index, 1) == pieces - 1:
        tl.store(arrived + index, 0)
        first = parts + (piece - part) * {parts}
{finish}
"""

# ---- rows

HEAD = """\
    row = table + index * {columns}
    size = tl.load(row)
{sizes}
    cols = {lane}
    rows = size // cols
    groups = {groups}
    span = rows // groups
    kept = scratch + index * {slots}
    group = hyper + tl.load(row + 1) * {hypers}
    wide = (cols + {block} - 1) // {block}
    high = (span + {height} - 1) // {height}
    tall = groups * high
    lane = tl.arange(0, {block})
    memory = pointer(row + {memory}, tl.float64, False)
{arrays}
    row_parts = memory + {kept}
    lane_parts = row_parts + {row_sums} * wide * rows
    tile_parts = lane_parts + {lane_sums} * tall * cols
"""
BETWEEN = """\
@triton.jit
def between_{k}(table, chunks, hyper, scratch, parts, arrived, ALIGNED: tl.constexpr):
    index = tl.program_id(0).to(tl.int64)
{head}
{body}
"""
# Adds up what lies at several places, in their order, for every value of an array.
JOIN = """\
for b in range(0, {length}, {block}):
    at = b + lane
    mask = at < {length}
    total = tl.full([{block}], {start}, tl.float64)
    for j in range(0, {inner}):
        for w in range(0, {outer}):
            x = tl.load({source}, mask, other=0.0)
            total = {joined}
    tl.store({target} + at, (total{over}).to({kind}).to(tl.float64), mask)"""
TILE = """\
@triton.jit
def pass_{k}(table, chunks, hyper, scratch, parts, arrived, ALIGNED: tl.constexpr):
    piece = tl.program_id(0).to(tl.int64)
    index = tl.load(chunks + 2 * piece)
    part = tl.load(chunks + 2 * piece + 1)
{head}
{begin}
    tile = part // wide
    g = tile // high
    top = tile % high * {height}
    left = part % wide * {block}
    mask = lane < cols - left
{columns}
    for a in range(top, tl.minimum(top + {height}, span)):
        r = {row}
        start = {start}
{body}
{end}
"""
