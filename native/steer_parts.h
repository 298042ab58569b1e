/* What the files of the hook share: the hook, steerings and sites. Not part of its interface, which is steer.h.
 *
 * steer.c        the hook: steerings and dials, and the ways to a site's memory
 * steer_nodes.c  which graph node is which site
 * steer_read.c   how far a site's rows lie along an axis
 * steer_turn.c   the mathematics, on rows in the host's memory
 * steer_graph.c  the same by the node that computes the rows
 * steer_device.c the same mathematics as a ggml graph, on a tensor's own device
 * steer_layout.c how the structures lie that the caller fills
 */
#ifndef STEER_PARTS_H
#define STEER_PARTS_H

#include "steer.h"

/* Wide vectors where the processor has them, chosen when the library is loaded. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(STEER_NO_CLONES)
#define STEER_WIDE __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define STEER_WIDE
#endif

struct steering {
    int32_t op;
    bool on;
    float x, y, z;     /* the dial, see steer_op */
    uint32_t turned_at; /* grows with every new dial, so that a device notices */
    int32_t n;
    int32_t *site; /* n, kept to count what is on */
    int32_t n_planes, rank;
    float *basis; /* n_planes x rank x d */
};

/* One steering at one site. */
struct act {
    int32_t steering, plane;
    float scale;
    const float *b1, *b2; /* b2 is null at rank 1 */
};

struct site {
    int32_t kind, layer;
    int32_t n_on; /* steerings here that are on */
    bool read;    /* it is read */
    int32_t n_acts;
    struct act *acts; /* in the order in which the steerings were added */
};

enum { MAX_KINDS = 16, NAME = 24, NOT_A_SITE = -1 };

/* A graph node, recognised by its address for as long as its name is the same: llama.cpp reuses a graph from token
 * to token, and reuses the memory when it builds another. All NAME bytes are compared, also those behind the name's
 * end: three loads, and a difference there costs no more than parsing the name again. */
struct node {
    const struct ggml_tensor *tensor;
    char name[NAME];
    int32_t site; /* NOT_A_SITE, a site, or numberless(kind) */
};

struct steer_hook {
    struct steer_ggml ggml;
    struct steer_device_ggml device_ggml; /* ggml.device and ggml.graph, where they are not null */
    struct steer_graph_ggml graph_ggml;
    int64_t d;
    int32_t path;
    int32_t n_kinds, n_sites, n_steerings, n_on;
    char kind[MAX_KINDS][NAME];
    struct site *sites;
    struct steering *steerings;
    int64_t *reached, *turned;
    bool recording;
    struct steer_record record;
    int32_t n_readings;
    struct steer_reading *readings; /* the caller's */
    struct node *nodes; /* open addressing, n_slots a power of two */
    int32_t n_nodes, n_slots;
    int32_t layer; /* of the numbered site last asked for: a node without a number belongs to it */
    int32_t status, failed_site;
    struct steer_device *devices;
    struct steer_inside *inside; /* by site and operator, see steer_graph.c; null where there is no such path */
    bool went_inside;            /* whether any node ever was changed */
    float *scratch;
    size_t scratch_size;
};

/* The site of a node, or NOT_A_SITE. */
int32_t steer_site_of(steer_hook *hook, const struct ggml_tensor *tensor);

/* The number of a kind of site, or -1. */
int32_t steer_find_kind(const steer_hook *hook, const char *name, size_t length);

/* h.b, for rows and axes of width d. */
double steer_dot(int64_t d, const float *h, const float *b);

/* Appends what the readings at `site` read of rows (n, d). */
void steer_read_rows(steer_hook *hook, int32_t site, const float *rows, int64_t n);

/* Lets what is on at `site` act on rows (n, d), in place. */
void steer_turn_rows(const struct steering *steerings, const struct site *site, int64_t d, float *rows, int64_t n);

/* The devices a hook has met, a list; null is none yet. */
struct steer_device;

/* The same on rows (n, d) at `data` in a ggml `buffer` of `device`. STEER_NO_DEVICE, and nothing is changed, where the
 * device lacks an operation or memory. */
int32_t steer_turn_on_device(struct steer_device **devices, const struct steer_device_ggml *ggml, void *device,
                             const struct steering *steerings, int32_t n_steerings, const struct site *site, int64_t d,
                             void *buffer, void *data, int64_t n);
void steer_free_devices(struct steer_device *devices, const struct steer_device_ggml *ggml);

/* For steer_hook's `inside`; null where memory lacks. */
struct steer_inside *steer_new_inside(steer_hook *hook);

/* Lets the node that computes a site's tensor turn it too. False, and nothing is changed, where it cannot or a forced
 * path, the recorder or a reading forbids it. */
bool steer_go_inside(steer_hook *hook, int32_t site, struct ggml_tensor *tensor);

/* Gives a node that this hook changed its own operator again. */
void steer_put_back(const steer_hook *hook, struct ggml_tensor *tensor);

#endif
