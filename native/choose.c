#include "choose.h"

#include "steer_parts.h"

#include <math.h>

enum { BLOCK = 1024 };

static bool usable(const struct choose_charges *c, const float *logits, int32_t n_vocab) {
    if (c == NULL || logits == NULL || n_vocab < 1 || c->n < 0 || (c->n > 0 && (!c->said || !c->kept))) return false;
    for (int32_t i = 0; i < c->n; i++) {
        if (c->said[i] < 0 || c->said[i] >= n_vocab) return false;
    }
    return true;
}

static int32_t times_said(const struct choose_charges *c, int32_t token) {
    int32_t times = 0;
    for (int32_t i = 0; i < c->n; i++) times += c->said[i] == token;
    return times;
}

/* A token said twice is charged twice from the same kept logit, to the same result. */
static void charge(const struct choose_charges *c, float *logits) {
    for (int32_t i = 0; i < c->n; i++) c->kept[i] = logits[c->said[i]];
    for (int32_t i = 0; i < c->n; i++) {
        const float kept = c->kept[i], repeated = kept <= 0 ? kept * c->repeat : kept / c->repeat;
        const float times = c->frequency == 0 ? 0 : (float)times_said(c, c->said[i]);
        logits[c->said[i]] = repeated - (times * c->frequency + c->presence);
    }
}

static void restore(const struct choose_charges *c, float *logits) {
    for (int32_t i = 0; i < c->n; i++) logits[c->said[i]] = c->kept[i];
}

STEER_WIDE static int32_t likeliest(const float *logits, int32_t n_vocab) {
    float most = -INFINITY;
    int32_t block = 0;
    for (int32_t at = 0; at < n_vocab; at += BLOCK) {
        const int32_t end = n_vocab - at < BLOCK ? n_vocab : at + BLOCK;
        float here = -INFINITY;
#pragma omp simd reduction(max : here)
        for (int32_t i = at; i < end; i++) here = logits[i] > here ? logits[i] : here;
        if (here > most) {
            most = here;
            block = at;
        }
    }
    for (int32_t i = block; i < n_vocab; i++) {
        if (logits[i] == most) return i;
    }
    return 0;
}

int32_t choose_charge(const struct choose_charges *charges, float *logits, int32_t n_vocab) {
    if (!usable(charges, logits, n_vocab)) return STEER_BAD_ARGUMENT;
    charge(charges, logits);
    return STEER_OK;
}

int32_t choose_restore(const struct choose_charges *charges, float *logits, int32_t n_vocab) {
    if (!usable(charges, logits, n_vocab)) return STEER_BAD_ARGUMENT;
    restore(charges, logits);
    return STEER_OK;
}

int32_t choose_likeliest(const struct choose_charges *charges, float *logits, int32_t n_vocab, int32_t *token) {
    if (token == NULL || !usable(charges, logits, n_vocab)) return STEER_BAD_ARGUMENT;
    charge(charges, logits);
    *token = likeliest(logits, n_vocab);
    restore(charges, logits);
    return STEER_OK;
}
