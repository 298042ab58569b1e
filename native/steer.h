/* steer: turns activations inside llama.cpp, records them, and reads how far they lie along an axis.
 *
 * One hook belongs to one llama_context. llama.cpp calls steer_eval for every node of its compute graph; at the
 * sites it was told of, the hook records the last rows, reads every row, then applies the steerings that are on, in order.
 *
 * The library links to nothing and keeps no globals: the ggml functions come from the caller. The caller owns the
 * arrays it passes; those marked "kept" must outlive the hook, the others are copied. Setters and getters may only
 * be called while no decode is running on the hook's context. Every function that can fail returns a steer_status.
 *
 * Letters: d model width, b1 and b2 the orthonormal rows of a plane, p1 = h.b1, p2 = h.b2.
 */
#ifndef STEER_H
#define STEER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef _WIN32
#define STEER_API __declspec(dllexport)
#else
#define STEER_API __attribute__((visibility("default")))
#endif

#define STEER_ABI 7

enum steer_status {
    STEER_OK = 0,
    STEER_BAD_ARGUMENT = 1,   /* null pointer, number out of range, or a dial that is not finite */
    STEER_NO_MEMORY = 2,
    STEER_BAD_TYPE = 3,       /* a site's tensor is not F32 */
    STEER_BAD_LAYOUT = 4,     /* a site's tensor is not contiguous */
    STEER_BAD_WIDTH = 5,      /* a site's tensor is not d wide */
    STEER_NO_BUFFER = 6,      /* a site's tensor has no memory, or none that the forced path can reach */
    STEER_NO_DEVICE = 7,      /* the forced path is the device, which lacks an operation or memory */
    STEER_DEVICE_FAILED = 8,  /* the device reported an error while it turned a site's tensor */
    STEER_NO_GRAPH = 9,       /* the forced path is the graph, where a site's tensor cannot be turned */
};

enum steer_op {
    STEER_TURN_BY = 0, /* h + (x p1 - y p2) b1 + (x p2 + y p1) b2     dial: x = cos - 1, y = sin            */
    STEER_TURN_TO = 1, /* h + (x r - p1) b1 + (y r - p2) b2, r = |p|  dial: x = cos, y = sin, z = threshold:
                          only rows with p1 > z; -infinity for all                                          */
    STEER_ABLATE = 2,  /* h - p1 b1                                   dial: none                            */
    STEER_ADD = 3,     /* h + x r b1                                  dial: x = alpha; r is given per site  */
};

enum steer_path {
    STEER_PATH_AUTO = 0,   /* the first that can: graph, host, device, copy */
    STEER_PATH_HOST = 1,   /* in place, once the tensor is computed */
    STEER_PATH_COPY = 2,
    STEER_PATH_DEVICE = 3, /* on the device, the host's memory included */
    STEER_PATH_GRAPH = 4,  /* by the node that computes the tensor, on the CPU; not where it is recorded or read */
    STEER_PATH_STOP = 5,   /* once the tensor is computed: the first that can of host, device, copy */
};

struct ggml_tensor;
struct ggml_context;
struct ggml_cgraph;

/* ggml_init_params */
struct steer_ggml_init {
    size_t mem_size;
    void *mem_buffer;
    bool no_alloc;
};

/* ggml's functions for turning a tensor on its own device: X(result, field, ggml's name, arguments). Buffers, buffer
 * types, devices, backends and allocators are void *. */
#define STEER_DEVICE_FUNCTIONS(X)                                                                                      \
    X(void *, buffer_get_type, ggml_backend_buffer_get_type, (void *buffer))                                           \
    X(void *, buft_get_device, ggml_backend_buft_get_device, (void *buffer_type))                                      \
    X(int, dev_type, ggml_backend_dev_type, (void *device))                                                            \
    X(void *, dev_init, ggml_backend_dev_init, (void *device, const char *params))                                     \
    X(bool, dev_supports_op, ggml_backend_dev_supports_op, (void *device, const struct ggml_tensor *))                 \
    X(void, backend_free, ggml_backend_free, (void *backend))                                                          \
    X(void *, get_default_buffer_type, ggml_backend_get_default_buffer_type, (void *backend))                          \
    X(int, graph_compute, ggml_backend_graph_compute, (void *backend, struct ggml_cgraph *))                           \
    X(void *, alloc_ctx_tensors, ggml_backend_alloc_ctx_tensors, (struct ggml_context *, void *backend))               \
    X(void, buffer_free, ggml_backend_buffer_free, (void *buffer))                                                     \
    X(int, tensor_alloc, ggml_backend_tensor_alloc, (void *buffer, struct ggml_tensor *, void *data))                  \
    X(void, tensor_set, ggml_backend_tensor_set, (struct ggml_tensor *, const void *, size_t offset, size_t size))     \
    X(void *, gallocr_new, ggml_gallocr_new, (void *buffer_type))                                                      \
    X(bool, gallocr_reserve, ggml_gallocr_reserve, (void *allocator, struct ggml_cgraph *))                            \
    X(bool, gallocr_alloc_graph, ggml_gallocr_alloc_graph, (void *allocator, struct ggml_cgraph *))                    \
    X(void, gallocr_free, ggml_gallocr_free, (void *allocator))                                                        \
    X(struct ggml_context *, init, ggml_init, (struct steer_ggml_init))                                                \
    X(void, reset, ggml_reset, (struct ggml_context *))                                                                \
    X(void, free, ggml_free, (struct ggml_context *))                                                                  \
    X(size_t, tensor_overhead, ggml_tensor_overhead, (void))                                                           \
    X(size_t, graph_overhead_custom, ggml_graph_overhead_custom, (size_t size, bool grads))                            \
    X(struct ggml_cgraph *, new_graph_custom, ggml_new_graph_custom, (struct ggml_context *, size_t size, bool grads)) \
    X(void, build_forward_expand, ggml_build_forward_expand, (struct ggml_cgraph *, struct ggml_tensor *))             \
    X(int, graph_n_nodes, ggml_graph_n_nodes, (struct ggml_cgraph *))                                                  \
    X(struct ggml_tensor *, graph_node, ggml_graph_node, (struct ggml_cgraph *, int))                                  \
    X(struct ggml_tensor *, new_tensor_2d, ggml_new_tensor_2d, (struct ggml_context *, int type, int64_t, int64_t))    \
    X(struct ggml_tensor *, view_2d, ggml_view_2d,                                                                     \
      (struct ggml_context *, struct ggml_tensor *, int64_t, int64_t, size_t, size_t))                                 \
    X(struct ggml_tensor *, mul_mat, ggml_mul_mat,                                                                     \
      (struct ggml_context *, struct ggml_tensor *, struct ggml_tensor *))                                             \
    X(struct ggml_tensor *, add_inplace, ggml_add_inplace,                                                             \
      (struct ggml_context *, struct ggml_tensor *, struct ggml_tensor *))                                             \
    X(struct ggml_tensor *, sub, ggml_sub, (struct ggml_context *, struct ggml_tensor *, struct ggml_tensor *))        \
    X(struct ggml_tensor *, mul, ggml_mul, (struct ggml_context *, struct ggml_tensor *, struct ggml_tensor *))        \
    X(struct ggml_tensor *, scale, ggml_scale, (struct ggml_context *, struct ggml_tensor *, float))                   \
    X(struct ggml_tensor *, sqr, ggml_sqr, (struct ggml_context *, struct ggml_tensor *))                              \
    X(struct ggml_tensor *, sqrt, ggml_sqrt, (struct ggml_context *, struct ggml_tensor *))                            \
    X(struct ggml_tensor *, repeat, ggml_repeat, (struct ggml_context *, struct ggml_tensor *, struct ggml_tensor *))  \
    X(struct ggml_tensor *, step, ggml_step, (struct ggml_context *, struct ggml_tensor *))

#define STEER_FUNCTION_FIELD(result, field, name, arguments) result(*field) arguments;

struct steer_device_ggml {
    STEER_DEVICE_FUNCTIONS(STEER_FUNCTION_FIELD)
    void *host_device; /* the device for the host's memory, when the path is forced */
    int32_t type_f32;
};

/* What the path inside the graph knows of ggml: offsets of a tensor's fields, numbers of operators, and the parameters
 * of a custom operator that calls steer_in_graph on every thread, with user data at `user_data_offset`. */
struct steer_graph_ggml {
    size_t op_offset, params_offset, source_offset, user_data_offset;
    int32_t op_mul, op_add, op_custom;
    unsigned char custom_params[64]; /* GGML_MAX_OP_PARAMS */
};

/* ggml's functions for every path. A name is an array of 24 bytes or more; ggml's has 64. */
#define STEER_FUNCTIONS(X)                                                                                             \
    X(const char *, get_name, ggml_get_name, (const struct ggml_tensor *))                                             \
    X(int64_t, nelements, ggml_nelements, (const struct ggml_tensor *))                                                \
    X(int64_t, nrows, ggml_nrows, (const struct ggml_tensor *))                                                        \
    X(bool, is_contiguous, ggml_is_contiguous, (const struct ggml_tensor *))                                           \
    X(void *, get_data, ggml_get_data, (const struct ggml_tensor *))                                                   \
    X(bool, buffer_is_host, ggml_backend_buffer_is_host, (void *buffer))                                               \
    X(void, tensor_get, ggml_backend_tensor_get, (const struct ggml_tensor *, void *, size_t offset, size_t size))     \
    X(void, tensor_set, ggml_backend_tensor_set, (struct ggml_tensor *, const void *, size_t offset, size_t size))

/* ggml's functions, and the offsets of the two fields for which ggml exports no getter. */
struct steer_ggml {
    STEER_FUNCTIONS(STEER_FUNCTION_FIELD)
    size_t type_offset;
    size_t buffer_offset;
    int32_t type_f32;
    const struct steer_device_ggml *device; /* copied; null where there is no device path */
    const struct steer_graph_ggml *graph;   /* copied; null where there is no path inside the graph; wants a device */
};

/* Where the last rows h of each site are added to or written; any pointer may be null. S sites. */
struct steer_record {
    double *sum;      /* (S, d)        sum of h                                      */
    double *sum_unit; /* (S, d)        sum of h / |h|                                */
    double *sum_norm; /* (S)           sum of |h|                                    */
    int64_t *count;   /* (S)           rows added                                    */
    float *rows;      /* (S, last, d)  the latest h; a tensor may have fewer         */
    int64_t last;     /* how many rows at a tensor's end are recorded, 1 or more     */
};

/* Where a site's rows h are read along an axis: gain (h.axis) + offset, row by row, into to[at], to[at + 1], ...;
 * `at` grows by one a row, and what would lie at or behind `room` is not written. */
struct steer_reading {
    int32_t site;
    const float *axis; /* d finite numbers */
    double gain, offset;
    float *to;
    int64_t room, at;
};

typedef struct steer_hook steer_hook;

STEER_API int32_t steer_abi(void);

/* One field of a structure that the caller fills: an address of ggml's goes by ggml's name of the function. */
struct steer_field {
    const char *structure, *field;
    size_t offset, size;
};

/* Every field of every such structure, in order, and behind each structure's a row of its own size, with the field "".
 * The last row is all null. A caller in another language lays its structures out by this, or compares them with it. */
STEER_API const struct steer_field *steer_fields(void);

/* A hook for sites kind[i]-layer[i], i < n_sites, of a model of width d. `reached` and `turned` (S each, kept) count
 * how often a site's tensor came by while it was asked for, and the rows turned there. */
STEER_API int32_t steer_new(const struct steer_ggml *ggml, int64_t d, int32_t n_sites, const char *const *kind,
                            const int32_t *layer, int64_t *reached, int64_t *turned, steer_hook **out);
STEER_API void steer_free(steer_hook *hook);
STEER_API int32_t steer_set_path(steer_hook *hook, int32_t path);

/* Whether a node ever was made to turn what it computes. */
STEER_API bool steer_went_inside(const steer_hook *hook);

/* Adds a steering, off, behind those already there; *id is its number. It acts at site[i] in plane[i], i < n, with
 * scale[i] as r for STEER_ADD (may be null for the others). The sites ascend. basis: n_planes x rank x d finite
 * numbers; rank is 2 for STEER_TURN_*, else 1. */
STEER_API int32_t steer_add(steer_hook *hook, int32_t op, int32_t n, const int32_t *site, const int32_t *plane,
                            const float *scale, int32_t n_planes, const float *basis, int32_t *id);
/* Sets the dial of steering `id` to {x, y, z}; null turns it off. Takes effect at the next decode. */
STEER_API int32_t steer_dial(steer_hook *hook, int32_t id, const double *xyz);

/* Records until called with null; *to is copied, its arrays are kept. */
STEER_API int32_t steer_set_record(steer_hook *hook, const struct steer_record *to);

/* Reads until called with n = 0. The readings (n, kept) may be given another `at` between two decodes. A site that is
 * read is never turned inside the graph. */
STEER_API int32_t steer_set_readings(steer_hook *hook, int32_t n, struct steer_reading *readings);

/* llama.cpp's cb_eval; user_data is the hook. */
STEER_API bool steer_eval(struct ggml_tensor *tensor, bool ask, void *user_data);

/* ggml's custom operator, in place of a site's own: the same result, turned. For ggml to call. */
STEER_API void steer_in_graph(struct ggml_tensor *tensor, int thread, int n_threads, void *user_data);

/* What the last decodes met with: the first failure since the last call and its site, then forgotten. */
STEER_API int32_t steer_take_status(steer_hook *hook, int32_t *site);

/* Applies what is on at `site` to rows (n, d) in place, as steer_eval does to a tensor. */
STEER_API int32_t steer_rows(const steer_hook *hook, int32_t site, float *rows, int64_t n);

/* Names of the graph nodes seen, each ended by '\n' and cut at 23 bytes, then '\0'. Returns the size needed. */
STEER_API size_t steer_names(const steer_hook *hook, char *out, size_t size);

#endif
