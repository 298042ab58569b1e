/* The path inside the graph as ggml runs it: several threads turn rows of one tensor, while another model with a hook
 * of its own does the same. Graphs are kept; the dial is another at every token, and off at every third. For
 * `just native-tsan`; prints the number of rows that were compared.
 */
#include "fake_ggml.h"

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { D = 64, ROWS = 33, THREADS = 4, TOKENS = 50 };

static struct fake_buffer host = {true};

#define DEMAND(claim)                                                          \
    do {                                                                       \
        if (!(claim)) {                                                        \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #claim); \
            abort();                                                           \
        }                                                                      \
    } while (0)

struct share {
    struct ggml_tensor *tensor;
    int thread;
};

static void *one_share(void *given) {
    const struct share *share = given;
    void *user_data;
    memcpy(&user_data, share->tensor->params + fake_graph_ggml.user_data_offset, sizeof user_data);
    steer_in_graph(share->tensor, share->thread, THREADS, user_data);
    return NULL;
}

static void *model(void *given) {
    const float dial = *(const float *)given;
    static const char *const kind[] = {"attn_norm"};
    const int32_t zero = 0;
    int64_t reached = 0, turned = 0, compared = 0;
    struct steer_ggml ggml = fake_ggml;
    ggml.device = &fake_device_ggml;
    ggml.graph = &fake_graph_ggml;
    steer_hook *hook = NULL;
    DEMAND(steer_new(&ggml, D, 1, kind, &zero, &reached, &turned, &hook) == STEER_OK);
    float basis[2][D] = {{0}}, a[ROWS][D], w[D], h[ROWS][D], expected[ROWS][D];
    basis[0][1] = basis[1][2] = 1;
    int32_t id = -1;
    DEMAND(steer_add(hook, STEER_TURN_BY, 1, &zero, &zero, NULL, 1, &basis[0][0], &id) == STEER_OK);
    struct ggml_tensor source = {.type = F32, .buffer = &host, .ne = {D, ROWS}, .data = &a[0][0], .contiguous = true};
    struct ggml_tensor weight = {.type = F32, .buffer = &host, .ne = {D, 1}, .data = w, .contiguous = true};
    struct ggml_tensor t = {.type = F32, .buffer = &host, .ne = {D, ROWS}, .data = &h[0][0], .contiguous = true,
                            .name = "attn_norm-0", .op = '*', .src = {&source, &weight}};
    for (int token = 0; token < TOKENS; token++) {
        for (int i = 0; i < ROWS * D; i++) (&a[0][0])[i] = (float)((i * 7 + token) % 13) - 6;
        for (int i = 0; i < D; i++) w[i] = (float)(i % 3) + 0.5f;
        if (token % 3 == 2) {
            DEMAND(steer_dial(hook, id, NULL) == STEER_OK && !steer_eval(&t, true, hook) && t.op == '*');
            continue;
        }
        const double turn = (double)dial * (token + 1);
        DEMAND(steer_dial(hook, id, (const double[]){cos(turn) - 1, sin(turn), 0}) == STEER_OK);
        for (int i = 0; i < ROWS * D; i++) (&expected[0][0])[i] = (&a[0][0])[i] * w[i % D];
        DEMAND(steer_rows(hook, 0, &expected[0][0], ROWS) == STEER_OK);
        DEMAND(!steer_eval(&t, true, hook) && t.op == 'c');
        pthread_t threads[THREADS];
        struct share shares[THREADS];
        for (int i = 0; i < THREADS; i++) {
            shares[i] = (struct share){&t, i};
            DEMAND(pthread_create(&threads[i], NULL, one_share, &shares[i]) == 0);
        }
        for (int i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);
        DEMAND(memcmp(h, expected, sizeof h) == 0);
        compared += ROWS;
    }
    DEMAND(reached * ROWS == compared && turned == compared);
    steer_free(hook);
    return NULL;
}

int main(void) {
    float dials[2] = {0.1f, -0.2f};
    pthread_t models[2];
    for (int i = 0; i < 2; i++) DEMAND(pthread_create(&models[i], NULL, model, &dials[i]) == 0);
    for (int i = 0; i < 2; i++) pthread_join(models[i], NULL);
    printf("%d rows on %d threads as on one\n", 2 * (TOKENS - TOKENS / 3) * ROWS, THREADS);
    return 0;
}
