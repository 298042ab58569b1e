/* Which node of llama.cpp's graph is which site: told by its name, and remembered by its address. */
#include "steer_parts.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_NODES = 1 << 16 };

static int32_t numberless(int32_t kind) { return -2 - kind; }

static int32_t find_site(const steer_hook *hook, int32_t kind, int32_t layer) {
    for (int32_t i = 0; i < hook->n_sites; i++) {
        if (hook->sites[i].kind == kind && hook->sites[i].layer == layer) return i;
    }
    return NOT_A_SITE;
}

int32_t steer_find_kind(const steer_hook *hook, const char *name, size_t length) {
    for (int32_t k = 0; k < hook->n_kinds; k++) {
        if (strlen(hook->kind[k]) == length && memcmp(hook->kind[k], name, length) == 0) return k;
    }
    return -1;
}

/* "ffn_norm-12" is site (ffn_norm, 12); "ffn_norm" alone is told by order. */
static int32_t resolve(const steer_hook *hook, const char *name) {
    const char *dash = strrchr(name, '-');
    if (dash == NULL) {
        const int32_t kind = steer_find_kind(hook, name, strlen(name));
        return kind < 0 ? NOT_A_SITE : numberless(kind);
    }
    const int32_t kind = steer_find_kind(hook, name, (size_t)(dash - name));
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

/* Parses the name of a node that is new, or another than at this address before. */
static struct node *learn(steer_hook *hook, struct node *node, const struct ggml_tensor *tensor, const char *name) {
    if (node == NULL || node->tensor == NULL) {
        if (2 * (hook->n_nodes + 1) > hook->n_slots) {
            if (!grow(hook)) return NULL;
            node = slot_for(hook->nodes, hook->n_slots, tensor);
        }
        hook->n_nodes++;
    }
    node->tensor = tensor;
    memcpy(node->name, name, NAME);
    node->site = resolve(hook, name);
    return node;
}

int32_t steer_site_of(steer_hook *hook, const struct ggml_tensor *tensor) {
    struct node *node = hook->n_slots ? slot_for(hook->nodes, hook->n_slots, tensor) : NULL;
    const char *name = hook->ggml.get_name(tensor);
    if (node == NULL || node->tensor == NULL || memcmp(node->name, name, NAME) != 0) {
        node = learn(hook, node, tensor, name);
        if (node == NULL) {
            hook->status = STEER_NO_MEMORY;
            return NOT_A_SITE;
        }
    }
    if (node->site == NOT_A_SITE) return NOT_A_SITE;
    if (node->site < 0) return find_site(hook, -2 - node->site, hook->layer);
    hook->layer = hook->sites[node->site].layer;
    return node->site;
}

size_t steer_names(const steer_hook *hook, char *out, size_t size) {
    size_t used = 0;
    if (out != NULL && size > 0) out[0] = '\0';
    for (int32_t i = 0; hook != NULL && i < hook->n_slots; i++) {
        if (hook->nodes[i].tensor == NULL) continue;
        const char *end = memchr(hook->nodes[i].name, '\0', NAME - 1);
        const size_t length = end ? (size_t)(end - hook->nodes[i].name) : NAME - 1;
        if (out != NULL && used + length + 2 <= size) {
            memcpy(out + used, hook->nodes[i].name, length);
            out[used + length] = '\n';
            out[used + length + 1] = '\0';
        }
        used += length + 1;
    }
    return used + 1;
}
