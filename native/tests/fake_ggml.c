#include "fake_ggml.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

int fake_alive;
char fake_lacking;
int fake_failure;

struct ggml_context {
    int n;
    struct ggml_tensor *made[MOST_NODES];
};

struct ggml_cgraph {
    struct ggml_context *context;
};

static struct ggml_cgraph the_graph;
static struct fake_buffer device_memory;
static int the_device, the_backend, the_allocator;

/* ---- tensors -------------------------------------------------------------------------------------------------- */

static const char *get_name(const struct ggml_tensor *t) { return t->name; }
static int64_t nelements(const struct ggml_tensor *t) { return t->ne[0] * t->ne[1]; }
static int64_t nrows(const struct ggml_tensor *t) { return t->ne[1]; }
static bool is_contiguous(const struct ggml_tensor *t) { return t->contiguous; }
static void *get_data(const struct ggml_tensor *t) { return t->data; }
static bool is_host(void *buffer) { return ((struct fake_buffer *)buffer)->host; }
static void tensor_get(const struct ggml_tensor *t, void *to, size_t offset, size_t size) {
    memcpy(to, (const char *)t->data + offset, size);
}
static void tensor_set(struct ggml_tensor *t, const void *from, size_t offset, size_t size) {
    memcpy((char *)t->data + offset, from, size);
}

static void *give(size_t size) {
    fake_alive++;
    return calloc(1, size);
}

static void take(void *given) {
    fake_alive--;
    free(given);
}

static struct ggml_tensor *make(struct ggml_context *c, char op, int64_t n0, int64_t n1, struct ggml_tensor *a,
                                struct ggml_tensor *b) {
    if (c->n == MOST_NODES) abort();
    struct ggml_tensor *t = give(sizeof *t);
    *t = (struct ggml_tensor){.ne = {n0, n1}, .row = (size_t)n0 * sizeof(float), .contiguous = true, .op = op};
    t->src[0] = a;
    t->src[1] = b;
    return c->made[c->n++] = t;
}

static struct ggml_context *init(struct steer_ggml_init params) {
    (void)params;
    return give(sizeof(struct ggml_context));
}

static void reset(struct ggml_context *c) {
    for (int i = 0; i < c->n; i++) {
        if (c->made[i]->owned) free(c->made[i]->data);
        take(c->made[i]);
    }
    c->n = 0;
}

static void free_context(struct ggml_context *c) {
    reset(c);
    take(c);
}

static void own(struct ggml_tensor *t) {
    t->data = calloc((size_t)(t->ne[0] * t->ne[1]) + 1, sizeof(float));
    t->owned = true;
}

/* ---- the device ----------------------------------------------------------------------------------------------- */

static void *buffer_get_type(void *buffer) { return buffer; }
static void *buft_get_device(void *type) { return ((struct fake_buffer *)type)->host ? NULL : &the_device; }
static int dev_type(void *device) { return device == &the_device ? 1 : 0; }
static void *dev_init(void *device, const char *params) {
    (void)device;
    (void)params;
    fake_alive++;
    return &the_backend;
}
static bool supports_op(void *device, const struct ggml_tensor *t) {
    (void)device;
    return fake_lacking == 0 || t->op != fake_lacking;
}
static void give_back(void *what) {
    (void)what;
    fake_alive--;
}
static void *default_type(void *backend) { return backend; }
static void *alloc_tensors(struct ggml_context *c, void *backend) {
    (void)backend;
    for (int i = 0; i < c->n; i++) own(c->made[i]);
    fake_alive++;
    return &device_memory;
}
static int tensor_alloc(void *buffer, struct ggml_tensor *t, void *data) {
    t->buffer = buffer;
    t->data = data;
    return 0;
}
static void *allocator_new(void *type) {
    (void)type;
    fake_alive++;
    return &the_allocator;
}
static bool reserve(void *allocator, struct ggml_cgraph *graph) {
    (void)allocator;
    (void)graph;
    return true;
}
static bool alloc_graph(void *allocator, struct ggml_cgraph *graph) {
    (void)allocator;
    for (int i = 0; i < graph->context->n; i++) {
        struct ggml_tensor *t = graph->context->made[i];
        if (t->data == NULL) own(t);
    }
    return true;
}
static size_t tensor_overhead(void) { return sizeof(struct ggml_tensor); }
static size_t graph_overhead(size_t size, bool grads) { return grads ? 0 : size; }
static struct ggml_cgraph *new_graph(struct ggml_context *c, size_t size, bool grads) {
    (void)size;
    (void)grads;
    the_graph.context = c;
    return &the_graph;
}
static void forward_expand(struct ggml_cgraph *graph, struct ggml_tensor *t) {
    (void)graph;
    (void)t;
}
static int n_nodes(struct ggml_cgraph *graph) { return graph->context->n; }
static struct ggml_tensor *graph_node(struct ggml_cgraph *graph, int i) { return graph->context->made[i]; }

static struct ggml_tensor *new_2d(struct ggml_context *c, int type, int64_t n0, int64_t n1) {
    struct ggml_tensor *t = make(c, 0, n0, n1, NULL, NULL);
    t->type = type;
    return t;
}
static struct ggml_tensor *view_2d(struct ggml_context *c, struct ggml_tensor *a, int64_t n0, int64_t n1, size_t row,
                                   size_t offset) {
    struct ggml_tensor *t = make(c, 'v', n0, n1, a, NULL);
    t->row = row;
    t->scale = (float)offset;
    return t;
}
static struct ggml_tensor *mul_mat(struct ggml_context *c, struct ggml_tensor *a, struct ggml_tensor *b) {
    if (a->ne[0] != b->ne[0]) abort();
    return make(c, '@', a->ne[1], b->ne[1], a, b);
}
static struct ggml_tensor *elementwise(struct ggml_context *c, char op, struct ggml_tensor *a, struct ggml_tensor *b) {
    if (b && (a->ne[0] % b->ne[0] || a->ne[1] % b->ne[1])) abort();
    return make(c, op, a->ne[0], a->ne[1], a, b);
}
static struct ggml_tensor *add_inplace(struct ggml_context *c, struct ggml_tensor *a, struct ggml_tensor *b) {
    struct ggml_tensor *t = elementwise(c, '+', a, b);
    t->data = a->data;
    return t;
}
static struct ggml_tensor *sub(struct ggml_context *c, struct ggml_tensor *a, struct ggml_tensor *b) {
    return elementwise(c, '-', a, b);
}
static struct ggml_tensor *mul(struct ggml_context *c, struct ggml_tensor *a, struct ggml_tensor *b) {
    return elementwise(c, '*', a, b);
}
static struct ggml_tensor *scale(struct ggml_context *c, struct ggml_tensor *a, float s) {
    struct ggml_tensor *t = elementwise(c, 's', a, NULL);
    t->scale = s;
    return t;
}
static struct ggml_tensor *sqr(struct ggml_context *c, struct ggml_tensor *a) { return elementwise(c, '2', a, NULL); }
static struct ggml_tensor *root(struct ggml_context *c, struct ggml_tensor *a) { return elementwise(c, 'r', a, NULL); }
static struct ggml_tensor *step(struct ggml_context *c, struct ggml_tensor *a) { return elementwise(c, 't', a, NULL); }
static struct ggml_tensor *repeat(struct ggml_context *c, struct ggml_tensor *a, struct ggml_tensor *b) {
    if (b->ne[0] % a->ne[0] || b->ne[1] % a->ne[1]) abort();
    return make(c, 'R', b->ne[0], b->ne[1], a, NULL);
}

static float *at(const struct ggml_tensor *t, int64_t i, int64_t j) {
    return (float *)(void *)((char *)t->data + (size_t)(j % t->ne[1]) * t->row) + i % t->ne[0];
}

static float value(const struct ggml_tensor *t, int64_t i, int64_t j) {
    const struct ggml_tensor *a = t->src[0], *b = t->src[1];
    float sum = 0;
    switch (t->op) {
    case '@':
        for (int64_t k = 0; k < a->ne[0]; k++) sum += *at(a, k, i) * *at(b, k, j);
        return sum;
    case 'R': return *at(a, i, j);
    case '+': return *at(a, i, j) + *at(b, i, j);
    case '-': return *at(a, i, j) - *at(b, i, j);
    case '*': return *at(a, i, j) * *at(b, i, j);
    case 's': return t->scale * *at(a, i, j);
    case '2': return *at(a, i, j) * *at(a, i, j);
    case 'r': return sqrtf(*at(a, i, j));
    case 't': return *at(a, i, j) > 0 ? 1.0f : 0.0f;
    default: abort();
    }
}

static int compute(void *backend, struct ggml_cgraph *graph) {
    (void)backend;
    if (fake_failure) return fake_failure;
    for (int n = 0; n < graph->context->n; n++) {
        struct ggml_tensor *t = graph->context->made[n];
        if (t->op == 0) continue;
        if (t->op == 'v') {
            if (t->owned) free(t->data);
            t->owned = false;
            t->data = (float *)(void *)((char *)t->src[0]->data + (size_t)t->scale);
            continue;
        }
        for (int64_t j = 0; j < t->ne[1]; j++) {
            for (int64_t i = 0; i < t->ne[0]; i++) *at(t, i, j) = value(t, i, j);
        }
    }
    return 0;
}

const struct steer_device_ggml fake_device_ggml = {
    .buffer_get_type = buffer_get_type,
    .buft_get_device = buft_get_device,
    .dev_type = dev_type,
    .dev_init = dev_init,
    .dev_supports_op = supports_op,
    .backend_free = give_back,
    .get_default_buffer_type = default_type,
    .graph_compute = compute,
    .alloc_ctx_tensors = alloc_tensors,
    .buffer_free = give_back,
    .tensor_alloc = tensor_alloc,
    .tensor_set = tensor_set,
    .gallocr_new = allocator_new,
    .gallocr_reserve = reserve,
    .gallocr_alloc_graph = alloc_graph,
    .gallocr_free = give_back,
    .init = init,
    .reset = reset,
    .free = free_context,
    .tensor_overhead = tensor_overhead,
    .graph_overhead_custom = graph_overhead,
    .new_graph_custom = new_graph,
    .build_forward_expand = forward_expand,
    .graph_n_nodes = n_nodes,
    .graph_node = graph_node,
    .new_tensor_2d = new_2d,
    .view_2d = view_2d,
    .mul_mat = mul_mat,
    .add_inplace = add_inplace,
    .sub = sub,
    .mul = mul,
    .scale = scale,
    .sqr = sqr,
    .sqrt = root,
    .repeat = repeat,
    .step = step,
    .host_device = &the_device,
    .type_f32 = F32,
};

const struct steer_graph_ggml fake_graph_ggml = {
    .op_offset = offsetof(struct ggml_tensor, op),
    .params_offset = offsetof(struct ggml_tensor, params),
    .source_offset = offsetof(struct ggml_tensor, src),
    .user_data_offset = 16,
    .op_mul = '*',
    .op_add = '+',
    .op_custom = 'c',
};

const struct steer_ggml fake_ggml = {
    .get_name = get_name,
    .nelements = nelements,
    .nrows = nrows,
    .is_contiguous = is_contiguous,
    .get_data = get_data,
    .buffer_is_host = is_host,
    .tensor_get = tensor_get,
    .tensor_set = tensor_set,
    .type_offset = offsetof(struct ggml_tensor, type),
    .buffer_offset = offsetof(struct ggml_tensor, buffer),
    .type_f32 = F32,
    .device = NULL,
};
