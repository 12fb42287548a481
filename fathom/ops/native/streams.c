/* Hyper-connections in training (report 2.2, eq. 1-8): streams opened, closed and differentiated in one pass over each token's numbers.

   x [T, N, W] are the streams. Sixteen tokens lie side by side in the lanes of a vector, so that the twenty rounds of Sinkhorn's divisions are
   additions and products of whole vectors; a lane never sees its neighbours. */

/* row . rows[n] of N rows [W] -> out [N]. */
ALWAYS void project_on(const float *row, const float *rows, long N, long W, float *out) {
    if (N == 4) dot_float_4(row, rows, W, W, out);
    else
        for (long n = 0; n < N; n++) out[n] = dot_float(row, rows + n * W, W);
}

/* Sinkhorn's step number `step` divides by the sums of columns (even) or of rows: which sum a number (i, j) belongs to. */
#define SUM_OF(step, i, j) ((step) % 2 ? (i) : (j))

ALWAYS void sums_of(const lanes *matrix, long N, long step, lanes *sums) {
    for (long i = 0; i < N; i++) sums[i] = (lanes){0};
    for (long i = 0; i < N; i++)
        for (long j = 0; j < N; j++) sums[SUM_OF(step, i, j)] += matrix[i * N + j];
}

/* The softmax of each row of the logits [N, N], and after it what every step leaves: [2 iterations, N, N]; the last one is the result. */
ALWAYS void sinkhorn(const lanes *logits, long N, long iterations, float eps, lanes *softmax, lanes *kept) {
    for (long i = 0; i < N; i++) {
        lanes most = logits[i * N], sum = {0};
        for (long j = 1; j < N; j++) most = larger(most, logits[i * N + j]);
        for (long j = 0; j < N; j++) sum += softmax[i * N + j] = exponential(logits[i * N + j] - most);
        for (long j = 0; j < N; j++) kept[i * N + j] = (softmax[i * N + j] /= sum) + eps;
    }
    for (long step = 0; step < 2 * iterations - 1; step++) {
        const lanes *before = kept + step * N * N;
        lanes *after = kept + (step + 1) * N * N, sums[N];
        sums_of(before, N, step, sums);
        for (long i = 0; i < N; i++) sums[i] = 1 / (sums[i] + eps);
        for (long i = 0; i < N; i++)
            for (long j = 0; j < N; j++) after[i * N + j] = before[i * N + j] * sums[SUM_OF(step, i, j)];
    }
}

/* The gradient of the result becomes that of the logits. With g = y dy, the gradient with respect to log y of y = x / (sum x + eps), a step
   backwards is g <- g - y sum g. */
ALWAYS void sinkhorn_backward(lanes *grad, long N, long iterations, const lanes *softmax, const lanes *kept) {
    lanes sums[N];
    for (long r = 0; r < N * N; r++) grad[r] *= kept[(2 * iterations - 1) * N * N + r];
    for (long step = 2 * iterations - 2; step >= 0; step--) {
        const lanes *after = kept + (step + 1) * N * N;
        sums_of(grad, N, step, sums);
        for (long i = 0; i < N; i++)
            for (long j = 0; j < N; j++) grad[i * N + j] -= after[i * N + j] * sums[SUM_OF(step, i, j)];
    }
    for (long r = 0; r < N * N; r++) grad[r] *= softmax[r] / kept[r]; /* from log(softmax + eps) to log softmax */
    sums_of(grad, N, 1, sums);
    for (long i = 0; i < N; i++)
        for (long j = 0; j < N; j++) grad[i * N + j] -= softmax[i * N + j] * sums[i];
}

/* Of 16 tokens their products with fn over their RMS, and the logits made of them [R]. */
ALWAYS void logits_of(const lanes *mix, lanes inverse_rms, const float *base, const float *scale, long N, lanes *normed, lanes *logits) {
    for (long r = 0; r < (2 + N) * N; r++) {
        normed[r] = mix[r] * inverse_rms;
        logits[r] = normed[r] * scale[r < N ? 0 : r < 2 * N ? 1 : 2] + base[r];
    }
}

/* Rows [count] of lanes -> out [T, count], the tokens from the t-th on. */
ALWAYS void spread(const lanes *rows, long count, long T, long t, float *out) {
    for (long r = 0; r < count; r++)
        for (long i = 0; i < LANES && t + i < T; i++) out[(t + i) * count + r] = rows[r][i];
}

ALWAYS void gather(const float *numbers, long count, long T, long t, lanes *rows) {
    for (long r = 0; r < count; r++) {
        float column[LANES] = {0};
        for (long i = 0; i < LANES && t + i < T; i++) column[i] = numbers[(t + i) * count + r];
        rows[r] = load(column);
    }
}

/* From the mix [R] of 16 tokens: the t-th and those behind it are opened. */
ALWAYS void open_sixteen(const void *x, int bf16, const lanes *mix, lanes inverse_rms, const float *base, const float *scale, long T, long t, long N,
                         long W, long iterations, float eps, void *out, float *pre, float *post, float *res) {
    long R = (2 + N) * N, last = t + LANES < T ? t + LANES : T;
    lanes normed[R], logits[R], softmax[N * N], kept[2 * iterations * N * N];
    logits_of(mix, inverse_rms, base, scale, N, normed, logits);
    sinkhorn(logits + 2 * N, N, iterations, eps, softmax, kept);
    spread(kept + (2 * iterations - 1) * N * N, N * N, T, t, res);
    for (long n = 0; n < 2 * N; n++) logits[n] = n < N ? gate(logits[n]) + eps : 2 * gate(logits[n]);
    spread(logits, N, T, t, pre);
    spread(logits + N, N, T, t, post);
    for (long i = t; i < last; i++) weigh_any(x, bf16, i * N * W, N, pre + i * N, W, out, i * W);
}

static void open_some(const void *x, int bf16, const lanes *mix, lanes inverse_rms, const float *base, const float *scale, long T, long t, long N,
                      long W, long iterations, float eps, void *out, float *pre, float *post, float *res) {
    if (N == 4) open_sixteen(x, bf16, mix, inverse_rms, base, scale, T, t, 4, W, iterations, eps, out, pre, post, res);
    else open_sixteen(x, bf16, mix, inverse_rms, base, scale, T, t, N, W, iterations, eps, out, pre, post, res);
}

/* Of 16 rows of x [T, I], the t-th and those behind it. */
static lanes inverse_rms_of(const void *x, int bf16, long T, long t, long I, float norm_eps) {
    lanes found = {0};
    for (long i = t; i < T && i < t + LANES; i++) {
        lanes even = {0}, odd = {0};
        for (long k = 0; k < I; k += 2 * LANES) {
            lanes first = load_part(x, bf16, i * I + k, I - k), second = load_part(x, bf16, i * I + k + LANES, I - k > LANES ? I - k - LANES : 0);
            even += first * first, odd += second * second;
        }
        found[i - t] = 1 / sqrtf(total(even + odd) / I + norm_eps);
    }
    return found;
}

/* What a sublayer reads [T, W] of the streams x [T, N, W], with pre [T, N], and post [T, N] and res [T, N, N] for what it adds (eq. 1-8): of a few tokens,
   for which fn is read once and from front to back. */
void fathom_open_streams(const void *x, int bf16, const float *fn, const float *base, const float *scale, long T, long N, long W, long iterations,
                         float eps, float norm_eps, void *out, float *pre, float *post, float *res, int threads) {
    long R = (2 + N) * N, I = N * W;
    float *mix = room(T * R);
    multiply((matrix){(const char *)fn, 0, FLOAT}, R, I, x, bf16, T, 1, mix, 0, R * I < SHARED_WORK ? 1 : threads);
    for (long t = 0; t < T; t += LANES) {
        lanes own[R];
        gather(mix, R, T, t, own);
        open_some(x, bf16, own, inverse_rms_of(x, bf16, T, t, I, norm_eps), base, scale, T, t, N, W, iterations, eps, out, pre, post, res);
    }
    free(mix);
}

/* The products of the tokens from the t-th on, at most 48, with fn [R, N W] -> mix [V][R], and the tokens' inverse RMS [V]; `columns` [N W, 48]. */
static void mix_of(const void *x, int bf16, const float *fn, long T, long t, long N, long W, float norm_eps, uint32_t *columns, lanes *mix,
                   lanes *inverse_rms) {
    long R = (2 + N) * N, I = N * W, V = (T - t + LANES - 1) / LANES < WIDE ? (T - t + LANES - 1) / LANES : WIDE;
    for (long v = 0; v < V; v++) {
        const void *column[LANES];
        long here = T - t - v * LANES < LANES ? T - t - v * LANES : LANES;
        lanes squares = {0};
        for (long c = 0; c < here; c++) column[c] = nth(x, bf16, t + v * LANES + c, I);
        if (bf16) pack_widened(column, here, I, columns + v * I * LANES);
        else pack_columns(column, here, I, 0, columns + v * I * LANES);
        for (long i = 0; i < I; i++) {
            lanes own = *(const lanes *)(columns + (v * I + i) * LANES);
            squares += own * own;
        }
        for (long c = 0; c < LANES; c++) inverse_rms[v][c] = 1 / sqrtf(squares[c] / I + norm_eps);
    }
    for (long r = 0; r < R; r += ROWS) {
        const uint32_t *row[ROWS];
        lanes sums[ROWS * WIDE];
        for (long i = 0; i < ROWS; i++) row[i] = (const uint32_t *)(fn + (r + i < R ? r + i : R - 1) * I);
        KERNELS[0][0][V - 1](row, columns, I * LANES, I, sums, 0);
        for (long i = 0; i < ROWS && r + i < R; i++)
            for (long v = 0; v < V; v++) mix[v * R + r + i] = sums[i * WIDE + v];
    }
}

/* A sublayer's input [T, W], pre and post [T, N], res [T, N, N] (eq. 1-8), of either kind of x (of float32 where fn is null). The products with fn [T, R] are given in `mix` where fn is
   null, else made, and kept there if it is not null; so is inverse_rms [T]. `space` [threads, N W, 48] is for use in between. */
void fathom_streams_opened(const void *x, int bf16, const float *fn, const float *base, const float *scale, long T, long N, long W, long iterations,
                           float eps, float norm_eps, float *mix, float *inverse_rms, void *out, float *pre, float *post, float *res, uint32_t *space,
                           int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (long t = 0; t < T; t += SPAN) {
        long R = (2 + N) * N;
        lanes own[WIDE * R], rms[WIDE];
        if (fn) mix_of(x, bf16, fn, T, t, N, W, norm_eps, space + (long)thread_number() * N * W * SPAN, own, rms);
        for (long v = 0; v < WIDE && t + v * LANES < T; v++) {
            long at = t + v * LANES;
            if (fn && mix) spread(own + v * R, R, T, at, mix);
            if (!fn) {
                gather(mix, R, T, at, own + v * R);
                rms[v] = inverse_rms_of(x, bf16, T, at, N * W, norm_eps);
            }
            if (inverse_rms) spread(rms + v, 1, T, at, inverse_rms);
            open_some(x, bf16, own + v * R, rms[v], base, scale, T, at, N, W, iterations, eps, out, pre, post, res);
        }
    }
}

ALWAYS void reopen_sixteen(const float *x, const float *mix, const float *inverse_rms, const float *base, const float *scale,
                                  const float *grad, const float *pre_grad, const float *post_grad, const float *res_grad, long T, long t, long N,
                                  long W, long iterations, float eps, float *logits_grad, float *mix_grad, float *radial) {
    long R = (2 + N) * N, last = t + LANES < T ? t + LANES : T;
    lanes normed[R], logits[R], softmax[N * N], kept[2 * iterations * N * N], found[R], rms;
    float along[N * LANES];
    memset(along, 0, sizeof along);
    for (long i = t; i < last; i++) {
        float own[N];
        project_on(grad + i * W, x + i * N * W, N, W, own);
        for (long n = 0; n < N; n++) along[n * LANES + i - t] = own[n];
    }
    gather(mix, R, T, t, found);
    gather(inverse_rms, 1, T, t, &rms);
    logits_of(found, rms, base, scale, N, normed, logits);
    sinkhorn(logits + 2 * N, N, iterations, eps, softmax, kept);
    gather(res_grad, N * N, T, t, found + 2 * N);
    sinkhorn_backward(found + 2 * N, N, iterations, softmax, kept);
    gather(pre_grad, N, T, t, found);
    gather(post_grad, N, T, t, found + N);
    for (long n = 0; n < 2 * N; n++) {
        lanes open = gate(logits[n]);
        found[n] = (n < N ? found[n] + load(along + n * LANES) : 2 * found[n]) * open * (1 - open);
    }
    spread(found, R, T, t, logits_grad);
    lanes inward = {0};
    for (long r = 0; r < R; r++) {
        found[r] *= scale[r < N ? 0 : r < 2 * N ? 1 : 2];
        inward += found[r] * normed[r];
        found[r] *= rms;
    }
    spread(found, R, T, t, mix_grad);
    inward *= rms * rms / -(float)(N * W); /* the RMS divides after the product, so its gradient is a multiple of x for each token */
    spread(&inward, 1, T, t, radial);
}

/* From the gradients of what `fathom_streams_opened` made: those of the logits and of mix [T, R], and the multiple of x [T] that belongs to x's. */
void fathom_streams_opened_backward(const float *x, const float *mix, const float *inverse_rms, const float *base, const float *scale,
                                    const float *grad, const float *pre_grad, const float *post_grad, const float *res_grad, long T, long N, long W,
                                    long iterations, float eps, float *logits_grad, float *mix_grad, float *radial, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long t = 0; t < T; t += LANES) {
        if (N == 4) reopen_sixteen(x, mix, inverse_rms, base, scale, grad, pre_grad, post_grad, res_grad, T, t, 4, W, iterations, eps, logits_grad, mix_grad, radial);
        else reopen_sixteen(x, mix, inverse_rms, base, scale, grad, pre_grad, post_grad, res_grad, T, t, N, W, iterations, eps, logits_grad, mix_grad, radial);
    }
}

/* x_grad [T, N, W] += pre_n grad + radial x_n, of a sublayer's input and of the RMS; without `radial` [T] x_grad = pre_n grad, and
   pre_grad [T, N] = x_n . grad (eq. 1). */
void fathom_streams_in_backward(const float *x, const float *pre, const float *radial, const float *grad, long T, long N, long W, float *x_grad,
                                float *pre_grad, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long t = 0; t < T; t++) {
        const float *own = x + t * N * W, *its = grad + t * W;
        for (long n = 0; n < N; n++) {
            float *to = x_grad + (t * N + n) * W, weight = pre[t * N + n];
            if (radial)
                for (long w = 0; w < W; w++) to[w] += weight * its[w] + radial[t] * own[n * W + w];
            else
                for (long w = 0; w < W; w++) to[w] = weight * its[w];
        }
        if (pre_grad) project_on(its, own, N, W, pre_grad + t * N);
    }
}

/* The sums over K tokens of a number of each row, `step` from one token to the next, times V times 16 numbers behind the token's place -> out [8][V]. */
#define STRIPE_OF(V)                                                                                                                                      \
    static __attribute__((noinline)) void stripe_##V(const uint32_t *const *row, long step, const uint32_t *const *places, long offset, long K, lanes *out) { \
        tile(row, step, NULL, places, offset, LANES, K, 0, V, out, 0);                                                                                    \
    }
STRIPE_OF(1) STRIPE_OF(2) STRIPE_OF(3)
typedef void stripe_kernel(const uint32_t *const *, long, const uint32_t *const *, long, long, lanes *);
static stripe_kernel *const STRIPES[WIDE] = {stripe_1, stripe_2, stripe_3};

enum { TOKENS = 64 /* tokens whose numbers stay in the cache of a core */ };

/* What the gradient of mix [T, R] gives to x and to fn [R, N W], W a multiple of 16: x_grad [T, N, W] = mix_grad fn + pre_n grad + radial x_n, and fn_grad =
   mix_grad^T x. `columns` [N W, R] is for use in between. */
void fathom_streams_gradients(const float *x, const float *fn, const float *mix_grad, const float *pre, const float *radial, const float *grad, long T, long N,
                              long W, float *x_grad, float *fn_grad, uint32_t *columns, int threads) {
    long R = (2 + N) * N, I = N * W;
    memset(fn_grad, 0, R * I * sizeof(float));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        long low = share(thread_number(), thread_count(), I, LANES), high = share(thread_number() + 1, thread_count(), I, LANES);
        pack_matrix(fn, 1, I, 0, low, high, R, columns);
        for (long t = 0; t < T; t += TOKENS) { /* a thread has some of the numbers of all tokens: sums are the same for any number of threads */
            long K = T - t < TOKENS ? T - t : TOKENS;
            const uint32_t *places[TOKENS];
            for (long k = 0; k < K; k++) places[k] = (const uint32_t *)(x + (t + k) * I);
            for (long o = low; o < high; o += SPAN)
                for (long r = 0; r < R; r += ROWS) {
                    long V = (high - o) / LANES < WIDE ? (high - o) / LANES : WIDE;
                    const uint32_t *row[ROWS];
                    lanes sums[ROWS * WIDE];
                    for (long i = 0; i < ROWS; i++) row[i] = (const uint32_t *)(mix_grad + t * R + (r + i < R ? r + i : R - 1));
                    STRIPES[V - 1](row, R, places, o, K, sums);
                    for (long i = 0; i < ROWS && r + i < R; i++)
                        for (long v = 0; v < V; v++) {
                            lanes *to = (lanes *)(fn_grad + (r + i) * I + o + v * LANES);
                            *to += sums[i * WIDE + v];
                        }
                }
        }
#pragma omp barrier
#pragma omp for schedule(static)
        for (long t = 0; t < T; t += ROWS) {
            const uint32_t *row[ROWS];
            for (long i = 0; i < ROWS; i++) row[i] = (const uint32_t *)(mix_grad + (t + i < T ? t + i : T - 1) * R);
            for (long n = 0; n < N; n++)
                for (long w = 0; w < W; w += SPAN) {
                    long V = (W - w) / LANES < WIDE ? (W - w) / LANES : WIDE, o = n * W + w;
                    lanes sums[ROWS * WIDE];
                    KERNELS[0][0][V - 1](row, columns + o * R, R * LANES, R, sums, 0);
                    for (long i = 0; i < ROWS && t + i < T; i++)
                        for (long v = 0; v < V; v++)
                            *(lanes *)(x_grad + (t + i) * I + o + v * LANES) =
                                sums[i * WIDE + v] + pre[(t + i) * N + n] * load(grad + (t + i) * W + w + v * LANES)
                                + radial[t + i] * load(x + (t + i) * I + o + v * LANES);
                }
        }
    }
}

ALWAYS void close_backward(const float *x, const float *y, const float *post, const float *res, const float *grad, long N, long W,
                                  float *x_grad, float *y_grad, float *post_grad, float *res_grad) {
    for (long j = 0; j < N; j++) {
        weigh(grad, 0, 0, N, res + j * N, W, x_grad, j * W);
        project_on(x + j * W, grad, N, W, res_grad + j * N);
    }
    weigh(grad, 0, 0, N, post, W, y_grad, 0);
    project_on(y, grad, N, W, post_grad);
}

/* The gradients of x [T, N, W], y [T, W], post [T, N] and res [T, N, N] of `fathom_streams_out`. */
void fathom_streams_out_backward(const float *x, const float *y, const float *post, const float *res, const float *grad, long T, long N, long W,
                                 float *x_grad, float *y_grad, float *post_grad, float *res_grad, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long t = 0; t < T; t++) {
        if (N == 4) close_backward(x + t * 4 * W, y + t * W, post + t * 4, res + t * 16, grad + t * 4 * W, 4, W, x_grad + t * 4 * W, y_grad + t * W,
                                   post_grad + t * 4, res_grad + t * 16);
        else close_backward(x + t * N * W, y + t * W, post + t * N, res + t * N * N, grad + t * N * W, N, W, x_grad + t * N * W, y_grad + t * W,
                            post_grad + t * N, res_grad + t * N * N);
    }
}
