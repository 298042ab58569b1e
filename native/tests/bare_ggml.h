/* A ggml of our own to drive steer.h without llama.cpp: tensors that are whatever a test says they are. */
#ifndef BARE_GGML_H
#define BARE_GGML_H

#include <stdlib.h>
#include <string.h>

#include "../steer.h"

enum { FAKE_F32 = 0, FAKE_NAME = 64 };

struct ggml_tensor {
    int32_t type;
    void *buffer; /* null, fake_host or fake_device */
    int64_t elements, rows;
    bool contiguous;
    float *data; /* `room` floats, or null */
    size_t room;
    char name[FAKE_NAME];
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

#endif
