/* libFuzzer target for steer.h: the input is a program of calls on one hook, with arguments out of range, dials and
 * planes that are not finite, memory that runs out, and graph nodes of any name, type, shape and place.
 *
 * Arrays are exactly as long as the header says they must be, so that AddressSanitizer sees a step past their end.
 * Run by `just fuzz-native SECONDS`.
 */
#include <math.h>
#include <stdio.h>

#include "../../native/tests/bare_ggml.h"

enum { MOST_SITES = 12, MOST_ROWS = 5, MOST_WIDTH = 40, TENSORS = 6, MOST_READINGS = 3, MOST_CALLS = 200 };

/* ---- the input ------------------------------------------------------------------------------------------------ */

static const uint8_t *input;
static size_t left;

static uint8_t byte(void) {
    if (left == 0) return 0;
    left--;
    return *input++;
}

static void bytes(void *to, size_t size) {
    for (size_t i = 0; i < size; i++) ((uint8_t *)to)[i] = byte();
}

static int64_t any64(void) {
    int64_t value;
    bytes(&value, sizeof value);
    return value;
}

/* Mostly in 0 … below - 1, now and then anything. */
static int64_t about(int64_t below) {
    const uint8_t choice = byte();
    if (choice < 240) return choice % below;
    if (choice < 246) return below + choice - 243;
    return any64();
}

/* Mostly in 1 … most. */
static int64_t from_one(int64_t most) { return (int64_t)((uint64_t)about(most) + 1); }

static float number(void) {
    static const float odd[] = {0, 1, -1, 0.5f, NAN, INFINITY, -INFINITY, 3e38f, -3e38f, 1e-40f};
    const uint8_t choice = byte();
    if (choice < 10) return odd[choice];
    return ((float)choice - 130) / 64;
}

/* ---- memory that runs out: the library is compiled with these in place of malloc and its kin ------------------ */

static int allocations_left;

void *fuzz_malloc(size_t size) { return allocations_left-- > 0 ? malloc(size) : NULL; }
void *fuzz_calloc(size_t count, size_t size) { return allocations_left-- > 0 ? calloc(count, size) : NULL; }
void *fuzz_realloc(void *old, size_t size) { return allocations_left-- > 0 ? realloc(old, size) : NULL; }

/* ---- the calls ------------------------------------------------------------------------------------------------ */

static const char *const KINDS[] = {"attn_norm", "ffn_norm", "ffn_post_norm", "l_out", "", "a-b", "sixteen_letters_",
                                    "a_kind_that_is_far_too_long_for_it"};

static struct {
    steer_hook *hook;
    int64_t d, reached[MOST_SITES], turned[MOST_SITES];
    int32_t n_sites;
    struct steer_record record;
    struct steer_reading reading[MOST_READINGS];
    struct ggml_tensor tensor[TENSORS];
} it;

static void demand(bool truth, const char *what) {
    if (truth) return;
    fprintf(stderr, "broken promise: %s\n", what);
    abort();
}

static void drop_readings(void) {
    for (int i = 0; i < MOST_READINGS; i++) {
        free((void *)it.reading[i].axis);
        free(it.reading[i].to);
    }
    memset(it.reading, 0, sizeof it.reading);
}

static void close_hook(void) {
    steer_free(it.hook);
    it.hook = NULL;
    free(it.record.sum);
    free(it.record.sum_unit);
    free(it.record.sum_norm);
    free(it.record.count);
    free(it.record.rows);
    memset(&it.record, 0, sizeof it.record);
    drop_readings();
}

static void open_hook(void) {
    close_hook();
    it.d = it.n_sites = 1;
    const char *kind[MOST_SITES];
    int32_t layer[MOST_SITES];
    for (int i = 0; i < MOST_SITES; i++) {
        const uint8_t choice = byte();
        kind[i] = choice < 220 ? KINDS[choice % 3] : choice < 250 ? KINDS[choice % 8] : NULL;
        layer[i] = (int32_t)about(4);
        it.reached[i] = it.turned[i] = 0;
    }
    const int64_t d = from_one(MOST_WIDTH);
    const int32_t n = (int32_t)from_one(MOST_SITES);
    struct steer_ggml ggml = fake_ggml;
    const uint8_t missing = byte();
    if (missing == 1) ggml.get_name = NULL;
    if (missing == 2) ggml.tensor_set = NULL;
    if (n > MOST_SITES && n <= 1 << 20) return; /* the arrays would have to be as long */
    const int32_t status = steer_new(missing == 3 ? NULL : &ggml, d, n, missing == 4 ? NULL : kind,
                                     missing == 5 ? NULL : layer, missing == 6 ? NULL : it.reached,
                                     missing == 7 ? NULL : it.turned, missing == 8 ? NULL : &it.hook);
    demand(missing == 8 || (status == STEER_OK) == (it.hook != NULL), "a hook where the status is good, else none");
    if (it.hook == NULL) return;
    it.d = d;
    it.n_sites = n;
}

static void add(void) {
    const int32_t op = (int32_t)about(4), n = (int32_t)about(MOST_SITES + 1), n_planes = (int32_t)from_one(3);
    if (n > 64 || n_planes > 64) return;
    const size_t count = n > 0 ? (size_t)n : 0, planes = n_planes > 0 ? (size_t)n_planes : 0;
    const size_t size = planes * (op == STEER_TURN_BY || op == STEER_TURN_TO ? 2 : 1) * (size_t)it.d;
    if (size > 1 << 16) return;
    int32_t *site = malloc(count * sizeof *site), *plane = malloc(count * sizeof *plane), id = -7;
    float *scale = malloc(count * sizeof *scale), *basis = malloc(size * sizeof *basis);
    for (size_t i = 0; i < count; i++) {
        site[i] = (int32_t)about(it.n_sites);
        plane[i] = (int32_t)about(n_planes > 0 ? n_planes : 1);
        scale[i] = number();
    }
    for (size_t i = 0; i < size; i++) basis[i] = number();
    const uint8_t missing = byte();
    const int32_t status = steer_add(missing == 1 ? NULL : it.hook, op, n, missing == 2 ? NULL : site,
                                     missing == 3 ? NULL : plane, missing == 4 ? NULL : scale, n_planes,
                                     missing == 5 ? NULL : basis, missing == 6 ? NULL : &id);
    demand(status == STEER_OK || id == -7, "no number where adding failed");
    free(site);
    free(plane);
    free(scale);
    free(basis);
}

static void dial(void) {
    const double xyz[3] = {(double)number(), (double)number(), byte() < 8 ? 1e300 : (double)number()};
    const int32_t status = steer_dial(it.hook, (int32_t)about(3), byte() < 60 ? NULL : xyz);
    demand(status == STEER_OK || status == STEER_BAD_ARGUMENT, "a dial is taken or refused");
}

static void record(void) {
    if (it.hook == NULL || byte() < 60) {
        steer_set_record(it.hook, NULL);
        return;
    }
    const size_t sites = (size_t)it.n_sites, all = sites * (size_t)it.d;
    if (it.record.count == NULL && all <= 1 << 16) {
        it.record = (struct steer_record){calloc(all, sizeof(double)), calloc(all, sizeof(double)),
                                          calloc(sites, sizeof(double)), calloc(sites, sizeof(int64_t)),
                                          calloc(all, sizeof(float))};
    }
    const uint8_t which = byte();
    struct steer_record some = it.record;
    if (which & 1) some.sum = NULL;
    if (which & 2) some.sum_unit = NULL;
    if (which & 4) some.sum_norm = NULL;
    if (which & 8) some.count = NULL;
    if (which & 16) some.rows = NULL;
    steer_set_record(it.hook, &some);
}

static void read_rows(void) {
    if (it.hook == NULL || it.d > 1 << 12) return;
    demand(steer_set_readings(it.hook, 0, NULL) == STEER_OK, "reading can end");
    drop_readings();
    const int32_t n = (int32_t)(byte() % (MOST_READINGS + 1));
    for (int i = 0; i < n; i++) {
        struct steer_reading *r = &it.reading[i];
        const int64_t room = byte() % 16;
        float *axis = byte() < 250 ? malloc((size_t)it.d * sizeof *axis) : NULL;
        for (int64_t k = 0; axis && k < it.d; k++) axis[k] = k < 32 ? number() : 0.5f;
        *r = (struct steer_reading){(int32_t)about(it.n_sites), axis, (double)number(), (double)number(),
                                   byte() < 250 ? malloc((size_t)room * sizeof(float) + 1) : NULL, room, about(16)};
    }
    const int32_t status = steer_set_readings(it.hook, n, byte() < 250 ? it.reading : NULL);
    demand(status == STEER_OK || status == STEER_BAD_ARGUMENT, "readings are taken or refused");
}

/* A node as a graph of llama.cpp might have it, or never has. The address of an earlier one may come again. */
static struct ggml_tensor *node(void) {
    struct ggml_tensor *t = &it.tensor[byte() % TENSORS];
    free(t->data);
    memset(t, 0, sizeof *t);
    const uint8_t named = byte();
    if (named < 200) {
        snprintf(t->name, sizeof t->name, "%s-%d", KINDS[named % 4], byte() % 4);
    } else if (named < 230) {
        snprintf(t->name, sizeof t->name, "%s", KINDS[named % 4]);
    } else {
        bytes(t->name, byte() % (FAKE_NAME - 1));
    }
    t->type = byte() < 240 ? FAKE_F32 : byte();
    t->contiguous = byte() < 240;
    const uint8_t where = byte();
    t->buffer = where < 120 ? &fake_host : where < 240 ? &fake_device : NULL;
    const int64_t d = it.d;
    t->rows = about(MOST_ROWS);
    t->elements = byte() < 240 ? (int64_t)((uint64_t)t->rows * (uint64_t)d) : about(4 * MOST_WIDTH);
    /* A tensor that claims more than 2^20 elements has no data of ours; the library must ask for none of it. */
    t->room = t->elements > 0 && t->elements <= 1 << 20 ? (size_t)t->elements : 0;
    t->data = where == 7 || t->room == 0 ? NULL : malloc(t->room * sizeof(float));
    if (t->data == NULL) t->room = 0;
    for (size_t i = 0; i < t->room; i++) t->data[i] = i < 64 ? number() : 1;
    return t;
}

static void eval(void) {
    if (it.hook == NULL) return;
    struct ggml_tensor *t = node();
    float *before = malloc(t->room * sizeof(float) + 1);
    if (t->room) memcpy(before, t->data, t->room * sizeof(float));
    const uint8_t how = byte();
    const bool asked = how < 16 || steer_eval(t, true, it.hook);
    demand(t->room == 0 || memcmp(before, t->data, t->room * sizeof(float)) == 0, "asking changes nothing");
    if (asked) {
        const bool good = steer_eval(t, false, it.hook);
        demand(good || t->room == 0 || memcmp(before, t->data, t->room * sizeof(float)) == 0,
               "what is refused is not changed");
        int32_t site = -1;
        const int32_t status = good ? STEER_OK : steer_take_status(it.hook, &site);
        demand(good || (status != STEER_OK && site >= 0 && site < it.n_sites), "a refusal has a status and a site");
    }
    free(before);
}

static void rows(void) {
    if (it.hook == NULL || it.d > 1 << 12) return;
    const int64_t n = about(MOST_ROWS), room = n > 0 && n <= 64 ? n * it.d : 0;
    if (n > 64) return;
    float *h = room ? malloc((size_t)room * sizeof *h) : NULL;
    for (int64_t i = 0; i < room; i++) h[i] = i < 32 ? number() : 0.25f;
    steer_rows(it.hook, (int32_t)about(it.n_sites), h, n);
    free(h);
}

static void names(void) {
    const size_t size = byte();
    char *out = malloc(size + 1);
    const size_t needed = steer_names(it.hook, byte() < 40 ? NULL : out, size);
    demand(needed >= 1, "names need their end");
    free(out);
    out = malloc(needed);
    demand(steer_names(it.hook, out, needed) == needed && memchr(out, '\0', needed), "names fit where they said");
    free(out);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    input = data;
    left = size;
    const uint8_t memory = byte();
    allocations_left = memory < 200 ? 1 << 20 : memory - 200;
    open_hook();
    for (int call = 0; call < MOST_CALLS && left > 0; call++) {
        int32_t site;
        switch (byte() % 16) {
        case 0: open_hook(); break;
        case 1: case 2: add(); break;
        case 3: case 4: dial(); break;
        case 5: record(); break;
        case 6: steer_set_path(it.hook, (int32_t)about(3)); break;
        case 7: rows(); break;
        case 8: names(); break;
        case 10: read_rows(); break;
        case 9: steer_take_status(it.hook, byte() < 8 ? NULL : &site); break;
        default: eval(); break;
        }
    }
    for (int i = 0; i < MOST_SITES; i++) demand(it.reached[i] >= 0 && it.turned[i] >= 0, "counters only grow");
    close_hook();
    for (int i = 0; i < TENSORS; i++) {
        free(it.tensor[i].data);
        it.tensor[i].data = NULL;
    }
    return 0;
}
