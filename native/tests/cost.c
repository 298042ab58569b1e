/* How many instructions the hook costs a token: a graph as SmolLM2-135M's, asked for node by node as llama.cpp does,
 * 59 sites of width 576, three steerings. To be run under callgrind, which counts them for each function:
 *
 *     cc -std=gnu11 -O3 -g -fopenmp-simd -ffp-contract=fast -I native native/steer*.c native/tests/cost.c -lm -o cost
 *     valgrind --tool=callgrind --toggle-collect=steer_eval ./cost 3
 *
 * The argument is the number of steerings that are on. 1000 tokens; the first, which fills the table, is one of them.
 */
#include "steer.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { LAYERS = 30, D = 576, TOKENS = 1000, SITES = 2 * LAYERS - 1, STEERINGS = 3 };

struct ggml_tensor {
    int32_t type;
    void *buffer;
    float *data;
    char elsewhere[232]; /* as in ggml, the name lies in a cache line of its own */
    char name[64];
};

/* The nodes of one layer, views and reshapes included. */
static const char *const NODES[] = {
    "norm-%d",          "attn_norm-%d",        "Qcur-%d",          "Qcur-%d (reshaped)",   "Qcur-%d",
    "Kcur-%d",          "Kcur-%d (reshaped)",  "Kcur-%d",          "Vcur-%d",              "Vcur-%d (reshaped)",
    "cache_k_l%d (view)", "cache_k_l%d (copy)", "cache_v_l%d (view)", "cache_v_l%d (copy)", "q-%d (permuted)",
    "cache_k_l%d (permuted)", "kq-%d",         "kq_soft_max-%d",   "cache_v_l%d (permuted)", "kqv-%d",
    "kqv-%d (permuted)", "kqv_out-%d",         "attn_out-%d",      "ffn_inp-%d",           "norm-%d",
    "ffn_norm-%d",      "ffn_gate-%d",         "ffn_up-%d",        "ffn_swiglu-%d",        "ffn_out-%d",
    "l_out-%d",         "node-%d",
};
enum { PER_LAYER = sizeof NODES / sizeof *NODES, COUNT = LAYERS * PER_LAYER };

static const char *name(const struct ggml_tensor *t) { return t->name; }
static int64_t elements(const struct ggml_tensor *t) { return t ? D : 0; }
static int64_t rows(const struct ggml_tensor *t) { return t ? 1 : 0; }
static bool contiguous(const struct ggml_tensor *t) { return t != NULL; }
static void *data(const struct ggml_tensor *t) { return t->data; }
static bool host(void *buffer) { return buffer != NULL; }
static void get(const struct ggml_tensor *t, void *to, size_t at, size_t n) { (void)t, (void)to, (void)at, (void)n; }
static void set(struct ggml_tensor *t, const void *from, size_t at, size_t n) { (void)t, (void)from, (void)at, (void)n; }

int main(int count, char **arguments) {
    static int64_t reached[SITES], turned[SITES];
    const char *kinds[SITES];
    int32_t layers[SITES], sites[SITES], planes[SITES];
    const int on = count > 1 ? atoi(arguments[1]) : STEERINGS;
    struct ggml_tensor *graph = calloc(COUNT, sizeof *graph);
    float *basis = malloc((size_t)SITES * 2 * D * sizeof *basis), *h = calloc(D, sizeof *h);
    if (!graph || !basis || !h) return 1;
    for (int i = 0; i < SITES * 2 * D; i++) basis[i] = 0.02f;
    for (int i = 0; i < SITES; i++) {
        kinds[i] = (i + 1) % 2 ? "ffn_norm" : "attn_norm";
        layers[i] = (i + 1) / 2;
        sites[i] = planes[i] = i;
    }
    for (int i = 0; i < COUNT; i++) {
        graph[i] = (struct ggml_tensor){.buffer = &graph, .data = h};
        snprintf(graph[i].name, sizeof graph[i].name, NODES[i % PER_LAYER], i / PER_LAYER);
    }
    const struct steer_ggml ggml = {.get_name = name, .nelements = elements, .nrows = rows, .is_contiguous = contiguous,
                                    .get_data = data, .buffer_is_host = host, .tensor_get = get, .tensor_set = set,
                                    .buffer_offset = offsetof(struct ggml_tensor, buffer)};
    steer_hook *hook;
    if (steer_new(&ggml, D, SITES, kinds, layers, reached, turned, &hook) != STEER_OK) return 1;
    for (int i = 0; i < STEERINGS; i++) {
        int32_t id;
        if (steer_add(hook, STEER_TURN_BY, SITES, sites, planes, NULL, SITES, basis, &id) != STEER_OK) return 1;
        if (steer_dial(hook, id, i < on ? (const double[]){-0.01, 0.14, 0} : NULL) != STEER_OK) return 1;
    }
    for (int token = 0; token < TOKENS; token++) {
        for (int i = 0; i < COUNT; i++) {
            if (steer_eval(&graph[i], true, hook)) steer_eval(&graph[i], false, hook);
        }
    }
    printf("%d nodes and %d sites a token, %d tokens\n", COUNT, SITES, TOKENS);
    steer_free(hook);
    free(graph), free(basis), free(h);
    return 0;
}
