/* How the structures lie that the caller fills. A field left out here shows by the next one's offset, or by the size. */
#include "choose.h"

#define FIELD(structure, field) \
    {#structure, #field, offsetof(struct structure, field), sizeof(((struct structure *)0)->field)},
#define SIZE(structure) {#structure, "", 0, sizeof(struct structure)},

#define FUNCTION(structure, field, name) \
    {#structure, #name, offsetof(struct structure, field), sizeof(((struct structure *)0)->field)},
#define OF_GGML(result, field, name, arguments) FUNCTION(steer_ggml, field, name)
#define OF_DEVICE_GGML(result, field, name, arguments) FUNCTION(steer_device_ggml, field, name)

static const struct steer_field FIELDS[] = {
    STEER_DEVICE_FUNCTIONS(OF_DEVICE_GGML)
    FIELD(steer_device_ggml, host_device)
    FIELD(steer_device_ggml, type_f32)
    SIZE(steer_device_ggml)

    FIELD(steer_graph_ggml, op_offset)
    FIELD(steer_graph_ggml, params_offset)
    FIELD(steer_graph_ggml, source_offset)
    FIELD(steer_graph_ggml, user_data_offset)
    FIELD(steer_graph_ggml, op_mul)
    FIELD(steer_graph_ggml, op_add)
    FIELD(steer_graph_ggml, op_custom)
    FIELD(steer_graph_ggml, custom_params)
    SIZE(steer_graph_ggml)

    STEER_FUNCTIONS(OF_GGML)
    FIELD(steer_ggml, type_offset)
    FIELD(steer_ggml, buffer_offset)
    FIELD(steer_ggml, type_f32)
    FIELD(steer_ggml, device)
    FIELD(steer_ggml, graph)
    SIZE(steer_ggml)

    FIELD(steer_ggml_init, mem_size)
    FIELD(steer_ggml_init, mem_buffer)
    FIELD(steer_ggml_init, no_alloc)
    SIZE(steer_ggml_init)

    FIELD(steer_record, sum)
    FIELD(steer_record, sum_unit)
    FIELD(steer_record, sum_norm)
    FIELD(steer_record, count)
    FIELD(steer_record, rows)
    FIELD(steer_record, last)
    SIZE(steer_record)

    FIELD(steer_reading, site)
    FIELD(steer_reading, axis)
    FIELD(steer_reading, gain)
    FIELD(steer_reading, offset)
    FIELD(steer_reading, to)
    FIELD(steer_reading, room)
    FIELD(steer_reading, at)
    SIZE(steer_reading)

    FIELD(choose_charges, repeat)
    FIELD(choose_charges, frequency)
    FIELD(choose_charges, presence)
    FIELD(choose_charges, n)
    FIELD(choose_charges, said)
    FIELD(choose_charges, kept)
    SIZE(choose_charges)

    {NULL, NULL, 0, 0},
};

const struct steer_field *steer_fields(void) { return FIELDS; }
