/* Operators of many tokens in tiles (tiles.c): routed experts, the indexer's selection. */

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
                kernel(row, tokens, WK * LANES, WK, gated, ROWS * WK);
                for (long r = 0; r < ROWS; r++) row[r] = (const uint32_t *)((const char *)ups + (e * F + f + r) * W * size);
                kernel(row, tokens, WK * LANES, WK, upped, ROWS * WK);
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
                    kernel(row, hidden, FK * LANES, FK, sums, ROWS * FK);
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

/* Scores of V times 16 packed keys for up to 8 queries with heads [queries, H, D]: sum_h weight_h relu(q_h k) -> score [queries], rows `next` apart. Eight
   heads are a tile, whosever they are. */
ALWAYS void score_span(const void *q, int bf16, const float *weight, long queries, int alone, long H, long D, const uint32_t *columns, long V, float *score,
                       long next) {
    long K = words_of(D, bf16), heads = queries * H;
    lanes found[ROWS][WIDE] = {{{0}}};
    for (long h = 0; h < heads; h += ROWS) {
        const uint32_t *row[ROWS];
        lanes sums[ROWS * WIDE];
        for (long r = 0; r < ROWS; r++) row[r] = nth(q, bf16, h + r < heads ? h + r : heads - 1, D);
        tile(row, 1, columns, NULL, 0, K * LANES, K, bf16, V, sums, 0);
        for (long r = 0; r < ROWS && h + r < heads; r++)
#pragma GCC unroll 3
            for (long v = 0; v < V; v++) {
                lanes sum = sums[r * WIDE + v];
                found[alone ? 0 : (h + r) / H][v] += weight[h + r] * chosen((words)(sum > 0), sum, all(0));
            }
    }
    for (long i = 0; i < (alone ? 1 : queries); i++)
#pragma GCC unroll 3
        for (long v = 0; v < V; v++) *(lanes *)(score + i * next + v * LANES) = found[i][v];
}

static void score_spans(const void *q, int bf16, const float *weight, long queries, long H, long D, const uint32_t *columns, long V, float *score, long next) {
    if (H % ROWS == 0 && V == WIDE) /* sums stay in registers */
        for (long i = 0; i < queries; i++) {
            if (bf16) score_span(nth(q, 1, i, H * D), 1, weight + i * H, 1, 1, H, D, columns, 3, score + i * next, next);
            else score_span(nth(q, 0, i, H * D), 0, weight + i * H, 1, 1, H, D, columns, 3, score + i * next, next);
        }
    else if (V == 3 && bf16) score_span(q, 1, weight, queries, 0, H, D, columns, 3, score, next);
    else if (V == 3) score_span(q, 0, weight, queries, 0, H, D, columns, 3, score, next);
    else if (V == 2) score_span(q, bf16, weight, queries, 0, H, D, columns, 2, score, next);
    else score_span(q, bf16, weight, queries, 0, H, D, columns, 1, score, next);
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
                long V = (high - m + LANES - 1) / LANES, i = b * S + s;
                score_spans(nth(q, bf16, i, H * D), bf16, weight + i * H, here, H, D, columns + m * words, V < WIDE ? V : WIDE, own + m, padded);
            }
            for (long i = b * S + s; i < b * S + s + here; i++)
                best_slots(own + (i - b * S - s) * padded + first[i], first[i], count[i], K, selected + i * K);
        }
    }
}
