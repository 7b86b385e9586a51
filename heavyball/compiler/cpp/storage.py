"""C++ for blocks of 8-bit codes, whose arithmetic `compiler/formats.py` prints."""

# Elements that an 8-bit tensor is decoded to and encoded from at a time.
WIDE = 1024

CODES = """\
static inline int8_t code_of(const int8_t*, float x, float scale) { return int8_of(x, scale); }
static inline uint8_t code_of(const uint8_t*, float x, float scale) { return uint8_of(x, scale); }
static inline int8_t code_of(const int8_t*, float x, float scale, uint32_t key, uint32_t index) {
    return random_int8_of(x, scale, key, index);
}
static inline uint8_t code_of(const uint8_t*, float x, float scale, uint32_t key, uint32_t index) {
    return random_uint8_of(x, scale, key, index);
}
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
