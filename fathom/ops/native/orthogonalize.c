/* Newton-Schulz in tiles (tiles.c; report 2.4, Algorithm 1): a thread takes a matrix through all steps, in its core's cache. Two of the three products of a
   step are symmetric: of those half is computed. */

/* The 16 rows of a matrix [., O] from `from` on, the `count` columns from `to` on, written a second time as columns. */
ALWAYS void mirror(void *out, int bf16, long O, long from, long to, long count) {
    words block[LANES];
    for (long i = 0; i < LANES; i++) {
        lanes found = load_part(out, bf16, (from + i) * O + to, count);
        block[i] = (words)found;
    }
    turn(block);
    for (long i = 0; i < LANES && i < count; i++) store_part((lanes)block[i], out, bf16, (to + i) * O + from, LANES);
}

/* alpha x m^T + beta `plus` -> out [N, O] for x [N, I] and packed columns of m; of a symmetric result the upper half, which is mirrored. Everything in one dtype. */
static void scaled_product(const void *x, int bf16, const uint32_t *columns, long N, long O, long I, float alpha, const void *plus, float beta, int symmetric,
                           void *out) {
    long K = words_of(I, bf16);
    for (long n = 0; n < N; n += ROWS) {
        const uint32_t *row[ROWS];
        for (long r = 0; r < ROWS; r++) row[r] = nth(x, bf16, n + r < N ? n + r : N - 1, I);
        for (long o = symmetric ? n / LANES * LANES : 0; o < O; o += SPAN) {
            long V = (O - o + LANES - 1) / LANES < WIDE ? (O - o + LANES - 1) / LANES : WIDE;
            lanes sums[ROWS * WIDE];
            KERNELS[0][bf16][V - 1](row, columns + o * K, K * LANES, K, sums, 0);
            for (long r = 0; r < ROWS && n + r < N; r++)
                for (long v = 0; v < V; v++) {
                    long place = (n + r) * O + o + v * LANES, count = O - o - v * LANES;
                    lanes found = alpha * sums[r * WIDE + v];
                    if (plus) found += beta * load_part(plus, bf16, place, count);
                    store_part(found, out, bf16, place, count);
                }
        }
    }
    for (long from = 0; symmetric && from < N; from += LANES) /* blocks on the diagonal are whole */
        for (long to = from + LANES; to < N; to += LANES) mirror(out, bf16, O, from, to, N - to);
}

/* X <- a X + b (X X^T) X + c (X X^T)^2 X of each X [N, M] of B, in place, for each (a, b, c) of the steps. N and M are even for bfloat16. `space` [threads, room]
   words: two matrices [N, N], one [N, M], and packed columns of the largest factor. */
void fathom_newton_schulz(void *matrices, int bf16, long B, long N, long M, const float *steps, long count, uint32_t *space, long room, int threads) {
    long size = bf16 ? 2 : 4, square = words_of(N * N, bf16), whole = words_of(N * M, bf16);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (long b = 0; b < B; b++) {
        uint32_t *gram = space + thread_number() * room, *inner = gram + square, *other = inner + square, *columns = other + whole;
        void *X = (char *)matrices + b * N * M * size, *from = X, *to = other;
        for (long step = 0; step < count; step++) {
            const float *own = steps + 3 * step;
            pack_matrix(from, M, 1, bf16, 0, N, M, columns);
            scaled_product(from, bf16, columns, N, N, M, 1, NULL, 0, 1, gram);
            pack_matrix(gram, N, 1, bf16, 0, N, N, columns);
            scaled_product(gram, bf16, columns, N, N, N, own[2], gram, own[1], 1, inner);
            pack_matrix(from, 1, M, bf16, 0, M, N, columns);
            scaled_product(inner, bf16, columns, N, M, N, 1, from, own[0], 0, to);
            void *before = from;
            from = to, to = before;
        }
        if (from != X) memcpy(X, from, N * M * size);
    }
}
