/* What lies between the products of many tokens, where torch would make a pass over memory for each operation. Sums are in float32. */

/* A row's scores [J] to probabilities: e^(scale x) where it is seen, over the sum of these and of e^sink, whose share stands last. */
ALWAYS void softmax_row(const void *score, int bf16, long row, long J, float scale, const uint32_t *seen, float sink, float *made, void *out,
                        int out_bf16) {
    lanes low = all(-INFINITY), nothing = all(-87), most = low, sums = {0};
    for (long j = 0; j < J; j += LANES) {
        lanes x = load_part(score, bf16, row * J + j, J - j) * scale;
        *(lanes *)(made + j) = x;
        most = larger(most, chosen(*(const loose_words *)(seen + j), x, low));
    }
    float top = largest_of(most);
    if (!(top > sink)) top = sink;
    for (long j = 0; j < J; j += LANES) {
        lanes x = load(made + j) - top;
        lanes e = chosen(*(const loose_words *)(seen + j) & (words)(x > nothing), exponential(x), (lanes){0});
        sums += *(lanes *)(made + j) = e;
    }
    float own = sink - top < -87 ? 0 : exponential(all(sink - top))[0], inverse = 1 / (total(sums) + own);
    made[J - 1] = own;
    for (long j = 0; j < J; j += LANES) store_part(load(made + j) * inverse, out, out_bf16, row * J + j, J - j);
}

/* Scores [B, C, H, J] to probabilities (softmax_row). Columns: `near` window keys [B, near], of which a query at a place [B, C] sees those at places from
   `reach` before it on; then `far` entries, of which it sees the selected [B, C, K], or `count` from `first` on; or, where they are the selected
   themselves (`own`), those that are not -1. `out` may be the scores. */
void fathom_column_probabilities(const void *score, int bf16, const float *sink, long B, long C, long H, long J, float scale, const int64_t *place,
                                 const int64_t *reach, const int64_t *key_place, long near, const int64_t *first, const int64_t *count,
                                 const int64_t *selected, long K, int own, long far, void *out, int out_bf16, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long query = 0; query < B * C; query++) {
        long padded = (J + LANES - 1) / LANES * LANES;
        uint32_t seen[padded];
        float made[padded];
        memset(seen, 0, sizeof seen);
        for (long t = 0; t < near; t++) {
            int64_t key = key_place[query / C * near + t];
            seen[t] = key <= place[query] && key >= place[query] - reach[query] ? ~0u : 0;
        }
        for (long k = 0; k < K; k++) {
            int64_t slot = selected[query * K + k];
            if (slot >= 0 && slot < far) seen[near + (own ? k : slot)] = ~0u;
        }
        if (first) {
            long from = first[query] < 0 ? 0 : first[query], to = first[query] + count[query];
            for (long m = from; m < to && m < far; m++) seen[near + m] = ~0u;
        }
        for (long h = 0; h < H; h++) {
            long row = query * H + h;
            if (bf16 && out_bf16) softmax_row(score, 1, row, J, scale, seen, sink[h], made, out, 1);
            else if (bf16) softmax_row(score, 1, row, J, scale, seen, sink[h], made, out, 0);
            else softmax_row(score, 0, row, J, scale, seen, sink[h], made, out, out_bf16);
        }
    }
}

/* The gradients of probabilities [R, J] to those of what their softmax was of: scale p (g - sum p g); unscaled, that of the last column [R].
   `out` may be the gradients. */
void fathom_column_gradients(const void *grad, int bf16, const float *probability, long R, long J, float scale, void *out, float *last, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long row = 0; row < R; row++) {
        lanes sums = {0};
        for (long j = 0; j < J; j += LANES)
            sums += load_part(grad, bf16, row * J + j, J - j) * load_part(probability, 0, row * J + j, J - j);
        float along = total(sums), final = number(grad, bf16, row * J + J - 1);
        for (long j = 0; j < J; j += LANES) {
            lanes x = (load_part(grad, bf16, row * J + j, J - j) - along) * load_part(probability, 0, row * J + j, J - j) * scale;
            store_part(x, out, bf16, row * J + j, J - j);
        }
        last[row] = (final - along) * probability[row * J + J - 1];
    }
}

/* silu(min(gate, limit)) clamp(up, -limit, limit), times a weight for each row if there are any: [N, F] of the inputs' or the other kind. */
void fathom_swiglu(const void *gates, const void *ups, int bf16, const float *weight, long N, long F, float limit, void *out, int out_bf16,
                   int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long n = 0; n < N; n++) {
        float by = weight ? weight[n] : 1;
        for (long f = 0; f < F; f += LANES) {
            long place = n * F + f, count = F - f;
            store_part(activated(load_part(gates, bf16, place, count), load_part(ups, bf16, place, count), limit) * by, out, out_bf16, place, count);
        }
    }
}

/* From the gradients of fathom_swiglu's result: the result, if wanted, and gradients of gate and up, all of their kind, and of the weights [N], if any. */
void fathom_swiglu_backward(const void *gates, const void *ups, const void *grads, int bf16, const float *weight, long N, long F, float limit,
                            void *out, void *gate_grad, void *up_grad, float *weight_grad, int threads) {
    lanes high = all(limit), low = -high, zero = {0};
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long n = 0; n < N; n++) {
        float by = weight ? weight[n] : 1;
        lanes along = {0};
        for (long f = 0; f < F; f += LANES) {
            long place = n * F + f, count = F - f;
            lanes x = load_part(gates, bf16, place, count), y = load_part(ups, bf16, place, count), grad = load_part(grads, bf16, place, count);
            words over = (words)(x > high), outside = (words)(y > high) | (words)(y < low);
            x = chosen(over, high, x), y = chosen((words)(y > high), high, chosen((words)(y < low), low, y));
            lanes slope = gate(x), silu = x * slope;
            along += grad * silu * y;
            grad *= by;
            if (out) store_part(silu * y * by, out, bf16, place, count);
            store_part(chosen(over, zero, grad * y * (slope + silu * (1 - slope))), gate_grad, bf16, place, count);
            store_part(chosen(outside, zero, grad * silu), up_grad, bf16, place, count);
        }
        if (weight) weight_grad[n] = total(along);
    }
}

/* The sums [N, W] in float32 of K rows each of y [P, W], those whose numbers stand in place [N, K]. */
void fathom_sum_rows(const void *y, int bf16, const int64_t *place, long N, long K, long W, float *out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long n = 0; n < N; n++)
        for (long w = 0; w < W; w += LANES) {
            lanes sum = {0};
            for (long k = 0; k < K; k++) sum += load_part(y, bf16, place[n * K + k] * W + w, W - w);
            store_part(sum, out, 0, n * W + w, W - w);
        }
}

/* Of channels d ... of one block: the softmax over its tokens of their scores, times their values; with `grad`, that of the result, each token's
   gradients of value and score. */
ALWAYS lanes pooled(const float *value, const float *score, long step, const int64_t *current, const int64_t *previous, long R, long half, long d,
                    long count, const lanes *grad, float *value_grad, float *score_grad) {
    lanes most = all(-INFINITY), sum = {0}, found = {0};
    for (int pass = 0; pass < (grad ? 3 : 2); pass++)
        for (long r = previous ? 0 : R; r < 2 * R; r++) {
            long place = r < R ? previous[r] * step + d : current[r - R] * step + half + d;
            lanes x = load_part(score, 0, place, count);
            if (!pass) most = larger(x, most);
            else if (pass == 1) {
                lanes e = exponential(x - most);
                sum += e, found += e * load_part(value, 0, place, count);
            } else {
                lanes direct = *grad * exponential(x - most) / sum;
                store_part(direct, value_grad, 0, place, count);
                store_part(direct * (load_part(value, 0, place, count) - found / sum), score_grad, 0, place, count);
            }
        }
    return found / sum;
}

/* Entries [N, D] of N blocks: values and scores lie `step` apart, each token's 2 D of them where there is `previous` [N, R], else D. */
void fathom_pool_blocks(const float *value, const float *score, long step, const int64_t *current, const int64_t *previous, const uint8_t *has_previous,
                        long N, long R, long D, float *out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long n = 0; n < N; n++)
        for (long d = 0; d < D; d += LANES) {
            const int64_t *before = previous && has_previous[n] ? previous + n * R : NULL;
            lanes entry = pooled(value, score, step, current + n * R, before, R, previous ? D : 0, d, D - d, NULL, NULL, NULL);
            store_part(entry, out, 0, n * D + d, D - d);
        }
}

/* From the gradients of entries [N, D], those of values and scores, which lie as these do and are zeros before; no token is twice in a list. */
void fathom_pool_backward(const float *value, const float *score, const float *grad, long step, const int64_t *current, const int64_t *previous,
                          const uint8_t *has_previous, long N, long R, long D, float *value_grad, float *score_grad, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long n = 0; n < N; n++)
        for (long d = 0; d < D; d += LANES) {
            const int64_t *before = previous && has_previous[n] ? previous + n * R : NULL;
            lanes own = load_part(grad, 0, n * D + d, D - d);
            pooled(value, score, step, current + n * R, before, R, previous ? D : 0, d, D - d, &own, value_grad, score_grad);
        }
}

/* The gradients of x [N, D] over each row's root mean square, times a weight [D] that may be null; the weight's in parts [N / 64, D] to be summed. */
void fathom_rms_backward(const float *x, const float *grad, const float *weight, long N, long D, float eps, float *out, float *parts, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long part = 0; part < (N + 63) / 64; part++) {
        float *own = parts + part * D;
        if (weight) memset(own, 0, D * sizeof(float));
        for (long n = part * 64; n < N && n < part * 64 + 64; n++) {
            const float *row = x + n * D, *from = grad + n * D;
            float inverse = 1 / sqrtf(dot_float(row, row, D) / D + eps);
            lanes sums = {0};
            for (long d = 0; d < D; d += LANES) {
                lanes along = load_part(row, 0, d, D - d) * load_part(from, 0, d, D - d);
                if (weight) {
                    store_part(load_part(own, 0, d, D - d) + along * inverse, own, 0, d, D - d);
                    along *= load_part(weight, 0, d, D - d);
                }
                sums += along;
            }
            float radial = total(sums) * inverse * inverse * inverse / D;
            for (long d = 0; d < D; d += LANES) {
                lanes direct = load_part(from, 0, d, D - d) * inverse;
                if (weight) direct *= load_part(weight, 0, d, D - d);
                store_part(direct - load_part(row, 0, d, D - d) * radial, out, 0, n * D + d, D - d);
            }
        }
    }
}

/* The indexer's objective of a query (report 2.3.1): the KL of its scores' softmax from what its heads' attention, probabilities [A, J] that stand from column `near`
   on, gave M entries. Scores are the sums of products [H, M], of which negative ones are 0 already, by weights [H], of those entries that are seen. Gradients are
   written over the products where they are wanted. `target` and `share` are for use in between. Whether the query reads anything. */
static int divergence_of(const float *probability, long A, long J, float *product, const float *weight, const uint8_t *seen, long H, long M, int gradients,
                         float *target, float *share, float *divergence, float *weight_grad) {
    lanes mass = {0}, low = all(-INFINITY), most = low, sums = {0};
    for (long m = 0; m < M; m += LANES) {
        lanes own = {0}, score = {0};
        words open;
        for (long a = 0; a < A; a++) own += load_part(probability, 0, a * J + m, M - m);
        for (long h = 0; h < H; h++) score += weight[h] * load_part(product, 0, h * M + m, M - m);
        for (long i = 0; i < LANES; i++) open[i] = m + i < M && seen[m + i] ? ~0u : 0;
        mass += *(lanes *)(target + m) = own;
        most = larger(most, *(lanes *)(share + m) = chosen(open, score, low));
    }
    float whole = total(mass), top = largest_of(most);
    if (!(whole > 0)) { /* nothing to learn from */
        if (gradients) memset(product, 0, H * M * sizeof(float)), memset(weight_grad, 0, H * sizeof(float));
        *divergence = 0;
        return 0;
    }
    for (long m = 0; m < M; m += LANES) {
        lanes x = load(share + m) - top;
        sums += chosen((words)(x > all(-87)), exponential(x), (lanes){0});
    }
    double found = 0, all_shares = total(sums), logarithm = log(all_shares);
    for (long m = 0; m < M; m++) {
        float own = target[m] / (whole > FLT_MIN ? whole : FLT_MIN), x = share[m] - top;
        target[m] = own;
        if (own > 0) found += own * (logf(own) - (x - logarithm));
    }
    *divergence = found;
    if (!gradients) return 1;
    for (long m = 0; m < M; m += LANES) {
        lanes x = load(share + m) - top, made = chosen((words)(x > all(-87)), exponential(x), (lanes){0}) / (float)all_shares - load(target + m);
        *(lanes *)(share + m) = chosen((words)(x > low), made, (lanes){0});
    }
    for (long h = 0; h < H; h++) {
        lanes along = {0};
        for (long m = 0; m < M; m += LANES) {
            lanes own = load_part(product, 0, h * M + m, M - m), grad = load(share + m);
            along += own * grad;
            store_part(chosen((words)(own != 0), weight[h] * grad, (lanes){0}), product, 0, h * M + m, M - m);
        }
        weight_grad[h] = total(along);
    }
    return 1;
}

/* divergence_of for Q queries: probabilities [Q, A, J], products [Q, H, M], weights [Q, H], seen [Q, M] -> divergence [Q], reads [Q], weight_grad [Q, H]. */
void fathom_block_divergence(const float *probability, long Q, long A, long J, long near, float *product, const float *weight, const uint8_t *seen, long H,
                             long M, int gradients, float *divergence, uint8_t *reads, float *weight_grad, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long q = 0; q < Q; q++) {
        long padded = (M + LANES - 1) / LANES * LANES;
        float target[padded], share[padded];
        reads[q] = divergence_of(probability + q * A * J + near, A, J, product + q * H * M, weight + q * H, seen + q * M, H, M, gradients, target, share,
                                 divergence + q, gradients ? weight_grad + q * H : NULL);
    }
}
