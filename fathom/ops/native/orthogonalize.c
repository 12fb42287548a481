/* Newton-Schulz in tiles (tiles.c; report 2.4, Algorithm 1): a thread takes a matrix through all steps, in its core's cache. Of symmetric products half is
   computed. */

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

/* alpha x m^T + beta `plus` + diagonal I -> out [N, O] for x [N, I] and packed columns of m; of a symmetric result the upper half, which is mirrored. Everything in
   one dtype. */
static void scaled_product(const void *x, int bf16, const uint32_t *columns, long N, long O, long I, float alpha, const void *plus, float beta, float diagonal,
                           int symmetric, void *out) {
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
                    long place = (n + r) * O + o + v * LANES, count = O - o - v * LANES, own = n + r - o - v * LANES;
                    lanes found = alpha * sums[r * WIDE + v];
                    if (plus) found += beta * load_part(plus, bf16, place, count);
                    if (diagonal != 0 && own >= 0 && own < LANES) found[own] += diagonal;
                    store_part(found, out, bf16, place, count);
                }
        }
    }
    for (long from = 0; symmetric && from < N; from += LANES) /* blocks on the diagonal are whole */
        for (long to = from + LANES; to < N; to += LANES) mirror(out, bf16, O, from, to, N - to);
}

/* a X + (b G + c G^2) X -> out, of G = X X^T: one step as it is written. */
static void plain_step(const void *X, int bf16, long N, long M, const float *abc, uint32_t *gram, uint32_t *inner, uint32_t *columns, void *out) {
    pack_matrix(X, M, 1, bf16, 0, N, M, columns);
    scaled_product(X, bf16, columns, N, N, M, 1, NULL, 0, 0, 1, gram);
    pack_matrix(gram, N, 1, bf16, 0, N, N, columns);
    scaled_product(gram, bf16, columns, N, N, N, abc[2], gram, abc[1], 0, 1, inner);
    pack_matrix(X, 1, M, bf16, 0, M, N, columns);
    scaled_product(inner, bf16, columns, N, M, N, 1, X, abc[0], 0, 0, out);
}

/* Several steps at once: a step is a product of X and the symmetric P = a I + b G + c G^2, so that its next G is P G P, and all of them are Q X, Q the product of
   their P. Where M > N these are fewer multiplications. `square`: four matrices [N, N]; `out` serves between, too; `columns`: 2 N N or N M packed. */
static void steps_together(const void *X, int bf16, long N, long M, const float *steps, long count, uint32_t *square, uint32_t *columns, void *out) {
    long size = words_of(N * N, bf16);
    uint32_t *gram = square, *P = gram + size, *Q = P + size, *spare = Q + size, *second = columns + (N + LANES - 1) / LANES * LANES * words_of(N, bf16);
    pack_matrix(X, M, 1, bf16, 0, N, M, columns);
    scaled_product(X, bf16, columns, N, N, M, 1, NULL, 0, 0, 1, gram);
    for (long step = 0; step < count; step++) {
        const float *abc = steps + 3 * step;
        pack_matrix(gram, N, 1, bf16, 0, N, N, columns);
        scaled_product(gram, bf16, columns, N, N, N, abc[2], gram, abc[1], abc[0], 1, step ? P : Q);
        if (step) {
            pack_matrix(Q, N, 1, bf16, 0, N, N, second);
            scaled_product(P, bf16, second, N, N, N, 1, NULL, 0, 0, 1, spare);
            uint32_t *before = Q;
            Q = spare, spare = before;
        }
        if (step + 1 == count) break;
        const uint32_t *own = step ? P : Q;
        scaled_product(own, bf16, columns, N, N, N, 1, NULL, 0, 0, 1, out);
        pack_matrix(own, N, 1, bf16, 0, N, N, columns);
        scaled_product(out, bf16, columns, N, N, N, 1, NULL, 0, 0, 1, gram);
    }
    pack_matrix(X, 1, M, bf16, 0, M, N, columns);
    scaled_product(Q, bf16, columns, N, M, N, 1, NULL, 0, 0, 0, out);
}

/* X <- a X + b (X X^T) X + c (X X^T)^2 X of each X [N, M] of B, N <= M, in place, for each (a, b, c) of the steps, in `parts` of several at once. N and M are even for
   bfloat16. `space` [threads, room] words: four matrices [N, N], one [N, M], and packed columns, 2 N N or N M. */
void fathom_newton_schulz(void *matrices, int bf16, long B, long N, long M, const float *steps, long count, long parts, uint32_t *space, long room,
                          int threads) {
    long size = bf16 ? 2 : 4, square = words_of(N * N, bf16), whole = words_of(N * M, bf16);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (long b = 0; b < B; b++) {
        uint32_t *squares = space + thread_number() * room, *other = squares + 4 * square, *columns = other + whole;
        void *X = (char *)matrices + b * N * M * size, *from = X, *to = other;
        for (long part = 0; part < parts; part++) {
            long step = count * part / parts, now = count * (part + 1) / parts - step;
            if (now == 1) plain_step(from, bf16, N, M, steps + 3 * step, squares, squares + square, columns, to);
            else steps_together(from, bf16, N, M, steps + 3 * step, now, squares, columns, to);
            void *before = from;
            from = to, to = before;
        }
        if (from != X) memcpy(X, from, N * M * size);
    }
}
