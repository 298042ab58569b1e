/* How far a site's rows lie along an axis, before anything is turned there. */
#include "steer_parts.h"

#include <math.h>

int32_t steer_set_readings(steer_hook *hook, int32_t n, struct steer_reading *readings) {
    if (hook == NULL || n < 0 || n > 1 << 20 || (n > 0 && readings == NULL)) return STEER_BAD_ARGUMENT;
    for (int32_t i = 0; i < n; i++) {
        const struct steer_reading *r = &readings[i];
        if (r->site < 0 || r->site >= hook->n_sites || r->axis == NULL || !isfinite(r->gain) || !isfinite(r->offset) ||
            r->to == NULL || r->room < 0 || r->at < 0) {
            return STEER_BAD_ARGUMENT;
        }
        for (int64_t k = 0; k < hook->d; k++) {
            if (!isfinite(r->axis[k])) return STEER_BAD_ARGUMENT;
        }
    }
    for (int32_t i = 0; i < hook->n_sites; i++) hook->sites[i].read = false;
    for (int32_t i = 0; i < n; i++) hook->sites[readings[i].site].read = true;
    hook->readings = n > 0 ? readings : NULL;
    hook->n_readings = n;
    return STEER_OK;
}

void steer_read_rows(steer_hook *hook, int32_t site, const float *rows, int64_t n) {
    for (int32_t i = 0; i < hook->n_readings; i++) {
        struct steer_reading *r = &hook->readings[i];
        if (r->site != site || r->at < 0) continue;
        for (int64_t row = 0; row < n && r->at < INT64_MAX; row++, r->at++) {
            if (r->at >= r->room) continue;
            r->to[r->at] = (float)(r->gain * steer_dot(hook->d, rows + row * hook->d, r->axis) + r->offset);
        }
    }
}
