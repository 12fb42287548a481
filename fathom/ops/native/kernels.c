/* The operators for a few tokens at a time, as in decoding, where every weight is read once and used once or a few times.

   Products are those of dots.c: neither the threads nor the other tokens of a call show in a bit of the result. Everything is contiguous, sums are in
   float32; `bf16` says that numbers are bfloat16. The Python files beside this one say what is computed. */

static inline lanes larger(lanes a, lanes b) {
    words first = (words)(a > b);
    return (lanes)(((words)a & first) | ((words)b & ~first));
}

static inline float largest_of(lanes x) {
    x = larger(x, MOVED(x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    x = larger(x, MOVED(x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    x = larger(x, MOVED(x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    x = larger(x, MOVED(x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
    return x[0];
}

/* e^x to a relative 2.3e-7; from -87 down and from 88 up as there. x = k ln 2 + r, e^r by its series. */
static inline lanes exponential(lanes x) {
    lanes low = {0}, high = {0}, magic = {0};
    low -= 87, high += 88, magic += 0x1.8p23f;
    x = (lanes)(((words)low & (words)(x < low)) | ((words)high & (words)(x > high)) | ((words)x & ~(words)(x < low) & ~(words)(x > high)));
    lanes shifted = x * 0x1.715476p+0f + magic, k = shifted - magic;
    lanes r = (x - k * 0x1.62e4p-1f) + k * -0x1.7f7d1cp-20f;
    lanes sum = 1 + r * (1 + r * (1.f / 2 + r * (1.f / 6 + r * (1.f / 24 + r * (1.f / 120 + r * (1.f / 720))))));
    return (lanes)((words)sum + ((words)shifted << 23));
}

static inline lanes gate(lanes x) { return 1 / (1 + exponential(-x)); }

/* x [length] -> e^(x - top); returns their sum. */
static inline float exponentials(float *x, long length, float top) {
    lanes sums = {0};
    long j = 0;
    for (; j + LANES <= length; j += LANES) sums += *(lanes *)(x + j) = exponential(load(x + j) - top);
    float sum = total(sums);
    if (j < length) {
        lanes rest = exponential(load_rest(x + j, length - j) - top);
        for (long i = 0; j + i < length; i++) sum += x[j + i] = rest[i];
    }
    return sum;
}

/* Space that begins with a cache line: a vector across two is read half as fast. */
static inline float *room(long floats) { return aligned_alloc(64, (floats * sizeof(float) / 64 + 1) * 64); }

enum { SETS = 4096 }; /* bytes: x that lie a multiple of this apart, each a part that is used at once, would push each other out of the first cache */

/* x [N, G, I] times the transposed matrix [O, I] -> out [N, O]; each G-th part of the rows has its own x, and 16 divide it if G > 1. */
static void multiply(matrix m, long O, long I, const void *x, int bf16, long N, long G, void *out, int out_bf16, int threads) {
    int coded = format_of(m) >= FP8, pairs = bf16 && format_of(m) == BF16;
    long size = pairs ? 2 : 4, step = G * I * size, apart = N > 2 && step % SETS == 0 ? step + SETS / 2 : step;
    char *space = coded || bf16 != pairs || apart != step ? (char *)room(N * apart / 4) : 0;
    for (long row = 0; space && row < N * G; row++) {
        char *own = space + row / G * apart + row % G * I * size;
        float wide[I];
        if (pairs) memcpy(own, nth(x, 1, row, I), I * size);
        else if (coded) arrange(widened(nth(x, bf16, row, I), bf16, I, wide), format_of(m), I, (float *)own);
        else widen(nth(x, bf16, row, I), bf16, I, (float *)own);
    }
    if (space) x = space;
    long together = LANES; /* rows of the matrix; fewer where a few blocks of them would be shared unevenly */
    while (together > 4 && O <= 4 * LANES * threads && blocks_of(O, together) % threads) together /= 2;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long o = 0; o < O; o += together) {
        float made[N * LANES];
        long end = O - o < together ? O : o + together;
        times(m, o, end, I, (const char *)x + o / (O / G) * I * size, pairs, space ? apart : step, N, made);
        for (long n = 0; n < N; n++) put(made + n * LANES, end - o, out, out_bf16, n * O + o);
    }
    free(space);
}

/* As `multiply`; x and out are of one kind. */
void fathom_linear(const void *numbers, const void *scale, int kind, long O, long I, const void *x, int bf16, long N, long G, void *out, int threads) {
    multiply((matrix){numbers, scale, kind}, O, I, x, bf16, N, G, out, bf16, threads);
}

/* x [N, D] over the root mean square of each row, times a weight [D] that may be null. */
void fathom_rms_normalise(const void *x, int bf16, const float *weight, long N, long D, float eps, void *out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long n = 0; n < N; n++) {
        float made[D];
        const float *row = widened(nth(x, bf16, n, D), bf16, D, made);
        float inverse = 1 / sqrtf(dot_float(row, row, D) / D + eps);
        if (weight)
            for (long d = 0; d < D; d++) made[d] = row[d] * inverse * weight[d];
        else
            for (long d = 0; d < D; d++) made[d] = row[d] * inverse;
        put(made, D, out, bf16, n * D);
    }
}

/* `out` may be x. The last 2 C channels of x [N, A, D] as complex numbers times turn [N, C], or its conjugates where `inverse`. */
void fathom_rotate(const void *x, int bf16, const float *turn, long N, long A, long D, long C, int inverse, void *out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long row = 0; row < N * A; row++) {
        float made[2 * C], space[2 * C];
        const float *from = widened(nth(x, bf16, row * D + D - 2 * C, 1), bf16, 2 * C, space), *by = turn + row / A * 2 * C;
        for (long c = 0; c < 2 * C; c += 2) {
            float imaginary = inverse ? -by[c + 1] : by[c + 1];
            made[c] = from[c] * by[c] - from[c + 1] * imaginary;
            made[c + 1] = from[c] * imaginary + from[c + 1] * by[c];
        }
        if (out != x) memcpy((char *)out + row * D * (bf16 ? 2 : 4), nth(x, bf16, row, D), (D - 2 * C) * (bf16 ? 2 : 4));
        put(made, 2 * C, out, bf16, row * D + D - 2 * C);
    }
}

/* silu(min(gate, limit)) clamp(up, -limit, limit) */
ALWAYS lanes activated(lanes x, lanes y, float limit) {
    lanes high = all(limit), low = -high;
    x = chosen((words)(x > high), high, x), y = chosen((words)(y > high), high, chosen((words)(y < low), low, y));
    return x * gate(x) * y;
}

/* Whether what comes between an expert's products is kept in bfloat16, as pairs of which the last is made. */
static inline int paired(int kind, int bf16) { return bf16 && kind == BF16; }

/* Pairs of token and expert, P = N K, sorted by expert into `order`, so that an expert's matrices are read once: each pair's activation
   hidden [P, F] of x [N, W], in that order, of x's kind where the matrices are bfloat16, else floats; own [P, W] is for use in between. `bf16`: gate and
   up are narrowed, as products of such x are, and the activation before it is rounded. Returns 1, having done nothing, where an expert is none of the E. */
int fathom_experts_in(const void *x, const int64_t *expert, const float *weight, const void *gate, const void *gate_scale, const void *up,
                      const void *up_scale, int kind, int bf16, long N, long K, long E, long F, long W, float limit, int64_t *order, float *own,
                      void *hidden, int threads) {
    long P = N * K;
    int pairs = paired(kind, bf16);
    matrix gates = {gate, gate_scale, kind}, ups = {up, up_scale, kind};
    for (long p = 0; p < P; p++) {
        if (expert[p] < 0 || expert[p] >= E) return 1;
        long place = p;
        for (; place > 0 && expert[order[place - 1]] > expert[p]; place--) order[place] = order[place - 1];
        order[place] = p;
    }
    for (long p = 0; p < P; p++) {
        float token[W];
        const void *from = nth(x, bf16, order[p] / K, W);
        if (pairs) memcpy((uint16_t *)own + p * W, from, W * sizeof(uint16_t));
        else {
            widen(from, bf16, W, token);
            if (kind & ROUNDS) round_fp8(token, W, INPUT_BLOCK);
            if (format_of(gates) >= FP8) arrange(token, format_of(gates), W, own + p * W);
            else memcpy(own + p * W, token, W * sizeof(float));
        }
    }
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (long p = 0, end; p < P; p = end) {
        long e = expert[order[p]], step = W * (pairs ? 2 : 4);
        for (end = p + 1; end < P && expert[order[end]] == e;) end++;
        matrix its_gate = nth_matrix(gates, e, F, W), its_up = nth_matrix(ups, e, F, W);
#pragma omp for schedule(static) nowait
        for (long f = 0; f < F; f += LANES) {
            float made[2][(end - p) * LANES];
            times(its_gate, f, F, W, (const char *)own + p * step, pairs, step, end - p, made[0]);
            times(its_up, f, F, W, (const char *)own + p * step, pairs, step, end - p, made[1]);
            settle(made[0], 2 * (end - p) * LANES, bf16);
            for (long i = p; i < end; i++) {
                lanes own_hidden = activated(load(made[0] + (i - p) * LANES), load(made[1] + (i - p) * LANES), limit) * weight[order[i]];
                store_part(own_hidden, hidden, pairs, i * F + f, F - f);
            }
        }
    }
    for (long p = 0; kind & ROUNDS && p < P; p++) {
        settle((float *)hidden + p * F, F, bf16);
        round_fp8((float *)hidden + p * F, F, INPUT_BLOCK);
    }
    return 0;
}

/* Each token's sum [N, W] over its experts, of hidden [P, F] and `order` from above; own [P, F] and part [P, W] are for use in between. */
void fathom_experts_out(const void *hidden, const int64_t *expert, const int64_t *order, const void *down, const void *down_scale, int kind, int bf16,
                        long N, long K, long F, long W, float *own, float *part, float *out, int threads) {
    long P = N * K, step = F * (paired(kind, bf16) ? 2 : 4);
    matrix downs = {down, down_scale, kind & ~ROUNDS};
    if (format_of(downs) >= FP8) {
        for (long p = 0; p < P; p++) arrange((const float *)hidden + p * F, format_of(downs), F, own + p * F);
        hidden = own;
    }
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        for (long p = 0, end; p < P; p = end) {
            long e = expert[order[p]];
            for (end = p + 1; end < P && expert[order[end]] == e;) end++;
            matrix its_down = nth_matrix(downs, e, W, F);
#pragma omp for schedule(static) nowait
            for (long w = 0; w < W; w += LANES) {
                float made[(end - p) * LANES];
                times(its_down, w, W, F, (const char *)hidden + p * step, paired(kind, bf16), step, end - p, made);
                for (long i = p; i < end; i++) store_part(load(made + (i - p) * LANES), part, 0, order[i] * W + w, W - w);
            }
        }
#pragma omp barrier
#pragma omp for schedule(static)
        for (long n = 0; n < N; n++) {
            memset(out + n * W, 0, W * sizeof(float));
            for (long k = 0; k < K; k++) add_float(out + n * W, 1, part + (n * K + k) * W, W);
        }
    }
}

/* sum_n factor[n] rows[n] of N rows [W] from the `index`-th number on -> out, from its `place`-th on. */
ALWAYS void weigh(const void *rows, int bf16, long index, long N, const float *factor, long W, void *out, long place) {
    for (long w = 0; w < W; w += LANES) {
        lanes sum = factor[0] * load_part(rows, bf16, index + w, W - w);
        for (long n = 1; n < N; n++) sum += factor[n] * load_part(rows, bf16, index + n * W + w, W - w);
        store_part(sum, out, bf16, place + w, W - w);
    }
}

static inline void weigh_any(const void *rows, int bf16, long index, long N, const float *factor, long W, void *out, long place) {
    if (N == 4 && bf16) weigh(rows, 1, index, 4, factor, W, out, place);
    else if (N == 4) weigh(rows, 0, index, 4, factor, W, out, place);
    else weigh(rows, bf16, index, N, factor, W, out, place);
}

/* The N new streams of one token. */
ALWAYS void streams_of(const void *x, const void *y, int bf16, const float *post, const float *res, long t, long N, long W, void *out) {
    for (long k = 0; k < N; k++)
        for (long w = 0; w < W; w += LANES) {
            lanes sum = res[t * N * N + k] * load_part(x, bf16, t * N * W + w, W - w);
            for (long n = 1; n < N; n++) sum += res[(t * N + n) * N + k] * load_part(x, bf16, (t * N + n) * W + w, W - w);
            store_part(sum + post[t * N + k] * load_part(y, bf16, t * W + w, W - w), out, bf16, (t * N + k) * W + w, W - w);
        }
}

/* sum_n pre_n x_n [T, W] of x [T, N, W] (eq. 1). */
void fathom_streams_in(const void *x, int bf16, const float *pre, long T, long N, long W, void *out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long t = 0; t < T; t++) weigh_any(x, bf16, t * N * W, N, pre + t * N, W, out, t * W);
}

/* New streams [T, N, W]: post_k y + sum_j res[j, k] x_j (eq. 1). */
void fathom_streams_out(const void *x, const void *y, int bf16, const float *post, const float *res, long T, long N, long W, void *out,
                        int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long t = 0; t < T; t++) {
        if (N == 4 && bf16) streams_of(x, y, 1, post, res, t, 4, W, out);
        else if (N == 4) streams_of(x, y, 0, post, res, t, 4, W, out);
        else streams_of(x, y, bf16, post, res, t, N, W, out);
    }
}

/* scale q_n . key_j for each of n heads and `seen` keys -> score [n, seen], whose rows lie `apart` numbers from each other, in whole vectors. */
static void score_keys(const char *q, const char **keys, long seen, int how, long n, long D, float scale, float *score, long apart) {
    for (long j = 0; j < seen; j += LANES) {
        words space[n * LANES]; /* for its alignment */
        lanes *sums = (lanes *)space;
        memset(space, 0, sizeof space);
        for (long r = 0; r < LANES && j + r < seen; r++) many_dots(keys[j + r], 0, 1, q, D * (how == PAIRS ? 2 : 4), n, D, how, sums + r);
        for (long h = 0; h < n; h++) *(lanes *)(score + h * apart + j) = scale * totals(sums + h * LANES);
    }
}

/* out [n, D] = sum_j weight [n, j] key_j for n heads, each sum in the order of the keys; the channels from d on, as many as V vectors hold. */
ALWAYS void mix_part(const char **keys, long seen, int bf16, int n, long D, long d, int V, const float *weight, long apart, float *out) {
    lanes sums[8][2];
    long count = D - d < V * LANES ? D - d : V * LANES;
#pragma GCC unroll 8
    for (int h = 0; h < n; h++)
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) sums[h][v] = (lanes){0};
    for (long j = 0; j < seen; j++) {
        lanes key[2];
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) key[v] = load_part(keys[j], bf16, d + v * LANES, V > 1 ? LANES : count);
#pragma GCC unroll 8
        for (int h = 0; h < n; h++) {
            lanes by = all(weight[h * apart + j]);
#pragma GCC unroll 2
            for (int v = 0; v < V; v++) sums[h][v] += by * key[v];
        }
    }
#pragma GCC unroll 8
    for (int h = 0; h < n; h++)
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) store_part(sums[h][v], out, 0, h * D + d + v * LANES, V > 1 ? LANES : count);
}

ALWAYS void mix_heads(const char **keys, long seen, int bf16, int n, long D, const float *weight, long apart, float *out) {
    long d = 0;
    for (; d + 2 * LANES <= D; d += 2 * LANES) mix_part(keys, seen, bf16, n, D, d, 2, weight, apart, out);
    for (; d < D; d += LANES) mix_part(keys, seen, bf16, n, D, d, 1, weight, apart, out);
}

static void mix_keys(const char **keys, long seen, int bf16, long n, long D, const float *weight, long apart, float *out) {
    for (long h = 0, some; h < n; h += some) {
        const float *own = weight + h * apart;
        some = n - h >= 8 ? 8 : n - h >= 4 ? 4 : 1;
        if (some == 8 && bf16) mix_heads(keys, seen, 1, 8, D, own, apart, out + h * D);
        else if (some == 8) mix_heads(keys, seen, 0, 8, D, own, apart, out + h * D);
        else if (some == 4 && bf16) mix_heads(keys, seen, 1, 4, D, own, apart, out + h * D);
        else if (some == 4) mix_heads(keys, seen, 0, 4, D, own, apart, out + h * D);
        else mix_heads(keys, seen, bf16, 1, D, own, apart, out + h * D);
    }
}

/* Softmax attention out [B, S, H, D], of q's kind, over seen window keys [B, T, D], visible or selected entries [B, ., D] and the sink; rows of entries
   lie `entry_row` numbers apart. `selected` [B, S, K] may be null, and then `count` entries from `first` on are read. q is of the keys' kind or floats.
   Heads that are computed together share what is read, not their sums. */
void fathom_attention(const void *q, int q_bf16, const void *window, const void *entries, int bf16, const int64_t *key_place, const int64_t *query_place,
                      const int64_t *reach, const int64_t *first, const int64_t *count, const int64_t *selected, const float *sink, long B,
                      long S, long H, long D, long T, long K, long entry_row, long most, void *out, int threads) {
    long size = bf16 ? 2 : 4, together = 8, apart = (most + LANES - 1) / LANES * LANES;
    int how = !bf16 ? FLOATS : q_bf16 ? PAIRS : WIDENED;
    while (together > 1 && B * S * ((H + together - 1) / together) < threads) together /= 2;
    long groups = (H + together - 1) / together;
    float scale = 1 / sqrtf(D);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const char **keys = malloc(most * sizeof(char *));
        float *score = malloc(8 * (apart + D) * sizeof(float)), *made = score + 8 * apart;
#pragma omp for schedule(static)
        for (long i = 0; i < B * S * groups; i++) {
            long h = i % groups * together, s = i / groups, b = s / S, seen = 0, n = H - h < together ? H - h : together;
            for (long t = 0; t < T; t++) {
                int64_t distance = query_place[s] - key_place[b * T + t];
                if (distance >= 0 && distance <= reach[s]) keys[seen++] = (const char *)window + (b * T + t) * D * size;
            }
            const char *row = (const char *)entries + b * entry_row * size;
            if (selected)
                for (long k = 0; k < K; k++) {
                    if (selected[s * K + k] >= 0) keys[seen++] = row + selected[s * K + k] * D * size;
                }
            else if (entries)
                for (long m = first[s]; m < first[s] + count[s]; m++) keys[seen++] = row + m * D * size;
            score_keys(nth(q, q_bf16, s * H + h, D), keys, seen, how, n, D, scale, score, apart);
            for (long head = 0; head < n; head++) {
                float *own = score + head * apart, top = sink[h + head];
                long j = 0;
                lanes tops = {0};
                for (tops += top; j + LANES <= seen; j += LANES) tops = larger(tops, load(own + j));
                for (top = largest_of(tops); j < seen; j++) top = own[j] > top ? own[j] : top;
                float inverse = 1 / (exponentials(own, seen, top) + expf(sink[h + head] - top));
                for (j = 0; j < seen; j++) own[j] *= inverse;
            }
            mix_keys(keys, seen, bf16, n, D, score, apart, made);
            put(made, n * D, out, q_bf16, (s * H + h) * D);
        }
        free(keys);
        free(score);
    }
}

/* Numbers in the order of floats, smallest first. */
static inline uint32_t rank_of(float score) {
    uint32_t bits;
    memcpy(&bits, &score, 4);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/* The k-th largest rank of `length` scores, 8 bits at a time, and how many of its equals belong to the k best. */
static uint32_t kth_rank(const float *score, long length, long k, long *equals) {
    uint32_t found = 0, mask = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        uint32_t counts[256] = {0}, bucket = 255;
        for (long m = 0; m < length; m++) {
            uint32_t rank = rank_of(score[m]);
            if ((rank & mask) == found) counts[rank >> shift & 255]++;
        }
        for (; counts[bucket] < k; bucket--) k -= counts[bucket];
        found |= bucket << shift;
        mask |= 255u << shift;
    }
    *equals = k;
    return found;
}

/* The places of scores that are no less than `least`, at most `room` of them; returns how many, or -1 where there are more. */
static long places_from(const float *score, long count, float least, long room, int64_t *place) {
    long found = 0, m = 0;
#ifdef __AVX512F__
    for (; m + LANES <= count; m += LANES)
        for (uint32_t bits = _mm512_cmp_ps_mask((__m512)load(score + m), (__m512)((lanes){0} + least), _CMP_GE_OQ); bits; bits &= bits - 1) {
            if (found == room) return -1;
            place[found++] = m + __builtin_ctz(bits);
        }
#endif
    for (; m < count; m++)
        if (score[m] >= least) {
            if (found == room) return -1;
            place[found++] = m;
        }
    return found;
}

enum { MOST_GROUPS = 8192 };

/* Slots [K] of the K best of `count` scores, the first of which is slot `first`: ascending, of equals the earlier; -1 behind the last.
   Among many, only those are looked at that are no less than the K-th best of 2 K groups' maxima: K groups at least hold one such. */
static void best_slots(const float *score, long first, long count, long K, int64_t *slots) {
    long equals, taken = 0, groups = (2 * K + LANES - 1) / LANES * LANES, room = 2 * groups, found = -1;
    if (count <= K) {
        for (long k = 0; k < K; k++) slots[k] = k < count ? first + k : -1;
        return;
    }
    if (groups <= MOST_GROUPS && count >= room) {
        float most[groups], kept[room], least;
        int64_t place[room];
        memcpy(most, score, sizeof most);
        for (long m = groups; m < count; m += groups) {
            long g = 0;
            for (; g < groups && m + g + LANES <= count; g += LANES) *(lanes *)(most + g) = larger(load(score + m + g), load(most + g));
            for (; g < groups && m + g < count; g++) most[g] = score[m + g] > most[g] ? score[m + g] : most[g];
        }
        uint32_t rank = kth_rank(most, groups, K, &equals), bits = rank & 0x80000000u ? rank & 0x7fffffffu : ~rank;
        memcpy(&least, &bits, 4);
        found = places_from(score, count, least, room, place);
        if (found < K) found = -1; /* scores that are no numbers */
        for (long i = 0; i < found; i++) kept[i] = score[place[i]];
        uint32_t last = found < 0 ? 0 : kth_rank(kept, found, K, &equals);
        for (long i = 0; i < found; i++) {
            rank = rank_of(kept[i]);
            if (rank > last || (rank == last && equals-- > 0)) slots[taken++] = first + place[i];
        }
    }
    if (found >= 0) return;
    uint32_t last = kth_rank(score, count, K, &equals);
    for (long m = 0; m < count; m++) {
        uint32_t rank = rank_of(score[m]);
        if (rank > last || (rank == last && equals-- > 0)) slots[taken++] = first + m;
    }
}

/* Slots [B S, K] of the K best of each query's `count` entries from `first` on, ascending, of equals the earlier; -1 behind the last.
   Queries [B S, H, D] and weights [B S, H] against keys [B, ., D]; a score is sum_h weight_h relu(q_h k) (eq. 16). Heads lie in the
   lanes, a block of 16 after the other: turned [D, 16] and score [most] are for use in between. */
void fathom_index_topk(const float *q, const float *weight, const void *keys, int bf16, const int64_t *first, const int64_t *count, long B,
                       long S, long H, long D, long K, long key_row, float *turned, float *score, int64_t *selected, int threads) {
    for (long s = 0; s < B * S; s++) {
        long visible = count[s];
        int64_t *slots = selected + s * K;
        if (visible <= K) {
            best_slots(NULL, first[s], visible, K, slots);
            continue;
        }
        const void *row = nth(keys, bf16, s / S * key_row + first[s] * D, 1);
        for (long head = 0; head < H; head += LANES) {
            lanes weights = {0};
            memset(turned, 0, D * LANES * sizeof(float));
            for (long h = head; h < H && h < head + LANES; h++) {
                weights[h - head] = weight[s * H + h];
                for (long d = 0; d < D; d++) turned[d * LANES + h - head] = q[(s * H + h) * D + d];
            }
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
            for (long m = 0; m < visible; m++) {
                lanes a = {0}, b = {0};
                long d = 0;
                for (; d + 2 <= D; d += 2) {
                    a += load(turned + d * LANES) * number(row, bf16, m * D + d);
                    b += load(turned + d * LANES + LANES) *
                         number(row, bf16, m * D + d + 1);
                }
                if (d < D) a += load(turned + d * LANES) * number(row, bf16, m * D + d);
                lanes product = a + b;
                float sum = total(weights * (lanes)((words)product & (words)(product > 0))) + 0.0f; /* no -0, which equals 0 but sorts before it */
                score[m] = head ? score[m] + sum : sum;
            }
        }
        best_slots(score, first[s], visible, K, slots);
    }
}
