/* The operators for a few tokens at a time, as in decoding, where every weight is read once and used once or a few times.

   A row of a matrix is read from front to back by one thread, which memory answers fastest (docs/performance.md). A sum's order depends on
   its length alone: neither the threads nor the other tokens of a call show in a bit of the result. Everything is contiguous, sums are
   in float32; `bf16` says that numbers are bfloat16. The Python files beside this one say what is computed. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef float lanes __attribute__((vector_size(64), aligned(4), may_alias));
typedef float half_lanes __attribute__((vector_size(32)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint16_t shorts __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint32_t loose_words __attribute__((vector_size(64), aligned(1), may_alias));
typedef uint8_t bytes __attribute__((vector_size(16), aligned(1), may_alias));
enum { LANES = 16 };

static inline lanes load(const float *numbers) { return *(const lanes *)numbers; }

static inline lanes load_bf16(const uint16_t *numbers) {
    return (lanes)(__builtin_convertvector(*(const shorts *)numbers, words) << 16);
}

static inline float one(const float *number) { return *number; }

static inline float one_bf16(const uint16_t *number) {
    uint32_t bits = (uint32_t)*number << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}

static inline float total(lanes sums) {
    union { lanes all; half_lanes halves[2]; } split = {sums};
    half_lanes half = split.halves[0] + split.halves[1];
    float quarter[4] = {half[0] + half[4], half[1] + half[5], half[2] + half[6], half[3] + half[7]};
    return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

/* NAME: a row times x. NAME_4: the same bits for four x that lie `step` numbers apart, while the row is read and widened once. */
#define DOT(NAME, TYPE, LOAD, ONE)                                                                  \
    static inline float NAME(const TYPE *row, const float *x, long length) {                        \
        lanes a = {0}, b = {0}, c = {0}, d = {0};                                                   \
        long i = 0;                                                                                 \
        for (; i + 4 * LANES <= length; i += 4 * LANES) {                                           \
            a += LOAD(row + i) * load(x + i);                                                       \
            b += LOAD(row + i + LANES) * load(x + i + LANES);                                       \
            c += LOAD(row + i + 2 * LANES) * load(x + i + 2 * LANES);                               \
            d += LOAD(row + i + 3 * LANES) * load(x + i + 3 * LANES);                               \
        }                                                                                           \
        return NAME##_end(row, x, i, length, (a + b) + (c + d));                                    \
    }                                                                                               \
    static inline void NAME##_4(const TYPE *row, const float *x, long step, long length, float *out) { \
        lanes a[4] = {{0}}, b[4] = {{0}}, c[4] = {{0}}, d[4] = {{0}};                               \
        long i = 0;                                                                                 \
        for (; i + 4 * LANES <= length; i += 4 * LANES) {                                           \
            lanes row_a = LOAD(row + i), row_b = LOAD(row + i + LANES);                             \
            lanes row_c = LOAD(row + i + 2 * LANES), row_d = LOAD(row + i + 3 * LANES);             \
            for (int n = 0; n < 4; n++) {                                                           \
                const float *own = x + n * step + i;                                                \
                a[n] += row_a * load(own);                                                          \
                b[n] += row_b * load(own + LANES);                                                  \
                c[n] += row_c * load(own + 2 * LANES);                                              \
                d[n] += row_d * load(own + 3 * LANES);                                              \
            }                                                                                       \
        }                                                                                           \
        for (int n = 0; n < 4; n++)                                                                 \
            out[n] = NAME##_end(row, x + n * step, i, length, (a[n] + b[n]) + (c[n] + d[n]));       \
    }

#define DOT_END(NAME, TYPE, LOAD, ONE)                                                              \
    static inline float NAME##_end(const TYPE *row, const float *x, long i, long length, lanes sums) { \
        float rest = 0;                                                                             \
        for (; i + LANES <= length; i += LANES) sums += LOAD(row + i) * load(x + i);                \
        for (; i < length; i++) rest += ONE(row + i) * x[i];                                        \
        return total(sums) + rest;                                                                  \
    }

#define ADD(NAME, TYPE, LOAD, ONE)                                                                  \
    static inline void NAME(float *sum, float factor, const TYPE *row, long length) {               \
        long i = 0;                                                                                 \
        for (; i + LANES <= length; i += LANES) *(lanes *)(sum + i) += factor * LOAD(row + i);      \
        for (; i < length; i++) sum[i] += factor * ONE(row + i);                                    \
    }

DOT_END(dot_float, float, load, one)
DOT_END(dot_bf16, uint16_t, load_bf16, one_bf16)
DOT(dot_float, float, load, one)
DOT(dot_bf16, uint16_t, load_bf16, one_bf16)
ADD(add_float, float, load, one)
ADD(add_bf16, uint16_t, load_bf16, one_bf16)

static inline float number(const void *numbers, int bf16, long index) {
    return bf16 ? one_bf16((const uint16_t *)numbers + index) : ((const float *)numbers)[index];
}

static inline const void *nth(const void *matrices, int bf16, long index, long numbers) {
    return (const char *)matrices + index * numbers * (bf16 ? 2 : 4);
}

/* `length` numbers as floats: where they lie, or widened into `space`. */
static inline const float *widened(const void *numbers, int bf16, long length, float *space) {
    if (!bf16) return numbers;
    for (long i = 0; i < length; i++) space[i] = one_bf16((const uint16_t *)numbers + i);
    return space;
}

/* The nearest bfloat16, of two the even one. */
static inline uint16_t narrowed(float number) {
    uint32_t bits;
    memcpy(&bits, &number, 4);
    return number == number ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
}

/* Floats to `out` from its `index`-th number on, narrowed or as they are. */
static inline void put(const float *numbers, long length, void *out, int bf16, long index) {
    if (!bf16) memcpy((float *)out + index, numbers, length * sizeof(float));
    else
        for (long i = 0; i < length; i++) ((uint16_t *)out)[index + i] = narrowed(numbers[i]);
}

/* A matrix [O, I], or several: its numbers and, where they are codes, their scales (fathom/quant/formats.py): for FP8 one for 128 x 128
   numbers, for FP4 one for 32 of a row. `kind` is a format and, with 4, says that scales are e8m0 rather than floats. */
typedef struct {
    const char *numbers, *scale;
    int kind;
} matrix;
enum { FLOAT, BF16, FP8, FP4, TILE = 128, BLOCK = 32 };

static inline int format_of(matrix m) { return m.kind & 3; }

static inline float scale_at(matrix m, long index) {
    if (!(m.kind & 4)) return ((const float *)m.scale)[index];
    uint8_t exponent = ((const uint8_t *)m.scale)[index];
    uint32_t bits = exponent ? (uint32_t)exponent << 23 : 0x400000; /* 2^-127 */
    float scale;
    memcpy(&scale, &bits, 4);
    return scale;
}

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

/* 16 rows of a matrix, from `row` on and at most to `end`, times N x (of codes: arranged) that lie `step` apart -> out [N, 16]. */
static inline void times(matrix m, long row, long end, long I, const float *x, long step, long N, float *out) {
    int coded = format_of(m) >= FP8, bf16 = format_of(m) == BF16;
    float space[coded ? I : 1];
    for (long r = 0; r < LANES && row + r < end; r++) {
        const void *numbers = m.numbers + (row + r) * row_bytes(m, I);
        if (format_of(m) == FP8) decode_fp8(m, row + r, I, space);
        if (format_of(m) == FP4) decode_fp4(m, row + r, I, space);
        if (coded) numbers = space;
        float four[4];
        long n = 0;
        for (; n + 4 <= N; n += 4) {
            if (bf16) dot_bf16_4(numbers, x + n * step, step, I, four);
            else dot_float_4(numbers, x + n * step, step, I, four);
            for (int i = 0; i < 4; i++) out[(n + i) * LANES + r] = four[i];
        }
        for (; n < N; n++) out[n * LANES + r] = bf16 ? dot_bf16(numbers, x + n * step, I) : dot_float(numbers, x + n * step, I);
    }
}

/* x [N, G, I] times the transposed matrix [O, I] -> out [N, O]; each G-th part of the rows has its own x, and 16 divide it if G > 1.
   `space` [N, G, I] is for use in between where the matrix holds codes. */
void fathom_linear(const void *numbers, const void *scale, int kind, long O, long I, const float *x, long N, long G, float *space, float *out,
                   int threads) {
    matrix m = {numbers, scale, kind};
    if (format_of(m) >= FP8) {
        for (long row = 0; row < N * G; row++) arrange(x + row * I, format_of(m), I, space + row * I);
        x = space;
    }
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long o = 0; o < O; o += LANES) {
        float made[N * LANES];
        long rows = O - o < LANES ? O - o : LANES;
        times(m, o, O, I, x + o / (O / G) * I, G * I, N, made);
        for (long n = 0; n < N; n++) memcpy(out + n * O + o, made + n * LANES, rows * sizeof(float));
    }
}

/* x [N, D] over the root mean square of each row, times a weight [D] that may be null. */
void fathom_rms_normalise(const void *x, int bf16, const float *weight, long N, long D, float eps, void *out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long n = 0; n < N; n++) {
        float made[D];
        const float *row = widened(nth(x, bf16, n, D), bf16, D, made);
        float inverse = 1 / sqrtf(dot_float(row, row, D) / D + eps);
        if (weight)
            for (long d = 0; d < D; d++) made[d] = row[d] * inverse * weight[d];
        else
            for (long d = 0; d < D; d++) made[d] = row[d] * inverse;
        put(made, D, out, bf16, n * D);
    }
}

/* The last 2 C channels of x [N, A, D] as complex numbers times turn [N, C], or its conjugates where `inverse`. */
void fathom_rotate(const void *x, int bf16, const float *turn, long N, long A, long D, long C, int inverse, void *out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long row = 0; row < N * A; row++) {
        float made[2 * C], space[2 * C];
        const float *from = widened(nth(x, bf16, row * D + D - 2 * C, 1), bf16, 2 * C, space), *by = turn + row / A * 2 * C;
        for (long c = 0; c < 2 * C; c += 2) {
            float imaginary = inverse ? -by[c + 1] : by[c + 1];
            made[c] = from[c] * by[c] - from[c + 1] * imaginary;
            made[c + 1] = from[c] * imaginary + from[c + 1] * by[c];
        }
        memcpy((char *)out + row * D * (bf16 ? 2 : 4), nth(x, bf16, row, D), (D - 2 * C) * (bf16 ? 2 : 4));
        put(made, 2 * C, out, bf16, row * D + D - 2 * C);
    }
}

/* Pairs of token and expert, P = N K, sorted by expert into `order`, so that an expert's matrices are read once: each pair's activation
   hidden [P, F] of x [N, W], in that order; own [P, W] is for use in between. `bf16`: gate and up are narrowed, as products of such x
   are. Returns 1, having done nothing, where an expert is none of the E. */
int fathom_experts_in(const float *x, const int64_t *expert, const float *weight, const void *gate, const void *gate_scale, const void *up,
                      const void *up_scale, int kind, int bf16, long N, long K, long E, long F, long W, float limit, int64_t *order, float *own,
                      float *hidden, int threads) {
    long P = N * K;
    matrix gates = {gate, gate_scale, kind}, ups = {up, up_scale, kind};
    for (long p = 0; p < P; p++) {
        if (expert[p] < 0 || expert[p] >= E) return 1;
        long place = p;
        for (; place > 0 && expert[order[place - 1]] > expert[p]; place--) order[place] = order[place - 1];
        order[place] = p;
    }
    for (long p = 0; p < P; p++) {
        const float *token = x + order[p] / K * W;
        if (format_of(gates) >= FP8) arrange(token, format_of(gates), W, own + p * W);
        else memcpy(own + p * W, token, W * sizeof(float));
    }
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (long p = 0, end; p < P; p = end) {
        long e = expert[order[p]];
        for (end = p + 1; end < P && expert[order[end]] == e;) end++;
        matrix its_gate = nth_matrix(gates, e, F, W), its_up = nth_matrix(ups, e, F, W);
#pragma omp for schedule(static) nowait
        for (long f = 0; f < F; f += LANES) {
            float made[2][(end - p) * LANES];
            times(its_gate, f, F, W, own + p * W, W, end - p, made[0]);
            times(its_up, f, F, W, own + p * W, W, end - p, made[1]);
            for (long i = p; i < end; i++)
                for (long r = 0; r < LANES && f + r < F; r++) {
                    float g = made[0][(i - p) * LANES + r], u = made[1][(i - p) * LANES + r];
                    if (bf16) {
                        uint16_t narrow[2] = {narrowed(g), narrowed(u)};
                        g = one_bf16(narrow), u = one_bf16(narrow + 1);
                    }
                    g = g > limit ? limit : g;
                    u = u > limit ? limit : u < -limit ? -limit : u;
                    hidden[i * F + f + r] = g / (1 + expf(-g)) * u * weight[order[i]];
                }
        }
    }
    return 0;
}

/* Each token's sum [N, W] over its experts, of hidden [P, F] and `order` from above; own [P, F] and part [P, W] are for use in between. */
void fathom_experts_out(const float *hidden, const int64_t *expert, const int64_t *order, const void *down, const void *down_scale, int kind,
                        long N, long K, long F, long W, float *own, float *part, float *out, int threads) {
    long P = N * K;
    matrix downs = {down, down_scale, kind};
    if (format_of(downs) >= FP8) {
        for (long p = 0; p < P; p++) arrange(hidden + p * F, format_of(downs), F, own + p * F);
        hidden = own;
    }
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        for (long p = 0, end; p < P; p = end) {
            long e = expert[order[p]];
            for (end = p + 1; end < P && expert[order[end]] == e;) end++;
            matrix its_down = nth_matrix(downs, e, W, F);
#pragma omp for schedule(static) nowait
            for (long w = 0; w < W; w += LANES) {
                float made[(end - p) * LANES];
                times(its_down, w, W, F, hidden + p * F, F, end - p, made);
                for (long i = p; i < end; i++)
                    for (long r = 0; r < LANES && w + r < W; r++) part[order[i] * W + w + r] = made[(i - p) * LANES + r];
            }
        }
#pragma omp barrier
#pragma omp for schedule(static)
        for (long n = 0; n < N; n++) {
            memset(out + n * W, 0, W * sizeof(float));
            for (long k = 0; k < K; k++) add_float(out + n * W, 1, part + (n * K + k) * W, W);
        }
    }
}

static inline float sigmoid(float x) { return 1 / (1 + expf(-x)); }

/* A matrix [N, N], softmax over rows, then divided by its columns' and rows' sums in turn (eq. 8). */
static void balance(float *matrix, long N, long iterations, float eps) {
    for (long i = 0; i < N; i++) {
        float *row = matrix + i * N, most = row[0], sum = 0;
        for (long j = 1; j < N; j++) most = row[j] > most ? row[j] : most;
        for (long j = 0; j < N; j++) sum += row[j] = expf(row[j] - most);
        for (long j = 0; j < N; j++) row[j] = row[j] / sum + eps;
    }
    for (long step = 0; step < 2 * iterations - 1; step++) {
        float sums[N];
        for (long i = 0; i < N; i++) sums[i] = 0;
        for (long i = 0; i < N; i++)
            for (long j = 0; j < N; j++) sums[step % 2 ? i : j] += matrix[i * N + j];
        for (long i = 0; i < N; i++) sums[i] += eps;
        for (long i = 0; i < N; i++)
            for (long j = 0; j < N; j++) matrix[i * N + j] /= sums[step % 2 ? i : j];
    }
}

/* pre and post [T, N], res [T, N, N] of the streams x [T, N W]; mix [T, (2 + N) N] is for use in between (eq. 3-8). */
void fathom_stream_coefficients(const float *x, const float *fn, const float *base, const float *scale, long T, long N, long W,
                                long iterations, float eps, float norm_eps, float *mix, float *pre, float *post, float *res, int threads) {
    long R = (2 + N) * N, I = N * W;
    fathom_linear(fn, 0, FLOAT, R, I, x, T, 1, 0, mix, threads);
    for (long t = 0; t < T; t++) {
        float inverse_rms = 1 / sqrtf(dot_float(x + t * I, x + t * I, I) / I + norm_eps);
        const float *m = mix + t * R;
        for (long n = 0; n < N; n++) {
            pre[t * N + n] = sigmoid(m[n] * inverse_rms * scale[0] + base[n]) + eps;
            post[t * N + n] = 2 * sigmoid(m[N + n] * inverse_rms * scale[1] + base[N + n]);
        }
        for (long i = 0; i < N * N; i++) res[t * N * N + i] = m[2 * N + i] * inverse_rms * scale[2] + base[2 * N + i];
        balance(res + t * N * N, N, iterations, eps);
    }
}

/* sum += factor times `length` numbers from the `index`-th on. */
static inline void add(float *sum, float factor, const void *numbers, int bf16, long index, long length) {
    if (bf16) add_bf16(sum, factor, (const uint16_t *)numbers + index, length);
    else add_float(sum, factor, (const float *)numbers + index, length);
}

/* sum_n pre_n x_n [T, W] of x [T, N, W] (eq. 1). */
void fathom_streams_in(const void *x, int bf16, const float *pre, long T, long N, long W, void *out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long t = 0; t < T; t++) {
        float sum[W];
        memset(sum, 0, sizeof sum);
        for (long n = 0; n < N; n++) add(sum, pre[t * N + n], x, bf16, (t * N + n) * W, W);
        put(sum, W, out, bf16, t * W);
    }
}

/* New streams [T, N, W]: post_k y + sum_j res[j, k] x_j (eq. 1). */
void fathom_streams_out(const void *x, const void *y, int bf16, const float *post, const float *res, long T, long N, long W, void *out,
                        int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long t = 0; t < T; t++)
        for (long k = 0; k < N; k++) {
            float sum[W];
            memset(sum, 0, sizeof sum);
            for (long j = 0; j < N; j++) add(sum, res[(t * N + j) * N + k], x, bf16, (t * N + j) * W, W);
            add(sum, post[t * N + k], y, bf16, t * W, W);
            put(sum, W, out, bf16, (t * N + k) * W);
        }
}

/* Softmax attention out [B, S, H, D] over seen window keys [B, T, D], visible or selected entries [B, ., D] and the sink; rows of entries
   lie `entry_row` numbers apart. `selected` [B, S, K] may be null, and then `count` entries from `first` on are read. */
void fathom_attention(const float *q, const void *window, const void *entries, int bf16, const int64_t *key_place, const int64_t *query_place,
                      const int64_t *reach, const int64_t *first, const int64_t *count, const int64_t *selected, const float *sink, long B,
                      long S, long H, long D, long T, long K, long entry_row, long most, float *out, int threads) {
    long size = bf16 ? 2 : 4;
    float scale = 1 / sqrtf(D);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const char **keys = malloc(most * sizeof(char *));
        float *score = malloc(most * sizeof(float));
#pragma omp for schedule(static)
        for (long i = 0; i < B * S * H; i++) {
            long h = i % H, s = i / H, b = s / S, seen = 0;
            for (long t = 0; t < T; t++) {
                int64_t distance = query_place[s] - key_place[b * T + t];
                if (distance >= 0 && distance <= reach[s]) keys[seen++] = (const char *)window + (b * T + t) * D * size;
            }
            const char *row = (const char *)entries + b * entry_row * size;
            if (selected)
                for (long k = 0; k < K; k++) {
                    if (selected[s * K + k] >= 0) keys[seen++] = row + selected[s * K + k] * D * size;
                }
            else if (entries)
                for (long m = first[s]; m < first[s] + count[s]; m++) keys[seen++] = row + m * D * size;
            float top = sink[h], sum = 0;
            for (long j = 0; j < seen; j++) {
                score[j] = scale * (bf16 ? dot_bf16((const uint16_t *)keys[j], q + i * D, D) : dot_float((const float *)keys[j], q + i * D, D));
                top = score[j] > top ? score[j] : top;
            }
            for (long j = 0; j < seen; j++) sum += score[j] = expf(score[j] - top);
            sum += expf(sink[h] - top);
            memset(out + i * D, 0, D * sizeof(float));
            for (long j = 0; j < seen; j++) {
                if (bf16) add_bf16(out + i * D, score[j] / sum, (const uint16_t *)keys[j], D);
                else add_float(out + i * D, score[j] / sum, (const float *)keys[j], D);
            }
        }
        free(keys);
        free(score);
    }
}

/* Numbers in the order of floats, smallest first. */
static inline uint32_t rank_of(float score) {
    uint32_t bits;
    memcpy(&bits, &score, 4);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/* The k-th largest rank of `length` scores, 11 bits at a time, and how many of its equals belong to the k best. */
static uint32_t kth_rank(const float *score, long length, long k, long *equals) {
    static const int shifts[3] = {21, 10, 0}, bits[3] = {11, 11, 10};
    uint32_t found = 0, mask = 0;
    for (int pass = 0; pass < 3; pass++) {
        long counts[1 << 11] = {0}, bucket = (1L << bits[pass]) - 1;
        for (long m = 0; m < length; m++) {
            uint32_t rank = rank_of(score[m]);
            if ((rank & mask) == found) counts[rank >> shifts[pass] & bucket]++;
        }
        for (; counts[bucket] < k; bucket--) k -= counts[bucket];
        found |= (uint32_t)bucket << shifts[pass];
        mask |= ((1u << bits[pass]) - 1) << shifts[pass];
    }
    *equals = k;
    return found;
}

/* Slots [B S, K] of the K best of each query's `count` entries from `first` on, ascending, of equals the earlier; -1 behind the last.
   Queries [B S, H, D] and weights [B S, H] against keys [B, ., D]; a score is sum_h weight_h relu(q_h k) (eq. 16). Heads lie in the
   lanes, a block of 16 after the other: turned [D, 16] and score [most] are for use in between. */
void fathom_index_topk(const float *q, const float *weight, const void *keys, int bf16, const int64_t *first, const int64_t *count, long B,
                       long S, long H, long D, long K, long key_row, float *turned, float *score, int64_t *selected, int threads) {
    for (long s = 0; s < B * S; s++) {
        long visible = count[s];
        int64_t *slots = selected + s * K;
        if (visible <= K) {
            for (long k = 0; k < K; k++) slots[k] = k < visible ? first[s] + k : -1;
            continue;
        }
        const void *row = nth(keys, bf16, s / S * key_row + first[s] * D, 1);
        for (long head = 0; head < H; head += LANES) {
            lanes weights = {0};
            memset(turned, 0, D * LANES * sizeof(float));
            for (long h = head; h < H && h < head + LANES; h++) {
                weights[h - head] = weight[s * H + h];
                for (long d = 0; d < D; d++) turned[d * LANES + h - head] = q[(s * H + h) * D + d];
            }
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
            for (long m = 0; m < visible; m++) {
                lanes a = {0}, b = {0};
                long d = 0;
                for (; d + 2 <= D; d += 2) {
                    a += load(turned + d * LANES) * number(row, bf16, m * D + d);
                    b += load(turned + d * LANES + LANES) *
                         number(row, bf16, m * D + d + 1);
                }
                if (d < D) a += load(turned + d * LANES) * number(row, bf16, m * D + d);
                lanes product = a + b;
                float sum = total(weights * (lanes)((words)product & (words)(product > 0))) + 0.0f; /* no -0, which equals 0 but sorts before it */
                score[m] = head ? score[m] + sum : sum;
            }
        }
        long equals, taken = 0;
        uint32_t last = kth_rank(score, visible, K, &equals);
        for (long m = 0; m < visible; m++) {
            uint32_t rank = rank_of(score[m]);
            if (rank > last || (rank == last && equals-- > 0)) slots[taken++] = first[s] + m;
        }
    }
}
