/* Attention of many queries and its gradients in tiles (tiles.c; report eq. 27). Heads of a query are the rows of a tile. Keys are packed once for each row of the
   batch as columns of scores, entries that a query selects for this query. As rows of sums, keys are read where they lie; of bfloat16 two keys
   that follow one another have to lie side by side, word by word, and are packed like that too.

   What a query reads are its columns: blocks of 16 window keys, then blocks of 16 entries, and who is not seen among these. */

typedef struct {
    const void *near, *far;                                       /* keys [T, D] of the window, entries [M, D] */
    int bf16;
    const int64_t *place, *reach, *key_place;                     /* of each query, of each window key */
    const int64_t *first, *count, *selected;                      /* entries of a query: a range, or K of them, or (nulls) none */
    long D, T, M, K;
    uint32_t *near_columns, *near_pairs, *far_columns, *far_pairs; /* packed */
} readable;

typedef struct {
    long near, all;                                              /* columns of window keys, and of all */
    const uint32_t *near_columns, *far_columns;
    const uint32_t **places;                                     /* [all], or of bfloat16 [all / 2]: keys as rows of sums */
    uint32_t *seen;                                              /* [all] */
    int64_t *slot;                                               /* [all], if wanted: the number of the window key or entry */
} columns_read;

static inline long blocks_up(long length) { return (length + LANES - 1) / LANES * LANES; }

static inline void pair_rows(const uint16_t *low, const uint16_t *high, long D, uint32_t *out) {
    for (long d = 0; d < D; d++) out[d] = low[d] | (high ? (uint32_t)high[d] << 16 : 0);
}

/* Up to 16 keys packed as columns, and in pairs. */
ALWAYS void pack_sixteen(const void *const *key, long count, long D, int bf16, uint32_t *columns, uint32_t *pairs) {
    pack_columns(key, count, D, bf16, columns);
    if (bf16)
        for (long c = 0; c < count; c += 2) pair_rows(key[c], c + 1 < count ? key[c + 1] : NULL, D, pairs + c / 2 * D);
}

static void pack_keys_of(const void *keys, int bf16, long T, long D, uint32_t *columns, uint32_t *pairs) {
#pragma omp for schedule(static)
    for (long t = 0; t < T; t += LANES) {
        const void *key[LANES];
        long here = T - t < LANES ? T - t : LANES;
        for (long c = 0; c < here; c++) key[c] = nth(keys, bf16, t + c, D);
        pack_sixteen(key, here, D, bf16, columns + t * words_of(D, bf16), pairs + t / 2 * D);
    }
}

static long packed_words(long length, long D, int bf16) { return blocks_up(length) * words_of(D, bf16) + (bf16 ? blocks_up(length) / 2 * D : 0); }

/* A row of the batch, its keys packed by all threads: `shared` holds packed_words of T, and of M unless entries are selected. */
static readable row_of(const void *window, const void *entries, int bf16, const int64_t *place, const int64_t *reach, const int64_t *key_place,
                       const int64_t *first, const int64_t *count, const int64_t *selected, long b, long D, long T, long M, long K, long entry_row,
                       uint32_t *shared) {
    readable own = {nth(window, bf16, b, T * D), nth(entries, bf16, b, entry_row), bf16, place, reach, key_place + b * T, first, count, selected, D, T, M, K};
    own.near_columns = shared, own.near_pairs = shared + blocks_up(T) * words_of(D, bf16);
    own.far_columns = shared + packed_words(T, D, bf16), own.far_pairs = own.far_columns + blocks_up(M) * words_of(D, bf16);
    pack_keys_of(own.near, bf16, T, D, own.near_columns, own.near_pairs);
    if (entries && !selected) pack_keys_of(own.far, bf16, M, D, own.far_columns, own.far_pairs);
    return own;
}

static inline int sees(const readable *from, long i, long t) {
    return t < from->T && from->key_place[t] <= from->place[i] && from->key_place[t] >= from->place[i] - from->reach[i];
}

/* A column, and its place where it is the first of a pair or alone. */
ALWAYS void add_column(columns_read *to, int bf16, int seen, int64_t slot, const void *place) {
    to->seen[to->all] = seen ? ~0u : 0;
    if (to->slot) to->slot[to->all] = slot;
    if (!bf16 || to->all % 2 == 0) to->places[bf16 ? to->all / 2 : to->all] = place;
    to->all++;
}

/* What query i reads. `space` holds packed_words of K and a row of zeros. */
static void read_columns(const readable *from, long i, uint32_t *space, columns_read *to) {
    long D = from->D, words = words_of(D, from->bf16), low = 0, high = 0;
    int bf16 = from->bf16;
    uint32_t *columns = space, *pairs = space + blocks_up(from->K) * words, *zeros = space + packed_words(from->K, D, bf16);
    memset(zeros, 0, D * sizeof(uint32_t));
    for (long t = 0; t < from->T; t += LANES) {
        long here = from->T - t < LANES ? from->T - t : LANES;
        int64_t any = 0;
        for (long c = 0; c < here; c++) any |= from->key_place[t + c] <= from->place[i] && from->key_place[t + c] >= from->place[i] - from->reach[i];
        if (any && high == 0) low = t;
        if (any) high = t + LANES;
    }
    to->all = 0, to->near_columns = from->near_columns + low * words, to->far_columns = columns;
    for (long t = low; t < high; t++) {
        int seen = sees(from, i, t);
        add_column(to, bf16, seen, t, bf16 ? (seen || sees(from, i, t + 1) ? from->near_pairs + t / 2 * D : zeros) : seen ? nth(from->near, 0, t, D) : zeros);
    }
    to->near = to->all;
    if (from->selected) {
        const void *key[LANES];
        long found = 0;
        for (long k = 0; k < from->K; k++) {
            int64_t slot = from->selected[i * from->K + k];
            if (slot < 0) continue;
            key[found % LANES] = nth(from->far, bf16, slot, D);
            add_column(to, bf16, 1, slot, bf16 ? pairs + found / 2 * D : key[found % LANES]);
            if (++found % LANES == 0) pack_sixteen(key, LANES, D, bf16, columns + (found - LANES) * words, pairs + (found - LANES) / 2 * D);
        }
        if (found % LANES) pack_sixteen(key, found % LANES, D, bf16, columns + found / LANES * LANES * words, pairs + found / LANES * LANES / 2 * D);
    } else if (from->far && from->first) {
        long begin = from->first[i] > 0 ? from->first[i] : 0, end = from->first[i] + from->count[i] < from->M ? from->first[i] + from->count[i] : from->M;
        to->far_columns = from->far_columns + begin / LANES * LANES * words;
        for (long m = begin / LANES * LANES; m < end; m++)
            add_column(to, bf16, m >= begin, m, bf16 ? from->far_pairs + m / 2 * D : m >= begin ? nth(from->far, 0, m, D) : zeros);
    }
    while (to->all % LANES) add_column(to, bf16, 0, 0, zeros);
}

/* Products of 8 rows with all columns -> score [8], rows `most` apart. */
static void score_columns(const uint32_t *const *row, int bf16, const columns_read *from, long words, float *score, long most) {
    for (int far = 0; far < 2; far++) {
        const uint32_t *columns = far ? from->far_columns : from->near_columns;
        long begin = far ? from->near : 0, end = far ? from->all : from->near;
        for (long j = begin; j < end; j += SPAN) {
            long V = (end - j) / LANES < WIDE ? (end - j) / LANES : WIDE;
            lanes sums[ROWS * WIDE];
            KERNELS[0][bf16][V - 1](row, columns + (j - begin) * words, words * LANES, words, sums, 0);
            for (long r = 0; r < ROWS; r++)
                for (long v = 0; v < V; v++) *(lanes *)(score + r * most + j + v * LANES) = sums[r * WIDE + v];
        }
    }
}

/* A head's scores [J] to weights e^(scale x - top), in place or as bfloat16 from there on; returns one over their sum and the sink's, and its share. */
ALWAYS float weights_of(float *score, const uint32_t *seen, long J, float scale, float sink, int bf16, float *sinks_share) {
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
    float own = sink - top < -87 ? 0 : exponential(all(sink - top))[0], inverse = 1 / (total(sums) + own);
    *sinks_share = own * inverse;
    return inverse;
}

/* Sums over K words of 8 rows times rows of D numbers that lie at `places` -> out [blocks of 48 numbers][8][3]. */
ALWAYS void mix_rows(const uint32_t *const *row, long step, const uint32_t *const *places, int bf16, long K, long D, lanes *out) {
    for (long d = 0; d < D; d += SPAN) {
        lanes *sums = out + d / SPAN * ROWS * WIDE;
        if (D - d >= SPAN) tile(row, step, NULL, places, d, LANES, K, bf16, 3, sums, 0);
        else if (D - d > LANES) tile(row, step, NULL, places, d, LANES, K, bf16, 2, sums, 0);
        else tile(row, step, NULL, places, d, LANES, K, bf16, 1, sums, 0);
    }
}

static void mix_any(const uint32_t *const *row, long step, const uint32_t *const *places, int bf16, long K, long D, lanes *out) {
    if (bf16 && step == 1) mix_rows(row, 1, places, 1, K, D, out);
    else if (step == 1) mix_rows(row, 1, places, 0, K, D, out);
    else if (bf16) mix_rows(row, step, places, 1, K, D, out);
    else mix_rows(row, step, places, 0, K, D, out);
}

static inline lanes mixed(const lanes *sums, long r, long d) { return sums[d / SPAN * ROWS * WIDE + r * WIDE + d % SPAN / LANES]; }

/* Attention [B, S, H, D] of queries over window keys [B, T, D] and entries [B, M, D], rows of the batch `entry_row` numbers apart, of which a query reads `count`
   from `first` on, or the selected [B, S, K]. D is a multiple of 16, `most` too, which no query's columns exceed. For use in between: `shared` as
   row_of wants it, and for each thread `score` [8, most] and `space` as read_columns wants it, `room` words. */
void fathom_attention_of_many(const void *q, const void *window, const void *entries, int bf16, const int64_t *place, const int64_t *reach,
                              const int64_t *key_place, const int64_t *first, const int64_t *count, const int64_t *selected, const float *sink, long B,
                              long S, long H, long D, long T, long M, long K, long entry_row, long most, uint32_t *shared, float *score, uint32_t *space,
                              long room, void *out, int threads) {
    long words = words_of(D, bf16);
    float scale = 1 / sqrtf(D);
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (long b = 0; b < B; b++) {
        readable from = row_of(window, entries, bf16, place, reach, key_place, first, count, selected, b, D, T, M, K, entry_row, shared);
        uint32_t seen[most];
        const uint32_t *places[most];
        columns_read read = {.places = places, .seen = seen};
        float *own = score + thread_number() * ROWS * most;
#pragma omp for schedule(dynamic, 8)
        for (long i = b * S; i < (b + 1) * S; i++) {
            read_columns(&from, i, space + thread_number() * room, &read);
            for (long h = 0; h < H; h += ROWS) {
                const uint32_t *row[ROWS];
                lanes sums[(D + SPAN - 1) / SPAN * ROWS * WIDE];
                float inverse[ROWS], share;
                for (long r = 0; r < ROWS; r++) row[r] = nth(q, bf16, i * H + (h + r < H ? h + r : H - 1), D);
                score_columns(row, bf16, &read, words, own, most);
                for (long r = 0; r < ROWS; r++) {
                    row[r] = (const uint32_t *)(own + r * most);
                    inverse[r] = h + r < H ? weights_of(own + r * most, seen, read.all, scale, sink[h + r], bf16, &share) : 0;
                }
                mix_any(row, 1, places, bf16, words_of(read.all, bf16), D, sums);
                for (long r = 0; r < ROWS && h + r < H; r++)
                    for (long d = 0; d < D; d += LANES) store_part(mixed(sums, r, d) * inverse[r], out, bf16, (i * H + h + r) * D + d, LANES);
            }
        }
    }
}

enum { CHUNK_QUERIES = 64 };

/* The weights of 8 heads and the gradients of the scores, from scores and the weights' gradients, all [8, J] in rows `most` apart. Weights of heads
   from `heads` on are zeros. */
static void score_gradients(float *weight, float *grad, const uint32_t *seen, long J, long most, float scale, const float *sink, long heads, float *sink_grad) {
    for (long r = 0; r < ROWS; r++) {
        float *p = weight + r * most, *g = grad + r * most, share;
        lanes along = {0};
        if (r >= heads) {
            memset(p, 0, J * sizeof(float));
            memset(g, 0, J * sizeof(float));
            continue;
        }
        float inverse = weights_of(p, seen, J, scale, sink[r], 0, &share);
        for (long j = 0; j < J; j += LANES) {
            lanes own = load(p + j) * inverse;
            *(lanes *)(p + j) = own;
            along += chosen((words)(own > 0), own * load(g + j), all(0));
        }
        float mean = total(along);
        for (long j = 0; j < J; j += LANES) {
            lanes own = load(p + j);
            *(lanes *)(g + j) = chosen((words)(own > 0), own * (load(g + j) - mean) * scale, all(0));
        }
        sink_grad[r] = -share * mean;
    }
}

/* Words of two rows each, side by side, as bfloat16: [4] rows from [8], all `most` apart. */
static void pair_heads(const float *rows, long J, long most, uint32_t *out) {
    for (long r = 0; r < ROWS; r += 2)
        for (long j = 0; j < J; j += LANES) {
            words low = (words)load(rows + r * most + j), high = (words)load(rows + (r + 1) * most + j);
            low = (low + 0x7fff + ((low >> 16) & 1)) >> 16, high = (high + 0x7fff + ((high >> 16) & 1)) & 0xffff0000u;
            *(loose_words *)(out + r / 2 * most + j) = low | high;
        }
}

/* The gradients of fathom_attention_of_many's queries, keys and entries (these in float32), and of the sinks for each query [B, S, H]. A thread takes 64 queries
   at a time; what they give to keys is summed apart, and added in the order of the queries. `score` [threads, 16 + 8, most],
   `sums` [threads, T + M, D], T and M rounded up to 16; key and entry gradients are zeros before. */
void fathom_attention_backward(const void *q, const void *grad, const void *window, const void *entries, int bf16, const int64_t *place, const int64_t *reach,
                               const int64_t *key_place, const int64_t *first, const int64_t *count, const int64_t *selected, const float *sink, long B, long S,
                               long H, long D, long T, long M, long K, long entry_row, long most, uint32_t *shared, float *score, uint32_t *space, long room,
                               float *sums, void *q_grad, float *near_grad, float *far_grad, float *sink_grad, int threads) {
    long words = words_of(D, bf16), near_numbers = blocks_up(T) * D, chunk_words = bf16 ? ROWS : 2 * ROWS;
    float scale = 1 / sqrtf(D);
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (long b = 0; b < B; b++) {
        readable from = row_of(window, entries, bf16, place, reach, key_place, first, count, selected, b, D, T, M, K, entry_row, shared);
        uint32_t seen[most], pairs[bf16 ? ROWS * D : 1];
        int64_t slot[most];
        const uint32_t *places[most];
        columns_read read = {.places = places, .seen = seen, .slot = slot};
        float *weight = score + thread_number() * 3 * ROWS * most, *slope = weight + ROWS * most;
        uint32_t *narrow = (uint32_t *)(slope + ROWS * most);
        float *near_sums = sums + thread_number() * (near_numbers + blocks_up(M) * D), *far_sums = near_sums + near_numbers;
#pragma omp for ordered schedule(dynamic, 1)
        for (long chunk = 0; chunk < (S + CHUNK_QUERIES - 1) / CHUNK_QUERIES; chunk++) {
            long begin = b * S + chunk * CHUNK_QUERIES, end = begin + CHUNK_QUERIES < (b + 1) * S ? begin + CHUNK_QUERIES : (b + 1) * S;
            long low = T, high = 0;
            if (entries) memset(far_sums, 0, M * D * sizeof(float));
            for (long i = begin; i < end; i++) {
                read_columns(&from, i, space + thread_number() * room, &read);
                if (read.near) { /* rows that this query is the first to see */
                    long its_low = slot[0], its_high = slot[read.near - 1] + 1;
                    if (low > high) low = high = its_low;
                    for (; low > its_low; low--) memset(near_sums + (low - 1) * D, 0, D * sizeof(float));
                    for (; high < its_high; high++) memset(near_sums + high * D, 0, D * sizeof(float));
                }
                for (long h = 0; h < H; h += ROWS) {
                    const uint32_t *row[ROWS], *from_rows[2 * ROWS];
                    lanes found[(D + SPAN - 1) / SPAN * ROWS * WIDE];
                    long heads = H - h < ROWS ? H - h : ROWS;
                    for (long r = 0; r < ROWS; r++) row[r] = nth(q, bf16, i * H + (r < heads ? h + r : H - 1), D);
                    for (long r = 0; r < ROWS; r++) from_rows[r] = row[r];
                    score_columns(row, bf16, &read, words, weight, most);
                    for (long r = 0; r < ROWS; r++) row[r] = from_rows[ROWS + r] = nth(grad, bf16, i * H + (r < heads ? h + r : H - 1), D);
                    score_columns(row, bf16, &read, words, slope, most);
                    score_gradients(weight, slope, seen, read.all, most, scale, sink + h, heads, sink_grad + i * H + h);
                    if (bf16) { /* heads in pairs, for sums over heads */
                        for (long r = 0; r < 2 * ROWS; r += 2) {
                            pair_rows((const uint16_t *)from_rows[r], (const uint16_t *)from_rows[r + 1], D, pairs + r / 2 * D);
                            from_rows[r / 2] = pairs + r / 2 * D;
                        }
                        pair_heads(slope, read.all, most, narrow), pair_heads(weight, read.all, most, narrow + ROWS / 2 * most);
                        for (long r = 0; r < ROWS; r++)
                            for (long j = 0; j < read.all; j += LANES) store_part(load(slope + r * most + j), slope + r * most, 1, j, LANES);
                    }
                    for (long r = 0; r < ROWS; r++) row[r] = (const uint32_t *)(slope + r * most);
                    mix_any(row, 1, places, bf16, words_of(read.all, bf16), D, found);
                    for (long r = 0; r < heads; r++)
                        for (long d = 0; d < D; d += LANES) store_part(mixed(found, r, d), q_grad, bf16, (i * H + h + r) * D + d, LANES);
                    if (!bf16) /* slopes, then weights, as pairs have them */
                        for (long r = 0; r < ROWS; r++) {
                            const uint32_t *own = from_rows[r];
                            from_rows[r] = from_rows[ROWS + r], from_rows[ROWS + r] = own;
                        }
                    for (long j = 0; j < read.all; j += ROWS) {
                        for (long r = 0; r < ROWS; r++) row[r] = (bf16 ? narrow : (const uint32_t *)weight) + j + r;
                        mix_any(row, most, from_rows, bf16, chunk_words, D, found);
                        for (long r = 0; r < ROWS; r++)
                            if (seen[j + r]) {
                                float *to = (j + r < read.near ? near_sums : far_sums) + slot[j + r] * D;
                                for (long d = 0; d < D; d += LANES) *(lanes *)(to + d) += mixed(found, r, d);
                            }
                    }
                }
            }
#pragma omp ordered
            {
                for (long n = low * D; n < high * D && n < T * D; n++) near_grad[b * T * D + n] += near_sums[n];
                if (entries)
                    for (long n = 0; n < M * D; n++) far_grad[b * M * D + n] += far_sums[n];
            }
        }
    }
}
