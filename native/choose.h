/* choose: the next token from a row of logits.
 *
 * It is here because a decode leaves none of Python in the processor's caches: the numpy calls that this replaces take
 * 8 microseconds in a loop of their own, and 80 between two decodes.
 */
#ifndef CHOOSE_H
#define CHOOSE_H

#include "steer.h"

/* What tokens that were said are charged, as in llama.cpp's penalties: repeat (a factor) and presence once, frequency
 * each time. Charges whatever it is given: n is 0 where nothing is to be charged. */
struct choose_charges {
    float repeat, frequency, presence;
    int32_t n;           /* tokens said */
    const int32_t *said; /* n, any order */
    float *kept;         /* n, where charged logits are kept */
};

/* Charges the logits (n_vocab) of the tokens said, in place. */
STEER_API int32_t choose_charge(const struct choose_charges *charges, float *logits, int32_t n_vocab);

/* Puts back what choose_charge found. */
STEER_API int32_t choose_restore(const struct choose_charges *charges, float *logits, int32_t n_vocab);

/* The first of the likeliest tokens once charges are made; the logits are left as they were. *token is 0 where no logit
 * is a number above -infinity. */
STEER_API int32_t choose_likeliest(const struct choose_charges *charges, float *logits, int32_t n_vocab,
                                   int32_t *token);

#endif
