"""C++ for blocks of codes, whose arithmetic `compiler/formats.py` prints."""

from collections.abc import Iterable

from heavyball.compiler.cpp.dialect import TYPES
from heavyball.compiler.formats import short
from heavyball.compiler.passes.loops import Column

# Elements that a tensor of codes is decoded to and encoded from at a time.
WIDE = 1024

# The functions of one type of codes under a common name.
CODE_OF = """\
static inline float value_of({type} code, float scale) {{ return value_of_{name}(code, scale); }}
static inline {type} code_of(const {type}*, float x, float scale) {{ return {name}_of(x, scale); }}
static inline {type} code_of(const {type}*, float x, float scale, uint32_t key, uint32_t index) {{
    return random_{name}_of(x, scale, key, index);
}}
"""
CODES = """\
template <class C>
static inline void decode_block(const C* codes, float scale, float* out, int64_t count) {
    #pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = value_of(codes[i], scale);
}
template <class C>
static inline void decode(const C* codes, const bf16* scales, float* out, int64_t count) {
    int64_t b = 0;
    for (; b + 32 <= count; b += 32) decode_block(codes + b, load(scales + b / 32), out + b, 32);
    if (b < count) decode_block(codes + b, load(scales + b / 32), out + b, count - b);
}
// first: the number of the first element, from which its random bits come
template <bool RANDOM, class C>
static inline void encode_block(C* codes, bf16* scales, const float* old, const float* in,
                                int64_t count, uint32_t key, int64_t first) {
    int changed = 0;
    uint32_t largest = 0;  // as bits, among which NaN and infinity are the largest
    #pragma omp simd reduction(+:changed) reduction(max:largest)
    for (int64_t i = 0; i < count; ++i) {
        changed += old[i] == in[i] ? 0 : 1;
        uint32_t word;
        std::memcpy(&word, in + i, 4);
        word &= 0x7fffffffu;
        largest = largest < word ? word : largest;
    }
    if (!changed) return;  // what did not change keeps its bits
    *scales = scale_of(float_of(largest));
    const float scale = load(scales);
    #pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
        codes[i] = RANDOM ? code_of(codes, in[i], scale, key, (uint32_t)(first + i))
                          : code_of(codes, in[i], scale);
    }
}
template <bool RANDOM, class C>
static inline void encode(C* codes, bf16* scales, const float* old, const float* in,
                          int64_t count, uint32_t key, int64_t first) {
    int64_t b = 0;
    for (; b + 32 <= count; b += 32)
        encode_block<RANDOM>(codes + b, scales + b / 32, old + b, in + b, 32, key, first + b);
    if (b < count)
        encode_block<RANDOM>(codes + b, scales + b / 32, old + b, in + b, count - b, key, first + b);
}
"""

# Of 4 bits; a tensor is whole blocks.
FOUR_BIT_CODES = """\
template <bool SIGNED>
static inline void decode_four_bit(const uint8_t* codes, const float* scales, float* out,
                                   int64_t count) {
    for (int64_t b = 0; b < count; b += 128, codes += 64, out += 128) {
        const float scale = scales[b / 128];
        #pragma omp simd
        for (int64_t i = 0; i < 64; ++i) {
            const uint8_t high = codes[i] >> 4, low = codes[i] & 15;
            out[2 * i] = SIGNED ? four_bit_moment(high, scale) : four_bit_square(high, scale);
            out[2 * i + 1] = SIGNED ? four_bit_moment(low, scale) : four_bit_square(low, scale);
        }
    }
}
template <bool SIGNED, bool RANDOM>
static inline uint8_t four_bits_of(float x, float scale, uint32_t key, uint32_t index) {
    if (SIGNED) return RANDOM ? random_four_bits_of_moment(x, scale, key, index)
                              : four_bits_of_moment(x, scale);
    return RANDOM ? random_four_bits_of_square(x, scale, key, index)
                  : four_bits_of_square(x, scale);
}
// first: the number of the first element, from which its random bits come
template <bool SIGNED, bool RANDOM>
static inline void encode_four_bit(uint8_t* codes, float* scales, const float* old, const float* in,
                                   int64_t count, uint32_t key, int64_t first) {
    for (int64_t b = 0; b < count; b += 128, codes += 64, old += 128, in += 128, ++scales) {
        int changed = 0;
        uint32_t largest = 0;  // as bits, among which NaN and infinity are the largest
        #pragma omp simd reduction(+:changed) reduction(max:largest)
        for (int64_t i = 0; i < 128; ++i) {
            changed += old[i] == in[i] ? 0 : 1;
            const uint32_t word = word_of(SIGNED ? reach_of_moment(in[i]) : reach_of_square(in[i]));
            largest = largest < word ? word : largest;
        }
        if (!changed) continue;  // what did not change keeps its bits
        const float scale = *scales = four_bit_scale_of(float_of(largest & 0x7fffffffu));
        uint8_t made[128];
        #pragma omp simd
        for (int64_t i = 0; i < 128; ++i)
            made[i] = four_bits_of<SIGNED, RANDOM>(in[i], scale, key, (uint32_t)(first + b + i));
        for (int64_t i = 0; i < 64; ++i)
            codes[i] = (uint8_t)(made[2 * i] << 4 | made[2 * i + 1]);
    }
}
"""

# A bit for each truth value. Every row of `side` values begins with a new byte; `count` values from
# number `at` on lie in one such row, and begin and end with a byte or the row.
BITS = """\
static inline void unpack_bits(uint8_t* __restrict out, const uint8_t* __restrict bits, int64_t at,
                               int64_t count, int64_t side) {
    bits += at / side * ((side + 7) / 8) + at % side / 8;
    const int64_t whole = count / 8 * 8;
    for (int64_t i = 0; i < whole; i += 8)
        for (int64_t k = 0; k < 8; ++k) out[i + k] = bits[i / 8] >> k & 1;
    for (int64_t i = whole; i < count; ++i) out[i] = bits[i / 8] >> (i & 7) & 1;
}
static inline void pack_bits(uint8_t* __restrict bits, const uint8_t* __restrict in, int64_t at,
                             int64_t count, int64_t side) {
    bits += at / side * ((side + 7) / 8) + at % side / 8;
    for (int64_t i = 0; i < count; i += 8) {
        const int64_t n = count - i < 8 ? count - i : 8;
        unsigned byte = 0;
        for (int64_t k = 0; k < n; ++k) byte |= (unsigned)in[i + k] << k;
        bits[i / 8] = (uint8_t)byte;
    }
}
"""


def blocks_of(columns: Iterable[Column]) -> list[str]:
    """The functions that decode and encode blocks of the codes in these tensors."""
    columns = list(columns)
    of_bytes = {c.dtype: None for c in columns if c.code_bits == 8}
    found = [CODE_OF.format(type=TYPES[dtype], name=short(dtype)) for dtype in of_bytes]
    found += [CODES] if of_bytes else []
    return [*found, FOUR_BIT_CODES] if any(c.code_bits == 4 for c in columns) else found
