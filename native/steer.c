#include "steer.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Wide vectors where the processor has them, chosen when the library is loaded. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(STEER_NO_CLONES)
#define STEER_WIDE __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define STEER_WIDE
#endif

enum { MAX_KINDS = 16, NAME = 24, LANES = 16, MAX_NODES = 1 << 16, NOT_A_SITE = -1 };

struct steering {
    int32_t op;
    bool on;
    float x, y, z;
    int32_t n;
    int32_t *site;  /* n, kept to count what is on */
    float *basis;   /* planes x rank x d */
};

/* One steering at one site. */
struct act {
    int32_t steering;
    float scale;
    const float *b1, *b2;
};

struct site {
    int32_t kind, layer;
    int32_t n_on; /* steerings here that are on */
    int32_t n_acts;
    struct act *acts; /* in the order in which the steerings were added */
};

/* A graph node, recognised by its address for as long as its name is the same: llama.cpp reuses a graph from token
 * to token, and reuses the memory when it builds another. */
struct node {
    const struct ggml_tensor *tensor;
    char name[NAME];
    int32_t site; /* NOT_A_SITE, a site, or numberless(kind) */
};

struct steer_hook {
    struct steer_ggml ggml;
    int64_t d;
    int32_t path;
    int32_t n_kinds, n_sites, n_steerings;
    char kind[MAX_KINDS][NAME];
    struct site *sites;
    struct steering *steerings;
    int64_t *reached, *turned;
    bool recording;
    struct steer_record record;
    struct node *nodes; /* open addressing, n_slots a power of two */
    int32_t n_nodes, n_slots;
    int32_t layer; /* of the numbered site last asked for: a node without a number belongs to it */
    int32_t status, failed_site;
    float *scratch;
    size_t scratch_size;
};

int32_t steer_abi(void) { return STEER_ABI; }

/* ---- the mathematics ------------------------------------------------------------------------------------------ */

/* p1 = h.b1, p2 = h.b2. Partial sums in lanes: the compiler makes vectors of them without reordering additions. */
STEER_WIDE static void dot2(int64_t d, const float *h, const float *b1, const float *b2, float *p1, float *p2) {
    float s1[LANES] = {0}, s2[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= d; i += LANES) {
        for (int k = 0; k < LANES; k++) {
            s1[k] += h[i + k] * b1[i + k];
            s2[k] += h[i + k] * b2[i + k];
        }
    }
    double t1 = 0, t2 = 0;
    for (int k = 0; k < LANES; k++) {
        t1 += (double)s1[k];
        t2 += (double)s2[k];
    }
    for (; i < d; i++) {
        t1 += (double)h[i] * (double)b1[i];
        t2 += (double)h[i] * (double)b2[i];
    }
    *p1 = (float)t1;
    *p2 = (float)t2;
}

STEER_WIDE static float dot(int64_t d, const float *h, const float *b) {
    float s[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= d; i += LANES) {
        for (int k = 0; k < LANES; k++) s[k] += h[i + k] * b[i + k];
    }
    double t = 0;
    for (int k = 0; k < LANES; k++) t += (double)s[k];
    for (; i < d; i++) t += (double)h[i] * (double)b[i];
    return (float)t;
}

STEER_WIDE static void add2(int64_t d, float *restrict h, float q1, const float *restrict b1, float q2,
                            const float *restrict b2) {
    for (int64_t i = 0; i < d; i++) h[i] += q1 * b1[i] + q2 * b2[i];
}

STEER_WIDE static void add1(int64_t d, float *restrict h, float q, const float *restrict b) {
    for (int64_t i = 0; i < d; i++) h[i] += q * b[i];
}

static void turn_row(int64_t d, float *h, const struct steering *s, const struct act *act) {
    float p1, p2;
    switch (s->op) {
    case STEER_TURN_BY:
        dot2(d, h, act->b1, act->b2, &p1, &p2);
        add2(d, h, s->x * p1 - s->y * p2, act->b1, s->x * p2 + s->y * p1, act->b2);
        break;
    case STEER_TURN_TO: {
        dot2(d, h, act->b1, act->b2, &p1, &p2);
        if (!(p1 > s->z)) break;
        const float r = hypotf(p1, p2);
        add2(d, h, s->x * r - p1, act->b1, s->y * r - p2, act->b2);
        break;
    }
    case STEER_ABLATE:
        add1(d, h, -dot(d, h, act->b1), act->b1);
        break;
    case STEER_ADD:
        add1(d, h, s->x * act->scale, act->b1);
        break;
    }
}

static void turn_rows(const steer_hook *hook, const struct site *site, float *rows, int64_t n) {
    for (int64_t row = 0; row < n; row++) {
        for (int32_t a = 0; a < site->n_acts; a++) {
            const struct steering *s = &hook->steerings[site->acts[a].steering];
            if (s->on) turn_row(hook->d, rows + row * hook->d, s, &site->acts[a]);
        }
    }
}

static void record_row(const steer_hook *hook, int32_t site, const float *h) {
    const struct steer_record *to = &hook->record;
    const int64_t d = hook->d, at = site * d;
    double square = 0;
    for (int64_t i = 0; i < d; i++) square += (double)h[i] * (double)h[i];
    const double norm = sqrt(square), inverse = norm > 0 ? 1 / norm : 0;
    if (to->sum) {
        for (int64_t i = 0; i < d; i++) to->sum[at + i] += (double)h[i];
    }
    if (to->sum_unit) {
        for (int64_t i = 0; i < d; i++) to->sum_unit[at + i] += (double)h[i] * inverse;
    }
    if (to->sum_norm) to->sum_norm[site] += norm;
    if (to->count) to->count[site] += 1;
    if (to->rows) memcpy(to->rows + at, h, (size_t)d * sizeof(float));
}

/* ---- which node is which site --------------------------------------------------------------------------------- */

static int32_t numberless(int32_t kind) { return -2 - kind; }

static int32_t find_site(const steer_hook *hook, int32_t kind, int32_t layer) {
    for (int32_t i = 0; i < hook->n_sites; i++) {
        if (hook->sites[i].kind == kind && hook->sites[i].layer == layer) return i;
    }
    return NOT_A_SITE;
}

static int32_t find_kind(const steer_hook *hook, const char *name, size_t length) {
    for (int32_t k = 0; k < hook->n_kinds; k++) {
        if (strlen(hook->kind[k]) == length && memcmp(hook->kind[k], name, length) == 0) return k;
    }
    return -1;
}

/* "ffn_norm-12" is site (ffn_norm, 12); "ffn_norm" alone is told by order. */
static int32_t resolve(const steer_hook *hook, const char *name) {
    const char *dash = strrchr(name, '-');
    if (dash == NULL) {
        const int32_t kind = find_kind(hook, name, strlen(name));
        return kind < 0 ? NOT_A_SITE : numberless(kind);
    }
    const int32_t kind = find_kind(hook, name, (size_t)(dash - name));
    if (kind < 0 || dash[1] == '\0') return NOT_A_SITE;
    int32_t layer = 0;
    for (const char *c = dash + 1; *c; c++) {
        if (*c < '0' || *c > '9' || layer > 100000) return NOT_A_SITE;
        layer = layer * 10 + (*c - '0');
    }
    return find_site(hook, kind, layer);
}

static struct node *slot_for(struct node *nodes, int32_t n_slots, const struct ggml_tensor *tensor) {
    const uint32_t mask = (uint32_t)n_slots - 1;
    uint32_t i = (uint32_t)(((uint64_t)(uintptr_t)tensor * 0x9E3779B97F4A7C15ull) >> 32) & mask;
    while (nodes[i].tensor != NULL && nodes[i].tensor != tensor) i = (i + 1) & mask;
    return &nodes[i];
}

static bool grow(steer_hook *hook) {
    if (hook->n_nodes >= MAX_NODES) { /* addresses of graphs long gone: start again */
        memset(hook->nodes, 0, (size_t)hook->n_slots * sizeof(struct node));
        hook->n_nodes = 0;
        return true;
    }
    const int32_t n_slots = hook->n_slots ? 2 * hook->n_slots : 4096;
    struct node *nodes = calloc((size_t)n_slots, sizeof(struct node));
    if (nodes == NULL) return false;
    for (int32_t i = 0; i < hook->n_slots; i++) {
        if (hook->nodes[i].tensor) *slot_for(nodes, n_slots, hook->nodes[i].tensor) = hook->nodes[i];
    }
    free(hook->nodes);
    hook->nodes = nodes;
    hook->n_slots = n_slots;
    return true;
}

/* The site of a node, or NOT_A_SITE. Its name is parsed once per graph; afterwards it is only compared. */
static int32_t site_of(steer_hook *hook, const struct ggml_tensor *tensor) {
    struct node *node = hook->n_slots ? slot_for(hook->nodes, hook->n_slots, tensor) : NULL;
    const char *name = hook->ggml.get_name(tensor);
    if (node == NULL || node->tensor == NULL || strncmp(node->name, name, NAME - 1) != 0) {
        if (node == NULL || node->tensor == NULL) {
            if (2 * (hook->n_nodes + 1) > hook->n_slots) {
                if (!grow(hook)) {
                    hook->status = STEER_NO_MEMORY;
                    return NOT_A_SITE;
                }
                node = slot_for(hook->nodes, hook->n_slots, tensor);
            }
            hook->n_nodes++;
        }
        node->tensor = tensor;
        strncpy(node->name, name, NAME - 1);
        node->name[NAME - 1] = '\0';
        node->site = resolve(hook, name);
    }
    if (node->site >= 0) {
        hook->layer = hook->sites[node->site].layer;
        return node->site;
    }
    return node->site == NOT_A_SITE ? NOT_A_SITE : find_site(hook, -2 - node->site, hook->layer);
}

/* ---- llama.cpp's side ----------------------------------------------------------------------------------------- */

static int32_t act_on(steer_hook *hook, int32_t site, struct ggml_tensor *tensor) {
    const struct steer_ggml *ggml = &hook->ggml;
    int32_t type;
    void *buffer;
    memcpy(&type, (const char *)tensor + ggml->type_offset, sizeof type);
    memcpy(&buffer, (const char *)tensor + ggml->buffer_offset, sizeof buffer);
    const int64_t elements = ggml->nelements(tensor);
    const int64_t n = elements == 0 ? 0 : ggml->nrows(tensor);
    hook->reached[site]++;
    if (type != ggml->type_f32) return STEER_BAD_TYPE;
    if (n == 0) return STEER_OK; /* the last block of a micro-batch without outputs */
    /* n * d and its bytes could overflow. */
    if (elements < 0 || elements % hook->d != 0 || elements / hook->d != n) return STEER_BAD_WIDTH;
    if ((uint64_t)elements > PTRDIFF_MAX / sizeof(float)) return STEER_NO_MEMORY;
    if (!ggml->is_contiguous(tensor)) return STEER_BAD_LAYOUT;
    if (buffer == NULL || ggml->get_data(tensor) == NULL) return STEER_NO_BUFFER; /* ggml would end the process */

    const bool turn = hook->sites[site].n_on > 0;
    const bool in_place = hook->path != STEER_PATH_COPY && ggml->buffer_is_host(buffer);
    if (hook->path == STEER_PATH_HOST && !in_place) return STEER_NO_BUFFER;
    if (in_place) {
        float *rows = ggml->get_data(tensor);
        if (hook->recording) record_row(hook, site, rows + (n - 1) * hook->d);
        if (turn) turn_rows(hook, &hook->sites[site], rows, n);
    } else {
        const int64_t first = turn ? 0 : n - 1; /* a recorder needs the last row only */
        const size_t row_size = (size_t)hook->d * sizeof(float), size = (size_t)(n - first) * row_size;
        if (hook->scratch_size < size) {
            float *scratch = realloc(hook->scratch, size);
            if (scratch == NULL) return STEER_NO_MEMORY;
            hook->scratch = scratch;
            hook->scratch_size = size;
        }
        ggml->tensor_get(tensor, hook->scratch, (size_t)first * row_size, size);
        if (hook->recording) record_row(hook, site, hook->scratch + (n - 1 - first) * hook->d);
        if (turn) {
            turn_rows(hook, &hook->sites[site], hook->scratch, n);
            ggml->tensor_set(tensor, hook->scratch, 0, size);
        }
    }
    if (turn) hook->turned[site] += n;
    return STEER_OK;
}

bool steer_eval(struct ggml_tensor *tensor, bool ask, void *user_data) {
    steer_hook *hook = user_data;
    if (hook->status != STEER_OK) return false; /* the decode is lost; say no more, Python will read the status */
    const int32_t site = site_of(hook, tensor);
    if (ask) return site >= 0 && (hook->recording || hook->sites[site].n_on > 0);
    if (site < 0) return true;
    const int32_t status = act_on(hook, site, tensor);
    if (status == STEER_OK) return true;
    hook->status = status;
    hook->failed_site = site;
    return false;
}

/* ---- setting up ----------------------------------------------------------------------------------------------- */

static bool has_functions(const struct steer_ggml *g) {
    return g->get_name && g->nelements && g->nrows && g->is_contiguous && g->get_data && g->buffer_is_host &&
           g->tensor_get && g->tensor_set;
}

int32_t steer_new(const struct steer_ggml *ggml, int64_t d, int32_t n_sites, const char *const *kind,
                  const int32_t *layer, int64_t *reached, int64_t *turned, steer_hook **out) {
    if (out == NULL) return STEER_BAD_ARGUMENT;
    *out = NULL;
    if (!ggml || !has_functions(ggml) || d < 1 || d > 1 << 24 || n_sites < 1 || n_sites > 1 << 20 || !kind || !layer ||
        !reached || !turned) {
        return STEER_BAD_ARGUMENT;
    }
    steer_hook *hook = calloc(1, sizeof *hook);
    if (hook == NULL) return STEER_NO_MEMORY;
    hook->ggml = *ggml;
    hook->d = d;
    hook->reached = reached;
    hook->turned = turned;
    hook->sites = calloc((size_t)n_sites, sizeof *hook->sites);
    if (hook->sites == NULL) {
        steer_free(hook);
        return STEER_NO_MEMORY;
    }
    hook->n_sites = n_sites;
    for (int32_t i = 0; i < n_sites; i++) {
        const size_t length = kind[i] ? strlen(kind[i]) : 0;
        int32_t k = length ? find_kind(hook, kind[i], length) : -1;
        if (length == 0 || length >= NAME - 8 || layer[i] < 0 || (k < 0 && hook->n_kinds == MAX_KINDS)) {
            steer_free(hook);
            return STEER_BAD_ARGUMENT;
        }
        if (k < 0) {
            k = hook->n_kinds++;
            memcpy(hook->kind[k], kind[i], length + 1);
        }
        hook->sites[i].kind = k;
        hook->sites[i].layer = layer[i];
    }
    *out = hook;
    return STEER_OK;
}

void steer_free(steer_hook *hook) {
    if (hook == NULL) return;
    for (int32_t i = 0; i < hook->n_sites; i++) free(hook->sites[i].acts);
    for (int32_t i = 0; i < hook->n_steerings; i++) {
        free(hook->steerings[i].site);
        free(hook->steerings[i].basis);
    }
    free(hook->sites);
    free(hook->steerings);
    free(hook->nodes);
    free(hook->scratch);
    free(hook);
}

int32_t steer_set_path(steer_hook *hook, int32_t path) {
    if (hook == NULL || path < STEER_PATH_AUTO || path > STEER_PATH_COPY) return STEER_BAD_ARGUMENT;
    hook->path = path;
    return STEER_OK;
}

int32_t steer_add(steer_hook *hook, int32_t op, int32_t n, const int32_t *site, const int32_t *plane,
                  const float *scale, int32_t n_planes, const float *basis, int32_t *id) {
    if (!hook || op < STEER_TURN_BY || op > STEER_ADD || n < 1 || n > hook->n_sites || !site || !plane ||
        n_planes < 1 || n_planes > 1 << 20 || !basis || !id || (op == STEER_ADD && !scale)) {
        return STEER_BAD_ARGUMENT;
    }
    const int64_t rank = op == STEER_TURN_BY || op == STEER_TURN_TO ? 2 : 1;
    for (int32_t i = 0; i < n; i++) {
        if (site[i] < 0 || site[i] >= hook->n_sites || plane[i] < 0 || plane[i] >= n_planes) return STEER_BAD_ARGUMENT;
    }
    struct steering *grown = realloc(hook->steerings, (size_t)(hook->n_steerings + 1) * sizeof *grown);
    if (grown == NULL) return STEER_NO_MEMORY;
    hook->steerings = grown;
    struct steering *s = &grown[hook->n_steerings];
    const size_t basis_size = (size_t)(n_planes * rank * hook->d) * sizeof(float);
    *s = (struct steering){.op = op, .n = n, .site = malloc((size_t)n * sizeof *site), .basis = malloc(basis_size)};
    if (s->site == NULL || s->basis == NULL) {
        free(s->site);
        free(s->basis);
        return STEER_NO_MEMORY;
    }
    memcpy(s->site, site, (size_t)n * sizeof *site);
    memcpy(s->basis, basis, basis_size);

    /* Room at every site first, so that a failure leaves no site with half a steering. */
    for (int32_t i = 0; i < n; i++) {
        struct site *at = &hook->sites[site[i]];
        struct act *acts = realloc(at->acts, (size_t)(at->n_acts + n) * sizeof *acts);
        if (acts == NULL) {
            free(s->site);
            free(s->basis);
            return STEER_NO_MEMORY;
        }
        at->acts = acts;
    }
    for (int32_t i = 0; i < n; i++) {
        struct site *at = &hook->sites[site[i]];
        const float *b1 = s->basis + plane[i] * rank * hook->d;
        at->acts[at->n_acts++] = (struct act){
            .steering = hook->n_steerings, .scale = scale ? scale[i] : 0, .b1 = b1, .b2 = rank == 2 ? b1 + hook->d : NULL};
    }
    *id = hook->n_steerings++;
    return STEER_OK;
}

int32_t steer_dial(steer_hook *hook, int32_t id, const double *xyz) {
    if (hook == NULL || id < 0 || id >= hook->n_steerings) return STEER_BAD_ARGUMENT;
    struct steering *s = &hook->steerings[id];
    if (xyz) {
        const float x = (float)xyz[0], y = (float)xyz[1], z = (float)xyz[2]; /* a double may be too large for one */
        if (!isfinite(x) || !isfinite(y) || isnan(z)) return STEER_BAD_ARGUMENT;
        s->x = x;
        s->y = y;
        s->z = z;
    }
    const bool on = xyz != NULL;
    if (on != s->on) {
        for (int32_t i = 0; i < s->n; i++) hook->sites[s->site[i]].n_on += on ? 1 : -1;
        s->on = on;
    }
    return STEER_OK;
}

int32_t steer_set_record(steer_hook *hook, const struct steer_record *to) {
    if (hook == NULL) return STEER_BAD_ARGUMENT;
    hook->recording = to != NULL;
    hook->record = to ? *to : (struct steer_record){0};
    return STEER_OK;
}

int32_t steer_take_status(steer_hook *hook, int32_t *site) {
    if (hook == NULL || site == NULL) return STEER_BAD_ARGUMENT;
    const int32_t status = hook->status;
    *site = hook->failed_site;
    hook->status = STEER_OK;
    return status;
}

int32_t steer_rows(const steer_hook *hook, int32_t site, float *rows, int64_t n) {
    if (hook == NULL || site < 0 || site >= hook->n_sites || n < 0 || (rows == NULL && n > 0)) return STEER_BAD_ARGUMENT;
    turn_rows(hook, &hook->sites[site], rows, n);
    return STEER_OK;
}

size_t steer_names(const steer_hook *hook, char *out, size_t size) {
    size_t used = 0;
    if (out != NULL && size > 0) out[0] = '\0';
    for (int32_t i = 0; hook != NULL && i < hook->n_slots; i++) {
        if (hook->nodes[i].tensor == NULL) continue;
        const size_t length = strlen(hook->nodes[i].name);
        if (out != NULL && used + length + 2 <= size) {
            memcpy(out + used, hook->nodes[i].name, length);
            out[used + length] = '\n';
            out[used + length + 1] = '\0';
        }
        used += length + 1;
    }
    return used + 1;
}
