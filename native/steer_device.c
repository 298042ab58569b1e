/* The mathematics of steer_op as a ggml graph on a tensor's own device, so that no activation crosses the bus.
 *
 * Once per device: a backend of its own, and every steering's planes. Once per dial: at most five numbers. Per call:
 * a graph of about five nodes a steering, built anew (a microsecond a node) in the same memory. The rows enter it as a
 * leaf of their own over the same data: as the model's tensor they would bring all that they were computed from.
 *
 * Letters: H (n, d) the rows, B (rank, d) a plane, P = H B^T (n, rank). ggml names the innermost extent first.
 */
#include "steer_parts.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { NODES = 16, META = 4 /* GGML_BACKEND_DEVICE_TYPE_META */ };

/* One steering on a device. */
struct upload {
    struct ggml_context *tensors;
    void *buffer;
    struct ggml_tensor *basis;      /* planes of rank rows, d wide */
    struct ggml_tensor *transposed; /* planes of d rows, rank wide */
    struct ggml_tensor *dial;       /* K with Q = P K^T for linear operators; (x, y) for STEER_TURN_TO */
    struct ggml_tensor *threshold;  /* z, for STEER_TURN_TO */
    uint32_t turned_at;             /* of the dial that is there; 0 is none */
};

struct steer_device {
    struct steer_device *next;
    void *device, *backend, *allocator; /* the last two are null where it could not be started */
    struct upload *uploads;             /* by steering */
    int32_t n_uploads;
    struct ggml_context *graph;
    void *graph_memory;
    int32_t graph_room; /* steerings */
};

/* ---- what lies on the device ---------------------------------------------------------------------------------- */

static struct steer_device *find_device(struct steer_device **devices, const struct steer_device_ggml *g, void *device) {
    for (struct steer_device *at = *devices; at; at = at->next) {
        if (at->device == device) return at;
    }
    struct steer_device *made = calloc(1, sizeof *made);
    if (made == NULL) return NULL;
    made->device = device;
    made->next = *devices;
    *devices = made;
    if (g->dev_type(device) == META) return made; /* a tensor in pieces on several devices */
    made->backend = g->dev_init(device, NULL);
    if (made->backend) made->allocator = g->gallocr_new(g->get_default_buffer_type(made->backend));
    return made;
}

static void free_upload(struct upload *u, const struct steer_device_ggml *g) {
    if (u->buffer) g->buffer_free(u->buffer);
    if (u->tensors) g->free(u->tensors);
    *u = (struct upload){0};
}

/* Lays steering s on the device, but for its dial. */
static bool upload(const struct steer_device *to, const struct steer_device_ggml *g, const struct steering *s, int64_t d,
                   struct upload *u) {
    const int64_t rows = (int64_t)s->n_planes * s->rank;
    const int64_t dial_width = s->op == STEER_TURN_TO ? 1 : s->rank;
    u->tensors = g->init((struct steer_ggml_init){4 * g->tensor_overhead(), NULL, true});
    if (u->tensors == NULL) return false;
    u->basis = g->new_tensor_2d(u->tensors, g->type_f32, d, rows);
    u->transposed = g->new_tensor_2d(u->tensors, g->type_f32, s->rank, s->n_planes * d);
    u->dial = g->new_tensor_2d(u->tensors, g->type_f32, dial_width, s->rank);
    u->threshold = g->new_tensor_2d(u->tensors, g->type_f32, 1, 1);
    u->buffer = g->alloc_ctx_tensors(u->tensors, to->backend);
    const size_t size = (size_t)(rows * d) * sizeof(float);
    float *transposed = u->buffer ? malloc(size) : NULL;
    if (transposed == NULL) {
        free_upload(u, g);
        return false;
    }
    for (int64_t plane = 0; plane < s->n_planes; plane++) {
        const float *from = s->basis + plane * s->rank * d;
        float *at = transposed + plane * s->rank * d;
        for (int64_t i = 0; i < d; i++) {
            for (int64_t k = 0; k < s->rank; k++) at[i * s->rank + k] = from[k * d + i];
        }
    }
    g->tensor_set(u->basis, s->basis, 0, size);
    g->tensor_set(u->transposed, transposed, 0, size);
    free(transposed);
    return true;
}

static void set_dial(const struct steer_device_ggml *g, const struct steering *s, struct upload *u) {
    if (u->turned_at == s->turned_at) return;
    u->turned_at = s->turned_at;
    switch (s->op) {
    case STEER_TURN_BY:
        g->tensor_set(u->dial, (const float[]){s->x, -s->y, s->y, s->x}, 0, 4 * sizeof(float));
        break;
    case STEER_TURN_TO:
        g->tensor_set(u->dial, (const float[]){s->x, s->y}, 0, 2 * sizeof(float));
        g->tensor_set(u->threshold, &s->z, 0, sizeof(float));
        break;
    case STEER_ABLATE:
        g->tensor_set(u->dial, (const float[]){-1}, 0, sizeof(float));
        break;
    }
}

/* ---- the graph ------------------------------------------------------------------------------------------------ */

/* Q (n, 2) with H' = H + Q B, of rows whose part in the plane is P (n, 2). */
static struct ggml_tensor *turn_to(const struct steer_device_ggml *g, struct ggml_context *ctx, const struct steering *s,
                                   const struct upload *u, struct ggml_tensor *p, int64_t n) {
    struct ggml_tensor *r = g->sqrt(ctx, g->sum_rows(ctx, g->sqr(ctx, p)));
    struct ggml_tensor *q = g->sub(ctx, g->mul_mat(ctx, u->dial, r), p);
    if (s->z == -INFINITY) return q;
    struct ggml_tensor *p1 = g->view_2d(ctx, p, 1, n, 2 * sizeof(float), 0);
    return g->mul(ctx, q, g->step(ctx, g->sub(ctx, p1, u->threshold)));
}

/* The node that writes into H what one steering makes of it. */
static struct ggml_tensor *turned(const struct steer_device_ggml *g, struct ggml_context *ctx, const struct steering *s,
                                  const struct upload *u, const struct act *act, struct ggml_tensor *h, int64_t d,
                                  int64_t n) {
    const size_t plane = (size_t)(act->plane * s->rank * d) * sizeof(float);
    struct ggml_tensor *b = g->view_2d(ctx, u->basis, d, s->rank, (size_t)d * sizeof(float), plane);
    if (s->op == STEER_ADD) return g->add_inplace(ctx, h, g->scale(ctx, b, s->x * act->scale));
    struct ggml_tensor *bt = g->view_2d(ctx, u->transposed, s->rank, d, (size_t)s->rank * sizeof(float), plane);
    struct ggml_tensor *p = g->mul_mat(ctx, b, h);
    struct ggml_tensor *q = s->op == STEER_TURN_TO ? turn_to(g, ctx, s, u, p, n) : g->mul_mat(ctx, u->dial, p);
    return g->add_inplace(ctx, h, g->mul_mat(ctx, bt, q));
}

/* Room for the graph, at the same addresses every time: backends keep notes on graphs by address. */
static bool make_room(struct steer_device *on, const struct steer_device_ggml *g, int32_t n_steerings) {
    if (on->graph_room >= n_steerings) {
        g->reset(on->graph);
        return true;
    }
    if (on->graph) g->free(on->graph);
    free(on->graph_memory);
    on->graph = NULL;
    on->graph_room = 0;
    const size_t nodes = (size_t)NODES * (size_t)(n_steerings + 1);
    const size_t size = nodes * g->tensor_overhead() + g->graph_overhead_custom(nodes, false);
    on->graph_memory = malloc(size);
    if (on->graph_memory == NULL) return false;
    on->graph = g->init((struct steer_ggml_init){size, on->graph_memory, true});
    if (on->graph == NULL) return false;
    on->graph_room = n_steerings;
    return true;
}

int32_t steer_turn_on_device(struct steer_device **devices, const struct steer_device_ggml *g, void *device,
                             const struct steering *steerings, int32_t n_steerings, const struct site *site, int64_t d,
                             void *buffer, void *data, int64_t n) {
    struct steer_device *on = find_device(devices, g, device);
    if (on == NULL) return STEER_NO_MEMORY;
    if (on->backend == NULL || on->allocator == NULL) return STEER_NO_DEVICE;
    if (on->n_uploads < n_steerings) {
        struct upload *grown = realloc(on->uploads, (size_t)n_steerings * sizeof *grown);
        if (grown == NULL) return STEER_NO_MEMORY;
        memset(grown + on->n_uploads, 0, (size_t)(n_steerings - on->n_uploads) * sizeof *grown);
        on->uploads = grown;
        on->n_uploads = n_steerings;
    }
    if (!make_room(on, g, n_steerings)) return STEER_NO_MEMORY;

    struct ggml_cgraph *graph = g->new_graph_custom(on->graph, (size_t)NODES * (size_t)(n_steerings + 1), false);
    struct ggml_tensor *h = g->new_tensor_2d(on->graph, g->type_f32, d, n);
    if (g->tensor_alloc(buffer, h, data) != 0) return STEER_NO_DEVICE;
    for (int32_t a = 0; a < site->n_acts; a++) {
        const struct act *act = &site->acts[a];
        const struct steering *s = &steerings[act->steering];
        struct upload *u = &on->uploads[act->steering];
        if (!s->on) continue;
        if (u->buffer == NULL && !upload(on, g, s, d, u)) return STEER_NO_DEVICE;
        set_dial(g, s, u);
        h = turned(g, on->graph, s, u, act, h, d, n);
    }
    g->build_forward_expand(graph, h);
    for (int i = 0; i < g->graph_n_nodes(graph); i++) {
        if (!g->dev_supports_op(device, g->graph_node(graph, i))) return STEER_NO_DEVICE;
    }
    /* Planned anew every time: the allocator itself would only look at sizes, and two graphs can agree in those. */
    if (!g->gallocr_reserve(on->allocator, graph) || !g->gallocr_alloc_graph(on->allocator, graph)) {
        return STEER_NO_DEVICE;
    }
    return g->graph_compute(on->backend, graph) == 0 ? STEER_OK : STEER_DEVICE_FAILED;
}

void steer_free_devices(struct steer_device *devices, const struct steer_device_ggml *g) {
    while (devices) {
        struct steer_device *next = devices->next;
        for (int32_t i = 0; i < devices->n_uploads; i++) free_upload(&devices->uploads[i], g);
        free(devices->uploads);
        if (devices->graph) g->free(devices->graph);
        free(devices->graph_memory);
        if (devices->allocator) g->gallocr_free(devices->allocator);
        if (devices->backend) g->backend_free(devices->backend);
        free(devices);
        devices = next;
    }
}
