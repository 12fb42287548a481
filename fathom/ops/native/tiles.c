/* Products of many rows. A tile is 8 rows of one factor times up to 48 columns of the other, kept in 24 registers: each step of the inner sum takes a
   word of every row for all lanes, and 16 columns' words a register. A word is a float, or two bfloat16 that lie one after the other in the sum. Columns
   are packed for it, [words][16] for 16 of them. Each number's sum runs in the same order whatever stands beside it: neither threads nor
   other rows show in a bit of it. Sums are in float32. */

enum { ROWS = 8, WIDE = 3, SPAN = WIDE * LANES, PART = 256 /* words: sums of sums round less than one long sum */ };

/* Whether this processor multiplies float32 (1) and bfloat16 (2) well in tiles: not where it has matrix instructions for the latter. */
int fathom_tile_kinds(void) {
    int kinds = 0;
#ifdef __AVX512F__
    kinds |= 1;
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
    kinds |= 2;
#endif
#endif
    return kinds;
}

ALWAYS lanes word_times(lanes sum, uint32_t word, const uint32_t *columns, int bf16) {
#ifdef __AVX512BF16__
    if (bf16) return (lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(columns), (__m512bh)_mm512_set1_epi32(word));
#endif
    if (bf16) {
        words both = *(const loose_words *)columns;
        float low, high;
        uint32_t low_bits = word << 16, high_bits = word & 0xffff0000u;
        memcpy(&low, &low_bits, 4), memcpy(&high, &high_bits, 4);
        return sum + (lanes)(both << 16) * low + (lanes)(both & 0xffff0000u) * high;
    }
    float number;
    memcpy(&number, &word, 4);
    return sum + *(const lanes *)columns * number;
}

/* sums[8][V] of K words, 256 at a time: a row's words lie `step` apart, blocks of 16 columns `next` words. Columns are packed, or where `places` are given
   the k-th words of the first 16 lie `offset` words behind the k-th place. What lies `ahead` words behind the rows, if it is not 0, is fetched for the next tile:
   the processor does not foresee where eight new rows begin. */
ALWAYS void tile(const uint32_t *const *row, long step, const uint32_t *columns, const uint32_t *const *places, long offset, long next, long K, int bf16,
                 int V, lanes *out, long ahead) {
    for (long from = 0; from == 0 || from < K; from += PART) {
        long to = from + PART < K ? from + PART : K;
        lanes sum[ROWS][WIDE];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 3
            for (int v = 0; v < V; v++) sum[r][v] = (lanes){0};
        for (long block = from; block < to; block += LANES) {
            long stop = block + LANES < to ? block + LANES : to;
            if (ahead) {
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++) __builtin_prefetch(row[r] + block * step + ahead, 0, 2);
            }
            for (long k = block; k < stop; k++) {
                const uint32_t *words = places ? places[k] + offset : columns + k * LANES;
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 3
                    for (int v = 0; v < V; v++) sum[r][v] = word_times(sum[r][v], row[r][k * step], words + v * next, bf16);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 3
            for (int v = 0; v < V; v++) {
                if (from) sum[r][v] += out[r * WIDE + v];
                out[r * WIDE + v] = sum[r][v];
            }
    }
}

#define TILE_OF(NAME, BF16, STEP, V)                                                                                                  \
    static __attribute__((noinline)) void NAME##_##V(const uint32_t *const *row, const uint32_t *columns, long next, long K, lanes *out, long ahead) { \
        tile(row, STEP, columns, NULL, 0, next, K, BF16, V, out, ahead);                                                                              \
    }
#define TILES_OF(NAME, BF16, STEP) TILE_OF(NAME, BF16, STEP, 1) TILE_OF(NAME, BF16, STEP, 2) TILE_OF(NAME, BF16, STEP, 3)
TILES_OF(tile_float, 0, 1)
TILES_OF(tile_bf16, 1, 1)
TILES_OF(turned_float, 0, ROWS)
TILES_OF(turned_bf16, 1, ROWS)
typedef void tile_kernel(const uint32_t *const *, const uint32_t *, long, long, lanes *, long);
static tile_kernel *const KERNELS[2][2][WIDE] = {{{tile_float_1, tile_float_2, tile_float_3}, {tile_bf16_1, tile_bf16_2, tile_bf16_3}},
                                                 {{turned_float_1, turned_float_2, turned_float_3}, {turned_bf16_1, turned_bf16_2, turned_bf16_3}}};

#define EXCHANGE(APART, FIRST, SECOND)                                                               \
    _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i++) if (!(i & APART)) {                      \
        words a = block[i], b = block[i + APART];                                                    \
        block[i] = FIRST, block[i + APART] = SECOND;                                                 \
    }

/* 16 vectors of 16 words, turned. */
ALWAYS void turn(words *block) {
    EXCHANGE(1, MIXED(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
             MIXED(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))
    EXCHANGE(2, MIXED(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
             MIXED(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
    EXCHANGE(4, MIXED(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
             MIXED(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31))
    EXCHANGE(8, MIXED(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
             MIXED(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
}

static inline long words_of(long numbers, int bf16) { return bf16 ? (numbers + 1) / 2 : numbers; }

/* The k-th word of a factor's row, whose numbers lie `step` apart. */
static inline uint32_t word_at(const void *row, long step, long k, long I, int bf16) {
    if (!bf16) return ((const uint32_t *)row)[k * step];
    const uint16_t *numbers = row;
    return numbers[2 * k * step] | (2 * k + 1 < I ? (uint32_t)numbers[(2 * k + 1) * step] << 16 : 0);
}

/* Up to 16 columns, each without gaps from where it begins, packed. */
static void pack_columns(const void *const *column, long count, long I, int bf16, uint32_t *out) {
    long whole = (bf16 ? I / 2 : I) / LANES * LANES, K = words_of(I, bf16);
    for (long k = 0; k < whole; k += LANES) {
        words block[LANES];
        for (int c = 0; c < LANES; c++) block[c] = *(const loose_words *)((const uint32_t *)column[c < count ? c : 0] + k);
        turn(block);
        for (int c = 0; c < LANES; c++) *(loose_words *)(out + (k + c) * LANES) = block[c];
    }
    for (long k = whole; k < K; k++)
        for (int c = 0; c < LANES; c++) out[k * LANES + c] = word_at(column[c < count ? c : 0], 1, k, I, bf16);
}

/* As pack_columns, of bfloat16 columns that are widened to floats. */
static void pack_widened(const void *const *column, long count, long I, uint32_t *out) {
    for (long i = 0; i < I; i += LANES) {
        words block[LANES];
        for (int c = 0; c < LANES; c++) block[c] = (words)load_part(column[c < count ? c : 0], 1, i, I - i);
        turn(block);
        for (int c = 0; c < LANES && i + c < I; c++) *(loose_words *)(out + (i + c) * LANES) = block[c];
    }
}

/* Rows of a factor that lie side by side, each number `step` from the one before, packed `width` together: [blocks][words][width]; those from `count` on are
   zeros. Four blocks or eight at a time: whole cache lines of each number's neighbours. */
ALWAYS void pack_beside(const void *first, long step, long count, long width, long I, int bf16, uint32_t *out) {
    long K = words_of(I, bf16), whole = bf16 ? I / 2 : I, together = 64 / width;
    for (long begin = 0; begin < count; begin += 64) {
        long blocks = (count - begin) / width < together ? (count - begin) / width : together;
        const char *from = (const char *)first + begin * (bf16 ? 2 : 4);
        uint32_t *to = out + begin * K;
        for (long k = 0; k < whole; k++)
            for (long block = 0; block < blocks; block++) {
                if (!bf16) memcpy(to + (block * K + k) * width, (const uint32_t *)from + k * step + block * width, width * sizeof(uint32_t));
                else {
                    const uint16_t *low = (const uint16_t *)from + 2 * k * step + block * width, *high = low + step;
                    for (long c = 0; c < width; c++) to[(block * K + k) * width + c] = low[c] | (uint32_t)high[c] << 16;
                }
            }
        for (long block = 0; block < together && begin + block * width < count; block++)
            for (long k = block < blocks ? whole : 0; k < K; k++)
                for (long c = 0; c < width; c++)
                    to[(block * K + k) * width + c] = begin + block * width + c < count ? word_at(from + (block * width + c) * (bf16 ? 2 : 4), step, k, I, bf16) : 0;
    }
}

/* The columns from `begin` to `end` of m [O, I], packed in blocks of 16 that begin at multiples of 16. */
static void pack_matrix(const void *m, long row, long step, int bf16, long begin, long end, long I, uint32_t *columns) {
    long size = bf16 ? 2 : 4, K = words_of(I, bf16);
    const char *first = (const char *)m + begin * row * size;
    if (step != 1 && bf16) pack_beside(first, step, end - begin, LANES, I, 1, columns + begin * K);
    else if (step != 1) pack_beside(first, step, end - begin, LANES, I, 0, columns + begin * K);
    else
        for (long o = 0; o < end - begin; o += LANES) {
            const void *column[LANES];
            long count = end - begin - o < LANES ? end - begin - o : LANES;
            for (long c = 0; c < count; c++) column[c] = first + (o + c) * row * size;
            pack_columns(column, count, I, bf16, columns + (begin + o) * K);
        }
}

/* The rows from `begin` to `end` of x, packed in blocks of 8 that begin at multiples of 8. */
static void pack_rows(const void *x, long row, long step, int bf16, long begin, long end, long I, uint32_t *out) {
    long size = bf16 ? 2 : 4, K = words_of(I, bf16);
    const char *first = (const char *)x + begin * row * size;
    if (row == 1 && bf16) pack_beside(first, step, end - begin, ROWS, I, 1, out + begin * K);
    else if (row == 1) pack_beside(first, step, end - begin, ROWS, I, 0, out + begin * K);
    else
        for (long n = begin; n < end; n += ROWS)
            for (long k = 0; k < K; k++)
                for (long r = 0; r < ROWS; r++)
                    out[n * K + k * ROWS + r] = n + r < end ? word_at((const char *)x + (n + r) * row * size, step, k, I, bf16) : 0;
}

/* Part `part` of `length` in blocks of `block`: where it begins; that of part `parts` is its end. */
static inline long share(long part, long parts, long length, long block) {
    long begin = (length + block - 1) / block * part / parts * block;
    return begin < length ? begin : length;
}

/* Rows `top` to `end` and columns `low` to `high`, which begins a tile, of x [N, I] times the transposed m [O, I] -> out, whose rows lie `out_row` apart: of packed
   columns, and of x as it lies or, where it is given, of packed rows. */
static void product_part(const void *x, long x_row, int bf16, long top, long end, long N, long low, long high, long I, int relu, void *out, long out_row,
                         int out_bf16, const uint32_t *columns, const uint32_t *rows) {
    long K = words_of(I, bf16), size = bf16 ? 2 : 4, ahead = ROWS * (rows ? K : x_row * size / 4);
    for (long o = low; o < high; o += SPAN) {
        long V = (high - o + LANES - 1) / LANES < WIDE ? (high - o + LANES - 1) / LANES : WIDE;
        tile_kernel *kernel = KERNELS[rows != NULL][bf16][V - 1];
        for (long n = top; n < end; n += ROWS) {
            const uint32_t *row[ROWS];
            lanes sums[ROWS * WIDE];
            for (long r = 0; r < ROWS; r++)
                row[r] = rows ? rows + n * K + r : (const uint32_t *)((const char *)x + (n + r < N ? n + r : N - 1) * x_row * size);
            kernel(row, columns + o * K, K * LANES, K, sums, ahead);
            for (long r = 0; r < ROWS && n + r < N; r++)
                for (long v = 0; v < V; v++) {
                    lanes found = sums[r * WIDE + v];
                    if (relu) found = chosen((words)(found > 0), found, all(0));
                    store_part(found, out, out_bf16, (n + r) * out_row + o + v * LANES, high - o - v * LANES);
                }
        }
    }
}

/* x [N, I] times the transposed m [O, I] -> out [N, O], whose rows lie `out_row` apart; negative numbers become 0 where `relu`. One step of each factor is 1.
   `columns` [O, I] and, where x's numbers or an odd I want it, `rows` [N, I], both rounded up to tiles, are for use in between. A thread takes
   some of the columns, which no other core then has to fetch from it; where these are few, some of the rows. */
void fathom_product(const void *x, long x_row, long x_step, const void *m, long m_row, long m_step, int bf16, long N, long O, long I, int relu,
                    void *out, long out_row, int out_bf16, uint32_t *columns, uint32_t *rows, int threads) {
    int by_columns = O >= 2 * LANES * threads && 2 * O >= N;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        long own = thread_number(), parts = thread_count(), low = share(own, parts, O, LANES), high = share(own + 1, parts, O, LANES);
        long top = share(own, parts, N, ROWS), end = share(own + 1, parts, N, ROWS);
        if (rows) pack_rows(x, x_row, x_step, bf16, top, end, I, rows);
        pack_matrix(m, m_row, m_step, bf16, low, high, I, columns);
        if (rows || !by_columns) {
#pragma omp barrier
        }
        if (by_columns) product_part(x, x_row, bf16, 0, N, N, low, high, I, relu, out, out_row, out_bf16, columns, rows);
        else product_part(x, x_row, bf16, top, end, N, 0, O, I, relu, out, out_row, out_bf16, columns, rows);
    }
}

/* Products of neighbouring rows, each with a matrix of its own, a thread each: of group g those before end[g], from the end of the one before on. With `outer` the
   rows [P, N] and [P, O] of a group make one matrix, the sum of their products -> out [G, N, O]; else rows x [P, I] are multiplied with the transposed
   m [G, O, I] -> out [P, O]. Only m may have steps. `space` [threads, room] holds packed factors of the largest group. */
void fathom_grouped_products(const void *x, const void *m, long m_group, long m_row, long m_step, int bf16, const int64_t *end, long G, long N, long O,
                             long I, int outer, void *out, uint32_t *space, long room, int threads) {
    long size = bf16 ? 2 : 4;
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (long g = 0; g < G; g++) {
        long begin = g ? end[g - 1] : 0, P = end[g] - begin;
        uint32_t *columns = space + thread_number() * room;
        if (outer) {
            void *own = (char *)out + g * N * O * size;
            uint32_t *rows = columns + (O + LANES - 1) / LANES * LANES * words_of(P, bf16);
            if (P == 0) memset(own, 0, N * O * size);
            if (P == 0) continue;
            pack_rows((const char *)x + begin * N * size, 1, N, bf16, 0, N, P, rows);
            pack_matrix((const char *)m + begin * O * size, 1, O, bf16, 0, O, P, columns);
            product_part(NULL, 0, bf16, 0, N, N, 0, O, P, 0, own, O, bf16, columns, rows);
        } else if (P) {
            pack_matrix((const char *)m + g * m_group * size, m_row, m_step, bf16, 0, O, I, columns);
            product_part((const char *)x + begin * I * size, I, bf16, 0, P, P, 0, O, I, 0, (char *)out + begin * O * size, O, bf16, columns, NULL);
        }
    }
}
