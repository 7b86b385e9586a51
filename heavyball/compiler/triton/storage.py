"""Triton for tensors kept in fewer bits: the same as heavyball/state/packing.py, bit for bit."""

CORRECTED = '''\
@triton.jit
def half_step(kept):
    """Half the distance between neighbours, for float32 values that 16 bits hold."""
    word = kept.to(tl.float32).to(tl.uint32, bitcast=True) & 0x7F800000
    if kept.dtype == tl.bfloat16:
        word = tl.where(word < 0x00800000, tl.full([], 0x00800000, tl.uint32), word)
    else:
        word = tl.where(word < 0x38800000, tl.full([], 0x38800000, tl.uint32), word)
    word = tl.where(word > 0x7E800000, tl.full([], 0x7E800000, tl.uint32), word)
    return word.to(tl.float32, bitcast=True)


@triton.jit
def corrected(kept, rest):
    back = kept.to(tl.float32)
    unit = half_step(kept)
    if kept.dtype == tl.bfloat16:
        half = 0.00390625
    else:
        half = 0.00048828125
    if rest.dtype == tl.int8:
        part = rest.to(tl.float32) * tl.full([], 1 / 127, tl.float32) * half
        moved = back + part * unit
    else:
        wide = rest.to(tl.float64) * tl.full([], 1 / 32767, tl.float64) * half
        moved = (back.to(tl.float64) + wide * unit.to(tl.float64)).to(tl.float32)
    return tl.where(rest == 0, back, moved)


@triton.jit
def nearest_finite(x, KIND: tl.constexpr):
    if KIND == tl.float16:
        return finite_half(x)
    else:
        word = x.to(tl.uint32, bitcast=True)
        rounded = (word + 0x7FFF + ((word >> 16) & 1)) >> 16
        finite = (word & 0x7F800000) != 0x7F800000
        over = (rounded & 0x7FFF) >= 0x7F80
        rounded = tl.where(finite & over, rounded - 1, rounded)
        rounded = tl.where(x != x, tl.full([], 0x7FC0, tl.uint32), rounded)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def rest_of(x, kept, KIND: tl.constexpr):
    back = kept.to(tl.float32)
    unit = half_step(kept)
    if kept.dtype == tl.bfloat16:
        half = 0.00390625
    else:
        half = 0.00048828125
    if KIND == tl.int8:
        ratio = tl.div_rn(x - back, unit) * (1 / half)
        levels = 127.0
    else:
        ratio = (x.to(tl.float64) - back.to(tl.float64)) / unit.to(tl.float64) * (1 / half)
        levels = 32767.0
    size = tl.abs(ratio)
    count = tl.ceil(tl.where(size > 1.0, size * 0 + 1, size) * levels - 0.5)
    odd = (kept.to(tl.uint16, bitcast=True) & 1) != 0
    count = tl.where(odd & (count > levels - 1), count * 0 + (levels - 1), count)
    count = tl.where(ratio != ratio, size * 0, tl.where(ratio < 0, 0.0 - count, count))
    count = tl.where(count != count, tl.full([], 0.0, tl.float32), count)
    return count.to(KIND)
'''

ROOTS = '''\
@triton.jit
def squared(x):
    return x * x


@triton.jit
def root32(x):
    return tl.sqrt_rn(tl.where(x < 0, x * 0, x))


@triton.jit
def raised_root(x):
    """A positive value never becomes zero, since it is divided by."""
    value = root32(x)
    least = tl.full([], 5.9604644775390625e-8, tl.float32)
    return tl.where((value > 0) & (value < least), least, value)
'''
