// The sparse train step's four loops over memory, for CPUs. mtc/transcoder/sparse_loss.py compiles this file where there is a C
// compiler, says what each function computes, and holds the same in plain torch, against which they are tested.
// Every output element is summed by one thread in one order, so results do not depend on the number of threads.

#include <stdint.h>
#include <stdlib.h>

typedef int64_t i64;

// Columns that are worked on at a time: the slice of a whole table then fits in cache, and its rows are reused there.
enum { BLOCK = 512 };

static inline i64 least(i64 a, i64 b) { return a < b ? a : b; }

static inline float dot(const float *restrict a, const float *restrict b, i64 n) {
    float sum = 0;
    for (i64 i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

// out[i] += sum over entries e in [start, end) of weight[e] * table[index[e], i], four rows at a time.
static inline void add_rows(float *restrict out, const float *restrict table, i64 stride, const i64 *restrict index,
                            const float *restrict weight, i64 start, i64 end, i64 n) {
    i64 e = start;
    for (; e + 4 <= end; e += 4) {
        const float *a = table + index[e] * stride, *b = table + index[e + 1] * stride;
        const float *c = table + index[e + 2] * stride, *d = table + index[e + 3] * stride;
        const float wa = weight[e], wb = weight[e + 1], wc = weight[e + 2], wd = weight[e + 3];
        for (i64 i = 0; i < n; i++) out[i] += wa * a[i] + wb * b[i] + wc * c[i] + wd * d[i];
    }
    for (; e < end; e++) {
        const float *a = table + index[e] * stride, wa = weight[e];
        for (i64 i = 0; i < n; i++) out[i] += wa * a[i];
    }
}

void bag_sums(const float *table, const i64 *index, const float *weight, const i64 *offsets, float *out, i64 bags,
              i64 width, int threads) {
#pragma omp parallel num_threads(threads)
    for (i64 at = 0; at < width; at += BLOCK) {
        const i64 n = least(BLOCK, width - at);
#pragma omp for schedule(dynamic, 16)
        for (i64 j = 0; j < bags; j++) {
            float sum[BLOCK] = {0};
            add_rows(sum, table + at, width, index, weight, offsets[j], offsets[j + 1], n);
            for (i64 i = 0; i < n; i++) out[j * width + at + i] = sum[i];
        }
    }
}

void entry_dots(const float *left, const i64 *left_index, const float *right, const i64 *right_index, float *out,
                i64 entries, i64 width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 e = 0; e < entries; e++)
        out[e] = dot(left + left_index[e] * width, right + right_index[e] * width, width);
}

void nested_pass(const float *value, const i64 *feature, const i64 *offsets, const float *W_dec, const float *b_dec,
                 const float *y, const float *weight, i64 has_aux, float *gradient, float *value_gradient,
                 float *errors, i64 tokens, i64 slots, i64 width, int threads) {
    const i64 prefixes = slots - has_aux;
#pragma omp parallel num_threads(threads)
    for (i64 at = 0; at < width; at += BLOCK) {
        const i64 n = least(BLOCK, width - at);
#pragma omp for schedule(static)
        for (i64 t = 0; t < tokens; t++) {
            const i64 *border = offsets + t * slots;
            float *rows = gradient + t * slots * width + at;  // slot s is at rows + s * width
            for (i64 s = 0; s < slots; s++) {
                float *restrict r = rows + s * width;
                const float *restrict before = r - width, *restrict target = y + t * width + at;
                if (s) for (i64 i = 0; i < n; i++) r[i] = before[i];
                else for (i64 i = 0; i < n; i++) r[i] = b_dec[at + i] - target[i];
                add_rows(r, W_dec + at, width, feature, value, border[s], border[s + 1], n);
                errors[t * slots + s] = (at ? errors[t * slots + s] : 0) + dot(r, r, n);
            }
            for (i64 s = slots - 1; s >= 0; s--) {
                float *restrict r = rows + s * width;
                const float *restrict after = r + width;
                const float w = weight[s];
                if (s < prefixes - 1) for (i64 i = 0; i < n; i++) r[i] = w * r[i] + after[i];
                else for (i64 i = 0; i < n; i++) r[i] *= w;
                for (i64 e = border[s]; e < border[s + 1]; e++)
                    value_gradient[e] = (at ? value_gradient[e] : 0) + dot(r, W_dec + feature[e] * width + at, n);
            }
        }
    }
}

// An entry is above where it is larger than its column's border.
void count_above(const float *z, i64 rows, i64 width, const float *border, i64 *counts, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 r = 0; r < rows; r++) {
        int count = 0;
        for (i64 i = 0; i < width; i++) count += z[r * width + i] > border[i];
        counts[r] = count;
    }
}

void list_above(const float *z, i64 rows, i64 width, const float *border, const i64 *offsets, i64 *column,
                float *value, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 r = 0; r < rows; r++) {
        i64 e = offsets[r];
        for (i64 at = 0; at < width; at += 16) {
            const float *part = z + r * width + at, *limit = border + at;
            const i64 n = least(16, width - at);
            int any = 0;
            if (n == 16) for (int i = 0; i < 16; i++) any |= part[i] > limit[i];
            else any = 1;
            if (any)
                for (i64 i = 0; i < n; i++)
                    if (part[i] > limit[i]) { column[e] = at + i; value[e++] = part[i]; }
        }
    }
}
