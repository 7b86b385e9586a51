"""The C++ around the loops of a kernel."""

from heavyball.compiler.cpp.dialect import STRUCTS, TYPES

_STRUCTS = "\n".join(f"struct {TYPES[t]} {{ {bits} bits; }};" for t, bits in STRUCTS.items())

PRELUDE = """\
#include <cstdint>
#include <cstring>
#include <limits>

// Called for small and for large tensors: inlined, everything would be compiled twice.
#define PART static __attribute__((noinline))
<structs>

static inline uint32_t word_of(float v) { uint32_t w; std::memcpy(&w, &v, 4); return w; }
static inline float float_of(uint32_t w) { float v; std::memcpy(&v, &w, 4); return v; }
// With integers, since the compiler's own conversions are not vectorized.
static inline float wide(f16 x) {
    const uint32_t sign = (uint32_t)(x.bits & 0x8000u) << 16, size = x.bits & 0x7fffu;
    const uint32_t normal = (size << 13) + (size < 0x7c00u ? 0x38000000u : 0x70000000u);
    const uint32_t small = word_of((float)(int32_t)size * 5.9604644775390625e-8f);
    return float_of(sign | (size < 0x400u ? small : normal));
}
static inline float wide(bf16 x) { return float_of((uint32_t)x.bits << 16); }
// A finite value stays finite.
static inline f16 nearest_f16(float v) {
    const uint32_t sign = word_of(v) & 0x80000000u, word = word_of(v) & 0x7fffffffu;
    const uint32_t normal = (word + 0xfffu + ((word >> 13) & 1u) - 0x38000000u) >> 13;
    const uint32_t small = word_of(float_of(word) + 0.5f) - 0x3f000000u;
    uint32_t bits = word < 0x38800000u ? small : normal;
    bits = word > 0x477fe000u ? 0x7bffu : bits;
    bits = word >= 0x7f800000u ? (word > 0x7f800000u ? 0x7e00u : 0x7c00u) : bits;
    return f16{(uint16_t)(bits | (sign >> 16))};
}
static inline bf16 nearest_bf16(float v) {
    const uint32_t word = word_of(v);
    const uint32_t rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
    const bool finite = (word & 0x7f800000u) != 0x7f800000u;
    const bool over = (rounded & 0x7fffu) >= 0x7f80u;
    return bf16{(uint16_t)(v != v ? 0x7fc0u : finite && over ? rounded - 1u : rounded)};
}
static inline bf16 to_bf16(float v) {
    const uint32_t word = word_of(v), rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
    return bf16{(uint16_t)(v != v ? 0x7fc0u : rounded)};
}
static inline float load(const float* p) { return *p; }
static inline double load(const double* p) { return *p; }
static inline float load(const f16* p) { return wide(*p); }
static inline float load(const bf16* p) { return wide(*p); }
static inline void store(float* p, double v) { *p = (float)v; }
static inline void store(float* p, float v) { *p = v; }
static inline void store(double* p, double v) { *p = v; }
static inline void store(f16* p, double v) { *p = nearest_f16((float)v); }
static inline void store(bf16* p, double v) { *p = to_bf16((float)v); }
static inline void store(f16* p, float v) { *p = nearest_f16(v); }
static inline void store(bf16* p, float v) { *p = to_bf16(v); }

// With the sign of y, and exact, as torch's.
template <typename F> static inline F remainder_of(F x, F y) {
    const F rest = math::fmod(x, y);
    return rest != 0 && (rest < 0) != (y < 0) ? rest + y : rest;
}
""".replace("<structs>", _STRUCTS)
# A function of the C library for both types. <cmath> has them too, and reading it takes a quarter of the
# time in which a kernel is compiled.
MATH = """\
namespace math {{
template <class... F>
static inline float {name}(float x, F... more) {{ return __builtin_{name}f(x, more...); }}
template <class... F>
static inline double {name}(double x, F... more) {{ return __builtin_{name}(x, more...); }}
}}
"""
# The word from which a tensor that is rounded stochastically takes its bits in a step.
KEYS = """\
static inline uint32_t step_key(int64_t stream, double step) {
    return mix((uint32_t)stream + (uint32_t)(int64_t)step * 0x9e3779b1u);
}
"""
DRIVER = """\
static void whole(const int64_t* row, const double* hyper) {{
    double s[VALUES], part[PARTS];
    {whole}
}}

// table: COLUMNS numbers per tensor, the small ones first. large: (row, first chunk, end) for each of
// the others. chunks: (row, low, high, which large one). batches: (first large, end, first chunk, end);
// all passes of a batch are done before the next, while its tensors are still in the cache.
extern "C" void run(const int64_t* table, int64_t small, const int64_t* large, const int64_t* chunks,
                    const int64_t* batches, int64_t count, const double* hyper, double* scratch,
                    double* parts, int threads) {{
    #pragma omp parallel num_threads(threads) if (threads > 1)
    {{
        #pragma omp for schedule(dynamic, 1) nowait
        for (int64_t i = 0; i < small; ++i) whole(table + i * COLUMNS, hyper);
        for (const int64_t* b = batches; b < batches + 4 * count; b += 4) {{
            #pragma omp for schedule(static)
            for (int64_t i = b[0]; i < b[1]; ++i)
                scalars_0(table + large[3 * i] * COLUMNS, hyper, scratch + i * VALUES);{chunked}
            #pragma omp for schedule(static)
            for (int64_t i = b[0]; i < b[1]; ++i)
                write_numbers(table + large[3 * i] * COLUMNS, scratch + i * VALUES);
        }}
    }}
}}
"""
# Every other pass goes backwards and meets first what the pass before it has just left in the cache.
CHUNKED = """
            #pragma omp for schedule(dynamic, 1)
            for (int64_t n = b[2]; n < b[3]; ++n) {{
                const int64_t i = {k} % 2 ? b[2] + b[3] - 1 - n : n;
                const int64_t* c = chunks + 4 * i;
                pass_{k}(table + c[0] * COLUMNS, scratch + c[3] * VALUES, c[1], c[2], parts + i * PARTS);
            }}
            #pragma omp for schedule(static)
            for (int64_t i = b[0]; i < b[1]; ++i) {{
                double* s = scratch + i * VALUES;
                join_{k}(parts + large[3 * i + 1] * PARTS, parts + large[3 * i + 2] * PARTS, s);
                {after}(table + large[3 * i] * COLUMNS, hyper, s);
            }}"""

# One walk alone: what `run` does, but for the sums between two walks, which the caller may complete. It
# is compiled where it is asked for, see `walks_of`.
WALK = """
#ifdef ONE_WALK
// Walk k of every tensor, with its numbers, VALUES for each row, in `numbers`; after the last walk it
// computes those behind and writes the states. The other arguments are those of `run`.
extern "C" void walk(const int64_t* table, int64_t small, const int64_t* large, const int64_t* chunks,
                     const int64_t* batches, int64_t count, const double* hyper, double* numbers,
                     double* parts, int threads, int64_t k, void**) {{
    typedef void Begin(const int64_t*, const double*, double*);
    typedef void Part(const int64_t*, const double*, int64_t, int64_t, double*);
    typedef void Join(const double*, const double*, double*);
    static Begin* const begin[] = {{{begins}}};
    static Part* const pass[] = {{{passes}}};
    static Join* const join[] = {{{joins}}};
    const bool last = k == {walks};
    #pragma omp parallel num_threads(threads) if (threads > 1)
    {{
        #pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < small; ++i) {{
            const int64_t* row = table + i * COLUMNS;
            double part[PARTS], *s = numbers + i * VALUES;
            begin[k](row, hyper, s);
            if (last) {{
                write_numbers(row, s);
            }} else {{
                pass[k](row, s, 0, row[0], part);
                join[k](part, part + PARTS, s);
            }}
        }}
        for (const int64_t* b = batches; b < batches + 4 * count; b += 4) {{
            #pragma omp for schedule(static)
            for (int64_t i = b[0]; i < b[1]; ++i) {{
                const int64_t* row = table + large[3 * i] * COLUMNS;
                begin[k](row, hyper, numbers + large[3 * i] * VALUES);
                if (last) write_numbers(row, numbers + large[3 * i] * VALUES);
            }}
            if (last) continue;
            #pragma omp for schedule(dynamic, 1)
            for (int64_t i = b[2]; i < b[3]; ++i) {{
                const int64_t* c = chunks + 4 * i;
                pass[k](table + c[0] * COLUMNS, numbers + c[0] * VALUES, c[1], c[2], parts + i * PARTS);
            }}
            #pragma omp for schedule(static)
            for (int64_t i = b[0]; i < b[1]; ++i)
                join[k](parts + large[3 * i + 1] * PARTS, parts + large[3 * i + 2] * PARTS,
                        numbers + large[3 * i] * VALUES);
        }}
    }}
}}

// How many values the arrays take that a tensor keeps between two walks.
extern "C" int64_t kept(const int64_t*) {{ return 0; }}
#endif
"""

# ---- rows

BUFFER = """\
// Zeros that are freed at the end; <vector> takes longer to read than a kernel to compile.
template <typename V> struct Buffer {
    V* values;
    int64_t size;
    explicit Buffer(int64_t n = 0) : values(n ? new V[n]() : nullptr), size(n) {}
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { delete[] values; }
    void grow(int64_t n) {
        if (n <= size) return;
        delete[] values;
        values = nullptr, size = 0;
        values = new V[n](), size = n;
    }
    V* data() { return values; }
};
"""
BANDS = """\
// How many rows are whole blocks of codes, whose size is a power of two; where block b of rows begins.
static inline int64_t band_of(int64_t cols, int64_t size) {
    const int64_t whole = cols & -cols;
    return whole < size ? size / whole : 1;
}
static inline int64_t row_of(int64_t b, int64_t blocks, int64_t rows, int64_t band) {
    const int64_t low = (rows + band - 1) / band * b / blocks * band;
    return low < rows ? low : rows;
}
"""
HELPERS = """\
// How long a piece of a row is, a whole number of periods.
static inline int64_t width_of(int64_t lane, int64_t period) {{
    const int64_t pieces = (lane * period + {piece} / 2) / {piece};
    return pieces > 1 ? (lane + pieces - 1) / pieces * period : lane * period;
}}
// The values of one period again and again, and the sums for each place in a period.
static inline void repeat(T* __restrict out, const T* __restrict from, int64_t period, int64_t width) {{
    std::memcpy(out, from, period * sizeof(T));
    for (int64_t done = period; done < width; done *= 2)
        std::memcpy(out + done, out, (width - done < done ? width - done : done) * sizeof(T));
}}
// Joins the periods in the first one, by halves, so that the loops stay long.
template <bool LARGEST>
static inline double joined(double x, double y) {{ return LARGEST ? (x < y ? y : x) : x + y; }}
template <bool LARGEST>
static inline void folded(double* __restrict sums, int64_t period, int64_t width) {{
    for (int64_t count = width / period; count > 1; count -= count / 2) {{
        const int64_t half = count / 2 * period, other = (count - count / 2) * period;
        for (int64_t n = 0; n < half; ++n) sums[n] = joined<LARGEST>(sums[n], sums[other + n]);
    }}
}}
template <bool LARGEST>
static inline void fold(T* __restrict out, double* sums, int64_t period, int64_t width) {{
    folded<LARGEST>(sums, period, width);
    for (int64_t n = 0; n < period; ++n) out[n] = (T)sums[n];
}}
template <bool LARGEST>
static inline void add_folded(double* __restrict out, double* sums, int64_t period, int64_t width) {{
    folded<LARGEST>(sums, period, width);
    for (int64_t n = 0; n < period; ++n) out[n] = joined<LARGEST>(out[n], sums[n]);
}}
"""
ROWS_DRIVER = """\
static void whole(const int64_t* row, const double* hyper) {{
    const int64_t blocks = 1;
    double s[VALUES], parts[PARTS];
    Buffer<T> kept(KEPT);
    Buffer<double> added(SUMS);
    T* memory = kept.data();
    double* sums = added.data();
    {whole}
    scalars_end(row, hyper, s);
    write_numbers(row, s);
}}

// table: COLUMNS numbers per tensor, the small ones first; `count` large ones follow, one at a time, so
// that their memory is used again. The other arguments belong to kernels for flat memory.
extern "C" void run(const int64_t* table, int64_t small, const int64_t*, const int64_t*,
                    const int64_t*, int64_t count, const double* hyper, double*, double*,
                    int threads) {{
    Buffer<T> kept;
    Buffer<double> added;
    double s[VALUES], parts[BLOCKS * PARTS];
    #pragma omp parallel num_threads(threads) if (threads > 1)
    {{
        #pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < small; ++i) whole(table + i * COLUMNS, hyper);
        for (int64_t t = small; t < small + count; ++t) {{
            const int64_t* row = table + t * COLUMNS;
            const int64_t bands = (ROWS + BAND - 1) / BAND, blocks = bands < BLOCKS ? bands : BLOCKS;
            #pragma omp single
            {{
                kept.grow(KEPT);
                added.grow(BLOCKS * (SUMS));
            }}
            T* memory = kept.data();
            double* sums = added.data();{shared}
            #pragma omp single
            {{
                scalars_end(row, hyper, s);
                write_numbers(row, s);
            }}
        }}
    }}
}}
"""
ROWS_SHARED = """
            #pragma omp single
            {{
                {begin}
            }}
            #pragma omp for schedule(dynamic, 1)
            for (int64_t b = 0; b < blocks; ++b)
                pass_{k}(row, s, memory, row_of(b, blocks, ROWS, BAND),
                         row_of(b + 1, blocks, ROWS, BAND), parts + b * PARTS, sums + b * (SUMS));
            #pragma omp single
            join_{k}(row, s, memory, parts, sums, blocks);"""
ROWS_WALK = """
#ifdef ONE_WALK
extern "C" int64_t kept(const int64_t* row) {{ return KEPT; }}

// Walk k of every tensor, as for flat memory; `memory` has for each row the address of its arrays, and
// `kept` says how many values these have.
extern "C" void walk(const int64_t* table, int64_t small, const int64_t*, const int64_t*, const int64_t*,
                     int64_t count, const double* hyper, double* numbers, double*, int threads,
                     int64_t k, void** memory) {{
    typedef void Begin(const int64_t*, const double*, double*);
    typedef void Vectors(const int64_t*, double*, T*);
    typedef void Part(const int64_t*, const double*, T*, int64_t, int64_t, double*, double*);
    typedef void Join(const int64_t*, double*, T*, const double*, const double*, int64_t);
    static Begin* const begin[] = {{{begins}}};
    static Vectors* const vectors[] = {{{vectors}}};
    static Part* const pass[] = {{{passes}}};
    static Join* const join[] = {{{joins}}};
    #pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < small + count; ++t) {{
        const int64_t* row = table + t * COLUMNS;
        double parts[BLOCKS * PARTS], *s = numbers + t * VALUES;
        begin[k](row, hyper, s);
        if (k == {walks}) {{
            write_numbers(row, s);
            continue;
        }}
        const int64_t bands = (ROWS + BAND - 1) / BAND;
        const int64_t blocks = t < small ? 1 : bands < BLOCKS ? bands : BLOCKS;
        Buffer<double> sums(blocks * (SUMS));
        T* arrays = (T*)memory[t];
        vectors[k](row, s, arrays);
        for (int64_t b = 0; b < blocks; ++b)
            pass[k](row, s, arrays, row_of(b, blocks, ROWS, BAND), row_of(b + 1, blocks, ROWS, BAND),
                    parts + b * PARTS, sums.data() + b * (SUMS));
        join[k](row, s, arrays, parts, sums.data(), blocks);
    }}
}}
#endif
"""
