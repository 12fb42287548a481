/* The operators for a few tokens at a time, as in decoding, where every weight is read once and used once or a few times.

   A row of a matrix is read from front to back by one thread, which memory answers fastest (docs/performance.md). A sum's order depends on
   its length alone: neither the threads nor the other tokens of a call show in a bit of the result. Everything is contiguous, sums are
   in float32; `bf16` says that numbers are bfloat16. The Python files beside this one say what is computed. */

#if defined(__clang__) || __GNUC__ >= 12
#define MOVED(x, ...) __builtin_shufflevector(x, x, __VA_ARGS__)
#else
#define MOVED(x, ...) __builtin_shuffle(x, (words){__VA_ARGS__})
#endif

/* The sum of the lanes, halves on halves. */
static inline float total(lanes sums) {
    sums += MOVED(sums, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    sums += MOVED(sums, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    sums += MOVED(sums, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    sums += MOVED(sums, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    return sums[0];
}

static inline lanes larger(lanes a, lanes b) {
    words first = (words)(a > b);
    return (lanes)(((words)a & first) | ((words)b & ~first));
}

static inline float largest_of(lanes x) {
    x = larger(x, MOVED(x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    x = larger(x, MOVED(x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    x = larger(x, MOVED(x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    x = larger(x, MOVED(x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
    return x[0];
}

/* e^x to a relative 2.3e-7; from -87 down and from 88 up as there. x = k ln 2 + r, e^r by its series. */
static inline lanes exponential(lanes x) {
    lanes low = {0}, high = {0}, magic = {0};
    low -= 87, high += 88, magic += 0x1.8p23f;
    x = (lanes)(((words)low & (words)(x < low)) | ((words)high & (words)(x > high)) | ((words)x & ~(words)(x < low) & ~(words)(x > high)));
    lanes shifted = x * 0x1.715476p+0f + magic, k = shifted - magic;
    lanes r = (x - k * 0x1.62e4p-1f) + k * -0x1.7f7d1cp-20f;
    lanes sum = 1 + r * (1 + r * (1.f / 2 + r * (1.f / 6 + r * (1.f / 24 + r * (1.f / 120 + r * (1.f / 720))))));
    return (lanes)((words)sum + ((words)shifted << 23));
}

static inline lanes gate(lanes x) { return 1 / (1 + exponential(-x)); }

/* x [length] -> e^(x - top); returns their sum. */
static inline float exponentials(float *x, long length, float top) {
    lanes sums = {0};
    long j = 0;
    for (; j + LANES <= length; j += LANES) sums += *(lanes *)(x + j) = exponential(load(x + j) - top);
    float sum = total(sums);
    if (j < length) {
        lanes rest = exponential(load_rest(x + j, length - j) - top);
        for (long i = 0; j + i < length; i++) sum += x[j + i] = rest[i];
    }
    return sum;
}

/* NAME: a row times x. NAME_4: the same bits for four x that lie `step` numbers apart, while the row is read and widened once. (Sums in
   arrays would go through memory: GCC keeps only what has a name of its own in registers.) */
#define START(n) lanes a##n = {0}, b##n = {0}, c##n = {0}, d##n = {0};
#define STEP(n, own)                      \
    a##n += row_a * load(own);            \
    b##n += row_b * load(own + LANES);    \
    c##n += row_c * load(own + 2 * LANES); \
    d##n += row_d * load(own + 3 * LANES);
#define JOIN(n) lanes sum##n = (a##n + b##n) + (c##n + d##n);
#define FOUR(DO) DO(0) DO(1) DO(2) DO(3)
#define STEP_OF(n) STEP(n, (x + n * step + i))
#define MORE_OF(n) sum##n += more * load(x + n * step + i);
#define REST_OF(n) sum##n += more * load_rest(x + n * step + i, length - i);
#define TOTAL_OF(n) out[n] = total(sum##n);
#define DOT(NAME, TYPE, LOAD, REST)                                                                 \
    static inline float NAME(const TYPE *row, const float *x, long length) {                        \
        START(0)                                                                                    \
        long i = 0;                                                                                 \
        for (; i + 4 * LANES <= length; i += 4 * LANES) {                                           \
            lanes row_a = LOAD(row + i), row_b = LOAD(row + i + LANES);                             \
            lanes row_c = LOAD(row + i + 2 * LANES), row_d = LOAD(row + i + 3 * LANES);             \
            STEP(0, (x + i))                                                                        \
        }                                                                                           \
        JOIN(0)                                                                                     \
        for (; i + LANES <= length; i += LANES) sum0 += LOAD(row + i) * load(x + i);                \
        if (i < length) sum0 += REST(row + i, length - i) * load_rest(x + i, length - i);           \
        return total(sum0);                                                                         \
    }                                                                                               \
    static inline void NAME##_4(const TYPE *row, const float *x, long step, long length, float *out) { \
        FOUR(START)                                                                                 \
        long i = 0;                                                                                 \
        for (; i + 4 * LANES <= length; i += 4 * LANES) {                                           \
            lanes row_a = LOAD(row + i), row_b = LOAD(row + i + LANES);                             \
            lanes row_c = LOAD(row + i + 2 * LANES), row_d = LOAD(row + i + 3 * LANES);             \
            FOUR(STEP_OF)                                                                           \
        }                                                                                           \
        FOUR(JOIN)                                                                                  \
        for (; i + LANES <= length; i += LANES) {                                                   \
            lanes more = LOAD(row + i);                                                             \
            FOUR(MORE_OF)                                                                           \
        }                                                                                           \
        if (i < length) {                                                                           \
            lanes more = REST(row + i, length - i);                                                 \
            FOUR(REST_OF)                                                                           \
        }                                                                                           \
        FOUR(TOTAL_OF)                                                                              \
    }

#define ADD(NAME, TYPE, LOAD, ONE)                                                                  \
    static inline void NAME(float *sum, float factor, const TYPE *row, long length) {               \
        long i = 0;                                                                                 \
        for (; i + LANES <= length; i += LANES) *(lanes *)(sum + i) += factor * LOAD(row + i);      \
        for (; i < length; i++) sum[i] += factor * ONE(row + i);                                    \
    }

DOT(dot_float, float, load, load_rest)
DOT(dot_bf16, uint16_t, load_bf16, load_rest_bf16)
ADD(add_float, float, load, one)
ADD(add_bf16, uint16_t, load_bf16, one_bf16)

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

/* `out` may be x. The last 2 C channels of x [N, A, D] as complex numbers times turn [N, C], or its conjugates where `inverse`. */
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
        if (out != x) memcpy((char *)out + row * D * (bf16 ? 2 : 4), nth(x, bf16, row, D), (D - 2 * C) * (bf16 ? 2 : 4));
        put(made, 2 * C, out, bf16, row * D + D - 2 * C);
    }
}

/* Pairs of token and expert, P = N K, sorted by expert into `order`, so that an expert's matrices are read once: each pair's activation
   hidden [P, F] of x [N, W], in that order; own [P, W] is for use in between. `bf16`: gate and up are narrowed, as products of such x
   are, and the activation before it is rounded. Returns 1, having done nothing, where an expert is none of the E. */
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
        float token[W];
        memcpy(token, x + order[p] / K * W, W * sizeof(float));
        if (kind & ROUNDS) round_fp8(token, W, INPUT_BLOCK);
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
    for (long p = 0; kind & ROUNDS && p < P; p++) {
        settle(hidden + p * F, F, bf16);
        round_fp8(hidden + p * F, F, INPUT_BLOCK);
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

/* sum_n factor[n] rows[n] of N rows [W] from the `index`-th number on -> out, from its `place`-th on. */
ALWAYS void weigh(const void *rows, int bf16, long index, long N, const float *factor, long W, void *out, long place) {
    for (long w = 0; w < W; w += LANES) {
        lanes sum = factor[0] * load_part(rows, bf16, index + w, W - w);
        for (long n = 1; n < N; n++) sum += factor[n] * load_part(rows, bf16, index + n * W + w, W - w);
        store_part(sum, out, bf16, place + w, W - w);
    }
}

static inline void weigh_any(const void *rows, int bf16, long index, long N, const float *factor, long W, void *out, long place) {
    if (N == 4 && bf16) weigh(rows, 1, index, 4, factor, W, out, place);
    else if (N == 4) weigh(rows, 0, index, 4, factor, W, out, place);
    else weigh(rows, bf16, index, N, factor, W, out, place);
}

/* The N new streams of one token. */
ALWAYS void streams_of(const void *x, const void *y, int bf16, const float *post, const float *res, long t, long N, long W, void *out) {
    for (long k = 0; k < N; k++)
        for (long w = 0; w < W; w += LANES) {
            lanes sum = res[t * N * N + k] * load_part(x, bf16, t * N * W + w, W - w);
            for (long n = 1; n < N; n++) sum += res[(t * N + n) * N + k] * load_part(x, bf16, (t * N + n) * W + w, W - w);
            store_part(sum + post[t * N + k] * load_part(y, bf16, t * W + w, W - w), out, bf16, (t * N + k) * W + w, W - w);
        }
}

/* sum_n pre_n x_n [T, W] of x [T, N, W] (eq. 1). */
void fathom_streams_in(const void *x, int bf16, const float *pre, long T, long N, long W, void *out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long t = 0; t < T; t++) weigh_any(x, bf16, t * N * W, N, pre + t * N, W, out, t * W);
}

/* New streams [T, N, W]: post_k y + sum_j res[j, k] x_j (eq. 1). */
void fathom_streams_out(const void *x, const void *y, int bf16, const float *post, const float *res, long T, long N, long W, void *out,
                        int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long t = 0; t < T; t++) {
        if (N == 4 && bf16) streams_of(x, y, 1, post, res, t, 4, W, out);
        else if (N == 4) streams_of(x, y, 0, post, res, t, 4, W, out);
        else streams_of(x, y, bf16, post, res, t, N, W, out);
    }
}

/* scale q_n . key_j for each of n heads [., D] and `seen` keys -> score [n, seen]. */
static inline void score_keys(const float *q, const char **keys, long seen, int bf16, long n, long D, float scale, float *score) {
    for (long j = 0; j < seen; j++) {
        float four[4];
        if (n == 4 && bf16) dot_bf16_4((const uint16_t *)keys[j], q, D, D, four);
        else if (n == 4) dot_float_4((const float *)keys[j], q, D, D, four);
        else
            for (long h = 0; h < n; h++)
                four[h] = bf16 ? dot_bf16((const uint16_t *)keys[j], q + h * D, D) : dot_float((const float *)keys[j], q + h * D, D);
        for (long h = 0; h < n; h++) score[h * seen + j] = scale * four[h];
    }
}

/* out [n, D] = sum_j weight [n, j] key_j for n heads, 1 or 4, each sum in the order of the keys. */
#define MIX_START(n) lanes sum##n = {0};
#define MIX_STEP(n) sum##n += weight[n * seen + j] * key;
#define MIX_END(n) *(lanes *)(out + n * D + d) = sum##n;
#define MIX(NAME, TYPE, LOAD, HEADS)                                                                          \
    static void NAME(const char **keys, long seen, long D, const float *weight, float *out) {                \
        for (long d = 0; d + LANES <= D; d += LANES) {                                                        \
            HEADS(MIX_START)                                                                                  \
            for (long j = 0; j < seen; j++) {                                                                 \
                lanes key = LOAD((const TYPE *)keys[j] + d);                                                  \
                HEADS(MIX_STEP)                                                                               \
            }                                                                                                 \
            HEADS(MIX_END)                                                                                    \
        }                                                                                                     \
    }
#define ONE(DO) DO(0)
MIX(mix_float, float, load, ONE)
MIX(mix_float_4, float, load, FOUR)
MIX(mix_bf16, uint16_t, load_bf16, ONE)
MIX(mix_bf16_4, uint16_t, load_bf16, FOUR)

static inline void mix_keys(const char **keys, long seen, int bf16, long n, long D, const float *weight, float *out) {
    if (n == 4) (bf16 ? mix_bf16_4 : mix_float_4)(keys, seen, D, weight, out);
    else
        for (long h = 0; h < n; h++) (bf16 ? mix_bf16 : mix_float)(keys, seen, D, weight + h * seen, out + h * D);
    for (long d = D / LANES * LANES; d < D; d++)
        for (long h = 0; h < n; h++) {
            float sum = 0;
            for (long j = 0; j < seen; j++) sum += weight[h * seen + j] * number(keys[j], bf16, d);
            out[h * D + d] = sum;
        }
}

/* Softmax attention out [B, S, H, D] over seen window keys [B, T, D], visible or selected entries [B, ., D] and the sink; rows of entries
   lie `entry_row` numbers apart. `selected` [B, S, K] may be null, and then `count` entries from `first` on are read. Heads that are
   computed together share what is read, not their sums. */
void fathom_attention(const float *q, const void *window, const void *entries, int bf16, const int64_t *key_place, const int64_t *query_place,
                      const int64_t *reach, const int64_t *first, const int64_t *count, const int64_t *selected, const float *sink, long B,
                      long S, long H, long D, long T, long K, long entry_row, long most, float *out, int threads) {
    long size = bf16 ? 2 : 4, together = B * S * (H / 4) >= threads ? 4 : 1, groups = (H + together - 1) / together;
    float scale = 1 / sqrtf(D);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const char **keys = malloc(most * sizeof(char *));
        float *score = malloc(4 * most * sizeof(float));
#pragma omp for schedule(static)
        for (long i = 0; i < B * S * groups; i++) {
            long h = i % groups * together, s = i / groups, b = s / S, seen = 0, n = H - h < together ? H - h : together;
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
            score_keys(q + (s * H + h) * D, keys, seen, bf16, n, D, scale, score);
            for (long head = 0; head < n; head++) {
                float *own = score + head * seen, top = sink[h + head];
                long j = 0;
                lanes tops = {0};
                for (tops += top; j + LANES <= seen; j += LANES) tops = larger(tops, load(own + j));
                for (top = largest_of(tops); j < seen; j++) top = own[j] > top ? own[j] : top;
                float sum = exponentials(own, seen, top) + expf(sink[h + head] - top);
                for (j = 0; j < seen; j++) own[j] /= sum;
            }
            mix_keys(keys, seen, bf16, n, D, score, out + (s * H + h) * D);
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

/* The k-th largest rank of `length` scores, 8 bits at a time, and how many of its equals belong to the k best. */
static uint32_t kth_rank(const float *score, long length, long k, long *equals) {
    uint32_t found = 0, mask = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        uint32_t counts[256] = {0}, bucket = 255;
        for (long m = 0; m < length; m++) {
            uint32_t rank = rank_of(score[m]);
            if ((rank & mask) == found) counts[rank >> shift & 255]++;
        }
        for (; counts[bucket] < k; bucket--) k -= counts[bucket];
        found |= bucket << shift;
        mask |= 255u << shift;
    }
    *equals = k;
    return found;
}

/* The places of scores that are no less than `least`, at most `room` of them; returns how many, or -1 where there are more. */
static long places_from(const float *score, long count, float least, long room, int64_t *place) {
    long found = 0, m = 0;
#ifdef __AVX512F__
    for (; m + LANES <= count; m += LANES)
        for (uint32_t bits = _mm512_cmp_ps_mask((__m512)load(score + m), (__m512)((lanes){0} + least), _CMP_GE_OQ); bits; bits &= bits - 1) {
            if (found == room) return -1;
            place[found++] = m + __builtin_ctz(bits);
        }
#endif
    for (; m < count; m++)
        if (score[m] >= least) {
            if (found == room) return -1;
            place[found++] = m;
        }
    return found;
}

enum { MOST_GROUPS = 8192 };

/* Slots [K] of the K best of `count` scores, the first of which is slot `first`: ascending, of equals the earlier; -1 behind the last.
   Among many, only those are looked at that are no less than the K-th best of 2 K groups' maxima: K groups at least hold one such. */
static void best_slots(const float *score, long first, long count, long K, int64_t *slots) {
    long equals, taken = 0, groups = (2 * K + LANES - 1) / LANES * LANES, room = 2 * groups, found = -1;
    if (count <= K) {
        for (long k = 0; k < K; k++) slots[k] = k < count ? first + k : -1;
        return;
    }
    if (groups <= MOST_GROUPS && count >= room) {
        float most[groups], kept[room], least;
        int64_t place[room];
        memcpy(most, score, sizeof most);
        for (long m = groups; m < count; m += groups) {
            long g = 0;
            for (; g < groups && m + g + LANES <= count; g += LANES) *(lanes *)(most + g) = larger(load(score + m + g), load(most + g));
            for (; g < groups && m + g < count; g++) most[g] = score[m + g] > most[g] ? score[m + g] : most[g];
        }
        uint32_t rank = kth_rank(most, groups, K, &equals), bits = rank & 0x80000000u ? rank & 0x7fffffffu : ~rank;
        memcpy(&least, &bits, 4);
        found = places_from(score, count, least, room, place);
        if (found < K) found = -1; /* scores that are no numbers */
        for (long i = 0; i < found; i++) kept[i] = score[place[i]];
        uint32_t last = found < 0 ? 0 : kth_rank(kept, found, K, &equals);
        for (long i = 0; i < found; i++) {
            rank = rank_of(kept[i]);
            if (rank > last || (rank == last && equals-- > 0)) slots[taken++] = first + place[i];
        }
    }
    if (found >= 0) return;
    uint32_t last = kth_rank(score, count, K, &equals);
    for (long m = 0; m < count; m++) {
        uint32_t rank = rank_of(score[m]);
        if (rank > last || (rank == last && equals-- > 0)) slots[taken++] = first + m;
    }
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
            best_slots(NULL, first[s], visible, K, slots);
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
        best_slots(score, first[s], visible, K, slots);
    }
}
