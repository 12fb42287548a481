/* Numbers as they lie in memory: float32, bfloat16, and the release's FP8 and FP4 codes (fathom/quant/formats.py); rounding to each of them. */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

typedef float lanes __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint16_t shorts __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint32_t loose_words __attribute__((vector_size(64), aligned(1), may_alias));
typedef uint8_t bytes __attribute__((vector_size(16), aligned(1), may_alias));
enum { LANES = 16 };

static inline int thread_number(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

/* How many threads there are: fewer than were asked for where something limits them. */
static inline int thread_count(void) {
#ifdef _OPENMP
    return omp_get_num_threads();
#else
    return 1;
#endif
}

#define ALWAYS static inline __attribute__((always_inline)) /* for what is known while compiling */

static inline lanes load(const float *numbers) { return *(const lanes *)numbers; }

static inline lanes load_bf16(const uint16_t *numbers) {
    return (lanes)(__builtin_convertvector(*(const shorts *)numbers, words) << 16);
}

/* Fewer than 16 numbers, and zeros. */
static inline lanes load_rest(const float *numbers, long count) {
    lanes found = {0};
    memcpy(&found, numbers, count * sizeof(float));
    return found;
}

static inline lanes load_rest_bf16(const uint16_t *numbers, long count) {
    uint16_t found[LANES] = {0};
    memcpy(found, numbers, count * sizeof(uint16_t));
    return load_bf16(found);
}

ALWAYS lanes load_part(const void *numbers, int bf16, long index, long count) {
    if (bf16) {
        const uint16_t *from = (const uint16_t *)numbers + index;
        return count < LANES ? load_rest_bf16(from, count) : load_bf16(from);
    }
    const float *from = (const float *)numbers + index;
    return count < LANES ? load_rest(from, count) : load(from);
}

/* Up to 16 numbers to `out` from its `index`-th on. */
ALWAYS void store_part(lanes x, void *out, int bf16, long index, long count) {
    words bits = (words)x;
    shorts narrow = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, shorts);
    if (bf16 && count >= LANES) *(shorts *)((uint16_t *)out + index) = narrow;
    else if (bf16) memcpy((uint16_t *)out + index, &narrow, count * sizeof(uint16_t));
    else if (count >= LANES) *(lanes *)((float *)out + index) = x;
    else memcpy((float *)out + index, &x, count * sizeof(float));
}

ALWAYS lanes chosen(words mask, lanes x, lanes other) { return (lanes)(((words)x & mask) | ((words)other & ~mask)); }

static inline lanes all(float number) { return (lanes){0} + number; }

static inline float one(const float *number) { return *number; }

static inline float one_bf16(const uint16_t *number) {
    uint32_t bits = (uint32_t)*number << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}

static inline float number(const void *numbers, int bf16, long index) {
    return bf16 ? one_bf16((const uint16_t *)numbers + index) : ((const float *)numbers)[index];
}

static inline const void *nth(const void *matrices, int bf16, long index, long numbers) {
    return (const char *)matrices + index * numbers * (bf16 ? 2 : 4);
}

/* `length` numbers as floats: where they lie, or widened into `space`. */
static inline const float *widened(const void *numbers, int bf16, long length, float *space) {
    if (!bf16) return numbers;
    long i = 0;
    for (; i + LANES <= length; i += LANES) *(lanes *)(space + i) = load_bf16((const uint16_t *)numbers + i);
    for (; i < length; i++) space[i] = one_bf16((const uint16_t *)numbers + i);
    return space;
}

/* `length` numbers as floats of their own. */
static inline void widen(const void *numbers, int bf16, long length, float *out) {
    if (widened(numbers, bf16, length, out) != out) memcpy(out, numbers, length * sizeof(float));
}

/* The nearest bfloat16, of two the even one. */
static inline uint16_t narrowed(float number) {
    uint32_t bits;
    memcpy(&bits, &number, 4);
    return number == number ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
}

/* The nearest bfloat16 numbers as words, in their lower half. */
ALWAYS words narrow_words(lanes x) {
    words bits = (words)x, real = (words)(x == x);
    return (((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) & real) | (0x7fc0 & ~real);
}

/* Floats to `out` from its `index`-th number on, narrowed or as they are. */
static inline void put(const float *numbers, long length, void *out, int bf16, long index) {
    uint16_t *to = (uint16_t *)out + index;
    long i = 0;
    if (!bf16) memcpy((float *)out + index, numbers, length * sizeof(float));
    else {
        for (; i + LANES <= length; i += LANES) *(shorts *)(to + i) = __builtin_convertvector(narrow_words(load(numbers + i)), shorts);
        for (; i < length; i++) to[i] = narrowed(numbers[i]);
    }
}

/* A matrix [O, I], or several: its numbers and, where they are codes, their scales (fathom/quant/formats.py): for FP8 one for 128 x 128
   numbers, for FP4 one for 32 of a row. `kind` is a format and, with 4, says that
   scales are e8m0 rather than floats; with ROUNDS, that what is multiplied with it is rounded to FP8 first. */
typedef struct {
    const char *numbers, *scale;
    int kind;
} matrix;
enum { FLOAT, BF16, FP8, FP4, ROUNDS = 8, TILE = 128, BLOCK = 32, INPUT_BLOCK = 128, ENTRY_BLOCK = 64 };

static inline int format_of(matrix m) { return m.kind & 3; }

/* An e8m0 number. */
static inline float power(uint8_t exponent) {
    uint32_t bits = exponent ? (uint32_t)exponent << 23 : 0x400000; /* 2^-127 */
    float scale;
    memcpy(&scale, &bits, 4);
    return scale;
}

static inline float scale_at(matrix m, long index) { return m.kind & 4 ? power(((const uint8_t *)m.scale)[index]) : ((const float *)m.scale)[index]; }

static inline long row_bytes(matrix m, long I) { return format_of(m) == FLOAT ? 4 * I : format_of(m) == BF16 ? 2 * I : format_of(m) == FP8 ? I : I / 2; }

static inline long blocks_of(long numbers, long size) { return (numbers + size - 1) / size; }

/* The `index`-th of several matrices [O, I]. */
static inline matrix nth_matrix(matrix m, long index, long O, long I) {
    long scales = format_of(m) == FP8 ? blocks_of(O, TILE) * blocks_of(I, TILE) : format_of(m) == FP4 ? O * blocks_of(I, BLOCK) : 0;
    matrix found = {m.numbers + index * O * row_bytes(m, I), m.scale + index * scales * (m.kind & 4 ? 1 : 4), m.kind};
    return found;
}

/* In two steps, each of which is few instructions; GCC 12 takes one step of four times the width number by number. */
static inline words load_bytes(const uint8_t *codes) {
    return __builtin_convertvector(__builtin_convertvector(*(const bytes *)codes, shorts), words);
}

/* Sixteen e4m3 numbers: exponent and fraction moved to a float's places; those below 2^-6 have no leading 1. */
static inline lanes as_fp8(words code) {
    words size = code & 127, small = (words)(size < 8);
    lanes plain = (lanes)((size << 20) + (120u << 23)), without_one = 2 * plain - 0x1p-6f;
    return (lanes)(((words)without_one & small) | ((words)plain & ~small) | (code & 128) << 24);
}

/* Sixteen e2m1 numbers of codes 0 ... 15. */
static inline lanes as_fp4(words code) {
#if defined(__AVX512F__) && !defined(__clang__)
    static const lanes numbers = {0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6};
    return __builtin_shuffle(numbers, code);
#else
    words size = code & 7, one = (words)(size > 1) & 1, doubled = (one << 1 | (size & 1)) << ((size >> 1) - one);
    return (lanes)((words)(__builtin_convertvector(doubled, lanes) * 0.5f) | (code & 8) << 28);
#endif
}

/* Codes are decoded a chunk at a time, of which the first to have enough numbers left is taken. The numbers of a chunk of 16 P then follow
   each other as the bytes of words do: the 0th, P-th, 2 P-th, ..., then the first, and so on. */
static const long CHUNKS[2][2] = {{64, 0}, {128, 32}}; /* FP8, FP4 */

/* x [I] in the order in which a row of codes is decoded. */
static void arrange(const float *x, int format, long I, float *out) {
    long begin = 0;
    for (int c = 0; c < 2; c++) {
        long chunk = CHUNKS[format - FP8][c], share = chunk / LANES;
        for (; chunk && begin + chunk <= I; begin += chunk)
            for (long i = 0; i < chunk; i++) out[begin + i % share * LANES + i / share] = x[begin + i];
    }
    memcpy(out + begin, x + begin, (I - begin) * sizeof(float));
}

static inline void decode_fp8(matrix m, long r, long I, float *out) {
    const uint8_t *codes = (const uint8_t *)m.numbers + r * I;
    long first = r / TILE * blocks_of(I, TILE), i = 0;
    for (; i + 64 <= I; i += 64) {
        words four = *(const loose_words *)(codes + i);
        float scale = scale_at(m, first + i / TILE);
        for (int k = 0; k < 4; k++) *(lanes *)(out + i + k * LANES) = scale * as_fp8(four >> (8 * k) & 255);
    }
    for (; i + LANES <= I; i += LANES) *(lanes *)(out + i) = scale_at(m, first + i / TILE) * as_fp8(load_bytes(codes + i));
    for (; i < I; i++) out[i] = scale_at(m, first + i / TILE) * as_fp8((words){codes[i]})[0];
}

static inline void decode_fp4(matrix m, long r, long I, float *out) {
    const uint8_t *codes = (const uint8_t *)m.numbers + r * (I / 2);
    long first = r * blocks_of(I, BLOCK), i = 0;
    for (; i + 128 <= I; i += 128) {
        words eight = *(const loose_words *)(codes + i / 2);
        float a = scale_at(m, first + i / BLOCK), b = scale_at(m, first + i / BLOCK + 1);
        float c = scale_at(m, first + i / BLOCK + 2), d = scale_at(m, first + i / BLOCK + 3);
        lanes scales = {a, a, a, a, b, b, b, b, c, c, c, c, d, d, d, d};
        for (int k = 0; k < 8; k++) *(lanes *)(out + i + k * LANES) = scales * as_fp4(eight >> (4 * k) & 15);
    }
    for (; i + BLOCK <= I; i += BLOCK) {
        words pairs = load_bytes(codes + i / 2);
        *(lanes *)(out + i) = scale_at(m, first + i / BLOCK) * as_fp4(pairs & 15);
        *(lanes *)(out + i + LANES) = scale_at(m, first + i / BLOCK) * as_fp4(pairs >> 4);
    }
    for (; i < I; i++) out[i] = scale_at(m, first + i / BLOCK) * as_fp4((words){codes[i / 2] >> (i % 2 * 4) & 15})[0];
}

static void settle(float *x, long length, int bf16) {
    long i = 0;
    if (!bf16) return;
    for (; i + LANES <= length; i += LANES) *(loose_words *)(x + i) = narrow_words(load(x + i)) << 16;
    for (; i < length; i++) {
        uint16_t narrow = narrowed(x[i]);
        x[i] = one_bf16(&narrow);
    }
}

/* The nearest number of `bits` bits behind the point, of two the even one; below the biased exponent `least` they lie evenly. */
static inline float nearest(float x, int bits, uint32_t least) {
    uint32_t exponent;
    memcpy(&exponent, &x, 4);
    exponent = exponent >> 23 & 255;
    uint32_t large = ((exponent > least ? exponent : least) + 23 - bits) << 23 | 0x400000; /* a float whose last bit is worth the step */
    float magic;
    memcpy(&magic, &large, 4);
    return copysignf((x + magic) - magic, x);
}

enum { FP8_BITS = 3, FP8_LEAST = 121, FP4_BITS = 1, FP4_LEAST = 127 }; /* of e4m3 and e2m1 numbers */
#define FP8_LIMIT 448
#define FP8_SMALLEST 1e-4f
#define FP4_LIMIT 6
#define FP4_SMALLEST (6 * 0x1p-126f)

/* The power of two that the largest number of x [length], taken as at least `smallest`, is at most `limit` times of. */
static inline float block_scale(const float *x, long length, float limit, float smallest) {
    float largest = smallest;
    for (long i = 0; i < length; i++) largest = fabsf(x[i]) > largest ? fabsf(x[i]) : largest;
    int exponent, limit_exponent;
    float mantissa = frexpf(largest, &exponent), limit_mantissa = frexpf(limit, &limit_exponent);
    return ldexpf(1, exponent - limit_exponent + (mantissa > limit_mantissa));
}

/* x [length] in blocks that share a power of two, as small as its largest number over `limit` allows. */
static void round_blocks(float *x, long length, long block, float limit, float smallest, int bits, uint32_t least) {
    for (long begin = 0; begin < length; begin += block) {
        long end = begin + block < length ? begin + block : length;
        float scale = block_scale(x + begin, end - begin, limit, smallest), inverse = 1 / scale;
        for (long i = begin; i < end; i++) x[i] = nearest(x[i] * inverse, bits, least) * scale;
    }
}

static void round_fp8(float *x, long length, long block) { round_blocks(x, length, block, FP8_LIMIT, FP8_SMALLEST, FP8_BITS, FP8_LEAST); }

static void round_fp4(float *x, long length) { round_blocks(x, length, BLOCK, FP4_LIMIT, FP4_SMALLEST, FP4_BITS, FP4_LEAST); }

/* x [length] times the Hadamard matrix, each block of the largest power of two that divides the length on its own. */
static void turn_hadamard(float *x, long length) {
    long size = length & -length;
    for (long half = 1; half < size; half *= 2)
        for (long i = 0; i < length; i++)
            if (!(i & half)) {
                float one = x[i], other = x[i + half];
                x[i] = one + other, x[i + half] = one - other;
            }
    float factor = (float)(1 / sqrt((double)size));
    for (long i = 0; i < length; i++) x[i] *= factor;
}
