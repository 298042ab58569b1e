/* A ggml of our own to drive steer.h without llama.cpp: tensors that are whatever a test says they are. */
#ifndef BARE_GGML_H
#define BARE_GGML_H

#include <stdlib.h>
#include <string.h>

#include "../steer.h"

enum { FAKE_F32 = 0, FAKE_NAME = 64, FAKE_MUL = 1, FAKE_ADD = 2, FAKE_CUSTOM = 3, FAKE_USER_DATA = 16 };

struct ggml_tensor {
    int32_t type;
    void *buffer; /* null, fake_host or fake_device */
    int64_t elements, rows;
    bool contiguous;
    float *data; /* `room` floats, or null */
    size_t room;
    char name[FAKE_NAME];
    int32_t op;
    unsigned char params[64];
    struct ggml_tensor *src[2];
};

static char fake_host, fake_device;

static const char *fake_name(const struct ggml_tensor *t) { return t->name; }
static int64_t fake_elements(const struct ggml_tensor *t) { return t->elements; }
static int64_t fake_rows(const struct ggml_tensor *t) { return t->rows; }
static bool fake_contiguous(const struct ggml_tensor *t) { return t->contiguous; }
static void *fake_data(const struct ggml_tensor *t) { return t->data; }
static bool fake_is_host(void *buffer) { return buffer == &fake_host; }

/* What ggml answers with an assertion that ends the process. */
static void fake_check(const struct ggml_tensor *t, const void *memory, size_t offset, size_t size) {
    if (memory == NULL || t->buffer == NULL || size > t->room * sizeof(float) ||
        offset > t->room * sizeof(float) - size) {
        abort();
    }
}

static void fake_get(const struct ggml_tensor *t, void *to, size_t offset, size_t size) {
    fake_check(t, to, offset, size);
    memcpy(to, (const char *)t->data + offset, size);
}

static void fake_set(struct ggml_tensor *t, const void *from, size_t offset, size_t size) {
    fake_check(t, from, offset, size);
    memcpy((char *)t->data + offset, from, size);
}

static const struct steer_ggml fake_ggml = {
    .get_name = fake_name,
    .nelements = fake_elements,
    .nrows = fake_rows,
    .is_contiguous = fake_contiguous,
    .get_data = fake_data,
    .buffer_is_host = fake_is_host,
    .tensor_get = fake_get,
    .tensor_set = fake_set,
    .type_offset = offsetof(struct ggml_tensor, type),
    .buffer_offset = offsetof(struct ggml_tensor, buffer),
    .type_f32 = FAKE_F32,
};

/* ---- for the path inside the graph: a host's memory is the CPU's; what is elsewhere can only be copied ---------- */

static void fake_never(void) { abort(); }
static void *fake_type(void *buffer) { return buffer; }
static void *fake_device_of(void *type) { return type == &fake_host ? NULL : type; }
static int fake_dev_type(void *device) { return device == &fake_device ? 4 /* GGML_BACKEND_DEVICE_TYPE_META */ : 0; }

static inline struct steer_device_ggml fake_devices(void) {
#define FAKE_NEVER(result, field, name, arguments) .field = (result(*) arguments)fake_never,
    struct steer_device_ggml devices = {STEER_DEVICE_FUNCTIONS(FAKE_NEVER).host_device = &fake_device};
    devices.buffer_get_type = fake_type;
    devices.buft_get_device = fake_device_of;
    devices.dev_type = fake_dev_type;
    return devices;
}

static inline struct steer_graph_ggml fake_graph(void) {
    struct steer_graph_ggml graph = {.op_offset = offsetof(struct ggml_tensor, op),
                                     .params_offset = offsetof(struct ggml_tensor, params),
                                     .source_offset = offsetof(struct ggml_tensor, src),
                                     .user_data_offset = FAKE_USER_DATA,
                                     .op_mul = FAKE_MUL,
                                     .op_add = FAKE_ADD,
                                     .op_custom = FAKE_CUSTOM};
    graph.custom_params[0] = 77; /* in the place of the function's address */
    return graph;
}

#endif
