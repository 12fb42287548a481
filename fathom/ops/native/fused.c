/* Parts of a sublayer for a few tokens: the kernels of kernels.c one after the other, with no Python between them.

   What one step hands to the next is what torch would: numbers of the inputs' kind, and rounded to the release's formats where a layer does so
   (fathom/quant/). N is the number of tokens. */

enum { SHARED_WORK = 1 << 16 };

/* A layer's matrix [O, I]; with ROUNDS in its kind, inputs are rounded to FP8 before the product. */
#define PROJECTION(name) const void *name##_numbers, const void *name##_scale, int name##_kind
#define THIS(name) (matrix){name##_numbers, name##_scale, name##_kind}

/* x [N, I] times the transposed matrix [O, I], or in G groups (multiply) -> out [N, O], of x's kind or floats. */
static void project(matrix m, long O, long I, const void *x, int bf16, long N, long G, void *out, int out_bf16, int threads) {
    float *rounded = m.kind & ROUNDS ? room(N * G * I) : 0;
    for (long row = 0; rounded && row < N * G; row++) {
        float *own = rounded + row * I;
        widen(nth(x, bf16, row, I), bf16, I, own);
        round_fp8(own, I, INPUT_BLOCK);
    }
    if (rounded) x = rounded, bf16 = 0;
    multiply(m, O, I, x, bf16, N, G, out, out_bf16, O * I < SHARED_WORK ? 1 : threads);
    free(rounded);
}

/* Latent [N, R] = norm(down x) and queries [N, H, D] = turned norms of up latent, of x [N, W]. */
void fathom_low_rank_queries(const void *x, int bf16, PROJECTION(down), const float *norm, PROJECTION(up), const float *turn, long N, long W,
                             long R, long H, long D, long C, float eps, void *latent, void *q, int threads) {
    project(THIS(down), R, W, x, bf16, N, 1, latent, bf16, threads);
    fathom_rms_normalise(latent, bf16, norm, N, R, eps, latent, 1);
    project(THIS(up), H * D, R, latent, bf16, N, 1, q, bf16, threads);
    fathom_rms_normalise(q, bf16, 0, N * H, D, eps, q, 1);
    fathom_rotate(q, bf16, turn, N, H, D, C, 0, q, 1);
}

/* The indexer's queries [N, H, D] of latent [N, R]; where it `rounds`, through Hadamard's matrix to FP4. */
void fathom_index_queries(const void *latent, int bf16, PROJECTION(up), const float *turn, long N, long R, long H, long D, long C, int rounds,
                          void *q, int threads) {
    project(THIS(up), H * D, R, latent, bf16, N, 1, q, bf16, threads);
    fathom_rotate(q, bf16, turn, N, H, D, C, 0, q, 1);
    for (long row = 0; rounds && row < N * H; row++) {
        float space[D];
        widen(nth(q, bf16, row, D), bf16, D, space);
        turn_hadamard(space, D);
        settle(space, D, bf16);
        round_fp4(space, D);
        put(space, D, q, bf16, row * D);
    }
}

/* Keys, which are the values too, [N, D] of x [N, W]; where they are `rounded`, all but the 2 C turned channels to FP8. */
void fathom_shared_key(const void *x, int bf16, PROJECTION(down), const float *norm, const float *turn, long N, long W, long D, long C, float eps,
                       int rounds, void *out, int threads) {
    project(THIS(down), D, W, x, bf16, N, 1, out, bf16, threads);
    fathom_rms_normalise(out, bf16, norm, N, D, eps, out, 1);
    fathom_rotate(out, bf16, turn, N, 1, D, C, 0, out, 1);
    for (long n = 0; rounds && n < N; n++) {
        float space[D];
        widen(nth(out, bf16, n, D), bf16, D, space);
        round_fp8(space, D - 2 * C, ENTRY_BLOCK);
        put(space, D, out, bf16, n * D);
    }
}

/* The heads' outputs [N, H, D] turned back, each of G groups to R numbers, all of them to the width: out [N, W]. */
void fathom_join_heads(const void *heads, int bf16, const float *turn, PROJECTION(down), PROJECTION(up), long N, long H, long D, long C, long G,
                       long R, long W, void *out, int threads) {
    float *turned = room(N * (H * D + G * R)), *low = turned + N * H * D;
    fathom_rotate(heads, bf16, turn, N, H, D, C, 1, turned, 1);
    project(THIS(down), G * R, H * D / G, turned, bf16, N, G, low, bf16, threads);
    project(THIS(up), W, G * R, low, bf16, N, 1, out, bf16, threads);
    free(turned);
}

/* A compressor's values and scores out [N, 2 C] of x [N, W], in float32: the gate's plus the bias [R, C] of the token's place in its block. */
void fathom_compressor_inputs(const void *x, int bf16, PROJECTION(value), PROJECTION(gate), const float *bias, const int64_t *position, long N,
                              long W, long C, long R, float *out, int threads) {
    float *values = room(2 * N * C), *scores = values + N * C;
    project(THIS(value), C, W, x, bf16, N, 1, values, 0, threads);
    project(THIS(gate), C, W, x, bf16, N, 1, scores, 0, threads);
    for (long n = 0; n < N; n++) {
        memcpy(out + 2 * n * C, values + n * C, C * sizeof(float));
        for (long c = 0; c < C; c++) out[(2 * n + 1) * C + c] = scores[n * C + c] + bias[position[n] % R * C + c];
    }
    free(values);
}

/* An expert's output [N, W] for x [N, W]: down(silu(min(gate x, limit)) clamp(up x)). */
void fathom_swiglu_expert(const void *x, int bf16, PROJECTION(gate), PROJECTION(up), PROJECTION(down), long N, long W, long F, float limit,
                          void *out, int threads) {
    float *gates = room(2 * N * F), *ups = gates + N * F;
    project(THIS(gate), F, W, x, bf16, N, 1, gates, bf16, threads);
    project(THIS(up), F, W, x, bf16, N, 1, ups, bf16, threads);
    fathom_swiglu(gates, ups, bf16, NULL, N, F, limit, gates, bf16, 1);
    project(THIS(down), W, F, gates, bf16, N, 1, out, bf16, threads);
    free(gates);
}

/* Affinities [N, E] = sqrt(softplus(matrix x)), K experts a token (the best of affinity plus bias [E], unless they are `given`), and their
   weights [N, K], which sum to `scaling`. Returns 1, having chosen nothing, where a given expert is none of the E. */
int fathom_route(const void *x, int bf16, const float *rows, const float *bias, int given, long N, long W, long E, long K, float scaling,
                 float *affinity, int64_t *expert, float *weight, int threads) {
    for (long i = 0; given && i < N * K; i++)
        if (expert[i] < 0 || expert[i] >= E) return 1;
    project((matrix){(const char *)rows, 0, FLOAT}, E, W, x, bf16, N, 1, affinity, 0, threads);
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
    return 0;
}
