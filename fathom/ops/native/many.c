/* Operators of many tokens in tiles (tiles.c): routed experts, the indexer's selection, attention. */

/* Routed experts of P = N chosen pairs, which `order` sorts by expert: an expert's end before ends [E]. Each task takes up to 48 pairs of one expert through its
   three matrices; these are the rows of the tiles, so that nothing but tokens is packed. W and F are multiples of 16; tasks [P / 48 + E, 3] and, for each thread,
   space [48, W + F] are for use in between. -> out [P, W], in x's dtype, in the order of experts. */
void fathom_experts_of_many(const void *x, int bf16, const int64_t *order, long choices, const float *weight, const int64_t *ends, const void *gates,
                            const void *ups, const void *downs, long E, long W, long F, float limit, void *out, int64_t *tasks, uint32_t *space,
                            int threads) {
    long count = 0, size = bf16 ? 2 : 4, WK = words_of(W, bf16), FK = words_of(F, bf16);
    for (long e = 0; e < E; e++)
        for (long p = e ? ends[e - 1] : 0; p < ends[e]; p += SPAN, count++)
            tasks[3 * count] = e, tasks[3 * count + 1] = p, tasks[3 * count + 2] = ends[e] - p < SPAN ? ends[e] - p : SPAN;
    lanes high = all(limit), low = -high;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        uint32_t *tokens = space + thread_number() * SPAN * (WK + FK), *hidden = tokens + SPAN * WK;
#pragma omp for schedule(dynamic)
        for (long task = 0; task < count; task++) {
            long e = tasks[3 * task], begin = tasks[3 * task + 1], pairs = tasks[3 * task + 2], V = (pairs + LANES - 1) / LANES;
            tile_kernel *kernel = KERNELS[0][bf16][V - 1];
            lanes by[WIDE] = {{0}};
            for (long v = 0; v < V; v++) {
                const void *column[LANES];
                long here = pairs - v * LANES < LANES ? pairs - v * LANES : LANES;
                for (long c = 0; c < here; c++) {
                    int64_t pair = order[begin + v * LANES + c];
                    column[c] = (const char *)x + pair / choices * W * size, by[v][c] = weight[pair];
                }
                pack_columns(column, here, W, bf16, tokens + v * WK * LANES);
            }
            for (long f = 0; f < F; f += ROWS) {
                const uint32_t *row[ROWS];
                lanes gated[ROWS * WIDE], upped[ROWS * WIDE];
                for (long r = 0; r < ROWS; r++) row[r] = (const uint32_t *)((const char *)gates + (e * F + f + r) * W * size);
                kernel(row, tokens, WK * LANES, WK, gated);
                for (long r = 0; r < ROWS; r++) row[r] = (const uint32_t *)((const char *)ups + (e * F + f + r) * W * size);
                kernel(row, tokens, WK * LANES, WK, upped);
                for (long v = 0; v < V; v++)
                    for (long r = 0; r < ROWS; r++) {
                        lanes a = gated[r * WIDE + v], b = upped[r * WIDE + v];
                        a = chosen((words)(a > high), high, a), b = chosen((words)(b > high), high, chosen((words)(b < low), low, b));
                        lanes made = a * gate(a) * b * by[v];
                        if (bf16) {
                            words bits = (words)made, half = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
                            loose_words *place = (loose_words *)(hidden + (v * FK + (f + r) / 2) * LANES);
                            *place = r & 1 ? (words)*place | half << 16 : half;
                        } else *(lanes *)(hidden + (v * FK + f + r) * LANES) = made;
                    }
            }
            for (long w = 0; w < W; w += LANES) {
                words block[WIDE][LANES];
                for (long half = 0; half < LANES; half += ROWS) {
                    const uint32_t *row[ROWS];
                    lanes sums[ROWS * WIDE];
                    for (long r = 0; r < ROWS; r++) row[r] = (const uint32_t *)((const char *)downs + (e * W + w + half + r) * F * size);
                    kernel(row, hidden, FK * LANES, FK, sums);
                    for (long v = 0; v < V; v++)
                        for (long r = 0; r < ROWS; r++) block[v][half + r] = (words)sums[r * WIDE + v];
                }
                for (long v = 0; v < V; v++) {
                    turn(block[v]);
                    for (long c = 0; c < LANES && v * LANES + c < pairs; c++)
                        store_part((lanes)block[v][c], out, bf16, (begin + v * LANES + c) * W + w, LANES);
                }
            }
        }
    }
}

/* Scores of the keys from `from` up to `to` (multiples of 16) for one query's heads [H, D]: sum_h weight_h relu(q_h k); `zero` stands for no key's number. */
ALWAYS void score_span(const void *q, int bf16, const float *weight, long H, long D, const uint32_t *columns, long V, float *score) {
    long K = words_of(D, bf16), size = bf16 ? 2 : 4;
    lanes found[WIDE] = {{0}};
    for (long h = 0; h < H; h += ROWS) {
        const uint32_t *row[ROWS];
        lanes sums[ROWS * WIDE];
        for (long r = 0; r < ROWS; r++) row[r] = (const uint32_t *)((const char *)q + (h + r < H ? h + r : H - 1) * D * size);
        tile(row, 1, columns, NULL, 0, K * LANES, K, bf16, V, sums);
        for (long r = 0; r < ROWS && h + r < H; r++)
#pragma GCC unroll 3
            for (long v = 0; v < V; v++) {
                lanes sum = sums[r * WIDE + v];
                found[v] += weight[h + r] * chosen((words)(sum > 0), sum, all(0));
            }
    }
#pragma GCC unroll 3
    for (long v = 0; v < V; v++) *(lanes *)(score + v * LANES) = found[v];
}

static void score_spans(const void *q, int bf16, const float *weight, long H, long D, const uint32_t *columns, long V, float *score) {
    if (V == 3 && bf16) score_span(q, 1, weight, H, D, columns, 3, score);
    else if (V == 3) score_span(q, 0, weight, H, D, columns, 3, score);
    else if (V == 2) score_span(q, bf16, weight, H, D, columns, 2, score);
    else score_span(q, bf16, weight, H, D, columns, 1, score);
}

/* fathom_index_topk for many queries: keys are packed once for each row of the batch (columns [M, D], rounded up to 16 keys), eight queries at a time
   score them (score [threads, 8, M], rounded up likewise). D is even for bfloat16. */
void fathom_index_topk_of_many(const void *q, const float *weight, const void *keys, int bf16, const int64_t *first, const int64_t *count, long B, long S,
                               long H, long D, long M, long K, long key_row, uint32_t *columns, float *score, int64_t *selected, int threads) {
    long words = words_of(D, bf16), size = bf16 ? 2 : 4, padded = (M + LANES - 1) / LANES * LANES;
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (long b = 0; b < B; b++) {
#pragma omp for schedule(static)
        for (long m = 0; m < M; m += LANES) {
            const void *column[LANES];
            long here = M - m < LANES ? M - m : LANES;
            for (long c = 0; c < here; c++) column[c] = (const char *)keys + (b * key_row + (m + c) * D) * size;
            pack_columns(column, here, D, bf16, columns + m * words);
        }
#pragma omp for schedule(dynamic)
        for (long s = 0; s < S; s += ROWS) {
            float *own = score + thread_number() * ROWS * padded;
            long low = padded, high = 0, here = S - s < ROWS ? S - s : ROWS;
            for (long i = b * S + s; i < b * S + s + here; i++)
                if (count[i] > K) {
                    if (first[i] / LANES * LANES < low) low = first[i] / LANES * LANES;
                    if (first[i] + count[i] > high) high = first[i] + count[i];
                }
            for (long m = low; m < high; m += SPAN) {
                long V = (high - m + LANES - 1) / LANES;
                for (long i = b * S + s; i < b * S + s + here; i++)
                    if (count[i] > K && first[i] < m + SPAN && m < first[i] + count[i])
                        score_spans((const char *)q + i * H * D * size, bf16, weight + i * H, H, D, columns + m * words, V < WIDE ? V : WIDE,
                                    own + (i - b * S - s) * padded + m);
            }
            for (long i = b * S + s; i < b * S + s + here; i++)
                best_slots(own + (i - b * S - s) * padded + first[i], first[i], count[i], K, selected + i * K);
        }
    }
}

/* Words of each two rows [M, D] that follow one another, for sums over rows: [M / 2, D]; what is missing of the last two is zero. */
static inline void pair_rows(const uint16_t *low, const uint16_t *high, long D, uint32_t *out) {
    for (long d = 0; d < D; d++) out[d] = low[d] | (high ? (uint32_t)high[d] << 16 : 0);
}

/* Keys [T, D], one row of a batch, packed as columns of scores, and where they are bfloat16 in pairs as rows of sums. */
static void pack_keys_of(const void *keys, int bf16, long T, long D, uint32_t *columns, uint32_t *pairs) {
    long K = words_of(D, bf16);
#pragma omp for schedule(static)
    for (long t = 0; t < T; t += LANES) {
        const void *column[LANES];
        long here = T - t < LANES ? T - t : LANES;
        for (long c = 0; c < here; c++) column[c] = nth(keys, bf16, t + c, D);
        pack_columns(column, here, D, bf16, columns + t * K);
        if (bf16)
            for (long c = 0; c < here; c += 2) pair_rows(column[c], c + 1 < here ? column[c + 1] : NULL, D, pairs + (t + c) / 2 * D);
    }
}

/* Scores of 8 heads with `length` packed columns (a multiple of 16) -> score [8], rows `most` apart. */
static void score_heads(const uint32_t *const *row, int bf16, const uint32_t *columns, long words, long length, float *score, long most) {
    for (long j = 0; j < length; j += SPAN) {
        long V = (length - j) / LANES < WIDE ? (length - j) / LANES : WIDE;
        lanes sums[ROWS * WIDE];
        KERNELS[0][bf16][V - 1](row, columns + j * words, words * LANES, words, sums);
        for (long r = 0; r < ROWS; r++)
            for (long v = 0; v < V; v++) *(lanes *)(score + r * most + j + v * LANES) = sums[r * WIDE + v];
    }
}

/* A head's scores [J] to weights e^(scale x - top), in place or as bfloat16 from there on; returns one over their sum and the sink's. */
ALWAYS float weights_of(float *score, const uint32_t *seen, long J, float scale, float sink, int bf16) {
    lanes low = all(-INFINITY), most = low, sums = {0};
    for (long j = 0; j < J; j += LANES) most = larger(most, chosen(*(const loose_words *)(seen + j), load(score + j) * scale, low));
    float top = largest_of(most);
    if (!(top > sink)) top = sink;
    for (long j = 0; j < J; j += LANES) {
        lanes x = load(score + j) * scale - top;
        lanes e = chosen(*(const loose_words *)(seen + j) & (words)(x > -87), exponential(x), all(0));
        sums += e;
        store_part(e, score, bf16, j, LANES);
    }
    return 1 / (total(sums) + (sink - top < -87 ? 0 : exponential(all(sink - top))[0]));
}

ALWAYS void mix_rows(const uint32_t *const *row, const uint32_t *const *places, int bf16, long J, long D, lanes *out) {
    for (long d = 0; d < D; d += SPAN) {
        lanes *sums = out + d / SPAN * ROWS * WIDE;
        if (D - d >= SPAN) tile(row, 1, NULL, places, d, LANES, J, bf16, 3, sums);
        else if (D - d > LANES) tile(row, 1, NULL, places, d, LANES, J, bf16, 2, sums);
        else tile(row, 1, NULL, places, d, LANES, J, bf16, 1, sums);
    }
}

/* Attention of many queries [B, S, H, D] over window keys [B, T, D] and entries [B, ., D], of which each query reads `count` from `first` on or the
   selected [B, S, K] (eq. 27). D is a multiple of 16. A query's heads are the rows of a tile; keys are packed once for each row of the batch, selected entries
   for each query. For use in between: `packed`, window keys and entries as pack_keys_of wants them, both rounded up to 16 of them; for each
   thread `score` [8, most] and `space`, selected entries packed and paired, and a row of zeros. `most` is a multiple of 16 and holds all columns of a query. */
void fathom_attention_of_many(const void *q, const void *window, const void *entries, int bf16, const int64_t *place, const int64_t *reach,
                              const int64_t *key_place, const int64_t *first, const int64_t *count, const int64_t *selected, const float *sink, long B,
                              long S, long H, long D, long T, long M, long K, long window_row, long entry_row, long most, uint32_t *packed, float *score,
                              uint32_t *space, void *out, int threads) {
    long words = words_of(D, bf16), padded = (T + LANES - 1) / LANES * LANES, slots = selected ? (K + LANES - 1) / LANES * LANES : 0;
    uint32_t *near_pairs = packed + padded * words, *far_columns = near_pairs + (bf16 ? padded / 2 * D : 0);
    uint32_t *far_pairs = far_columns + (M + LANES - 1) / LANES * LANES * words;
    float scale = 1 / sqrtf(D);
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (long b = 0; b < B; b++) {
        const void *near = nth(window, bf16, b, window_row), *far = nth(entries, bf16, b, entry_row);
        uint32_t *columns = space + thread_number() * (slots * words + (bf16 ? slots / 2 * D : 0) + D), *pairs = columns + slots * words;
        uint32_t *zeros = pairs + (bf16 ? slots / 2 * D : 0), seen[most];
        const uint32_t *places[most];
        float *own = score + thread_number() * ROWS * most;
        memset(zeros, 0, D * sizeof(uint32_t));
        pack_keys_of(near, bf16, T, D, packed, near_pairs);
        if (entries && !selected) pack_keys_of(far, bf16, M, D, far_columns, far_pairs);
#pragma omp for schedule(dynamic, 8)
        for (long s = 0; s < S; s++) {
            long i = b * S + s, low = T, high = 0, from = 0, J;
            for (long t = 0; t < T; t += LANES) {
                long here = T - t < LANES ? T - t : LANES;
                int64_t any = 0;
                for (long c = 0; c < here; c++) any |= key_place[b * T + t + c] <= place[i] && key_place[b * T + t + c] >= place[i] - reach[i];
                if (any && high == 0) low = t;
                if (any) high = t + LANES;
            }
            if (high == 0) low = 0;
            for (long t = low; t < high; t++) {
                int64_t key = t < T ? key_place[b * T + t] : INT64_MAX;
                seen[t - low] = key <= place[i] && key >= place[i] - reach[i] ? ~0u : 0;
            }
            J = high - low;
            const uint32_t *far_packed = columns;
            if (selected) {
                const void *column[slots + 1];
                long found = 0;
                for (long k = 0; k < K; k++)
                    if (selected[i * K + k] >= 0) column[found++] = nth(far, bf16, selected[i * K + k], D);
                for (long k = 0; k < found; k += LANES) pack_columns(column + k, found - k < LANES ? found - k : LANES, D, bf16, columns + k * words);
                long far_length = (found + LANES - 1) / LANES * LANES;
                for (long k = 0; k < far_length; k++) seen[J + k] = k < found ? ~0u : 0;
                if (bf16)
                    for (long k = 0; k < found; k += 2) pair_rows(column[k], k + 1 < found ? column[k + 1] : NULL, D, pairs + k / 2 * D);
                for (long k = 0; k < far_length; k += bf16 ? 2 : 1)
                    places[(J + k) / (bf16 ? 2 : 1)] = k >= found ? zeros : bf16 ? pairs + k / 2 * D : (const uint32_t *)column[k];
                from = J, J += far_length;
            } else if (entries) {
                long begin = first[i] > 0 ? first[i] : 0, end = first[i] + count[i] < M ? first[i] + count[i] : M, at = begin / LANES * LANES;
                from = J;
                far_packed = far_columns + at * words;
                for (long m = at; m < end || (m - at) % LANES; m++) {
                    seen[J] = m >= begin && m < end ? ~0u : 0;
                    if (!bf16) places[J] = seen[J] ? nth(far, 0, m, D) : zeros;
                    else if (m % 2 == 0) places[J / 2] = m < end ? far_pairs + m / 2 * D : zeros;
                    J++;
                }
            } else from = J;
            for (long t = low; t < high; t += bf16 ? 2 : 1)
                if (bf16) places[(t - low) / 2] = seen[t - low] | seen[t - low + 1] ? near_pairs + t / 2 * D : zeros;
                else places[t - low] = seen[t - low] ? nth(near, 0, t, D) : zeros;
            for (long h = 0; h < H; h += ROWS) {
                const uint32_t *row[ROWS];
                lanes sums[(D + SPAN - 1) / SPAN * ROWS * WIDE];
                float inverse[ROWS];
                for (long r = 0; r < ROWS; r++) row[r] = nth(q, bf16, i * H + (h + r < H ? h + r : H - 1), D);
                score_heads(row, bf16, packed + low * words, words, from, own, most);
                score_heads(row, bf16, far_packed, words, J - from, own + from, most);
                for (long r = 0; r < ROWS; r++) {
                    row[r] = (const uint32_t *)(own + r * most);
                    inverse[r] = h + r < H ? weights_of(own + r * most, seen, J, scale, sink[h + r], bf16) : 0;
                }
                if (bf16) mix_rows(row, places, 1, J / 2, D, sums);
                else mix_rows(row, places, 0, J, D, sums);
                for (long r = 0; r < ROWS && h + r < H; r++)
                    for (long d = 0; d < D; d += LANES)
                        store_part(sums[d / SPAN * ROWS * WIDE + r * WIDE + d % SPAN / LANES] * inverse[r], out, bf16, (i * H + h + r) * D + d, LANES);
            }
        }
    }
}
