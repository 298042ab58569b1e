/* Turning inside llama.cpp's own graph: where the CPU is about to compute a site's tensor as a product or a sum, that
 * node becomes a custom operator of ggml's, which computes the same and turns the rows, each thread its share.
 *
 * A node that is asked for ends a run of the graph, and every run costs microseconds to plan and to start on all
 * threads; this way there is one run. llama.cpp asks about every node before the run that holds it, each time it
 * computes, and may keep a graph from token to token: so a node is put back when it is asked about, and changed again
 * where that is still wanted.
 */
#include "steer_parts.h"

#include <stdlib.h>
#include <string.h>

enum { CPU = 0 /* GGML_BACKEND_DEVICE_TYPE_CPU */ };

/* The user data of a custom operator. Two for each site: the product, the sum. */
struct steer_inside {
    const steer_hook *hook;
    int32_t site;
    bool sum;
};

struct steer_inside *steer_new_inside(steer_hook *hook) {
    struct steer_inside *made = calloc(2 * (size_t)hook->n_sites, sizeof *made);
    for (int32_t i = 0; made && i < 2 * hook->n_sites; i++) {
        made[i] = (struct steer_inside){.hook = hook, .site = i / 2, .sum = i % 2 == 1};
    }
    return made;
}

/* ---- ggml's fields -------------------------------------------------------------------------------------------- */

static int32_t op_of(const struct steer_graph_ggml *g, const struct ggml_tensor *tensor) {
    int32_t op;
    memcpy(&op, (const char *)tensor + g->op_offset, sizeof op);
    return op;
}

static void set_op(const struct steer_graph_ggml *g, struct ggml_tensor *tensor, int32_t op, const void *params) {
    memcpy((char *)tensor + g->op_offset, &op, sizeof op);
    memcpy((char *)tensor + g->params_offset, params, sizeof g->custom_params);
}

static const struct ggml_tensor *source_of(const struct steer_graph_ggml *g, const struct ggml_tensor *tensor, int number) {
    const struct ggml_tensor *source;
    memcpy(&source, (const char *)tensor + g->source_offset + (size_t)number * sizeof source, sizeof source);
    return source;
}

static int32_t type_of(const struct steer_ggml *ggml, const struct ggml_tensor *tensor) {
    int32_t type;
    memcpy(&type, (const char *)tensor + ggml->type_offset, sizeof type);
    return type;
}

/* ---- changing a node and putting it back ---------------------------------------------------------------------- */

static const unsigned char NO_PARAMS[sizeof((struct steer_graph_ggml *)0)->custom_params];

void steer_put_back(const steer_hook *hook, struct ggml_tensor *tensor) {
    const struct steer_graph_ggml *g = hook->ggml.graph;
    if (op_of(g, tensor) != g->op_custom) return;
    const struct steer_inside *inside;
    memcpy(&inside, (const char *)tensor + g->params_offset + g->user_data_offset, sizeof inside);
    const uintptr_t offset = (uintptr_t)inside - (uintptr_t)hook->inside; /* huge, where it lies before */
    if (offset >= 2 * (size_t)hook->n_sites * sizeof *inside) return;     /* a custom operator of somebody else's */
    set_op(g, tensor, inside->sum ? g->op_add : g->op_mul, NO_PARAMS);
}

/* Whether the CPU's own backend computes what lies in a buffer. Its buffer type names no device. */
static bool is_cpu(const struct steer_ggml *ggml, void *buffer) {
    void *device = ggml->device->buft_get_device(ggml->device->buffer_get_type(buffer));
    return ggml->buffer_is_host(buffer) && (device == NULL || ggml->device->dev_type(device) == CPU);
}

/* n rows, d wide, of F32 behind one another. So many elements in other rows would be repeated in another way. */
static bool readable(const steer_hook *hook, const struct ggml_tensor *source, int64_t n) {
    const struct steer_ggml *ggml = &hook->ggml;
    if (source == NULL || type_of(ggml, source) != ggml->type_f32 || !ggml->is_contiguous(source)) return false;
    return ggml->nelements(source) == n * hook->d && ggml->nrows(source) == n && ggml->get_data(source) != NULL;
}

bool steer_go_inside(steer_hook *hook, int32_t site, struct ggml_tensor *tensor) {
    const struct steer_ggml *ggml = &hook->ggml;
    const struct steer_graph_ggml *g = ggml->graph;
    if (g == NULL || hook->recording || hook->sites[site].read) return false;
    if (hook->path != STEER_PATH_AUTO && hook->path != STEER_PATH_GRAPH) return false;
    const int32_t op = op_of(g, tensor);
    if (op != g->op_mul && op != g->op_add) return false;
    if (memcmp((const char *)tensor + g->params_offset, NO_PARAMS, sizeof NO_PARAMS) != 0) return false;
    void *buffer;
    memcpy(&buffer, (const char *)tensor + ggml->buffer_offset, sizeof buffer);
    const int64_t elements = ggml->nelements(tensor), n = elements > 0 ? ggml->nrows(tensor) : 0, d = hook->d;
    if (n < 1 || elements % d != 0 || elements / d != n) return false; /* act_on has the word for it */
    if (!readable(hook, tensor, n) || buffer == NULL || !is_cpu(ggml, buffer)) return false;
    const struct ggml_tensor *a = source_of(g, tensor, 0), *b = source_of(g, tensor, 1);
    if (!readable(hook, a, n) || (!readable(hook, b, n) && !readable(hook, b, 1))) return false;

    const struct steer_inside *inside = &hook->inside[2 * site + (op == g->op_add)];
    unsigned char params[sizeof g->custom_params];
    memcpy(params, g->custom_params, sizeof params);
    memcpy(params + g->user_data_offset, &inside, sizeof inside);
    set_op(g, tensor, g->op_custom, params);
    hook->went_inside = true;
    hook->reached[site]++;
    hook->turned[site] += n;
    return true;
}

/* ---- what ggml calls ------------------------------------------------------------------------------------------ */

/* As ggml computes it, bit for bit. `to` may be `a` or `b`, hence no restrict; elements of one place only meet. */
STEER_WIDE static void combine(int64_t d, bool sum, const float *a, const float *b, float *to) {
    if (sum) {
#pragma omp simd
        for (int64_t i = 0; i < d; i++) to[i] = a[i] + b[i];
    } else {
#pragma omp simd
        for (int64_t i = 0; i < d; i++) to[i] = a[i] * b[i];
    }
}

void steer_in_graph(struct ggml_tensor *tensor, int thread, int n_threads, void *user_data) {
    const struct steer_inside *inside = user_data;
    const steer_hook *hook = inside->hook;
    const struct steer_ggml *ggml = &hook->ggml;
    const struct ggml_tensor *source = source_of(ggml->graph, tensor, 1);
    const float *a = ggml->get_data(source_of(ggml->graph, tensor, 0)), *b = ggml->get_data(source);
    float *to = ggml->get_data(tensor);
    const int64_t d = hook->d, n = ggml->nrows(tensor);
    const int64_t step = ggml->nelements(source) == d && n > 1 ? 0 : d; /* one row serves all */
    for (int64_t row = n * thread / n_threads; row < n * (thread + 1) / n_threads; row++) {
        combine(d, inside->sum, a + row * d, b + row * step, to + row * d);
        steer_turn_rows(hook->steerings, &hook->sites[inside->site], d, to + row * d, 1);
    }
}
