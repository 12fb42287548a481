/* Products of a few rows with a matrix: each of its rows is read once and from front to back, which memory answers fastest (docs/performance.md).

   A product's terms lie in sixteen lanes, added in one order: neither threads nor other rows show in a bit of it. The lanes of sixteen products are
   added together, which is a third of the work of adding each one's. Sums are in float32. */

#if defined(__clang__) || __GNUC__ >= 12
#define MOVED(x, ...) __builtin_shufflevector(x, x, __VA_ARGS__)
#define MIXED(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define MOVED(x, ...) __builtin_shuffle(x, (words){__VA_ARGS__})
#define MIXED(x, y, ...) __builtin_shuffle(x, y, (words){__VA_ARGS__})
#endif

/* The sum of the lanes, halves on halves. */
static inline float total(lanes sums) {
    sums += MOVED(sums, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    sums += MOVED(sums, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    sums += MOVED(sums, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    sums += MOVED(sums, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    return sums[0];
}

/* The totals of sixteen vectors, each the bits of `total`. */
static inline lanes totals(const lanes *sums) {
    lanes half[8], quarter[4], two[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        half[i] = MIXED(sums[i], sums[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                  MIXED(sums[i], sums[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        quarter[i] = MIXED(half[i], half[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
                     MIXED(half[i], half[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++)
        two[i] = MIXED(quarter[i], quarter[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                 MIXED(quarter[i], quarter[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    return MIXED(two[0], two[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
           MIXED(two[0], two[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}

/* What a row and x are: floats both, bfloat16 both, of which a lane takes two at a time, or bfloat16 and floats. */
enum { FLOATS, PAIRS, WIDENED };

ALWAYS lanes products(lanes sum, words a, words b, int how) {
#ifdef __AVX512BF16__
    if (how == PAIRS) return (lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
    if (how == PAIRS) return sum + (lanes)(a << 16) * (lanes)(b << 16) + (lanes)(a & 0xffff0000u) * (lanes)(b & 0xffff0000u);
    return sum + (lanes)a * (lanes)b;
}

/* The sixteen words of a row, or what is left of it and zeros, from its `k`-th number on. */
ALWAYS words row_words(const char *row, long k, long I, int how) {
    long left = I - k, most = how == PAIRS ? 2 * LANES : LANES, size = how == FLOATS ? 4 : 2;
    if (left >= most && how == WIDENED) return (words)load_bf16((const uint16_t *)row + k);
    if (left >= most) return *(const loose_words *)(row + k * size);
    words found = {0};
    if (how == WIDENED) return (words)load_rest_bf16((const uint16_t *)row + k, left);
    memcpy(&found, row + k * size, left * size);
    return found;
}

enum { AHEAD = 4096 /* bytes: Intel's processors do not foresee what lies behind the end of a page */ };

/* The lanes of n products of a row [I] with x, whose rows lie `step` bytes apart -> sums, `apart` vectors from one to the next, or
   added to them. */
ALWAYS void dots(const char *row, const char *x, long step, long I, int how, int n, lanes *sums, long apart, int added) {
    long each = how == PAIRS ? 2 * LANES : LANES, k = 0;
    int own = how == PAIRS ? PAIRS : FLOATS; /* how x is read */
    lanes even[8], odd[8];
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) even[i] = odd[i] = (lanes){0};
    for (; k + 2 * each <= I; k += 2 * each) {
        __builtin_prefetch(row + k * (how == FLOATS ? 4 : 2) + AHEAD), __builtin_prefetch(row + k * (how == FLOATS ? 4 : 2) + AHEAD + 64);
        words first = row_words(row, k, k + each, how), second = row_words(row, k + each, k + 2 * each, how);
#pragma GCC unroll 8
        for (int i = 0; i < n; i++) {
            even[i] = products(even[i], first, row_words(x + i * step, k, k + each, own), how);
            odd[i] = products(odd[i], second, row_words(x + i * step, k + each, k + 2 * each, own), how);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) even[i] += odd[i];
    for (; k < I; k += each) {
        words more = row_words(row, k, I, how);
#pragma GCC unroll 8
        for (int i = 0; i < n; i++) even[i] = products(even[i], more, row_words(x + i * step, k, I, own), how);
    }
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) {
        if (added) even[i] += sums[i * apart];
        sums[i * apart] = even[i];
    }
}

static inline float dot_float(const float *row, const float *x, long I) {
    lanes sum;
    dots((const char *)row, (const char *)x, 0, I, FLOATS, 1, &sum, 0, 0);
    return total(sum);
}

/* The same bits for four x that lie `step` numbers apart, while the row is read once. */
static inline void dot_float_4(const float *row, const float *x, long step, long I, float *out) {
    lanes sums[4];
    dots((const char *)row, (const char *)x, step * sizeof(float), I, FLOATS, 4, sums, 1, 0);
    for (int i = 0; i < 4; i++) out[i] = total(sums[i]);
}

/* Up to 16 rows, `bytes` apart, times n x each -> sums [n, 16]: a part of each row after the other, the sums of which are added, so that those of
   several x stay in the first cache while all rows use them. */
ALWAYS void dots_of_rows(const char *row, long bytes, long rows, const char *x, long step, long I, int how, int n, lanes *sums) {
    long part = how == PAIRS ? 1024 : 512, width = how == FLOATS ? 4 : 2, own_width = how == PAIRS ? 2 : 4;
#define PART_OF(r, from) \
    dots(row + (r) * bytes + (from) * width, x + (from) * own_width, step, I - (from) < part ? I - (from) : part, how, n, sums + (r), LANES, (from) > 0)
    if (n == 1) /* needs no such care: row after row */
        for (long r = 0; r < rows; r++)
            for (long from = 0; from < I; from += part) PART_OF(r, from);
    else
        for (long from = 0; from < I; from += part)
            for (long r = 0; r < rows; r++) PART_OF(r, from);
}

#define DOTS(NAME, HOW, N)                                                                                                                    \
    static __attribute__((noinline)) void NAME##_##N(const char *row, long bytes, long rows, const char *x, long step, long I, lanes *sums) { \
        dots_of_rows(row, bytes, rows, x, step, I, HOW, N, sums);                                                                             \
    }
#define DOTS_OF(NAME, HOW) DOTS(NAME, HOW, 1) DOTS(NAME, HOW, 2) DOTS(NAME, HOW, 4) DOTS(NAME, HOW, 8)
DOTS_OF(dots_float, FLOATS)
DOTS_OF(dots_pairs, PAIRS)
DOTS_OF(dots_widened, WIDENED)
typedef void dots_kernel(const char *, long, long, const char *, long, long, lanes *);
static dots_kernel *const DOTS_FOR[3][4] = {{dots_float_1, dots_float_2, dots_float_4, dots_float_8},
                                            {dots_pairs_1, dots_pairs_2, dots_pairs_4, dots_pairs_8},
                                            {dots_widened_1, dots_widened_2, dots_widened_4, dots_widened_8}};

static void many_dots(const char *row, long bytes, long rows, const char *x, long step, long N, long I, int how, lanes *sums) {
    for (long n = 0, size; n < N; n += size) {
        long some = N - n >= 8 ? 3 : N - n >= 4 ? 2 : N - n >= 2;
        size = 1L << some;
        DOTS_FOR[how][some](row, bytes, rows, x + n * step, step, I, sums + n * LANES);
    }
}

static inline int how_of(matrix m, int bf16) { return format_of(m) != BF16 ? FLOATS : bf16 ? PAIRS : WIDENED; }

/* Rows of a matrix, from `row` on to `end`, at most 16, times N x that lie `step` bytes apart -> out [N, 16]. x is bfloat16 only where the matrix is, too;
   of codes it is arranged. */
static void times(matrix m, long row, long end, long I, const void *x, int bf16, long step, long N, float *out) {
    long rows = end - row < LANES ? end - row : LANES, bytes = row_bytes(m, I);
    words space[N * LANES]; /* for its alignment */
    lanes *sums = (lanes *)space;
    if (rows < LANES) memset(space, 0, sizeof space);
    if (format_of(m) < FP8) many_dots(m.numbers + row * bytes, bytes, rows, x, step, N, I, how_of(m, bf16), sums);
    else
        for (long r = 0; r < rows; r++) {
            words numbers[blocks_of(I, LANES)];
            if (format_of(m) == FP8) decode_fp8(m, row + r, I, (float *)numbers);
            else decode_fp4(m, row + r, I, (float *)numbers);
            many_dots((const char *)numbers, 0, 1, x, step, N, I, FLOATS, sums + r);
        }
    for (long n = 0; n < N; n++) *(lanes *)(out + n * LANES) = totals(sums + n * LANES);
}

#define ADD(NAME, TYPE, LOAD, ONE)                                                                  \
    static inline void NAME(float *sum, float factor, const TYPE *row, long length) {               \
        long i = 0;                                                                                 \
        for (; i + LANES <= length; i += LANES) *(lanes *)(sum + i) += factor * LOAD(row + i);      \
        for (; i < length; i++) sum[i] += factor * ONE(row + i);                                    \
    }
ADD(add_float, float, load, one)
ADD(add_bf16, uint16_t, load_bf16, one_bf16)
