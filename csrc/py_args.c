/* py_args.c: the checks that every wrapper needs. Nothing here copies an array. */
#include "py_args.h"

#include <limits.h>
#include <string.h>

static const struct {
    const char *name;
    int type_num;
} dtypes[] = {
    [LK_F32] = {"float32", NPY_FLOAT32},
    [LK_BF16] = {"bfloat16", NPY_UINT16}, /* NumPy has no bfloat16: its bits cross as uint16 */
    [LK_F16] = {"float16", NPY_FLOAT16},
};

int py_type_num(lk_dtype dtype) { return dtypes[dtype].type_num; }
const char *py_dtype_name(lk_dtype dtype) { return dtypes[dtype].name; }

bool py_parse_dtype(PyObject *name, lk_dtype *dtype) {
    if (PyUnicode_Check(name)) {
        for (int i = 0; i < 3; i++) {
            if (PyUnicode_CompareWithASCIIString(name, dtypes[i].name) == 0) {
                *dtype = (lk_dtype)i;
                return true;
            }
        }
    }
    PyErr_Format(PyExc_ValueError, "dtype: expected 'float32', 'bfloat16' or 'float16', got %R",
                 name);
    return false;
}

/* "(2, 8, any, 128)", a new reference. */
static PyObject *shape_text(int n_axes, const int64_t *shape) {
    PyObject *text = PyUnicode_FromString("(");
    for (int i = 0; i < n_axes && text; i++) {
        const char *tail = i + 1 < n_axes ? ", " : n_axes == 1 ? "," : "";
        PyObject *more = shape[i] == PY_ANY
                             ? PyUnicode_FromFormat("%Uany%s", text, tail)
                             : PyUnicode_FromFormat("%U%lld%s", text, (long long)shape[i], tail);
        Py_SETREF(text, more);
    }
    if (text) Py_SETREF(text, PyUnicode_FromFormat("%U)", text));
    return text;
}

static void raise_shape(PyArrayObject *array, const char *name, int n_axes, const int64_t *shape) {
    int64_t got[NPY_MAXDIMS];
    for (int i = 0; i < PyArray_NDIM(array); i++) got[i] = PyArray_DIM(array, i);
    PyObject *want_text = shape_text(n_axes, shape);
    PyObject *got_text = shape_text(PyArray_NDIM(array), got);
    if (want_text && got_text)
        PyErr_Format(PyExc_ValueError, "%s: expected %U, got %U", name, want_text, got_text);
    Py_XDECREF(want_text);
    Py_XDECREF(got_text);
}

PyArrayObject *py_check_array(PyObject *object, const char *name, int type_num, int n_axes,
                              const int64_t *shape, bool writable) {
    if (!PyArray_Check(object)) {
        PyErr_Format(PyExc_TypeError, "%s: expected a NumPy array, got %s", name,
                     Py_TYPE(object)->tp_name);
        return NULL;
    }
    PyArrayObject *array = (PyArrayObject *)object;
    if (!PyArray_EquivTypenums(PyArray_TYPE(array), type_num) || !PyArray_ISNOTSWAPPED(array)) {
        PyArray_Descr *want = PyArray_DescrFromType(type_num);
        PyErr_Format(PyExc_TypeError, "%s: expected dtype %S, got %S", name, want,
                     PyArray_DESCR(array));
        Py_XDECREF(want);
        return NULL;
    }
    bool fits = PyArray_NDIM(array) == n_axes;
    for (int i = 0; fits && i < n_axes; i++)
        fits = shape[i] == PY_ANY || shape[i] == PyArray_DIM(array, i);
    if (!fits) {
        raise_shape(array, name, n_axes, shape);
        return NULL;
    }
    const npy_intp elem = PyArray_ITEMSIZE(array);
    bool strides_fit = PyArray_ISALIGNED(array);
    /* Strides of axes with one element or none are never used, and may be anything. */
    for (int i = 0; i < n_axes && PyArray_SIZE(array) > 0; i++) {
        const npy_intp stride = PyArray_STRIDE(array, i);
        if (PyArray_DIM(array, i) > 1)
            strides_fit = strides_fit && stride % elem == 0 && (i + 1 < n_axes || stride == elem);
    }
    if (!strides_fit) {
        PyErr_Format(
            PyExc_ValueError,
            "%s: expected an aligned array whose last axis is contiguous, got strides that are not "
            "(leank never copies silently; pass numpy.ascontiguousarray(%s))",
            name, name);
        return NULL;
    }
    if (writable && !PyArray_ISWRITEABLE(array)) {
        PyErr_Format(PyExc_ValueError, "%s: expected a writable array, got a read-only one", name);
        return NULL;
    }
    return array;
}

void py_elem_strides(PyArrayObject *array, int n_axes, int64_t *stride) {
    for (int i = 0; i < n_axes; i++) stride[i] = PyArray_STRIDE(array, i) / PyArray_ITEMSIZE(array);
}

const void *py_check_contiguous(PyObject *object, const char *name, int type_num, int n_axes,
                                const int64_t *shape) {
    PyArrayObject *array = py_check_array(object, name, type_num, n_axes, shape, false);
    if (!array) return NULL;
    if (!PyArray_IS_C_CONTIGUOUS(array)) {
        PyErr_Format(PyExc_ValueError,
                     "%s: expected a C-contiguous array, got one with other strides", name);
        return NULL;
    }
    return PyArray_DATA(array);
}

int py_parse_integer(PyObject *object, void *integer) {
    py_integer *out = integer;
    if (!PyIndex_Check(object)) {
        PyErr_Format(PyExc_TypeError, "%s: expected an integer, got %s", out->name,
                     Py_TYPE(object)->tp_name);
        return 0;
    }
    PyObject *number = PyNumber_Index(object);
    if (!number) return 0;
    int overflow;
    out->value = PyLong_AsLongLongAndOverflow(number, &overflow);
    if (overflow)
        PyErr_Format(PyExc_ValueError, "%s: expected less than 2**60 in size, got %S", out->name,
                     number);
    Py_DECREF(number);
    return !PyErr_Occurred();
}

bool py_is_missing(const py_integer *integer) {
    if (integer->value != PY_MISSING) return false;
    PyErr_Format(PyExc_TypeError, "missing required keyword argument: '%s'", integer->name);
    return true;
}

bool py_check_least(const py_integer *integer, long long least) {
    if (integer->value >= least && integer->value < INT64_MAX / 8) return true;
    PyErr_Format(PyExc_ValueError, "%s: expected at least %lld and less than 2**60, got %lld",
                 integer->name, least, integer->value);
    return false;
}

bool py_parse_limit(PyObject *object, const char *name, int64_t *out) {
    *out = -1;
    if (object == NULL || object == Py_None) return true;
    py_integer number = {name, 0};
    if (!py_parse_integer(object, &number) || !py_check_least(&number, 1)) return false;
    *out = number.value;
    return true;
}

bool py_check_threads(const py_integer *n_threads) {
    if (n_threads->value >= INT_MIN && n_threads->value <= INT_MAX) return true;
    PyErr_Format(PyExc_ValueError, "n_threads: expected %d to %d, got %lld", INT_MIN, INT_MAX,
                 n_threads->value);
    return false;
}

static bool check_dim(int64_t value, const char *name, const char *what) {
    if (value > 0 && value <= LK_MAX_HEAD_DIM && value % LK_CHANNEL_STEP == 0) return true;
    PyErr_Format(PyExc_ValueError, "%s: expected %s to be a multiple of %d up to %d, got %lld",
                 name, what, LK_CHANNEL_STEP, LK_MAX_HEAD_DIM, (long long)value);
    return false;
}

bool py_parse_config(PyObject *keep, PyObject *dtype, PyObject *v_dim, const py_integer *sink,
                     const py_integer *recent, const py_integer *slack, lk_config *config) {
    const void *data = py_check_contiguous(keep, "keep", NPY_BOOL, 2, (int64_t[]){PY_ANY, PY_ANY});
    if (!data) return false;
    const npy_intp n_heads = PyArray_DIM((PyArrayObject *)keep, 0);
    const npy_intp head_dim = PyArray_DIM((PyArrayObject *)keep, 1);
    if (n_heads < 1 || n_heads > INT16_MAX) {
        PyErr_Format(PyExc_ValueError, "keep: expected 1 to %d heads, got %zd", INT16_MAX, n_heads);
        return false;
    }
    if (!check_dim(head_dim, "keep", "the head dim")) return false;
    if (!py_check_least(sink, 0) || !py_check_least(recent, 1)) return false;
    if (!py_check_least(slack, 0)) return false;
    int64_t value_dim = -1;
    if (!py_parse_limit(v_dim, "v_dim", &value_dim)) return false;
    if (value_dim < 0) value_dim = head_dim;
    if (!check_dim(value_dim, "v_dim", "it")) return false;
    *config = (lk_config){.dtype = LK_F32,
                          .n_heads = (int32_t)n_heads,
                          .head_dim = (int32_t)head_dim,
                          .v_dim = (int32_t)value_dim,
                          .sink = sink->value,
                          .recent = recent->value,
                          .slack = slack->value,
                          .keep = data};
    if (dtype && !py_parse_dtype(dtype, &config->dtype)) return false;
    int64_t bad_head;
    if (lk_mask_check(data, n_heads, head_dim, LK_CHANNEL_STEP, &bad_head) != LK_OK) {
        PyErr_Format(
            PyExc_ValueError,
            "keep: expected each head to keep a multiple of %d channels, head %lld does not",
            LK_CHANNEL_STEP, (long long)bad_head);
        return false;
    }
    return true;
}

bool py_parse_span(py_layer_cache *self, PyObject *k, PyObject *v, PyObject *valid,
                   int64_t n_columns, lk_span *span) {
    const int64_t n_rows = lk_cache_n_rows(self->cache), n_heads = self->config.n_heads;
    const int type_num = py_type_num(self->config.dtype);
    *span = (lk_span){0};
    PyArrayObject *array = py_check_array(
        k, "k", type_num, 4, (int64_t[]){n_rows, n_heads, n_columns, self->config.head_dim}, false);
    if (!array) return false;
    span->n_columns = PyArray_DIM(array, 2);
    span->k = PyArray_DATA(array);
    py_elem_strides(array, 3, span->k_stride);
    array =
        py_check_array(v, "v", type_num, 4,
                       (int64_t[]){n_rows, n_heads, span->n_columns, self->config.v_dim}, false);
    if (!array) return false;
    span->v = PyArray_DATA(array);
    py_elem_strides(array, 3, span->v_stride);
    if (valid == NULL || valid == Py_None) return true;
    span->valid =
        py_check_contiguous(valid, "valid", NPY_BOOL, 2, (int64_t[]){n_rows, span->n_columns});
    return span->valid != NULL;
}

PyObject *py_raise(lk_status status, const char *what) {
    PyObject *type = PyExc_ValueError;
    if (status == LK_E_NOMEM) return PyErr_NoMemory();
    if (status == LK_E_STATE) type = PyExc_RuntimeError;
    PyErr_Format(type, "%s: %s", what, lk_status_text(status));
    return NULL;
}

bool py_claim(py_layer_cache *self) {
    if (!atomic_exchange(&self->busy, true)) return true;
    PyErr_SetString(PyExc_RuntimeError, "cache: in use by another thread");
    return false;
}

void py_unclaim(py_layer_cache *self) { atomic_store(&self->busy, false); }

PyObject *py_memory_dict(const lk_memory *memory) {
    return Py_BuildValue("{s:n,s:n,s:n,s:n,s:L,s:L}", "k_bytes", (Py_ssize_t)memory->k_bytes,
                         "v_bytes", (Py_ssize_t)memory->v_bytes, "total_bytes",
                         (Py_ssize_t)(memory->k_bytes + memory->v_bytes), "slab_bytes",
                         (Py_ssize_t)memory->slab_bytes, "n_pages", (long long)memory->n_pages,
                         "n_twins", (long long)memory->n_twins);
}
