/* What sanitizers are to see of steer.h, without llama.cpp: every call, every path, every refusal, and two models with
 * two steerings in two threads. Ends with the number of checks, or at the first that fails.
 *
 * Run by `just native-asan`, `just native-ubsan`, `just native-tsan`.
 */
#include <math.h>
#include <pthread.h>
#include <stdio.h>

#include "bare_ggml.h"

enum { D = 37, SITES = 4, ROWS = 5, ROUNDS = 200 };

static _Atomic int checks;

#define CHECK(truth)                                                           \
    do {                                                                       \
        checks++;                                                              \
        if (!(truth)) {                                                        \
            fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #truth); \
            abort();                                                           \
        }                                                                      \
    } while (0)

static const char *const kind[SITES] = {"attn_norm", "ffn_norm", "ffn_post_norm", "attn_norm"};
static const int32_t layer[SITES] = {0, 0, 0, 1};

/* One hook, the arrays it keeps, and one tensor at each of its sites. */
struct model {
    steer_hook *hook;
    int64_t reached[SITES], turned[SITES];
    struct ggml_tensor tensor[SITES];
    double sum[SITES * D], sum_unit[SITES * D], sum_norm[SITES];
    int64_t count[SITES];
    float last[SITES * D];
};

static void fill(struct ggml_tensor *t, int64_t rows) {
    free(t->data);
    t->rows = rows;
    t->elements = rows * D;
    t->room = (size_t)t->elements;
    t->data = malloc(t->room * sizeof(float) + 1);
    for (size_t i = 0; i < t->room; i++) t->data[i] = (float)(i % 11) - 4.25f;
}

static struct model *open_model(void) {
    struct model *m = calloc(1, sizeof *m);
    CHECK(m != NULL);
    CHECK(steer_new(&fake_ggml, D, SITES, kind, layer, m->reached, m->turned, &m->hook) == STEER_OK);
    for (int i = 0; i < SITES; i++) {
        struct ggml_tensor *t = &m->tensor[i];
        *t = (struct ggml_tensor){.type = FAKE_F32, .buffer = &fake_host, .contiguous = true};
        if (i == 2) snprintf(t->name, sizeof t->name, "%s", kind[i]); /* bears no number */
        else snprintf(t->name, sizeof t->name, "%s-%d", kind[i], layer[i]);
        fill(t, ROWS);
    }
    return m;
}

static void close_model(struct model *m) {
    steer_free(m->hook);
    for (int i = 0; i < SITES; i++) free(m->tensor[i].data);
    free(m);
}

/* A steering at every site, in one plane: the unit vectors of two axes. */
static int32_t add(struct model *m, int32_t op, int32_t axis) {
    const int32_t site[SITES] = {0, 1, 2, 3}, plane[SITES] = {0};
    const float scale[SITES] = {1, 2, 3, 4};
    const size_t rank = op == STEER_TURN_BY || op == STEER_TURN_TO ? 2 : 1;
    float *basis = calloc(rank * D, sizeof *basis);
    CHECK(basis != NULL);
    basis[axis] = 1;
    if (rank == 2) basis[D + axis + 1] = 1;
    int32_t id = -1;
    CHECK(steer_add(m->hook, op, SITES, site, plane, scale, 1, basis, &id) == STEER_OK);
    free(basis); /* copied */
    return id;
}

/* One decode: llama.cpp asks for every node, then hands over those asked for. Returns how many were. */
static int decode(struct model *m) {
    int handed = 0;
    for (int i = 0; i < SITES; i++) {
        if (!steer_eval(&m->tensor[i], true, m->hook)) continue;
        handed++;
        if (!steer_eval(&m->tensor[i], false, m->hook)) break;
    }
    return handed;
}

static int32_t status_of(struct model *m) {
    int32_t site;
    return steer_take_status(m->hook, &site);
}

static void every_operator_on_every_path(void) {
    struct model *m = open_model();
    const double dial[4][3] = {{-1, 1, 0}, {0, 1, -INFINITY}, {0, 0, 0}, {0.5, 0, 0}};
    for (int32_t op = 0; op < 4; op++) CHECK(add(m, op, 3 * op) == op);
    CHECK(decode(m) == 0); /* off is free */
    for (int32_t path = STEER_PATH_AUTO; path <= STEER_PATH_COPY; path++) {
        CHECK(steer_set_path(m->hook, path) == STEER_OK);
        for (int32_t op = 0; op < 4; op++) {
            for (int i = 0; i < SITES; i++) {
                m->tensor[i].buffer = path == STEER_PATH_HOST ? &fake_host : &fake_device;
                fill(&m->tensor[i], 1 + i);
            }
            const float before = m->tensor[3].data[D + 3 * op];
            CHECK(steer_dial(m->hook, op, dial[op]) == STEER_OK);
            CHECK(decode(m) == SITES && status_of(m) == STEER_OK);
            CHECK(m->tensor[3].data[D + 3 * op] != before);
            CHECK(steer_dial(m->hook, op, NULL) == STEER_OK);
        }
    }
    for (int i = 0; i < SITES; i++) CHECK(m->reached[i] == 12 && m->turned[i] == 12 * (1 + i));
    close_model(m);
}

static void recording(void) {
    struct model *m = open_model();
    struct steer_record all = {m->sum, m->sum_unit, m->sum_norm, m->count, m->last, 1}, none = {.last = 1};
    for (int32_t path = STEER_PATH_HOST; path <= STEER_PATH_COPY; path++) {
        CHECK(steer_set_path(m->hook, path) == STEER_OK);
        CHECK(steer_set_record(m->hook, &all) == STEER_OK && decode(m) == SITES);
        CHECK(steer_set_record(m->hook, &none) == STEER_OK && decode(m) == SITES);
    }
    CHECK(m->count[0] == 2 && m->last[0] == m->tensor[0].data[(ROWS - 1) * D]);
    CHECK(steer_set_record(m->hook, NULL) == STEER_OK && decode(m) == 0);
    close_model(m);
}

static void reading(void) {
    struct model *m = open_model();
    float *axis = calloc(D, sizeof *axis), *to = malloc(3 * ROWS * sizeof *to);
    CHECK(axis != NULL && to != NULL);
    axis[D - 1] = 1;
    struct steer_reading readings[2] = {{0, axis, 2, 1, to, 3 * ROWS, 0}, {3, axis, 1, 0, to, 0, 0}};
    CHECK(steer_set_readings(m->hook, 2, readings) == STEER_OK);
    for (int32_t path = STEER_PATH_AUTO; path <= STEER_PATH_COPY; path++) {
        for (int i = 0; i < SITES; i++) m->tensor[i].buffer = path == STEER_PATH_HOST ? &fake_host : &fake_device;
        CHECK(steer_set_path(m->hook, path) == STEER_OK && decode(m) == 2 && status_of(m) == STEER_OK);
    }
    CHECK(readings[0].at == 3 * ROWS && readings[1].at == 3 * ROWS);
    CHECK(to[3 * ROWS - 1] == 2 * m->tensor[0].data[ROWS * D - 1] + 1);
    CHECK(decode(m) == 2 && readings[0].at == 4 * ROWS); /* no room */
    CHECK(steer_set_readings(m->hook, 0, NULL) == STEER_OK && decode(m) == 0);
    close_model(m);
    free(axis);
    free(to);
}

static void refusals(void) {
    struct model *m = open_model();
    const double turn[3] = {-1, 1, 0};
    CHECK(add(m, STEER_TURN_BY, 0) == 0 && steer_dial(m->hook, 0, turn) == STEER_OK);
    const struct ggml_tensor good = m->tensor[0];
    const struct {
        int32_t type;
        void *buffer;
        int64_t elements, rows;
        bool contiguous, data;
        int32_t path, status;
    } odd[] = {
        {1, &fake_host, D, 1, true, true, STEER_PATH_AUTO, STEER_BAD_TYPE},
        {0, &fake_host, D, 1, false, true, STEER_PATH_AUTO, STEER_BAD_LAYOUT},
        {0, &fake_host, D + 1, 1, true, true, STEER_PATH_AUTO, STEER_BAD_WIDTH},
        {0, &fake_host, D, 2, true, true, STEER_PATH_AUTO, STEER_BAD_WIDTH},
        {0, &fake_host, D, INT64_MAX, true, true, STEER_PATH_AUTO, STEER_BAD_WIDTH},
        {0, &fake_host, -D, -1, true, true, STEER_PATH_AUTO, STEER_BAD_WIDTH},
        {0, &fake_host, INT64_MAX / D * D, INT64_MAX / D, true, true, STEER_PATH_COPY, STEER_NO_MEMORY},
        {0, NULL, D, 1, true, true, STEER_PATH_AUTO, STEER_NO_BUFFER},
        {0, &fake_host, D, 1, true, false, STEER_PATH_AUTO, STEER_NO_BUFFER},
        {0, &fake_device, D, 1, true, false, STEER_PATH_AUTO, STEER_NO_BUFFER},
        {0, &fake_device, D, 1, true, true, STEER_PATH_HOST, STEER_NO_BUFFER},
        {0, &fake_host, 0, 9, true, false, STEER_PATH_AUTO, STEER_OK}, /* no rows: no output is wanted */
    };
    for (size_t i = 0; i < sizeof odd / sizeof *odd; i++) {
        struct ggml_tensor *t = &m->tensor[0];
        t->type = odd[i].type;
        t->buffer = odd[i].buffer;
        t->elements = odd[i].elements;
        t->rows = odd[i].rows;
        t->contiguous = odd[i].contiguous;
        t->data = odd[i].data ? good.data : NULL;
        CHECK(steer_set_path(m->hook, odd[i].path) == STEER_OK);
        CHECK(steer_eval(t, true, m->hook));
        CHECK(steer_eval(t, false, m->hook) == (odd[i].status == STEER_OK));
        CHECK(steer_eval(t, true, m->hook) == (odd[i].status == STEER_OK)); /* a lost decode asks for no more */
        CHECK(status_of(m) == odd[i].status);
        *t = good;
    }

    const double inf[3] = {INFINITY, 0, 0}, nan3[3] = {0, 0, NAN}, large[3] = {1e39, 0, 0};
    CHECK(steer_dial(m->hook, 0, inf) == STEER_BAD_ARGUMENT && steer_dial(m->hook, 0, nan3) == STEER_BAD_ARGUMENT);
    CHECK(steer_dial(m->hook, 0, large) == STEER_BAD_ARGUMENT);
    CHECK(steer_dial(m->hook, 1, turn) == STEER_BAD_ARGUMENT && steer_dial(NULL, 0, turn) == STEER_BAD_ARGUMENT);
    CHECK(steer_set_path(m->hook, 9) == STEER_BAD_ARGUMENT && steer_set_record(NULL, NULL) == STEER_BAD_ARGUMENT);
    const int32_t site = SITES, plane = 1, fine = 0;
    const float b[2 * D] = {1};
    int32_t id = -1;
    CHECK(steer_add(m->hook, STEER_ABLATE, 1, &site, &fine, NULL, 1, b, &id) == STEER_BAD_ARGUMENT);
    CHECK(steer_add(m->hook, STEER_ABLATE, 1, &fine, &plane, NULL, 1, b, &id) == STEER_BAD_ARGUMENT);
    CHECK(steer_add(m->hook, STEER_ADD, 1, &fine, &fine, NULL, 1, b, &id) == STEER_BAD_ARGUMENT);
    CHECK(steer_add(m->hook, 4, 1, &fine, &fine, NULL, 1, b, &id) == STEER_BAD_ARGUMENT && id == -1);
    steer_hook *none = m->hook;
    CHECK(steer_new(&fake_ggml, 0, SITES, kind, layer, m->reached, m->turned, &none) == STEER_BAD_ARGUMENT && !none);
    close_model(m);
}

/* A graph is built again in the same memory, many times more nodes than the table holds at once. */
static void many_graphs(void) {
    struct model *m = open_model();
    const double turn[3] = {-1, 1, 0};
    CHECK(add(m, STEER_TURN_BY, 0) == 0 && steer_dial(m->hook, 0, turn) == STEER_OK);
    enum { NODES = 150000 };
    struct ggml_tensor *node = calloc(NODES, sizeof *node);
    CHECK(node != NULL);
    int asked = 0;
    for (int i = 0; i < NODES; i++) {
        snprintf(node[i].name, sizeof node[i].name, i % 100 ? "node_%d" : "attn_norm-%d", i % 100 ? i : i / 100 % 3);
        asked += steer_eval(&node[i], true, m->hook);
    }
    CHECK(asked == NODES / 100 / 3 * 2);
    char end, *names = malloc(steer_names(m->hook, NULL, 0));
    CHECK(steer_names(m->hook, names, 0) > 1 && steer_names(NULL, &end, 1) == 1 && end == '\0');
    CHECK(steer_names(m->hook, names, steer_names(m->hook, NULL, 0)) == strlen(names) + 1);
    free(names);
    free(node);
    close_model(m);
}

/* What one thread does with its own model: nothing of it may be seen by the other. */
static void *alone(void *angle) {
    const double radians = *(const double *)angle, turn[3] = {cos(radians) - 1, sin(radians), 0};
    struct model *m = open_model();
    const int32_t id = add(m, STEER_TURN_BY, 5);
    for (int round = 0; round < ROUNDS; round++) {
        for (int i = 0; i < SITES; i++) fill(&m->tensor[i], ROWS);
        CHECK(steer_set_path(m->hook, round % 3) == STEER_OK);
        CHECK(steer_dial(m->hook, id, round % 2 ? turn : NULL) == STEER_OK);
        const float h1 = m->tensor[1].data[5], h2 = m->tensor[1].data[6];
        CHECK(decode(m) == (round % 2 ? SITES : 0) && status_of(m) == STEER_OK);
        const double wanted = round % 2 ? cos(radians) * (double)h1 - sin(radians) * (double)h2 : (double)h1;
        CHECK(fabs((double)m->tensor[1].data[5] - wanted) < 1e-5);
    }
    close_model(m);
    return NULL;
}

static void two_models_in_two_threads(void) {
    double angle[2] = {0.3, -1.2};
    pthread_t thread[2];
    for (int i = 0; i < 2; i++) CHECK(pthread_create(&thread[i], NULL, alone, &angle[i]) == 0);
    for (int i = 0; i < 2; i++) CHECK(pthread_join(thread[i], NULL) == 0);
}

int main(void) {
    every_operator_on_every_path();
    recording();
    reading();
    refusals();
    many_graphs();
    two_models_in_two_threads();
    printf("%d checks\n", checks);
    return 0;
}
