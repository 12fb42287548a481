/* Cached vectors in the bytes of the release (fathom/quant/records.py says where each lies), packed and unpacked. */

/* The code of a number that is an e4m3 one already, and of an e2m1 one. */
static inline uint8_t fp8_code(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t size = bits & 0x7fffffff, sign = bits >> 24 & 128;
    if (x != x) return sign | 127;
    return sign | (size < 0x3c800000 ? (uint32_t)(fabsf(x) * 512) : (size >> 20) - (120 << 3)); /* below 2^-6: steps of 2^-9 */
}

static inline uint8_t fp4_code(float x) {
    float size = fabsf(x);
    return (size <= 2 ? 2 * size : size <= 4 ? size + 2 : 7) + (signbit(x) ? 8 : 0);
}

/* One block's codes and the biased exponent of its scale. */
static uint8_t encode(const float *x, long length, float limit, float smallest, int bits, uint32_t least, uint8_t *codes) {
    float own[length], scale = block_scale(x, length, limit, smallest);
    for (long i = 0; i < length; i++) own[i] = nearest(x[i] * (1 / scale), bits, least);
    for (long i = 0; i < length; i++) {
        if (bits == FP8_BITS) codes[i] = fp8_code(own[i]);
        else codes[i / 2] = (i % 2 ? codes[i / 2] : 0) | fp4_code(own[i]) << i % 2 * 4;
    }
    uint32_t exponent;
    memcpy(&exponent, &scale, 4);
    return exponent >> 23;
}

/* Entries x [N, D], of which the last R channels stay as they are, as records out [N, width]. */
void fathom_pack_entries(const void *x, int bf16, long N, long D, long R, long width, uint8_t *out) {
    long plain = D - R;
    for (long n = 0; n < N; n++) {
        float space[D];
        const float *row = widened(nth(x, bf16, n, D), bf16, D, space);
        uint8_t *codes = out + n * width, *scales = codes + plain + 2 * R;
        memset(codes, 0, width);
        for (long begin = 0; begin < plain; begin += ENTRY_BLOCK)
            scales[begin / ENTRY_BLOCK] = encode(row + begin, plain - begin < ENTRY_BLOCK ? plain - begin : ENTRY_BLOCK, FP8_LIMIT, FP8_SMALLEST,
                                                 FP8_BITS, FP8_LEAST, codes + begin);
        for (long r = 0; r < R; r++) {
            uint16_t narrow = narrowed(row[plain + r]);
            memcpy(codes + plain + 2 * r, &narrow, 2);
        }
    }
}

/* Records of entries [B, M, width], rows of which lie `step` bytes apart, as vectors out [B, M, D]. */
void fathom_unpack_entries(const uint8_t *records, long B, long M, long step, long D, long R, long width, int bf16, void *out, int threads) {
    long plain = D - R;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long i = 0; i < B * M; i++) {
        const uint8_t *codes = records + i / M * step + i % M * width, *scales = codes + plain + 2 * R;
        float made[D];
        long d = 0;
        for (; d + LANES <= plain; d += LANES) *(lanes *)(made + d) = power(scales[d / ENTRY_BLOCK]) * as_fp8(load_bytes(codes + d));
        for (; d < plain; d++) made[d] = power(scales[d / ENTRY_BLOCK]) * as_fp8((words){codes[d]})[0];
        for (long r = 0; r < R; r++) {
            uint16_t narrow;
            memcpy(&narrow, codes + plain + 2 * r, 2);
            made[plain + r] = one_bf16(&narrow);
        }
        put(made, D, out, bf16, i * D);
    }
}

/* Index keys x [N, D] as records out [N, width]: two codes a byte, then a scale for each block. */
void fathom_pack_keys(const void *x, int bf16, long N, long D, long width, uint8_t *out) {
    long bytes_of_codes = (D + 1) / 2;
    for (long n = 0; n < N; n++) {
        float space[D];
        const float *row = widened(nth(x, bf16, n, D), bf16, D, space);
        for (long begin = 0; begin < D; begin += BLOCK)
            out[n * width + bytes_of_codes + begin / BLOCK] = encode(row + begin, D - begin < BLOCK ? D - begin : BLOCK, FP4_LIMIT, FP4_SMALLEST, FP4_BITS,
                                                                     FP4_LEAST, out + n * width + begin / 2);
    }
}

/* Records of index keys [B, M, width] as vectors out [B, M, D]. */
void fathom_unpack_keys(const uint8_t *records, long B, long M, long step, long D, long width, int bf16, void *out, int threads) {
    static const float numbers[16] = {0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0f, -0.5, -1, -1.5, -2, -3, -4, -6};
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long i = 0; i < B * M; i++) {
        const uint8_t *codes = records + i / M * step + i % M * width, *scales = codes + (D + 1) / 2;
        float made[D];
        for (long d = 0; d < D; d++) made[d] = power(scales[d / BLOCK]) * numbers[codes[d / 2] >> d % 2 * 4 & 15];
        put(made, D, out, bf16, i * D);
    }
}
