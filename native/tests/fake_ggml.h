/* Just enough of ggml for the hook: tensors of two extents, and a device that computes what the device path asks for.
 * It counts what it gave out, so that a test can say that all came back. One test program, one thread. */
#ifndef FAKE_GGML_H
#define FAKE_GGML_H

#include "../steer.h"

enum { F32 = 0, MOST_NODES = 256 };

struct fake_buffer {
    bool host;
};

struct ggml_tensor {
    int32_t type;
    struct fake_buffer *buffer;
    int64_t ne[2];
    size_t row; /* bytes from row to row */
    float *data;
    bool owned, contiguous;
    char name[64];
    int32_t op; /* a letter; 0 is a leaf */
    unsigned char params[64];
    float scale;
    struct ggml_tensor *src[2];
};

/* What was given out and not yet taken back. */
extern int fake_alive;
/* The operation that the device lacks; 0 is none. */
extern char fake_lacking;
/* What graph_compute answers. */
extern int fake_failure;

extern const struct steer_device_ggml fake_device_ggml;
/* Products and sums are * and +, a custom operator is c: user data is all that its parameters hold. */
extern const struct steer_graph_ggml fake_graph_ggml;
/* All but the device path and the one inside the graph. */
extern const struct steer_ggml fake_ggml;

#endif
