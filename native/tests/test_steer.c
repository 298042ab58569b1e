/* The hook on a fake ggml: every operator on every path, every status, and the table of nodes; and choosing a token.
 *
 *     just native-test
 */
#include "../choose.h"
#include "fake_ggml.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { D = 37, SITES = 3, ROWS = 5 };

static int failures;

#define CHECK(claim)                                                       \
    do {                                                                   \
        if (!(claim)) {                                                    \
            failures++;                                                    \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #claim); \
        }                                                                  \
    } while (0)

static struct fake_buffer host = {true}, far = {false};
static const char *const KINDS[SITES] = {"attn_norm", "ffn_norm", "attn_norm"};
static const int32_t LAYERS[SITES] = {0, 0, 1}, PLANES[SITES] = {1, 0, 2}, ALL[SITES] = {0, 1, 2};
static const float SCALE[SITES] = {2, 3, 4};
static int64_t reached[SITES], turned[SITES];

static uint32_t seed = 1;
static float noise(void) {
    seed = seed * 1664525u + 1013904223u;
    return (float)(seed >> 8) / (float)(1 << 23) - 1;
}

/* SITES planes of orthonormal rows. */
static void fill_planes(float basis[SITES][2][D]) {
    for (int p = 0; p < SITES; p++) {
        for (int k = 0; k < 2; k++) {
            double along = 0, square = 0;
            for (int i = 0; i < D; i++) basis[p][k][i] = noise();
            for (int i = 0; i < D; i++) along += k ? basis[p][0][i] * basis[p][1][i] : 0;
            for (int i = 0; i < D; i++) basis[p][k][i] -= (float)along * (k ? basis[p][0][i] : 0);
            for (int i = 0; i < D; i++) square += basis[p][k][i] * basis[p][k][i];
            for (int i = 0; i < D; i++) basis[p][k][i] /= (float)sqrt(square);
        }
    }
}

static steer_hook *new_hook(bool with_device) {
    struct steer_ggml ggml = fake_ggml;
    if (with_device) ggml.device = &fake_device_ggml;
    steer_hook *hook = NULL;
    memset(reached, 0, sizeof reached);
    memset(turned, 0, sizeof turned);
    CHECK(steer_new(&ggml, D, SITES, KINDS, LAYERS, reached, turned, &hook) == STEER_OK);
    return hook;
}

static int32_t add(steer_hook *hook, int32_t op, float basis[SITES][2][D]) {
    float b1[SITES][D];
    for (int p = 0; p < SITES; p++) memcpy(b1[p], basis[p][0], sizeof b1[p]);
    const float *planes = op == STEER_TURN_BY || op == STEER_TURN_TO ? &basis[0][0][0] : &b1[0][0];
    int32_t id = -1;
    CHECK(steer_add(hook, op, SITES, ALL, PLANES, SCALE, SITES, planes, &id) == STEER_OK);
    return id;
}

static struct ggml_tensor tensor(const char *name, struct fake_buffer *buffer, float *data, int64_t n) {
    struct ggml_tensor t = {.type = F32, .buffer = buffer, .ne = {D, n}, .data = data, .contiguous = true};
    strncpy(t.name, name, sizeof t.name - 1);
    return t;
}

/* llama.cpp's two calls for one node. */
static bool pass(steer_hook *hook, struct ggml_tensor *t) {
    return !steer_eval(t, true, hook) || steer_eval(t, false, hook);
}

static void expected_row(float *h, int32_t op, const double dial[3], float basis[2][D], float scale) {
    double p1 = 0, p2 = 0, q1 = 0, q2 = 0;
    for (int i = 0; i < D; i++) {
        p1 += h[i] * basis[0][i];
        p2 += h[i] * basis[1][i];
    }
    const double r = hypot(p1, p2);
    switch (op) {
    case STEER_TURN_BY: q1 = dial[0] * p1 - dial[1] * p2, q2 = dial[0] * p2 + dial[1] * p1; break;
    case STEER_TURN_TO:
        if (p1 > dial[2]) q1 = dial[0] * r - p1, q2 = dial[1] * r - p2;
        break;
    case STEER_ABLATE: q1 = -p1; break;
    case STEER_ADD: q1 = dial[0] * (double)scale; break;
    }
    for (int i = 0; i < D; i++) h[i] += (float)(q1 * basis[0][i] + q2 * basis[1][i]);
}

static const struct {
    int32_t op;
    double dial[3];
} CASES[] = {
    {STEER_TURN_BY, {-0.3, 0.7, 0}},         {STEER_TURN_TO, {0.6, -0.8, -INFINITY}}, {STEER_TURN_TO, {0.6, 0.8, 0.1}},
    {STEER_ABLATE, {0, 0, 0}},               {STEER_ADD, {0.5, 0, 0}},
};
enum { N_CASES = sizeof CASES / sizeof *CASES };

static void every_operator_on_every_path_is_the_formula(void) {
    float basis[SITES][2][D], was[ROWS][D], expected[ROWS][D], rows[ROWS][D];
    fill_planes(basis);
    for (int32_t path = STEER_PATH_AUTO; path <= STEER_PATH_DEVICE; path++) {
        for (int in_far = 0; in_far < 2; in_far++) {
            if (in_far && path == STEER_PATH_HOST) continue;
            for (int64_t n = 0; n <= ROWS; n += ROWS) {
                steer_hook *hook = new_hook(true);
                CHECK(steer_set_path(hook, path) == STEER_OK);
                for (int c = 0; c < N_CASES; c++) CHECK(add(hook, CASES[c].op, basis) == c);
                /* each alone, then all at once, then each alone again: dials move */
                for (int round = 0; round < 2 * N_CASES + 1; round++) {
                    for (int c = 0; c < N_CASES; c++) {
                        const bool on = round == N_CASES || round % (N_CASES + 1) == c;
                        CHECK(steer_dial(hook, c, on ? CASES[c].dial : NULL) == STEER_OK);
                    }
                    for (int k = 0; k < ROWS * D; k++) (&was[0][0])[k] = 3 * noise();
                    memcpy(expected, was, sizeof was);
                    memcpy(rows, was, sizeof was);
                    for (int64_t row = 0; row < n; row++) {
                        for (int c = 0; c < N_CASES; c++) {
                            const bool on = round == N_CASES || round % (N_CASES + 1) == c;
                            if (on) expected_row(expected[row], CASES[c].op, CASES[c].dial, basis[2], SCALE[2]);
                        }
                    }
                    struct ggml_tensor t = tensor("attn_norm-1", in_far ? &far : &host, &rows[0][0], n);
                    CHECK(pass(hook, &t));
                    float worst = 0;
                    for (int k = 0; k < ROWS * D; k++) {
                        worst = fmaxf(worst, fabsf((&rows[0][0])[k] - (&expected[0][0])[k]));
                    }
                    CHECK(worst < 1e-5f);
                    CHECK((memcmp(rows, was, sizeof was) != 0) == (n > 0));
                }
                CHECK(reached[2] == 2 * N_CASES + 1 && turned[2] == n * (2 * N_CASES + 1));
                CHECK(reached[0] == 0 && reached[1] == 0);
                steer_free(hook);
                CHECK(fake_alive == 0);
            }
        }
    }
}

static void a_device_that_cannot_is_passed_by_unless_it_is_forced(void) {
    float basis[SITES][2][D], rows[ROWS][D], was[ROWS][D];
    int32_t site;
    fill_planes(basis);
    for (int k = 0; k < ROWS * D; k++) (&was[0][0])[k] = noise();
    struct ggml_tensor t = tensor("ffn_norm-0", &far, &rows[0][0], ROWS);
    for (int with_device = 0; with_device < 2; with_device++) {
        fake_lacking = '@';
        steer_hook *hook = new_hook(with_device);
        steer_dial(hook, add(hook, STEER_TURN_BY, basis), (const double[]){-2, 0, 0});
        memcpy(rows, was, sizeof was);
        CHECK(pass(hook, &t) && memcmp(rows, was, sizeof was) != 0); /* copied */
        CHECK(steer_set_path(hook, STEER_PATH_DEVICE) == STEER_OK);
        memcpy(rows, was, sizeof was);
        CHECK(!pass(hook, &t) && memcmp(rows, was, sizeof was) == 0);
        CHECK(steer_take_status(hook, &site) == STEER_NO_DEVICE && site == 1);
        fake_lacking = 0;
        if (with_device) {
            CHECK(pass(hook, &t));
            fake_failure = -1;
            CHECK(!pass(hook, &t) && steer_take_status(hook, &site) == STEER_DEVICE_FAILED);
            CHECK(steer_set_path(hook, STEER_PATH_AUTO) == STEER_OK);
            CHECK(!pass(hook, &t) && steer_take_status(hook, &site) == STEER_DEVICE_FAILED);
            fake_failure = 0;
        }
        steer_free(hook);
    }
    CHECK(fake_alive == 0);
}

static void a_tensor_that_is_wrong_stops_the_decode_with_its_status(void) {
    float basis[SITES][2][D], rows[ROWS][D] = {{0}};
    int32_t site;
    fill_planes(basis);
    steer_hook *hook = new_hook(false);
    steer_dial(hook, add(hook, STEER_ABLATE, basis), (const double[]){0, 0, 0});
    const struct ggml_tensor good = tensor("attn_norm-1", &host, &rows[0][0], ROWS);
    for (int32_t status = STEER_BAD_TYPE; status <= STEER_NO_BUFFER; status++) {
        struct ggml_tensor bad = good, other = good;
        if (status == STEER_BAD_TYPE) bad.type = 1;
        if (status == STEER_BAD_LAYOUT) bad.contiguous = false;
        if (status == STEER_BAD_WIDTH) bad.ne[0] = D + 1;
        if (status == STEER_NO_BUFFER) bad.buffer = NULL;
        CHECK(steer_eval(&bad, true, hook) && !steer_eval(&bad, false, hook));
        CHECK(!steer_eval(&other, true, hook)); /* the rest of the decode is let through */
        CHECK(steer_take_status(hook, &site) == status && site == 2);
        CHECK(steer_take_status(hook, &site) == STEER_OK);
        CHECK(pass(hook, &other));
    }
    struct ggml_tensor unreachable = tensor("attn_norm-1", &far, &rows[0][0], ROWS);
    CHECK(steer_set_path(hook, STEER_PATH_HOST) == STEER_OK);
    CHECK(!pass(hook, &unreachable) && steer_take_status(hook, &site) == STEER_NO_BUFFER);
    steer_free(hook);
}

static void bad_arguments_are_refused_and_leave_the_hook_as_it_was(void) {
    float basis[SITES][2][D], rows[D];
    int32_t id, site;
    fill_planes(basis);
    const float *planes = &basis[0][0][0];
    steer_hook *hook = new_hook(false), *none = hook;
    struct steer_ggml without = fake_ggml;
    without.get_data = NULL;
    struct steer_device_ggml half = fake_device_ggml;
    half.mul_mat = NULL;
    struct steer_ggml with_half = fake_ggml;
    with_half.device = &half;
    const char *const long_kind[SITES] = {"a_kind_of_norm_with_a_name", "b", "c"};
    const char *const no_kind[SITES] = {"", "b", "c"};
    const int32_t below[SITES] = {0, -1, 0};
#define NEW(ggml, d, n, kind, layer) steer_new(ggml, d, n, kind, layer, reached, turned, &none)
    CHECK(NEW(NULL, D, SITES, KINDS, LAYERS) == STEER_BAD_ARGUMENT && none == NULL);
    CHECK(NEW(&without, D, SITES, KINDS, LAYERS) == STEER_BAD_ARGUMENT);
    CHECK(NEW(&with_half, D, SITES, KINDS, LAYERS) == STEER_BAD_ARGUMENT);
    CHECK(NEW(&fake_ggml, 0, SITES, KINDS, LAYERS) == STEER_BAD_ARGUMENT);
    CHECK(NEW(&fake_ggml, INT64_MAX, SITES, KINDS, LAYERS) == STEER_BAD_ARGUMENT);
    CHECK(NEW(&fake_ggml, D, 0, KINDS, LAYERS) == STEER_BAD_ARGUMENT);
    CHECK(NEW(&fake_ggml, D, SITES, NULL, LAYERS) == STEER_BAD_ARGUMENT);
    CHECK(NEW(&fake_ggml, D, SITES, long_kind, LAYERS) == STEER_BAD_ARGUMENT);
    CHECK(NEW(&fake_ggml, D, SITES, no_kind, LAYERS) == STEER_BAD_ARGUMENT);
    CHECK(NEW(&fake_ggml, D, SITES, KINDS, below) == STEER_BAD_ARGUMENT && none == NULL);
#define ADD(hook, op, n, site, plane, scale, count, basis) \
    CHECK(steer_add(hook, op, n, site, plane, scale, count, basis, &id) == STEER_BAD_ARGUMENT)
    const int32_t outside[SITES] = {0, 1, SITES}, twice[SITES] = {0, 1, 1};
    ADD(NULL, STEER_TURN_BY, SITES, ALL, PLANES, SCALE, SITES, planes);
    ADD(hook, STEER_ADD + 1, SITES, ALL, PLANES, SCALE, SITES, planes);
    ADD(hook, -1, SITES, ALL, PLANES, SCALE, SITES, planes);
    ADD(hook, STEER_TURN_BY, 0, ALL, PLANES, SCALE, SITES, planes);
    ADD(hook, STEER_TURN_BY, SITES, outside, PLANES, SCALE, SITES, planes);
    ADD(hook, STEER_TURN_BY, SITES, twice, PLANES, SCALE, SITES, planes);
    ADD(hook, STEER_TURN_BY, SITES, below, PLANES, SCALE, SITES, planes);
    ADD(hook, STEER_TURN_BY, SITES, ALL, PLANES, SCALE, SITES - 1, planes); /* a plane is missing */
    ADD(hook, STEER_TURN_BY, SITES, ALL, below, SCALE, SITES, planes);
    ADD(hook, STEER_TURN_BY, SITES, ALL, PLANES, SCALE, INT32_MAX, planes);
    ADD(hook, STEER_TURN_BY, SITES, ALL, PLANES, SCALE, SITES, NULL);
    ADD(hook, STEER_ADD, SITES, ALL, PLANES, NULL, SITES, planes);
    const float bad_scale[SITES] = {1, INFINITY, 1};
    ADD(hook, STEER_ADD, SITES, ALL, PLANES, bad_scale, SITES, planes);
    basis[2][1][D - 1] = NAN;
    ADD(hook, STEER_TURN_BY, SITES, ALL, PLANES, SCALE, SITES, planes);
    basis[2][1][D - 1] = 0;
    CHECK(steer_dial(hook, 0, (const double[]){0, 0, 0}) == STEER_BAD_ARGUMENT); /* none was added */

    CHECK(add(hook, STEER_TURN_BY, basis) == 0);
    CHECK(steer_dial(hook, 0, (const double[]){NAN, 0, 0}) == STEER_BAD_ARGUMENT);
    CHECK(steer_dial(hook, 0, (const double[]){0, INFINITY, 0}) == STEER_BAD_ARGUMENT);
    CHECK(steer_dial(hook, 0, (const double[]){1e300, 0, 0}) == STEER_BAD_ARGUMENT);
    CHECK(steer_dial(hook, 0, (const double[]){0, 0, NAN}) == STEER_BAD_ARGUMENT);
    CHECK(steer_dial(hook, 1, NULL) == STEER_BAD_ARGUMENT && steer_dial(hook, -1, NULL) == STEER_BAD_ARGUMENT);
    CHECK(steer_set_path(hook, STEER_PATH_STOP + 1) == STEER_BAD_ARGUMENT && steer_set_path(hook, -1));
    CHECK(steer_rows(hook, SITES, rows, 1) == STEER_BAD_ARGUMENT);
    CHECK(steer_rows(hook, 0, NULL, 1) == STEER_BAD_ARGUMENT && steer_rows(hook, 0, rows, -1) == STEER_BAD_ARGUMENT);
    CHECK(steer_rows(hook, 0, NULL, 0) == STEER_OK);
    CHECK(steer_take_status(NULL, &site) == STEER_BAD_ARGUMENT && steer_take_status(hook, NULL) == STEER_BAD_ARGUMENT);
    CHECK(steer_set_record(NULL, NULL) == STEER_BAD_ARGUMENT);
    CHECK(steer_eval(NULL, true, hook) == false && steer_eval(NULL, true, NULL) == false);
    struct ggml_tensor t = tensor("attn_norm-1", &host, rows, 1);
    CHECK(!steer_eval(&t, true, hook)); /* nothing of all that has turned anything on */
    steer_free(hook);
    steer_free(NULL);
}

static void nodes_are_known_by_address_and_name(void) {
    float basis[SITES][2][D], rows[D] = {0};
    enum { MANY = 100000 };
    fill_planes(basis);
    steer_hook *hook = new_hook(false);
    const int32_t id = add(hook, STEER_TURN_BY, basis);
    struct ggml_tensor t = tensor("attn_norm-1", &host, rows, 1);
    CHECK(!steer_eval(&t, true, hook) && steer_names(hook, NULL, 0) == 1); /* off: nothing is looked up */
    steer_dial(hook, id, (const double[]){0, 1, 0});
    static const struct {
        const char *name;
        bool asked;
    } NAMES[] = {
        {"attn_norm-1", true},  {"attn_norm-2", false}, {"attn_norm-", false},     {"attn_norm", true},
        {"attn_norm-1x", false}, {"norm", false},       {"ffn_norm", false},       {"ffn_norm-0", true},
        {"ffn_norm", true},     {"", false},            {"-1", false},             {"attn_norm-99999999999", false},
        {"attn_norm-1", true},  {"a name that is longer than the table's column-1", false},
    };
    for (size_t i = 0; i < sizeof NAMES / sizeof *NAMES; i++) { /* one address, as where a graph is built again */
        memset(t.name, 'x', sizeof t.name - 1);
        memcpy(t.name, NAMES[i].name, strlen(NAMES[i].name) + 1);
        for (int twice = 0; twice < 2; twice++) CHECK(steer_eval(&t, true, hook) == NAMES[i].asked);
    }
    char names[64];
    const size_t size = steer_names(hook, names, sizeof names);
    CHECK(size <= sizeof names && strcmp(names, "a name that is longer t\n") == 0);
    CHECK(steer_names(hook, names, 3) == size && steer_names(NULL, NULL, 0) == 1);

    struct ggml_tensor *many = calloc(MANY, sizeof *many); /* graphs long gone do not fill the memory */
    for (int i = 0; many && i < MANY; i++) {
        many[i] = tensor(i % 1000 ? "Kcur-0" : "ffn_norm-0", &host, rows, 1);
        CHECK(steer_eval(&many[i], true, hook) == (i % 1000 == 0));
    }
    free(many);
    steer_free(hook);
}

static void the_recorder_sums_the_last_row_before_it_is_turned(void) {
    float basis[SITES][2][D], rows[ROWS][D], last[D];
    fill_planes(basis);
    for (int far_off = 0; far_off < 2; far_off++) {
        double sum[SITES * D] = {0}, sum_unit[SITES * D] = {0}, sum_norm[SITES] = {0}, square = 0, unit = 0;
        int64_t count[SITES] = {0};
        float latest[SITES * D] = {0};
        steer_hook *hook = new_hook(true);
        steer_dial(hook, add(hook, STEER_TURN_BY, basis), (const double[]){-2, 0, 0});
        const struct steer_record to = {sum, sum_unit, sum_norm, count, latest, 1};
        CHECK(steer_set_record(hook, &to) == STEER_OK);
        for (int k = 0; k < ROWS * D; k++) (&rows[0][0])[k] = noise();
        memcpy(last, rows[ROWS - 1], sizeof last);
        struct ggml_tensor t = tensor("ffn_norm-0", far_off ? &far : &host, &rows[0][0], ROWS);
        CHECK(pass(hook, &t) && count[1] == 1 && count[0] == 0);
        for (int i = 0; i < D; i++) {
            square += (double)last[i] * (double)last[i];
            unit += sum_unit[D + i] * sum_unit[D + i];
            CHECK(sum[D + i] == (double)last[i] && latest[D + i] == last[i]);
        }
        CHECK(fabs(sum_norm[1] - sqrt(square)) < 1e-9 && fabs(unit - 1) < 1e-9);
        CHECK(memcmp(last, rows[ROWS - 1], sizeof last) != 0);
        const struct steer_record nothing = {.last = 1};
        CHECK(steer_set_record(hook, &nothing) == STEER_OK && pass(hook, &t));
        CHECK(steer_set_record(hook, NULL) == STEER_OK && steer_dial(hook, 0, NULL) == STEER_OK);
        CHECK(!steer_eval(&t, true, hook) && count[1] == 1);
        steer_free(hook);
    }
    CHECK(fake_alive == 0);
}

static void the_recorder_takes_as_many_last_rows_as_it_is_asked_for(void) {
    float basis[SITES][2][D], rows[ROWS][D], latest[SITES][ROWS + 1][D];
    fill_planes(basis);
    for (int far_off = 0; far_off < 2; far_off++) {
        for (int64_t asked = 1; asked <= ROWS + 1; asked++) { /* the last time more than there are */
            const int64_t expected = asked < ROWS ? asked : ROWS;
            double sum[SITES * D] = {0};
            int64_t count[SITES] = {0};
            steer_hook *hook = new_hook(true);
            const struct steer_record to = {.sum = sum, .count = count, .rows = &latest[0][0][0], .last = asked};
            CHECK(steer_set_record(hook, &to) == STEER_OK);
            for (int k = 0; k < ROWS * D; k++) (&rows[0][0])[k] = noise();
            struct ggml_tensor t = tensor("ffn_norm-0", far_off ? &far : &host, &rows[0][0], ROWS);
            CHECK(pass(hook, &t) && count[1] == expected && count[0] == 0);
            const float *found = &latest[0][0][0] + asked * D; /* of site 1 */
            CHECK(memcmp(found, rows[ROWS - expected], (size_t)(expected * D) * sizeof(float)) == 0);
            for (int i = 0; i < D; i++) {
                double total = 0;
                for (int64_t k = ROWS - expected; k < ROWS; k++) total += (double)rows[k][i];
                CHECK(fabs(sum[D + i] - total) < 1e-12);
            }
            const struct steer_record none_asked = {.last = 0};
            CHECK(steer_set_record(hook, &none_asked) == STEER_BAD_ARGUMENT);
            steer_free(hook);
        }
    }
}

static void readings_are_of_every_row_before_it_is_turned(void) {
    float basis[SITES][2][D], rows[ROWS][D], was[ROWS][D], read[2][8];
    fill_planes(basis);
    for (int far_off = 0; far_off < 2; far_off++) {
        for (int on = 0; on < 2; on++) {
            steer_hook *hook = new_hook(true);
            const int32_t id = add(hook, STEER_TURN_BY, basis);
            struct steer_reading readings[2] = {{1, basis[0][0], 2, -0.5, read[0], 8, 1}, {1, basis[1][1], 1, 0, read[1], 3, 0}};
            if (on) CHECK(steer_dial(hook, id, (const double[]){-2, 0, 0}) == STEER_OK);
            CHECK(steer_set_readings(hook, 2, readings) == STEER_OK);
            for (int i = 0; i < 16; i++) (&read[0][0])[i] = 7;
            for (int k = 0; k < ROWS * D; k++) (&was[0][0])[k] = noise();
            memcpy(rows, was, sizeof was);
            struct ggml_tensor t = tensor("ffn_norm-0", far_off ? &far : &host, &rows[0][0], ROWS);
            struct ggml_tensor elsewhere = tensor("attn_norm-0", &host, &rows[0][0], 0);
            CHECK(steer_eval(&t, true, hook) && steer_eval(&t, false, hook));
            CHECK(steer_eval(&elsewhere, true, hook) == (on == 1));
            CHECK((memcmp(rows, was, sizeof was) != 0) == (on == 1) && turned[1] == (on ? ROWS : 0));
            CHECK(readings[0].at == 1 + ROWS && readings[1].at == ROWS); /* counted, though not written */
            for (int row = 0; row < ROWS; row++) {
                double p = 0, q = 0;
                for (int i = 0; i < D; i++) p += was[row][i] * basis[0][0][i], q += was[row][i] * basis[1][1][i];
                CHECK(fabs(read[0][1 + row] - (2 * p - 0.5)) < 1e-5);
                CHECK(row >= 3 || fabs(read[1][row] - q) < 1e-5);
            }
            CHECK(read[0][0] == 7 && read[0][1 + ROWS] == 7 && read[1][3] == 7);
            readings[0].at = INT64_MAX;
            CHECK(pass(hook, &t) && readings[0].at == INT64_MAX);
            CHECK(steer_set_readings(hook, 0, NULL) == STEER_OK && steer_eval(&t, true, hook) == (on == 1));
            CHECK(readings[1].at == 2 * ROWS);
            steer_free(hook);
        }
    }
    CHECK(fake_alive == 0);
    steer_hook *hook = new_hook(false);
    const struct steer_reading good = {2, basis[0][0], 1, 0, read[0], 8, 0};
    for (int wrong = 0; wrong < 8; wrong++) {
        struct steer_reading bad = good;
        const float axis[D] = {[D - 1] = NAN};
        switch (wrong) {
        case 0: bad.site = SITES; break;
        case 1: bad.site = -1; break;
        case 2: bad.axis = NULL; break;
        case 3: bad.axis = axis; break;
        case 4: bad.gain = INFINITY; break;
        case 5: bad.offset = NAN; break;
        case 6: bad.to = NULL; break;
        case 7: bad.at = -1; break;
        }
        CHECK(steer_set_readings(hook, 1, &bad) == STEER_BAD_ARGUMENT);
    }
    CHECK(steer_set_readings(hook, 1, NULL) == STEER_BAD_ARGUMENT);
    CHECK(steer_set_readings(hook, -1, NULL) == STEER_BAD_ARGUMENT && steer_set_readings(NULL, 0, NULL));
    struct ggml_tensor t = tensor("attn_norm-1", &host, &rows[0][0], ROWS);
    CHECK(!steer_eval(&t, true, hook)); /* none of those was taken */
    steer_free(hook);
}

static steer_hook *new_graph_hook(int32_t path) {
    struct steer_ggml ggml = fake_ggml;
    ggml.device = &fake_device_ggml;
    ggml.graph = &fake_graph_ggml;
    steer_hook *hook = NULL;
    memset(reached, 0, sizeof reached);
    memset(turned, 0, sizeof turned);
    CHECK(steer_new(&ggml, D, SITES, KINDS, LAYERS, reached, turned, &hook) == STEER_OK);
    CHECK(steer_set_path(hook, path) == STEER_OK);
    return hook;
}

/* What ggml does with a node on so many threads, one after the other. */
static void compute(struct ggml_tensor *t, int n_threads) {
    const struct ggml_tensor *a = t->src[0], *b = t->src[1];
    if (t->op == 'c') {
        void *user_data;
        memcpy(&user_data, t->params + fake_graph_ggml.user_data_offset, sizeof user_data);
        for (int i = 0; i < n_threads; i++) steer_in_graph(t, i, n_threads, user_data);
        return;
    }
    for (int64_t i = 0; i < t->ne[0] * t->ne[1]; i++) {
        const float y = b->data[i % (b->ne[0] * b->ne[1])];
        t->data[i] = t->op == '*' ? a->data[i] * y : a->data[i] + y;
    }
}

static void a_product_or_a_sum_is_turned_by_the_node_that_computes_it(void) {
    float basis[SITES][2][D], x[ROWS][D], y[ROWS][D], inside[ROWS][D], after[ROWS][D], plain[ROWS][D];
    fill_planes(basis);
    for (int k = 0; k < ROWS * D; k++) (&x[0][0])[k] = 3 * noise(), (&y[0][0])[k] = noise();
    for (int form = 0; form < 2 * 2 * 2 * 3; form++) {
        const int32_t op = form % 2 ? '*' : '+';
        const int64_t n = form / 2 % 2 ? ROWS : 1;
        const bool one_row = form / 4 % 2, in_place = form / 8 == 2;
        struct ggml_tensor a = tensor("a", &host, &x[0][0], n), b = tensor("b", &host, &y[0][0], one_row ? 1 : n);
        struct ggml_tensor t = tensor("attn_norm-1", &host, &after[0][0], n);
        t.op = op, t.src[0] = &a, t.src[1] = &b;

        steer_hook *host_hook = new_graph_hook(STEER_PATH_HOST);
        for (int c = 0; c < N_CASES; c++) CHECK(steer_dial(host_hook, add(host_hook, CASES[c].op, basis), CASES[c].dial) == STEER_OK);
        compute(&t, 1);
        memcpy(plain, after, sizeof plain);
        CHECK(pass(host_hook, &t) && t.op == op && memcmp(plain, after, sizeof plain) != 0);
        steer_free(host_hook);

        steer_hook *hook = new_graph_hook(form / 8 ? STEER_PATH_GRAPH : STEER_PATH_AUTO);
        for (int c = 0; c < N_CASES; c++) CHECK(steer_dial(hook, add(hook, CASES[c].op, basis), CASES[c].dial) == STEER_OK);
        memcpy(inside, x, sizeof x);
        if (in_place) a.data = &inside[0][0];
        t.data = &inside[0][0];
        for (int token = 0; token < 3; token++) { /* the graph is kept, or made anew */
            if (token == 2) t.op = op, memset(t.params, 0, sizeof t.params);
            memcpy(inside, x, sizeof x);
            CHECK(!steer_eval(&t, true, hook) && t.op == 'c');
            compute(&t, 3);
            CHECK(memcmp(inside, after, (size_t)n * sizeof *inside) == 0);
        }
        CHECK(reached[2] == 3 && turned[2] == 3 * n);

        float latest[SITES][D]; /* while recording it is turned afterwards */
        const struct steer_record record = {.rows = &latest[0][0], .last = 1};
        memcpy(inside, x, sizeof x);
        CHECK(steer_set_record(hook, &record) == STEER_OK && steer_eval(&t, true, hook) && t.op == op);
        compute(&t, 1);
        CHECK(steer_eval(&t, false, hook) && memcmp(inside, after, (size_t)n * sizeof *inside) == 0);
        CHECK(steer_set_record(hook, NULL) == STEER_OK && !steer_eval(&t, true, hook) && t.op == 'c');

        float read[ROWS]; /* and where it is read, also where the graph is forced */
        struct steer_reading reading = {2, basis[0][0], 1, 0, read, ROWS, 0};
        memcpy(inside, x, sizeof x);
        CHECK(steer_set_readings(hook, 1, &reading) == STEER_OK && steer_eval(&t, true, hook) && t.op == op);
        compute(&t, 1);
        CHECK(steer_eval(&t, false, hook) && memcmp(inside, after, (size_t)n * sizeof *inside) == 0 && reading.at == n);
        CHECK(steer_set_readings(hook, 0, NULL) == STEER_OK && !steer_eval(&t, true, hook) && t.op == 'c');
        for (int c = 0; c < N_CASES; c++) CHECK(steer_dial(hook, c, NULL) == STEER_OK);
        CHECK(!steer_eval(&t, true, hook) && t.op == op); /* idle: as llama.cpp made it */
        for (size_t i = 0; i < sizeof t.params; i++) CHECK(t.params[i] == 0);
        steer_free(hook);
    }
}

static void what_cannot_be_turned_inside_the_graph_is_turned_afterwards(void) {
    float basis[SITES][2][D], x[ROWS][D], y[ROWS][D], z[ROWS][D];
    fill_planes(basis);
    for (int wrong = 0; wrong < 12; wrong++) {
        struct fake_buffer other = {false};
        struct ggml_tensor a = tensor("a", &host, &x[0][0], ROWS), b = tensor("b", &host, &y[0][0], ROWS);
        struct ggml_tensor t = tensor("attn_norm-1", &host, &z[0][0], ROWS);
        for (int k = 0; k < ROWS * D; k++) (&x[0][0])[k] = noise(), (&y[0][0])[k] = noise(), (&z[0][0])[k] = 0;
        t.op = '*', t.src[0] = &a, t.src[1] = &b;
        switch (wrong) {
        case 0: t.op = 's'; break;
        case 1: t.op = 'c'; break; /* a custom operator of llama.cpp's own */
        case 2: t.params[9] = 1; break;
        case 3: t.src[1] = NULL; break;
        case 4: b.type = F32 + 1; break;
        case 5: a.contiguous = false; break;
        case 6: b.ne[1] = 2; break;
        case 7: a.data = NULL; break;
        case 8: t.buffer = &other; break;
        case 9: t.src[0] = NULL; break;
        case 10: b.ne[0] = 1, b.ne[1] = D; break; /* as many elements as a row */
        case 11: b.ne[0] = ROWS, b.ne[1] = D; break;
        }
        const struct ggml_tensor before = t;
        for (int forced = 0; forced < 2; forced++) {
            steer_hook *hook = new_graph_hook(forced ? STEER_PATH_GRAPH : STEER_PATH_AUTO);
            CHECK(steer_dial(hook, add(hook, STEER_ADD, basis), (const double[]){1, 0, 0}) == STEER_OK);
            CHECK(steer_eval(&t, true, hook) && memcmp(&before, &t, sizeof t) == 0);
            int32_t site = -1;
            CHECK(steer_eval(&t, false, hook) == !forced);
            CHECK(steer_take_status(hook, &site) == (forced ? STEER_NO_GRAPH : STEER_OK));
            CHECK(z[0][0] != 0 && turned[2] == (forced ? 0 : ROWS));
            steer_free(hook);
        }
    }
    struct steer_graph_ggml bad = fake_graph_ggml;
    struct steer_ggml ggml = fake_ggml;
    steer_hook *hook = NULL;
    ggml.graph = &bad; /* without a device's functions */
    CHECK(steer_new(&ggml, D, SITES, KINDS, LAYERS, reached, turned, &hook) == STEER_BAD_ARGUMENT);
    ggml.device = &fake_device_ggml;
    bad.user_data_offset = sizeof bad.custom_params - 7;
    CHECK(steer_new(&ggml, D, SITES, KINDS, LAYERS, reached, turned, &hook) == STEER_BAD_ARGUMENT && hook == NULL);
}

static void the_likeliest_token_once_charges_are_made(void) {
    enum { VOCABULARY = 3000 };
    static float logits[VOCABULARY], before[VOCABULARY];
    const int32_t said[] = {7, 2900, 7, 11};
    float kept[4];
    const struct choose_charges charges = {2, 0.5f, 0.25f, 4, said, kept}, none = {1, 0, 0, 0, NULL, NULL};
    for (int i = 0; i < VOCABULARY; i++) logits[i] = -1 - (float)(i % 5);
    logits[7] = 9, logits[2900] = 8, logits[11] = -1, logits[2500] = 3.4f, logits[2600] = 3.4f;
    memcpy(before, logits, sizeof logits);
    int32_t token = -1;
    CHECK(choose_likeliest(&none, logits, VOCABULARY, &token) == STEER_OK && token == 7);
    /* 9 / 2 - 2 * 0.5 - 0.25, 8 / 2 - 0.75, -1 * 2 - 0.75: the first of the two of 3.4 is left. */
    CHECK(choose_likeliest(&charges, logits, VOCABULARY, &token) == STEER_OK && token == 2500);
    CHECK(memcmp(before, logits, sizeof logits) == 0);
    CHECK(choose_charge(&charges, logits, VOCABULARY) == STEER_OK);
    CHECK(logits[7] == 3.25f && logits[2900] == 3.25f && logits[11] == -2.75f && logits[12] == before[12]);
    CHECK(choose_restore(&charges, logits, VOCABULARY) == STEER_OK && memcmp(before, logits, sizeof logits) == 0);

    for (int i = 0; i < VOCABULARY; i++) logits[i] = NAN;
    CHECK(choose_likeliest(&none, logits, VOCABULARY, &token) == STEER_OK && token == 0);
    logits[1234] = -5;
    CHECK(choose_likeliest(&none, logits, VOCABULARY, &token) == STEER_OK && token == 1234);

    const int32_t outside[] = {VOCABULARY}, below[] = {-1};
    const struct choose_charges wrong[] = {{1, 0, 0, 1, outside, kept}, {1, 0, 0, 1, below, kept}, {1, 0, 0, -1, said, kept},
                                           {1, 0, 0, 1, NULL, kept},    {1, 0, 0, 1, said, NULL}};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        CHECK(choose_likeliest(&wrong[i], logits, VOCABULARY, &token) == STEER_BAD_ARGUMENT);
        CHECK(choose_charge(&wrong[i], logits, VOCABULARY) == STEER_BAD_ARGUMENT);
        CHECK(choose_restore(&wrong[i], logits, VOCABULARY) == STEER_BAD_ARGUMENT);
    }
    CHECK(choose_likeliest(&none, NULL, VOCABULARY, &token) == STEER_BAD_ARGUMENT);
    CHECK(choose_likeliest(&none, logits, 0, &token) == STEER_BAD_ARGUMENT);
    CHECK(choose_likeliest(&none, logits, VOCABULARY, NULL) == STEER_BAD_ARGUMENT);
    CHECK(choose_likeliest(NULL, logits, VOCABULARY, &token) == STEER_BAD_ARGUMENT);
}

/* A field left out of the table leaves a gap before the next that no alignment explains. */
static void every_field_is_told_where_it_lies(void) {
    const struct steer_field *field = steer_fields();
    int structures = 0, functions = 0;
    for (size_t end = 0; field->structure; field++) {
        if (*field->field == '\0') {
            CHECK(field->size - end < _Alignof(void *));
            CHECK(strcmp(field->structure, field[1].structure ? field[1].structure : "") != 0);
            end = 0;
            structures++;
            continue;
        }
        CHECK(field->offset >= end && field->offset - end < field->size);
        CHECK(field[1].structure && strcmp(field->structure, field[1].structure) == 0);
        end = field->offset + field->size;
        functions += strncmp(field->field, "ggml_", 5) == 0;
    }
    CHECK(structures == 7);
    CHECK(functions == (int)((offsetof(struct steer_device_ggml, host_device) + offsetof(struct steer_ggml, type_offset)) /
                             sizeof(void *)));
}

int main(void) {
    CHECK(steer_abi() == STEER_ABI);
    every_field_is_told_where_it_lies();
    every_operator_on_every_path_is_the_formula();
    a_device_that_cannot_is_passed_by_unless_it_is_forced();
    a_tensor_that_is_wrong_stops_the_decode_with_its_status();
    bad_arguments_are_refused_and_leave_the_hook_as_it_was();
    nodes_are_known_by_address_and_name();
    the_recorder_sums_the_last_row_before_it_is_turned();
    the_recorder_takes_as_many_last_rows_as_it_is_asked_for();
    readings_are_of_every_row_before_it_is_turned();
    a_product_or_a_sum_is_turned_by_the_node_that_computes_it();
    what_cannot_be_turned_inside_the_graph_is_turned_afterwards();
    the_likeliest_token_once_charges_are_made();
    if (failures == 0) puts("steer: all as it should be");
    return failures != 0;
}
