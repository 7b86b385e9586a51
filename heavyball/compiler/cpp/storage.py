"""C++ for tensors kept in fewer bits: the same as heavyball/state/packing.py, bit for bit."""

# Elements that an 8-bit tensor is decoded to and encoded from at a time.
WIDE = 1024

CORRECTED = """\
static inline float half_of(const bf16*) { return 0.00390625f; }
static inline float half_of(const f16*) { return 0.00048828125f; }
static inline uint32_t least_of(const bf16*) { return 0x00800000u; }
static inline uint32_t least_of(const f16*) { return 0x38800000u; }
static inline float unit(float kept, uint32_t least) {
    uint32_t word = word_of(kept) & 0x7f800000u;
    word = word < least ? least : word;
    return float_of(word > 0x7e800000u ? 0x7e800000u : word);
}
static inline void store_finite(bf16* p, float v) {
    const uint32_t word = word_of(v);
    const uint32_t rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
    const bool finite = (word & 0x7f800000u) != 0x7f800000u;
    const bool over = (rounded & 0x7fffu) >= 0x7f80u;
    p->bits = (uint16_t)(v != v ? 0x7fc0u : finite && over ? rounded - 1u : rounded);
}

template <class M> static inline float load_corrected(const M* p, const int8_t* c) {
    const float kept = load(p);
    const float part = (float)*c * (1.0f / 127.0f) * half_of(p);
    return *c == 0 ? kept : kept + part * unit(kept, least_of(p));
}
template <class M> static inline float load_corrected(const M* p, const int16_t* c) {
    const float kept = load(p);
    const double part = (double)*c * (1.0 / 32767.0) * (double)half_of(p);
    return *c == 0 ? kept : (float)((double)kept + part * (double)unit(kept, least_of(p)));
}
template <class W, class M, class C>
static inline void split(M* p, C* c, float v, W levels) {
    M kept;
    store_finite(&kept, v);
    const float back = load(&kept);
    // the unit is a power of two from 2^-126 to 2^126, and so is its inverse
    const float inverse = float_of(0x7f000000u - word_of(unit(back, least_of(p))));
    const W ratio = ((W)v - (W)back) * (W)inverse * (W(1) / (W)half_of(p));
    W size = std::fabs(ratio);
    size = size > 1 ? W(1) : size;
    const W most = levels - W(kept.bits & 1);
    W count = std::ceil(size * levels - W(0.5));
    count = count > most ? most : count;
    count = ratio < 0 ? -count : count;
    count = ratio == ratio ? count : W(0);
    p->bits = kept.bits;
    *c = (C)(int32_t)count;
}
template <class M> static inline void store_corrected(M* p, int8_t* c, float v) {
    split<float>(p, c, v, 127.0f);
}
template <class M> static inline void store_corrected(M* p, int16_t* c, float v) {
    split<double>(p, c, v, 32767.0);
}
"""

ROOTS = """\
static inline float squared(float v) { return v * v; }
static inline float root(float v) { return std::sqrt(v < 0 ? 0.0f : v); }
// a positive value never becomes zero, since it is divided by
static inline float raised_root(float v) {
    const float r = root(v);
    return r > 0 && r < 5.9604644775390625e-8f ? 5.9604644775390625e-8f : r;
}
"""

CODES = """\
static inline float decoded(int8_t code, float scale) {
    const float part = (float)code * (1.0f / 127.0f);
    return part / (2.0f - std::fabs(part)) * scale;
}
static inline float decoded(uint8_t code, float scale) { return (float)code * (scale / 255.0f); }
static inline float position(const int8_t*, float size, float scale) {
    return 254.0f * size / (scale + size);
}
static inline float position(const uint8_t*, float size, float scale) {
    return size / (scale / 255.0f);
}
static inline float finished(const int8_t*, float code, float v) {
    code = code > 127.0f ? 127.0f : code;
    return code != code ? 0.0f : v < 0 ? -code : code;
}
static inline float finished(const uint8_t*, float code, float v) {
    code = v > 0 && code < 1.0f ? 1.0f : code;
    code = code > 255.0f ? 255.0f : code;
    return code != code ? 0.0f : code;
}
template <class C>
static inline void decode_block(const C* codes, float scale, float* out, int64_t count) {
    #pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = decoded(codes[i], scale);
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
    uint32_t above = (largest + 0xffffu) & 0xffff0000u;
    above = above > 0x7f7f0000u ? 0x7f7f0000u : above;
    scales->bits = (uint16_t)((largest < 0x7f800000u ? above : 0x7fc00000u) >> 16);
    const float scale = load(scales);
    #pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
        float code = position(codes, std::fabs(in[i]), scale);
        if (RANDOM) {
            const uint32_t bits = mix(((uint32_t)(first + i) * 0x9e3779b1u) ^ key) & 0xffffu;
            code = std::floor(code + (float)(int32_t)bits / 65536.0f);
        } else {
            code = std::nearbyint(code);
        }
        codes[i] = (C)(int32_t)finished(codes, code, in[i]);
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
