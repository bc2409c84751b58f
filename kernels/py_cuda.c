/* py_cuda.c: the extension leank._cuda. Addresses, sizes and a stream come in as integers; the Python side (leank/cuda.py)
 * has checked the tensors behind them and keeps them alive. It needs no NumPy, no torch and, to be imported, no GPU. */
#include "py_cuda.h"

#include "plan.h"

#include <stdbool.h>
#include <string.h>

typedef struct {
    PyTypeObject *layer_type;
} module_state;

typedef struct {
    PyObject_HEAD lk_cuda_layer layer;
} py_layer;

int py_to_address(PyObject *object, void *out) {
    const void *address = object == Py_None ? NULL : PyLong_AsVoidPtr(object);
    memcpy(out, &address, sizeof address);
    return address || !PyErr_Occurred();
}

/* A tuple of n strides into int64_t [n]; false with an exception. */
static int to_strides(PyObject *object, int64_t *out, Py_ssize_t n) {
    if (!PyTuple_Check(object) || PyTuple_GET_SIZE(object) != n) {
        PyErr_Format(PyExc_TypeError, "expected a tuple of %zd strides, got %R", n, object);
        return 0;
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        out[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(object, i));
        if (out[i] == -1 && PyErr_Occurred()) return 0;
    }
    return 1;
}

/* For "O&": of b and head; of b, head and column. */
static int to_2_strides(PyObject *object, void *out) { return to_strides(object, out, 2); }
static int to_3_strides(PyObject *object, void *out) { return to_strides(object, out, 3); }

static PyObject *raise_status(lk_status status, const char *what, int32_t cuda_error) {
    if (status == LK_E_DEVICE)
        return PyErr_Format(PyExc_RuntimeError, "%s: CUDA error %d: %s", what, (int)cuda_error,
                            lk_cuda_error_text(cuda_error));
    return PyErr_Format(PyExc_ValueError, "%s: %s", what, lk_status_text(status));
}

PyObject *py_done_or_raise(lk_status status, const char *what, int32_t cuda_error) {
    if (status != LK_OK) return raise_status(status, what, cuda_error);
    Py_RETURN_NONE;
}

/* ---------------------------------------------------------------------------------------------------- Layer */

static PyObject *layer_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"page",   "twin",  "table_stride", "state",   "real",     "real_stride",
                            "geom",   "dtype", "n_rows",       "n_heads", "head_dim", "sink",
                            "recent", "slack", "max_tokens",   NULL};
    long long table_stride, real_stride;
    const char *dtype;
    lk_cuda_layer layer = {0};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "$O&O&LO&O&LO&siiiiiii:Layer", names,
                                     py_to_address, &layer.page, py_to_address, &layer.twin,
                                     &table_stride, py_to_address, &layer.state, py_to_address,
                                     &layer.real, &real_stride, py_to_address, &layer.geom, &dtype,
                                     &layer.n_rows, &layer.n_heads, &layer.head_dim, &layer.sink,
                                     &layer.recent, &layer.slack, &layer.max_tokens))
        return NULL;
    if (strcmp(dtype, "bfloat16") != 0 && strcmp(dtype, "float16") != 0)
        return PyErr_Format(PyExc_ValueError, "dtype: expected 'bfloat16' or 'float16', got '%s'",
                            dtype);
    layer.dtype = strcmp(dtype, "bfloat16") == 0 ? LK_BF16 : LK_F16;
    layer.table_stride = table_stride;
    layer.real_stride = real_stride;
    PyObject *self = type->tp_alloc(type, 0);
    if (self) ((py_layer *)self)->layer = layer;
    return self;
}

static void layer_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyType_Slot layer_slots[] = {
    {Py_tp_new, layer_new},
    {Py_tp_dealloc, layer_dealloc},
    {Py_tp_doc, "Addresses and sizes of one layer's cache on a device; it owns nothing."},
    {0, NULL},
};

static PyType_Spec layer_spec = {
    .name = "leank._cuda.Layer",
    .basicsize = sizeof(py_layer),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = layer_slots,
};

static PyTypeObject *layer_type(PyObject *module) {
    return ((module_state *)PyModule_GetState(module))->layer_type;
}

/* ------------------------------------------------------------------------------------------------- launches */

/* LK_E_SHAPE of an attend: what has no room on this GPU. */
static PyObject *raise_no_room(const lk_cuda_layer *layer, int32_t n_q_heads, int32_t smem_bytes) {
    return PyErr_Format(
        PyExc_ValueError,
        "q, cache: %d rows, %d query heads on %d KV heads and head dim %d need more "
        "than the %d bytes of shared memory of a block on this GPU",
        layer->n_rows, n_q_heads, layer->n_heads, layer->head_dim, smem_bytes);
}

/* What a launch that attends takes, of one column or several; then what is its own. */
#define ATTEND_NAMES                                                                               \
    "layer", "q", "q_stride", "k", "k_stride", "v", "v_stride", "o", "lse", "valid", "sinks",      \
        "n_q_heads", "scale", "softcap", "work", "n_blocks", "smem_bytes", "stream"
#define ATTEND_FORMAT "O!$O&O&O&O&O&O&O&O&O&O&iffO&iiO&"
#define ATTEND_TARGETS(module, layer, to_strides, a)                                               \
    layer_type(module), &(layer), py_to_address, &(a).q, to_strides, (a).q_stride, py_to_address,  \
        &(a).k, to_strides, (a).k_stride, py_to_address, &(a).v, to_strides, (a).v_stride,         \
        py_to_address, &(a).o, py_to_address, &(a).lse, py_to_address, &(a).valid, py_to_address,  \
        &(a).sinks, &(a).n_q_heads, &(a).scale, &(a).softcap, py_to_address, &(a).work,            \
        &(a).n_blocks, &(a).smem_bytes, py_to_address, &(a).stream

static PyObject *py_attend(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {ATTEND_NAMES, NULL};
    PyObject *layer;
    int32_t cuda_error = 0;
    lk_cuda_attend_args a = {.cuda_error = &cuda_error};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, ATTEND_FORMAT ":attend", names,
                                     ATTEND_TARGETS(module, layer, to_2_strides, a)))
        return NULL;
    a.layer = &((py_layer *)layer)->layer;
    const lk_status status = lk_cuda_attend(&a);
    if (status == LK_E_SHAPE) return raise_no_room(a.layer, a.n_q_heads, a.smem_bytes);
    return py_done_or_raise(status, "attend", cuda_error);
}

static PyObject *py_span(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {ATTEND_NAMES, "position", "scratch",        "twin_bytes",
                            "n_columns",  "piece",    "columns_before", NULL};
    PyObject *layer;
    int32_t cuda_error = 0;
    long long twin_bytes;
    lk_cuda_span_args a = {.cuda_error = &cuda_error};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, ATTEND_FORMAT "O&O&Liii:span", names,
                                     ATTEND_TARGETS(module, layer, to_3_strides, a), py_to_address,
                                     &a.position, py_to_address, &a.scratch, &twin_bytes,
                                     &a.n_columns, &a.piece, &a.columns_before))
        return NULL;
    a.layer = &((py_layer *)layer)->layer;
    a.twin_bytes = twin_bytes;
    const lk_status status = lk_cuda_span(&a);
    if (status == LK_E_SHAPE) return raise_no_room(a.layer, a.n_q_heads, a.smem_bytes);
    return py_done_or_raise(status, "span", cuda_error);
}

static PyObject *py_span_piece(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"layer", "n_q_heads", "n_columns", "twin_bytes", "smem_bytes", NULL};
    PyObject *layer;
    int n_q_heads, n_columns, smem_bytes;
    long long twin_bytes;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!$iiLi:span_piece", names, layer_type(module),
                                     &layer, &n_q_heads, &n_columns, &twin_bytes, &smem_bytes))
        return NULL;
    const lk_cuda_layer *to = &((py_layer *)layer)->layer;
    int32_t piece;
    size_t scratch_bytes;
    const lk_status status = lk_cuda_span_piece(to, n_q_heads, n_columns, twin_bytes, smem_bytes,
                                                &piece, &scratch_bytes);
    if (status != LK_OK) return py_done_or_raise(status, "span_piece", 0);
    return Py_BuildValue("(in)", piece, (Py_ssize_t)scratch_bytes);
}

static PyObject *py_append(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"layer",          "k",      "k_stride", "v",
                            "v_stride",       "valid",  "position", "n_columns",
                            "columns_before", "stream", NULL};
    PyObject *layer;
    int32_t cuda_error = 0;
    lk_cuda_append_args a = {.cuda_error = &cuda_error};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!$O&O&O&O&O&O&iiO&:append", names,
                                     layer_type(module), &layer, py_to_address, &a.k, to_3_strides,
                                     a.k_stride, py_to_address, &a.v, to_3_strides, a.v_stride,
                                     py_to_address, &a.valid, py_to_address, &a.position,
                                     &a.n_columns, &a.columns_before, py_to_address, &a.stream))
        return NULL;
    a.layer = &((py_layer *)layer)->layer;
    const lk_status status = lk_cuda_append(&a);
    return py_done_or_raise(status, "append", cuda_error);
}

static PyObject *py_crop(PyObject *module, PyObject *args) {
    PyObject *layer;
    int n_columns;
    void *stream;
    if (!PyArg_ParseTuple(args, "O!iO&:crop", layer_type(module), &layer, &n_columns, py_to_address,
                          &stream))
        return NULL;
    int32_t cuda_error = 0;
    const lk_status status =
        lk_cuda_crop(&((py_layer *)layer)->layer, n_columns, stream, &cuda_error);
    return py_done_or_raise(status, "crop", cuda_error);
}

static PyObject *py_step_columns(PyObject *module, PyObject *args) {
    PyObject *layer;
    void *mask, *valid, *misfit, *stream;
    long long mask_b;
    if (!PyArg_ParseTuple(args, "O!O&LO&O&O&:step_columns", layer_type(module), &layer,
                          py_to_address, &mask, &mask_b, py_to_address, &valid, py_to_address,
                          &misfit, py_to_address, &stream))
        return NULL;
    int32_t cuda_error = 0;
    const lk_status status = lk_cuda_step_columns(&((py_layer *)layer)->layer, mask, mask_b, valid,
                                                  misfit, stream, &cuda_error);
    return py_done_or_raise(status, "step_columns", cuda_error);
}

static PyObject *py_gather(PyObject *module, PyObject *args) {
    PyObject *layer;
    int row, n_tokens;
    void *k, *v, *stream;
    if (!PyArg_ParseTuple(args, "O!iiO&O&O&:gather", layer_type(module), &layer, &row, &n_tokens,
                          py_to_address, &k, py_to_address, &v, py_to_address, &stream))
        return NULL;
    int32_t cuda_error = 0;
    const lk_status status =
        lk_cuda_gather(&((py_layer *)layer)->layer, row, n_tokens, k, v, stream, &cuda_error);
    return py_done_or_raise(status, "gather", cuda_error);
}

static PyObject *py_copy_pages(PyObject *module, PyObject *args) {
    PyObject *to, *from;
    int n_pairs;
    long long page_bytes, twin_bytes;
    void *pairs, *stream;
    if (!PyArg_ParseTuple(args, "O!O!O&iLLO&:copy_pages", layer_type(module), &to,
                          layer_type(module), &from, py_to_address, &pairs, &n_pairs, &page_bytes,
                          &twin_bytes, py_to_address, &stream))
        return NULL;
    int32_t cuda_error = 0;
    const lk_status status =
        lk_cuda_copy_pages(&((py_layer *)to)->layer, &((py_layer *)from)->layer, pairs, n_pairs,
                           page_bytes, twin_bytes, stream, &cuda_error);
    return py_done_or_raise(status, "copy_pages", cuda_error);
}

/* -------------------------------------------------------------------------------------------- host functions */

static PyObject *py_geometry(PyObject *module, PyObject *args) {
    (void)module;
    Py_buffer keep;
    int n_heads, head_dim;
    if (!PyArg_ParseTuple(args, "y*ii:geometry", &keep, &n_heads, &head_dim)) return NULL;
    PyObject *geom = NULL, *result = NULL;
    if (n_heads < 1 || head_dim < 1 || keep.len != (Py_ssize_t)n_heads * head_dim) {
        PyErr_Format(PyExc_ValueError, "keep: expected %d * %d bytes, got %zd", n_heads, head_dim,
                     keep.len);
        goto done;
    }
    geom = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)lk_cuda_geom_bytes(n_heads, head_dim));
    if (!geom) goto done;
    size_t page_bytes, twin_bytes;
    const lk_status status =
        lk_cuda_geom(keep.buf, n_heads, head_dim, (int32_t *)(void *)PyBytes_AS_STRING(geom),
                     &page_bytes, &twin_bytes);
    if (status != LK_OK) raise_status(status, "keep", 0);
    else result = Py_BuildValue("Onn", geom, (Py_ssize_t)page_bytes, (Py_ssize_t)twin_bytes);
done:
    PyBuffer_Release(&keep);
    Py_XDECREF(geom);
    return result;
}

static PyObject *py_attend_work_bytes(PyObject *module, PyObject *args) {
    (void)module;
    int head_dim, r, n_blocks;
    if (!PyArg_ParseTuple(args, "iii:attend_work_bytes", &head_dim, &r, &n_blocks)) return NULL;
    return PyLong_FromSize_t(lk_cuda_attend_work_bytes(head_dim, r, n_blocks));
}

/* int32 numbers of a buffer; false with an exception. */
static bool int32_buffer(const Py_buffer *buffer, const char *name, int32_t *n) {
    if (buffer->len % (Py_ssize_t)sizeof(int32_t) == 0 && buffer->len / 4 <= INT32_MAX) {
        *n = (int32_t)(buffer->len / 4);
        return true;
    }
    PyErr_Format(PyExc_ValueError, "%s: expected int32 numbers, got %zd bytes", name, buffer->len);
    return false;
}

static PyObject *parts_list(const int32_t (*parts)[5], int64_t n) {
    PyObject *list = PyList_New(n);
    for (int64_t i = 0; list && i < n; i++) {
        PyObject *part = Py_BuildValue("(iiiii)", parts[i][0], parts[i][1], parts[i][2],
                                       parts[i][3], parts[i][4]);
        if (part) PyList_SET_ITEM(list, i, part); /* steals */
        else Py_CLEAR(list);
    }
    return list;
}

static PyObject *py_plan_parts(PyObject *module, PyObject *args) {
    (void)module;
    Py_buffer end, full_lo, n_kept;
    int head_dim, sink, n_blocks;
    if (!PyArg_ParseTuple(args, "y*y*y*iii:plan_parts", &end, &full_lo, &n_kept, &head_dim, &sink,
                          &n_blocks))
        return NULL;
    PyObject *list = NULL;
    int32_t (*parts)[5] = NULL;
    int32_t n_rows, n_full_lo, n_heads;
    if (!int32_buffer(&end, "end", &n_rows) || !int32_buffer(&full_lo, "full_lo", &n_full_lo) ||
        !int32_buffer(&n_kept, "n_kept", &n_heads))
        goto done;
    if (n_full_lo != n_rows || n_rows < 1 || n_heads < 1 || n_blocks < 1) {
        PyErr_SetString(PyExc_ValueError, "plan_parts: expected one end and full_lo per row");
        goto done;
    }
    const int64_t room = (int64_t)n_rows * n_heads + (int64_t)n_blocks * (LK_PLAN_HALVINGS + 1);
    parts = PyMem_Calloc((size_t)room, sizeof *parts);
    if (!parts) {
        PyErr_NoMemory();
        goto done;
    }
    const int64_t n = lk_cuda_plan_parts(end.buf, full_lo.buf, n_rows, n_kept.buf, n_heads,
                                         head_dim, sink, n_blocks, parts, room);
    list = parts_list((const int32_t (*)[5])parts, n < room ? n : room);
done:
    PyMem_Free(parts);
    PyBuffer_Release(&end);
    PyBuffer_Release(&full_lo);
    PyBuffer_Release(&n_kept);
    return list;
}

static PyObject *py_device_count(PyObject *module, PyObject *unused) {
    (void)module;
    (void)unused;
    return PyLong_FromLong(lk_cuda_device_count());
}

static PyObject *py_device_info(PyObject *module, PyObject *arg) {
    (void)module;
    const long device = PyLong_AsLong(arg);
    if (device == -1 && PyErr_Occurred()) return NULL;
    lk_cuda_device info;
    if (lk_cuda_device_info((int32_t)device, &info) != LK_OK)
        return PyErr_Format(PyExc_ValueError, "device: expected 0 to %d, got %ld",
                            lk_cuda_device_count() - 1, device);
    return Py_BuildValue("{s:(ii),s:i,s:i}", "capability", info.major, info.minor, "n_blocks",
                         info.n_blocks, "smem_bytes", info.smem_bytes);
}

static PyObject *py_built(PyObject *module, PyObject *unused) {
    (void)module;
    (void)unused;
    return PyUnicode_FromString(lk_cuda_built());
}

/* --------------------------------------------------------------------------------------------------- module */

/* clang-format off */
static PyMethodDef methods[] = {
    {"attend", (PyCFunction)(void (*)(void))py_attend, METH_VARARGS | METH_KEYWORDS, "One step: see lk_cuda_attend."},
    {"span", (PyCFunction)(void (*)(void))py_span, METH_VARARGS | METH_KEYWORDS, "Append columns and attend with them: see lk_cuda_span."},
    {"span_piece", (PyCFunction)(void (*)(void))py_span_piece, METH_VARARGS | METH_KEYWORDS, "Columns of a piece, and bytes of scratch: see lk_cuda_span_piece."},
    {"append", (PyCFunction)(void (*)(void))py_append, METH_VARARGS | METH_KEYWORDS, "Append columns: see lk_cuda_append."},
    {"crop", py_crop, METH_VARARGS, "crop(layer, n_columns, stream)"},
    {"step_columns", py_step_columns, METH_VARARGS, "step_columns(layer, mask, mask_b, valid, misfit, stream)"},
    {"gather", py_gather, METH_VARARGS, "gather(layer, row, n_tokens, k, v, stream)"},
    {"copy_pages", py_copy_pages, METH_VARARGS, "copy_pages(to, from, pairs, n_pairs, page_bytes, twin_bytes, stream)"},
    {"geometry", py_geometry, METH_VARARGS, "geometry(keep, n_heads, head_dim) -> (geom, page_bytes, twin_bytes)"},
    {"attend_work_bytes", py_attend_work_bytes, METH_VARARGS, "attend_work_bytes(head_dim, r, n_blocks)"},
    {"plan_parts", py_plan_parts, METH_VARARGS, "plan_parts(end, full_lo, n_kept, head_dim, sink, n_blocks)"},
    {"learn_work_bytes", (PyCFunction)(void (*)(void))py_learn_work_bytes, METH_VARARGS | METH_KEYWORDS, "See lk_cuda_learn_work_bytes."},
    {"learn_forward", (PyCFunction)(void (*)(void))py_learn_forward, METH_VARARGS | METH_KEYWORDS, "See lk_cuda_learn_forward."},
    {"learn_backward", (PyCFunction)(void (*)(void))py_learn_backward, METH_VARARGS | METH_KEYWORDS, "See lk_cuda_learn_backward."},
    {"device_count", py_device_count, METH_NOARGS, "Devices that the driver shows; 0 without a driver."},
    {"device_info", py_device_info, METH_O, "Capability, blocks and shared memory of a device."},
    {"built", py_built, METH_NOARGS, "Architectures that kernels were built for."},
    {NULL, NULL, 0, NULL},
};
/* clang-format on */

/* A tuple of n numbers. */
static int add_ints(PyObject *module, const char *name, const int *numbers, size_t n) {
    PyObject *tuple = PyTuple_New((Py_ssize_t)n);
    for (size_t i = 0; tuple && i < n; i++) {
        PyObject *number = PyLong_FromLong(numbers[i]);
        if (number) PyTuple_SET_ITEM(tuple, (Py_ssize_t)i, number); /* steals */
        else Py_CLEAR(tuple);
    }
    const int added = tuple ? PyModule_AddObjectRef(module, name, tuple) : -1;
    Py_XDECREF(tuple);
    return added;
}

static int module_exec(PyObject *module) {
    module_state *state = PyModule_GetState(module);
    state->layer_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &layer_spec, NULL);
    if (!state->layer_type) return -1;
    if (PyModule_AddIntConstant(module, "MAX_R", LK_CUDA_MAX_R) != 0) return -1;
    if (PyModule_AddIntConstant(module, "MAX_UNITS", LK_CUDA_MAX_UNITS) != 0) return -1;
    if (PyModule_AddIntConstant(module, "STATE_HEADER", LK_STATE_HEADER) != 0) return -1;
    if (PyModule_AddIntConstant(module, "STATE_COLUMNS", LK_STATE_COLUMNS) != 0) return -1;
    if (PyModule_AddIntConstant(module, "STATE_OVERFLOW", LK_STATE_OVERFLOW) != 0) return -1;
    if (PyModule_AddIntConstant(module, "STATE_OPEN", LK_STATE_OPEN) != 0) return -1;
    if (PyModule_AddIntConstant(module, "MOST_PIECE", LK_CUDA_MOST_PIECE) != 0) return -1;
    const int head_dims[] = LK_CUDA_HEAD_DIMS, learn_head_dims[] = LK_CUDA_LEARN_HEAD_DIMS;
    if (add_ints(module, "HEAD_DIMS", head_dims, sizeof head_dims / sizeof *head_dims) != 0)
        return -1;
    if (add_ints(module, "LEARN_HEAD_DIMS", learn_head_dims,
                 sizeof learn_head_dims / sizeof *learn_head_dims) != 0)
        return -1;
    return PyModule_AddObjectRef(module, "Layer", (PyObject *)state->layer_type);
}

static int module_traverse(PyObject *module, visitproc visit, void *arg) {
    module_state *state = PyModule_GetState(module);
    if (state) Py_VISIT(state->layer_type);
    return 0;
}

static int module_clear(PyObject *module) {
    module_state *state = PyModule_GetState(module);
    if (state) Py_CLEAR(state->layer_type);
    return 0;
}

static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, module_exec}, {0, NULL}};

static struct PyModuleDef module_def = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "leank._cuda",
    .m_doc = "CUDA kernels of LeanK; leank.cuda is the interface.",
    .m_size = sizeof(module_state),
    .m_methods = methods,
    .m_slots = module_slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
};

PyMODINIT_FUNC PyInit__cuda(void) { return PyModuleDef_Init(&module_def); }
