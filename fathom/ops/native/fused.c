/* Parts of a sublayer for a few tokens: the kernels of kernels.c one after the other, with no Python between them.

   What one step hands to the next is what torch would: floats, settled to bfloat16 where `bf16`, and to the release's formats where a layer
   rounds (fathom/quant/). N is the number of tokens. */

enum { SHARED_WORK = 1 << 16 };

/* A layer's matrix [O, I]; with ROUNDS in its kind, inputs are rounded to FP8 before the product. */
#define PROJECTION(name) const void *name##_numbers, const void *name##_scale, int name##_kind
#define THIS(name) (matrix){name##_numbers, name##_scale, name##_kind}

static inline float *room(long floats) { return malloc((floats ? floats : 1) * sizeof(float)); }

static void widen(const void *x, int bf16, long length, float *out) {
    if (!bf16) memcpy(out, x, length * sizeof(float));
    else
        for (long i = 0; i < length; i++) out[i] = one_bf16((const uint16_t *)x + i);
}

/* x [N, I] times the transposed matrix [O, I], or in G groups (fathom_linear) -> out [N, O]. */
static void project(matrix m, long O, long I, const float *x, long N, long G, int bf16, float *out, int threads) {
    long length = N * G * I;
    int rounds = m.kind & ROUNDS, coded = format_of(m) >= FP8;
    float *rounded = rounds || coded ? room(2 * length) : 0;
    if (rounds) {
        memcpy(rounded, x, length * sizeof(float));
        for (long row = 0; row < N * G; row++) round_fp8(rounded + row * I, I, INPUT_BLOCK);
        x = rounded;
    }
    fathom_linear(m.numbers, m.scale, m.kind, O, I, x, N, G, coded ? rounded + length : 0, out, O * I < SHARED_WORK ? 1 : threads);
    settle(out, N * O, bf16);
    free(rounded);
}

static void normalise(float *x, const float *weight, long N, long D, float eps, int bf16) {
    fathom_rms_normalise(x, 0, weight, N, D, eps, x, 1);
    settle(x, N * D, bf16);
}

static void rotate(float *x, const float *turn, long N, long A, long D, long C, int inverse, int bf16) {
    fathom_rotate(x, 0, turn, N, A, D, C, inverse, x, 1);
    settle(x, N * A * D, bf16);
}

/* Latent [N, R] = norm(down x) and queries [N, H, D] = turned norms of up latent, of x [N, W]. */
void fathom_low_rank_queries(const void *x, int bf16, PROJECTION(down), const float *norm, PROJECTION(up), const float *turn, long N, long W,
                             long R, long H, long D, long C, float eps, void *latent, void *q, int threads) {
    float *wide = room(N * (W + R + H * D)), *low = wide + N * W, *high = low + N * R;
    widen(x, bf16, N * W, wide);
    project(THIS(down), R, W, wide, N, 1, bf16, low, threads);
    normalise(low, norm, N, R, eps, bf16);
    project(THIS(up), H * D, R, low, N, 1, bf16, high, threads);
    normalise(high, 0, N * H, D, eps, bf16);
    rotate(high, turn, N, H, D, C, 0, bf16);
    put(low, N * R, latent, bf16, 0);
    put(high, N * H * D, q, bf16, 0);
    free(wide);
}

/* The indexer's queries [N, H, D] of latent [N, R]; where it `rounds`, through Hadamard's matrix to FP4. */
void fathom_index_queries(const void *latent, int bf16, PROJECTION(up), const float *turn, long N, long R, long H, long D, long C, int rounds,
                          void *q, int threads) {
    float *wide = room(N * (R + H * D)), *high = wide + N * R;
    widen(latent, bf16, N * R, wide);
    project(THIS(up), H * D, R, wide, N, 1, bf16, high, threads);
    rotate(high, turn, N, H, D, C, 0, bf16);
    for (long row = 0; rounds && row < N * H; row++) {
        turn_hadamard(high + row * D, D);
        settle(high + row * D, D, bf16);
        round_fp4(high + row * D, D);
    }
    put(high, N * H * D, q, bf16, 0);
    free(wide);
}

/* Keys, which are the values too, [N, D] of x [N, W]; where they are `rounded`, all but the 2 C turned channels to FP8. */
void fathom_shared_key(const void *x, int bf16, PROJECTION(down), const float *norm, const float *turn, long N, long W, long D, long C, float eps,
                       int rounds, void *out, int threads) {
    float *wide = room(N * (W + D)), *key = wide + N * W;
    widen(x, bf16, N * W, wide);
    project(THIS(down), D, W, wide, N, 1, bf16, key, threads);
    normalise(key, norm, N, D, eps, bf16);
    rotate(key, turn, N, 1, D, C, 0, bf16);
    for (long n = 0; rounds && n < N; n++) round_fp8(key + n * D, D - 2 * C, ENTRY_BLOCK);
    put(key, N * D, out, bf16, 0);
    free(wide);
}

/* The heads' outputs [N, H, D] turned back, each of G groups to R numbers, all of them to the width: out [N, W]. */
void fathom_join_heads(const void *heads, int bf16, const float *turn, PROJECTION(down), PROJECTION(up), long N, long H, long D, long C, long G,
                       long R, long W, void *out, int threads) {
    float *wide = room(N * (H * D + G * R + W)), *low = wide + N * H * D, *high = low + N * G * R;
    widen(heads, bf16, N * H * D, wide);
    rotate(wide, turn, N, H, D, C, 1, bf16);
    project(THIS(down), G * R, H * D / G, wide, N, G, bf16, low, threads);
    project(THIS(up), W, G * R, low, N, 1, bf16, high, threads);
    put(high, N * W, out, bf16, 0);
    free(wide);
}

/* A compressor's values and scores out [N, 2 C] of x [N, W], in float32: the gate's plus the bias [R, C] of the token's place in its block. */
void fathom_compressor_inputs(const void *x, int bf16, PROJECTION(value), PROJECTION(gate), const float *bias, const int64_t *position, long N,
                              long W, long C, long R, float *out, int threads) {
    float *wide = room(N * (W + 2 * C)), *values = wide + N * W, *scores = values + N * C;
    widen(x, bf16, N * W, wide);
    project(THIS(value), C, W, wide, N, 1, 0, values, threads);
    project(THIS(gate), C, W, wide, N, 1, 0, scores, threads);
    for (long n = 0; n < N; n++) {
        memcpy(out + 2 * n * C, values + n * C, C * sizeof(float));
        for (long c = 0; c < C; c++) out[(2 * n + 1) * C + c] = scores[n * C + c] + bias[position[n] % R * C + c];
    }
    free(wide);
}

/* An expert's output [N, W] for x [N, W]: down(silu(min(gate x, limit)) clamp(up x)). */
void fathom_swiglu_expert(const void *x, int bf16, PROJECTION(gate), PROJECTION(up), PROJECTION(down), long N, long W, long F, float limit,
                          void *out, int threads) {
    float *wide = room(N * (2 * W + 2 * F)), *made = wide + N * W, *gates = made + N * W, *ups = gates + N * F;
    widen(x, bf16, N * W, wide);
    project(THIS(gate), F, W, wide, N, 1, bf16, gates, threads);
    project(THIS(up), F, W, wide, N, 1, bf16, ups, threads);
    for (long i = 0; i < N * F; i++) {
        float g = gates[i] > limit ? limit : gates[i], u = ups[i] > limit ? limit : ups[i] < -limit ? -limit : ups[i];
        gates[i] = g / (1 + expf(-g)) * u;
    }
    settle(gates, N * F, bf16);
    project(THIS(down), W, F, gates, N, 1, bf16, made, threads);
    put(made, N * W, out, bf16, 0);
    free(wide);
}

/* Affinities [N, E] = sqrt(softplus(matrix x)), K experts a token (the best of affinity plus bias [E], unless they are `given`), and their
   weights [N, K], which sum to `scaling`. Returns 1, having chosen nothing, where a given expert is none of the E. */
int fathom_route(const void *x, int bf16, const float *rows, const float *bias, int given, long N, long W, long E, long K, float scaling,
                 float *affinity, int64_t *expert, float *weight, int threads) {
    float *wide = room(N * W);
    for (long i = 0; given && i < N * K; i++)
        if (expert[i] < 0 || expert[i] >= E) {
            free(wide);
            return 1;
        }
    widen(x, bf16, N * W, wide);
    project((matrix){(const char *)rows, 0, FLOAT}, E, W, wide, N, 1, 0, affinity, threads);
    for (long n = 0; n < N; n++) {
        float *own = affinity + n * E, sum = 0;
        for (long e = 0; e < E; e++) own[e] = sqrtf(own[e] > 20 ? own[e] : log1pf(expf(own[e])));
        for (long k = 0; k < K; k++) {
            long best = -1;
            for (long e = 0; !given && e < E; e++) {
                int taken = 0;
                for (long j = 0; j < k; j++) taken |= expert[n * K + j] == e;
                if (!taken && (best < 0 || own[e] + bias[e] > own[best] + bias[best])) best = e;
            }
            if (!given) expert[n * K + k] = best;
            sum += weight[n * K + k] = own[expert[n * K + k]];
        }
        for (long k = 0; k < K; k++) weight[n * K + k] = weight[n * K + k] / sum * scaling;
    }
    free(wide);
    return 0;
}

/* What a sublayer reads [T, W] of the streams x [T, N, W], with pre [T, N], and post [T, N] and res [T, N, N] for what it adds (eq. 1-8). */
void fathom_open_streams(const void *x, int bf16, const float *fn, const float *base, const float *scale, long T, long N, long W, long iterations,
                         float eps, float norm_eps, void *out, float *pre, float *post, float *res, int threads) {
    float *wide = bf16 ? room(T * N * W) : 0, *mix = room(T * (2 + N) * N);
    if (bf16) widen(x, bf16, T * N * W, wide);
    fathom_stream_coefficients(bf16 ? wide : x, fn, base, scale, T, N, W, iterations, eps, norm_eps, mix, pre, post, res,
                               (2 + N) * N * N * W < SHARED_WORK ? 1 : threads);
    fathom_streams_in(x, bf16, pre, T, N, W, out, T * N * W < SHARED_WORK ? 1 : threads);
    free(wide);
    free(mix);
}
