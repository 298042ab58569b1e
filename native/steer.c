#include "steer_parts.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

int32_t steer_abi(void) { return STEER_ABI; }

/* How many of a tensor's n rows are recorded. */
static int64_t recorded(const steer_hook *hook, int64_t n) { return n < hook->record.last ? n : hook->record.last; }

static void record_row(const steer_hook *hook, int32_t site, int64_t number, const float *h) {
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
    if (to->rows) memcpy(to->rows + (site * to->last + number) * d, h, (size_t)d * sizeof(float));
}

/* h: the rows that are recorded, count of them. */
static void record_rows(const steer_hook *hook, int32_t site, const float *h, int64_t count) {
    for (int64_t i = 0; i < count; i++) record_row(hook, site, i, h + i * hook->d);
}

/* ---- the ways to a tensor's memory ---------------------------------------------------------------------------- */

static int32_t act_in_place(steer_hook *hook, int32_t site, struct ggml_tensor *tensor, int64_t n) {
    float *rows = hook->ggml.get_data(tensor);
    if (rows == NULL) return STEER_NO_BUFFER;
    const int64_t last = recorded(hook, n);
    if (hook->recording) record_rows(hook, site, rows + (n - last) * hook->d, last);
    if (hook->sites[site].read) steer_read_rows(hook, site, rows, n);
    steer_turn_rows(hook->steerings, &hook->sites[site], hook->d, rows, n);
    return STEER_OK;
}

/* Room for n rows on their way to and from a device. */
static float *scratch(steer_hook *hook, int64_t n) {
    const size_t size = (size_t)(n * hook->d) * sizeof(float);
    if (hook->scratch_size < size) {
        float *grown = realloc(hook->scratch, size);
        if (grown == NULL) return NULL;
        hook->scratch = grown;
        hook->scratch_size = size;
    }
    return hook->scratch;
}

static int32_t record_copy(steer_hook *hook, int32_t site, const struct ggml_tensor *tensor, int64_t n) {
    const size_t row_size = (size_t)hook->d * sizeof(float);
    const int64_t last = recorded(hook, n);
    float *rows = scratch(hook, last);
    if (rows == NULL) return STEER_NO_MEMORY;
    hook->ggml.tensor_get(tensor, rows, (size_t)(n - last) * row_size, (size_t)last * row_size);
    record_rows(hook, site, rows, last);
    return STEER_OK;
}

static int32_t read_copy(steer_hook *hook, int32_t site, const struct ggml_tensor *tensor, int64_t n) {
    float *rows = scratch(hook, n);
    if (rows == NULL) return STEER_NO_MEMORY;
    hook->ggml.tensor_get(tensor, rows, 0, (size_t)(n * hook->d) * sizeof(float));
    steer_read_rows(hook, site, rows, n);
    return STEER_OK;
}

static int32_t turn_on_device(steer_hook *hook, int32_t site, const struct ggml_tensor *tensor, void *buffer, bool host,
                              int64_t n) {
    const struct steer_device_ggml *ggml = hook->ggml.device;
    if (ggml == NULL) return STEER_NO_DEVICE;
    void *device = host ? ggml->host_device : ggml->buft_get_device(ggml->buffer_get_type(buffer));
    if (device == NULL) return STEER_NO_DEVICE;
    return steer_turn_on_device(&hook->devices, ggml, device, hook->steerings, hook->n_steerings, &hook->sites[site],
                                hook->d, buffer, hook->ggml.get_data(tensor), n);
}

static int32_t turn_copy(steer_hook *hook, int32_t site, struct ggml_tensor *tensor, int64_t n) {
    float *rows = scratch(hook, n);
    if (rows == NULL) return STEER_NO_MEMORY;
    const size_t size = (size_t)(n * hook->d) * sizeof(float);
    hook->ggml.tensor_get(tensor, rows, 0, size);
    steer_turn_rows(hook->steerings, &hook->sites[site], hook->d, rows, n);
    hook->ggml.tensor_set(tensor, rows, 0, size);
    return STEER_OK;
}

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

    const bool host = ggml->buffer_is_host(buffer), turn = hook->sites[site].n_on > 0, read = hook->sites[site].read;
    int32_t status = STEER_OK;
    if (hook->path == STEER_PATH_GRAPH && !hook->recording && !read) {
        status = STEER_NO_GRAPH; /* it would have been turned there */
    } else if (host && hook->path != STEER_PATH_COPY && hook->path != STEER_PATH_DEVICE) {
        status = act_in_place(hook, site, tensor, n);
    } else if (hook->path == STEER_PATH_HOST || hook->path == STEER_PATH_GRAPH) {
        status = STEER_NO_BUFFER;
    } else {
        if (hook->recording) status = record_copy(hook, site, tensor, n);
        if (status == STEER_OK && read) status = read_copy(hook, site, tensor, n);
        if (status == STEER_OK && turn) {
            status = hook->path == STEER_PATH_COPY ? STEER_NO_DEVICE
                                                   : turn_on_device(hook, site, tensor, buffer, host, n);
            if (status == STEER_NO_DEVICE && hook->path != STEER_PATH_DEVICE) status = turn_copy(hook, site, tensor, n);
        }
    }
    if (status == STEER_OK && turn) hook->turned[site] += n;
    return status;
}

/* ---- llama.cpp's side ----------------------------------------------------------------------------------------- */

bool steer_eval(struct ggml_tensor *tensor, bool ask, void *user_data) {
    steer_hook *hook = user_data;
    if (hook == NULL || tensor == NULL) return false;
    if (ask && hook->went_inside) steer_put_back(hook, tensor);
    if (hook->n_on == 0 && !hook->recording && hook->n_readings == 0) return !ask; /* idle: nothing is looked up */
    if (hook->status != STEER_OK) return false; /* the decode is lost; say no more, Python will read the status */
    const int32_t site = steer_site_of(hook, tensor);
    if (ask) {
        const bool wanted = site >= 0 && (hook->recording || hook->sites[site].n_on > 0 || hook->sites[site].read);
        return wanted && !steer_go_inside(hook, site, tensor);
    }
    if (site < 0) return true;
    const int32_t status = act_on(hook, site, tensor);
    if (status == STEER_OK) return true;
    hook->status = status;
    hook->failed_site = site;
    return false;
}

/* ---- setting up ----------------------------------------------------------------------------------------------- */

#define AND_IS_THERE(result, field, name, arguments) && g->field

static bool has_functions(const struct steer_ggml *g) { return g != NULL STEER_FUNCTIONS(AND_IS_THERE); }

static bool has_device_functions(const struct steer_device_ggml *g) {
    return g != NULL STEER_DEVICE_FUNCTIONS(AND_IS_THERE);
}

int32_t steer_new(const struct steer_ggml *ggml, int64_t d, int32_t n_sites, const char *const *kind,
                  const int32_t *layer, int64_t *reached, int64_t *turned, steer_hook **out) {
    if (out == NULL) return STEER_BAD_ARGUMENT;
    *out = NULL;
    if (!has_functions(ggml) || (ggml->device && !has_device_functions(ggml->device)) || d < 1 ||
        d > 1 << 24 || n_sites < 1 || n_sites > 1 << 20 || !kind || !layer || !reached || !turned) {
        return STEER_BAD_ARGUMENT;
    }
    const struct steer_graph_ggml *graph = ggml->graph;
    if (graph && (!ggml->device || graph->user_data_offset > sizeof graph->custom_params - sizeof(void *))) {
        return STEER_BAD_ARGUMENT;
    }
    steer_hook *hook = calloc(1, sizeof *hook);
    if (hook == NULL) return STEER_NO_MEMORY;
    hook->ggml = *ggml;
    if (ggml->device) {
        hook->device_ggml = *ggml->device;
        hook->ggml.device = &hook->device_ggml;
    }
    hook->d = d;
    hook->reached = reached;
    hook->turned = turned;
    hook->sites = calloc((size_t)n_sites, sizeof *hook->sites);
    if (hook->sites == NULL) {
        steer_free(hook);
        return STEER_NO_MEMORY;
    }
    hook->n_sites = n_sites;
    if (graph) {
        hook->graph_ggml = *graph;
        hook->ggml.graph = &hook->graph_ggml;
        hook->inside = steer_new_inside(hook);
        if (hook->inside == NULL) {
            steer_free(hook);
            return STEER_NO_MEMORY;
        }
    }
    for (int32_t i = 0; i < n_sites; i++) {
        const size_t length = kind[i] ? strlen(kind[i]) : 0;
        int32_t k = length ? steer_find_kind(hook, kind[i], length) : -1;
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
    steer_free_devices(hook->devices, hook->ggml.device);
    free(hook->inside);
    free(hook->sites);
    free(hook->steerings);
    free(hook->nodes);
    free(hook->scratch);
    free(hook);
}

int32_t steer_set_path(steer_hook *hook, int32_t path) {
    if (hook == NULL || path < STEER_PATH_AUTO || path > STEER_PATH_STOP) return STEER_BAD_ARGUMENT;
    hook->path = path;
    return STEER_OK;
}

bool steer_went_inside(const steer_hook *hook) { return hook != NULL && hook->went_inside; }

static bool all_finite(const float *x, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        if (!isfinite(x[i])) return false;
    }
    return true;
}

int32_t steer_add(steer_hook *hook, int32_t op, int32_t n, const int32_t *site, const int32_t *plane,
                  const float *scale, int32_t n_planes, const float *basis, int32_t *id) {
    if (!hook || op < STEER_TURN_BY || op > STEER_ADD || n < 1 || n > hook->n_sites || !site || !plane ||
        n_planes < 1 || n_planes > 1 << 20 || !basis || !id || (op == STEER_ADD && !scale) ||
        hook->n_steerings == 1 << 20) {
        return STEER_BAD_ARGUMENT;
    }
    const int32_t rank = op == STEER_TURN_BY || op == STEER_TURN_TO ? 2 : 1;
    for (int32_t i = 0; i < n; i++) {
        if (site[i] < 0 || site[i] >= hook->n_sites || (i > 0 && site[i] <= site[i - 1]) || plane[i] < 0 ||
            plane[i] >= n_planes) {
            return STEER_BAD_ARGUMENT;
        }
    }
    const int64_t basis_length = (int64_t)n_planes * rank * hook->d;
    if (!all_finite(basis, basis_length) || (scale && !all_finite(scale, n))) return STEER_BAD_ARGUMENT;
    struct steering *grown = realloc(hook->steerings, (size_t)(hook->n_steerings + 1) * sizeof *grown);
    if (grown == NULL) return STEER_NO_MEMORY;
    hook->steerings = grown;
    /* Room at every site first, so that a failure leaves no site with half a steering. */
    for (int32_t i = 0; i < n; i++) {
        struct site *at = &hook->sites[site[i]];
        struct act *acts = realloc(at->acts, (size_t)(at->n_acts + 1) * sizeof *acts);
        if (acts == NULL) return STEER_NO_MEMORY;
        at->acts = acts;
    }
    const size_t site_size = (size_t)n * sizeof *site, basis_size = (size_t)basis_length * sizeof(float);
    struct steering *s = &grown[hook->n_steerings];
    *s = (struct steering){.op = op, .n = n, .n_planes = n_planes, .rank = rank};
    s->site = malloc(site_size);
    s->basis = malloc(basis_size);
    if (s->site == NULL || s->basis == NULL) {
        free(s->site);
        free(s->basis);
        return STEER_NO_MEMORY;
    }
    memcpy(s->site, site, site_size);
    memcpy(s->basis, basis, basis_size);
    for (int32_t i = 0; i < n; i++) {
        struct site *at = &hook->sites[site[i]];
        const float *b1 = s->basis + (int64_t)plane[i] * rank * hook->d;
        at->acts[at->n_acts++] = (struct act){.steering = hook->n_steerings,
                                              .plane = plane[i],
                                              .scale = scale ? scale[i] : 0,
                                              .b1 = b1,
                                              .b2 = rank == 2 ? b1 + hook->d : NULL};
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
        s->turned_at++;
    }
    const bool on = xyz != NULL;
    if (on != s->on) {
        for (int32_t i = 0; i < s->n; i++) hook->sites[s->site[i]].n_on += on ? 1 : -1;
        hook->n_on += on ? 1 : -1;
        s->on = on;
    }
    return STEER_OK;
}

int32_t steer_set_record(steer_hook *hook, const struct steer_record *to) {
    if (hook == NULL || (to && to->last < 1)) return STEER_BAD_ARGUMENT;
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
    steer_turn_rows(hook->steerings, &hook->sites[site], hook->d, rows, n);
    return STEER_OK;
}
