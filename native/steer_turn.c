/* The mathematics of steer_op, on rows in the host's memory. Letters as in steer.h. */
#include "steer_parts.h"

#include <math.h>

/* Sums of so many products are added up in float and wide, the sums of those in double. */
enum { BLOCK = 256 };

/* p1 = h.b1, p2 = h.b2. The pragma allows the compiler to add in another order; without it the sum stays scalar. */
STEER_WIDE static void dot2(int64_t d, const float *h, const float *b1, const float *b2, float *p1, float *p2) {
    double t1 = 0, t2 = 0;
    for (int64_t at = 0; at < d; at += BLOCK) {
        const int64_t end = d - at < BLOCK ? d : at + BLOCK;
        float s1 = 0, s2 = 0;
#pragma omp simd reduction(+ : s1, s2)
        for (int64_t i = at; i < end; i++) {
            s1 += h[i] * b1[i];
            s2 += h[i] * b2[i];
        }
        t1 += (double)s1;
        t2 += (double)s2;
    }
    *p1 = (float)t1;
    *p2 = (float)t2;
}

STEER_WIDE double steer_dot(int64_t d, const float *h, const float *b) {
    double t = 0;
    for (int64_t at = 0; at < d; at += BLOCK) {
        const int64_t end = d - at < BLOCK ? d : at + BLOCK;
        float s = 0;
#pragma omp simd reduction(+ : s)
        for (int64_t i = at; i < end; i++) s += h[i] * b[i];
        t += (double)s;
    }
    return t;
}

STEER_WIDE static void add2(int64_t d, float *restrict h, float q1, const float *restrict b1, float q2,
                            const float *restrict b2) {
    for (int64_t i = 0; i < d; i++) h[i] += q1 * b1[i] + q2 * b2[i];
}

STEER_WIDE static void add1(int64_t d, float *restrict h, float q, const float *restrict b) {
    for (int64_t i = 0; i < d; i++) h[i] += q * b[i];
}

static void turn_row(int64_t d, float *h, const struct steering *s, const struct act *act) {
    float p1, p2;
    switch (s->op) {
    case STEER_TURN_BY:
        dot2(d, h, act->b1, act->b2, &p1, &p2);
        add2(d, h, s->x * p1 - s->y * p2, act->b1, s->x * p2 + s->y * p1, act->b2);
        break;
    case STEER_TURN_TO: {
        dot2(d, h, act->b1, act->b2, &p1, &p2);
        if (!(p1 > s->z)) break;
        const float r = hypotf(p1, p2);
        add2(d, h, s->x * r - p1, act->b1, s->y * r - p2, act->b2);
        break;
    }
    case STEER_ABLATE:
        add1(d, h, -(float)steer_dot(d, h, act->b1), act->b1);
        break;
    case STEER_ADD:
        add1(d, h, s->x * act->scale, act->b1);
        break;
    }
}

void steer_turn_rows(const struct steering *steerings, const struct site *site, int64_t d, float *rows, int64_t n) {
    for (int64_t row = 0; row < n; row++) {
        for (int32_t a = 0; a < site->n_acts; a++) {
            const struct steering *s = &steerings[site->acts[a].steering];
            if (s->on) turn_row(d, rows + row * d, s, &site->acts[a]);
        }
    }
}
