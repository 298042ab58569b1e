/* The mathematics of steer_op as a ggml graph on a tensor's own device, so that no activation crosses the bus.
 *
 * Once per device: a backend of its own, and every steering's planes. Once per dial: at most five numbers. Per call:
 * a graph of some six to twenty nodes a steering, built anew (a microsecond a node) in the same memory. The rows enter
 * it as a leaf of their own over the same data: as the model's tensor they would bring all that they were computed from.
 *
 * A GPU may round the factors of a large F32 product to half precision (Vulkan, Metal: no number above 65504) or to TF32
 * (CUDA), but none does so with a matrix by one vector or two. So H, long as it is, is only ever the matrix, never the
 * many vectors, and what is added to it is formed number by number.
 *
 * Letters: H (n, d) the rows, b_k (d) a plane's rows, p_k = H b_k (n). ggml names the innermost extent first.
 */
#include "steer_parts.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { NODES = 32, META = 4 /* GGML_BACKEND_DEVICE_TYPE_META */ };

/* One steering on a device. */
struct upload {
    struct ggml_context *tensors;
    void *buffer;
    struct ggml_tensor *basis;      /* planes of rank rows, d wide */
    struct ggml_tensor *transposed; /* for STEER_TURN_BY: planes of d rows, 2 wide */
    struct ggml_tensor *dial;       /* by columns K with q = K p for STEER_TURN_BY; x, y for STEER_TURN_TO */
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

/* STEER_TURN_BY's planes with their rows as columns; false where memory lacks. */
static bool set_transposed(const struct steer_device_ggml *g, const struct steering *s, int64_t d, struct upload *u) {
    const size_t size = (size_t)(s->n_planes * 2 * d) * sizeof(float);
    float *transposed = malloc(size);
    if (transposed == NULL) return false;
    for (int64_t plane = 0; plane < s->n_planes; plane++) {
        const float *from = s->basis + plane * 2 * d;
        float *at = transposed + plane * 2 * d;
        for (int64_t i = 0; i < d; i++) {
            for (int64_t k = 0; k < 2; k++) at[i * 2 + k] = from[k * d + i];
        }
    }
    g->tensor_set(u->transposed, transposed, 0, size);
    free(transposed);
    return true;
}

/* Lays steering s on the device, but for its dial. */
static bool upload(const struct steer_device *to, const struct steer_device_ggml *g, const struct steering *s, int64_t d,
                   struct upload *u) {
    const int64_t rows = (int64_t)s->n_planes * s->rank;
    const bool turn_by = s->op == STEER_TURN_BY;
    u->tensors = g->init((struct steer_ggml_init){4 * g->tensor_overhead(), NULL, true});
    if (u->tensors == NULL) return false;
    u->basis = g->new_tensor_2d(u->tensors, g->type_f32, d, rows);
    u->dial = g->new_tensor_2d(u->tensors, g->type_f32, turn_by ? 2 : 1, 2);
    u->threshold = g->new_tensor_2d(u->tensors, g->type_f32, 1, 1);
    if (turn_by) u->transposed = g->new_tensor_2d(u->tensors, g->type_f32, 2, s->n_planes * d);
    u->buffer = g->alloc_ctx_tensors(u->tensors, to->backend);
    if (u->buffer == NULL || (turn_by && !set_transposed(g, s, d, u))) {
        free_upload(u, g);
        return false;
    }
    g->tensor_set(u->basis, s->basis, 0, (size_t)(rows * d) * sizeof(float));
    return true;
}

static void set_dial(const struct steer_device_ggml *g, const struct steering *s, struct upload *u) {
    if (u->turned_at == s->turned_at) return;
    u->turned_at = s->turned_at;
    switch (s->op) {
    case STEER_TURN_BY:
        g->tensor_set(u->dial, (const float[]){s->x, s->y, -s->y, s->x}, 0, 4 * sizeof(float));
        break;
    case STEER_TURN_TO:
        g->tensor_set(u->dial, (const float[]){s->x, s->y}, 0, 2 * sizeof(float));
        g->tensor_set(u->threshold, &s->z, 0, sizeof(float));
        break;
    }
}

/* ---- the graph ------------------------------------------------------------------------------------------------ */

/* What one steering does at one site, as it is built into the graph. */
struct build {
    const struct steer_device_ggml *g;
    struct ggml_context *ctx;
    const struct upload *u;
    int64_t d, n;
};

/* Row k of a plane's rows, or of what has their shape. */
static struct ggml_tensor *row_of(const struct build *at, struct ggml_tensor *rows, int64_t k) {
    return at->g->view_2d(at->ctx, rows, at->d, 1, (size_t)at->d * sizeof(float), (size_t)(k * at->d) * sizeof(float));
}

/* One number for each row of H: those behind `skipped` such columns of p. */
static struct ggml_tensor *column_of(const struct build *at, struct ggml_tensor *p, int64_t skipped) {
    return at->g->view_2d(at->ctx, p, 1, at->n, sizeof(float), (size_t)(skipped * at->n) * sizeof(float));
}

/* H + q b, in place: to each row of H its own q times b. */
static struct ggml_tensor *add_along(const struct build *at, struct ggml_tensor *h, struct ggml_tensor *q,
                                     struct ggml_tensor *b) {
    struct ggml_tensor *wide = at->n == 1 ? b : at->g->repeat(at->ctx, b, h);
    return at->g->add_inplace(at->ctx, h, at->g->mul(at->ctx, wide, q));
}

/* H + (x r - p1) b1 + (y r - p2) b2 with r = |p|, where p1 > z. */
static struct ggml_tensor *turned_to(const struct build *at, const struct steering *s, struct ggml_tensor *h,
                                     struct ggml_tensor *b, struct ggml_tensor *p) {
    const struct steer_device_ggml *g = at->g;
    struct ggml_tensor *p1 = column_of(at, p, 0), *p2 = column_of(at, p, 1), *passes = NULL;
    struct ggml_tensor *r = g->sqrt(at->ctx, g->add_inplace(at->ctx, g->sqr(at->ctx, p1), g->sqr(at->ctx, p2)));
    if (s->z != -INFINITY) passes = g->step(at->ctx, g->sub(at->ctx, p1, at->u->threshold));
    for (int64_t k = 0; k < 2; k++) {
        struct ggml_tensor *to = g->view_2d(at->ctx, at->u->dial, 1, 1, sizeof(float), (size_t)k * sizeof(float));
        struct ggml_tensor *q = g->sub(at->ctx, g->mul(at->ctx, r, to), k == 0 ? p1 : p2);
        if (passes) q = g->mul(at->ctx, q, passes);
        h = add_along(at, h, q, row_of(at, b, k));
    }
    return h;
}

/* The node that writes into H what one steering makes of it. */
static struct ggml_tensor *turned(const struct build *at, const struct steering *s, const struct act *act,
                                  struct ggml_tensor *h) {
    const struct steer_device_ggml *g = at->g;
    const size_t plane = (size_t)(act->plane * s->rank * at->d) * sizeof(float);
    struct ggml_tensor *b = g->view_2d(at->ctx, at->u->basis, at->d, s->rank, (size_t)at->d * sizeof(float), plane);
    if (s->op == STEER_ADD) return g->add_inplace(at->ctx, h, g->scale(at->ctx, b, s->x * act->scale));
    struct ggml_tensor *p = g->mul_mat(at->ctx, h, b);
    if (s->op == STEER_TURN_TO) return turned_to(at, s, h, b, p);
    if (s->op == STEER_ABLATE) return add_along(at, h, column_of(at, p, 0), g->scale(at->ctx, b, -1));
    /* With q = K p, H + q1 b1 + q2 b2 is H + p1 c1 + p2 c2: the plane is turned, however many rows there are. */
    struct ggml_tensor *bt = g->view_2d(at->ctx, at->u->transposed, 2, at->d, 2 * sizeof(float), plane);
    struct ggml_tensor *c = g->mul_mat(at->ctx, bt, at->u->dial);
    for (int64_t k = 0; k < 2; k++) h = add_along(at, h, column_of(at, p, k), row_of(at, c, k));
    return h;
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
        h = turned(&(struct build){g, on->graph, u, d, n}, s, act, h);
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
