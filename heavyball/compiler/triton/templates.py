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
    tl.store({target} + at, total.to({kind}).to(tl.float64), mask)"""
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
