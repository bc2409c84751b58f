/* py_cache.c: leank.LayerCache over lk_cache. Each method: parse, check, drop the GIL, one C call, exception. */
#include "py_args.h"

#include <limits.h>
#include <string.h>

/* ------------------------------------------------------------------------------------------ lifetime */

static void layer_cache_dealloc(PyObject *object) {
    py_layer_cache *self = (py_layer_cache *)object;
    PyTypeObject *type = Py_TYPE(object);
    lk_cache_free(self->cache);
    PyMem_Free(self->keep);
    type->tp_free(object);
    Py_DECREF(type); /* instances of a heap type own a reference to it */
}

static uint8_t *copy_keep(const lk_config *config) {
    const size_t n = (size_t)config->n_heads * (size_t)config->head_dim;
    uint8_t *keep = PyMem_Malloc(n);
    if (!keep) PyErr_NoMemory();
    else memcpy(keep, config->keep, n);
    return keep;
}

/* A new object that takes over `cache` and `keep`; on failure both are freed. */
static PyObject *wrap(PyTypeObject *type, lk_cache *cache, const lk_config *config, uint8_t *keep,
                      int64_t max_tokens) {
    py_layer_cache *self = (py_layer_cache *)type->tp_alloc(type, 0);
    if (!self) {
        PyMem_Free(keep);
        lk_cache_free(cache);
        return NULL;
    }
    self->cache = cache;
    self->config = *config;
    self->config.keep = self->keep = keep;
    self->max_tokens = max_tokens;
    atomic_init(&self->busy, false);
    return (PyObject *)self;
}

static PyObject *layer_cache_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"keep",  "n_rows", "sink",       "recent",   "slack",
                            "dtype", "v_dim",  "max_tokens", "max_call", NULL};
    PyObject *keep, *dtype = NULL, *v_dim = NULL, *max_tokens_arg = NULL;
    py_integer n_rows = {"n_rows", PY_MISSING}, sink = {"sink", PY_MISSING},
               recent = {"recent", PY_MISSING}, slack = {"slack", 64}, max_call = {"max_call", 1};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|$O&O&O&O&OOOO&:LayerCache", names, &keep,
                                     py_parse_integer, &n_rows, py_parse_integer, &sink,
                                     py_parse_integer, &recent, py_parse_integer, &slack, &dtype,
                                     &v_dim, &max_tokens_arg, py_parse_integer, &max_call))
        return NULL;
    if (py_is_missing(&n_rows) || py_is_missing(&sink) || py_is_missing(&recent)) return NULL;
    lk_config config;
    int64_t max_tokens;
    if (!py_parse_config(keep, dtype, v_dim, &sink, &recent, &slack, &config)) return NULL;
    if (!py_parse_limit(max_tokens_arg, "max_tokens", &max_tokens)) return NULL;
    if (n_rows.value < 1 || n_rows.value > INT32_MAX)
        return PyErr_Format(PyExc_ValueError, "n_rows: expected 1 to %d, got %lld", INT32_MAX,
                            n_rows.value);
    if (!py_check_least(&max_call, 1)) return NULL;
    /* Our own copy from here on: the caller's array may change while the GIL is dropped. */
    uint8_t *own_keep = copy_keep(&config);
    if (!own_keep) return NULL;
    config.keep = own_keep;
    lk_cache *cache = NULL;
    lk_status status;
    Py_BEGIN_ALLOW_THREADS
    status = max_tokens < 0 ? lk_cache_create(&config, n_rows.value, &cache)
                            : lk_cache_create_reserved(&config, n_rows.value, max_tokens,
                                                       max_call.value, &cache);
    Py_END_ALLOW_THREADS
    if (status != LK_OK) {
        PyMem_Free(own_keep);
        return py_raise(status, "LayerCache");
    }
    return wrap(type, cache, &config, own_keep, max_tokens);
}

static PyObject *layer_cache_copy(PyObject *object, PyObject *unused) {
    (void)unused;
    py_layer_cache *self = (py_layer_cache *)object;
    lk_cache *copy = NULL;
    lk_status status;
    uint8_t *keep = copy_keep(&self->config);
    if (!keep || !py_claim(self)) {
        PyMem_Free(keep);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    status = lk_cache_copy(self->cache, &copy);
    Py_END_ALLOW_THREADS
    py_unclaim(self);
    if (status != LK_OK) {
        PyMem_Free(keep);
        return py_raise(status, "copy");
    }
    return wrap(Py_TYPE(object), copy, &self->config, keep, self->max_tokens);
}

static PyObject *layer_cache_deepcopy(PyObject *object, PyObject *memo) {
    (void)memo; /* nothing inside refers to Python objects */
    return layer_cache_copy(object, NULL);
}

static PyObject *layer_cache_reduce(PyObject *object, PyObject *unused) {
    (void)unused;
    return PyErr_Format(PyExc_TypeError, "%s cannot be pickled; keep gather() of each row instead",
                        Py_TYPE(object)->tp_name);
}

/* ------------------------------------------------------------------------------------------- changes */

static PyObject *layer_cache_expect_prompt(PyObject *object, PyObject *arg) {
    py_layer_cache *self = (py_layer_cache *)object;
    py_integer n_columns = {"n_columns", 0};
    if (!py_parse_integer(arg, &n_columns) || !py_claim(self)) return NULL;
    const lk_status status = lk_cache_expect_prompt(self->cache, n_columns.value);
    const long long now = lk_cache_n_columns(self->cache);
    py_unclaim(self);
    if (status == LK_E_STATE)
        return PyErr_Format(PyExc_RuntimeError,
                            "expect_prompt: expected an empty cache, got one with %lld columns",
                            now);
    if (status != LK_OK)
        return PyErr_Format(PyExc_ValueError, "n_columns: expected at least 1, got %lld",
                            n_columns.value);
    Py_RETURN_NONE;
}

/* LK_E_LIMIT of append and attend, in words. */
PyObject *py_raise_append(py_layer_cache *self, lk_status status, const char *what) {
    if (status == LK_E_LIMIT)
        return PyErr_Format(
            PyExc_ValueError,
            "%s: expected rows of at most max_tokens=%lld tokens, and after the prompt calls of at "
            "most max_call tokens; got more",
            what, (long long)self->max_tokens);
    return py_raise(status, what);
}

static PyObject *layer_cache_append(PyObject *object, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"k", "v", "valid", NULL};
    py_layer_cache *self = (py_layer_cache *)object;
    PyObject *k, *v, *valid = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|O:append", names, &k, &v, &valid))
        return NULL;
    if (!py_claim(self)) return NULL;
    lk_span span;
    lk_status status = LK_OK;
    const bool parsed = py_parse_span(self, k, v, valid, PY_ANY, &span);
    if (parsed) {
        Py_BEGIN_ALLOW_THREADS
        status = lk_cache_append(self->cache, &span);
        Py_END_ALLOW_THREADS
    }
    py_unclaim(self);
    if (!parsed) return NULL;
    if (status != LK_OK) return py_raise_append(self, status, "append");
    Py_RETURN_NONE;
}

static PyObject *layer_cache_crop(PyObject *object, PyObject *arg) {
    py_layer_cache *self = (py_layer_cache *)object;
    py_integer n_columns = {"n_columns", 0};
    if (!py_parse_integer(arg, &n_columns) || !py_claim(self)) return NULL;
    const long long now = lk_cache_n_columns(self->cache);
    const lk_status status = lk_cache_crop(self->cache, n_columns.value);
    py_unclaim(self);
    if (status != LK_OK)
        return PyErr_Format(PyExc_ValueError, "n_columns: expected 0 to %lld, got %lld", now,
                            n_columns.value);
    Py_RETURN_NONE;
}

static PyObject *layer_cache_hold(PyObject *object, PyObject *arg) {
    py_layer_cache *self = (py_layer_cache *)object;
    const int on = PyObject_IsTrue(arg);
    if (on < 0 || !py_claim(self)) return NULL;
    const lk_status status = lk_cache_hold(self->cache, on);
    py_unclaim(self);
    if (status != LK_OK)
        return PyErr_Format(PyExc_ValueError,
                            "hold: expected a cache that grows, got one with max_tokens=%lld",
                            (long long)self->max_tokens);
    Py_RETURN_NONE;
}

static PyObject *layer_cache_reset(PyObject *object, PyObject *unused) {
    (void)unused;
    py_layer_cache *self = (py_layer_cache *)object;
    if (!py_claim(self)) return NULL;
    const lk_status status = lk_cache_crop(self->cache, 0);
    py_unclaim(self);
    if (status != LK_OK) return py_raise(status, "reset");
    Py_RETURN_NONE;
}

/* The caller's numbers as they are now: other threads and processes may write to the array while we use it. */
static int64_t *copy_numbers(const int64_t *numbers, npy_intp n) {
    int64_t *copy = PyMem_New(int64_t, n > 0 ? (size_t)n : 1);
    if (!copy) PyErr_NoMemory();
    else if (n > 0) memcpy(copy, numbers, (size_t)n * sizeof *copy);
    return copy;
}

static PyObject *layer_cache_select(PyObject *object, PyObject *arg) {
    py_layer_cache *self = (py_layer_cache *)object;
    const int64_t *array = py_check_contiguous(arg, "rows", NPY_INT64, 1, (int64_t[]){PY_ANY});
    if (!array) return NULL;
    const npy_intp n_rows = PyArray_DIM((PyArrayObject *)arg, 0);
    int64_t *rows = copy_numbers(array, n_rows);
    if (!rows || !py_claim(self)) {
        PyMem_Free(rows);
        return NULL;
    }
    const long long now = lk_cache_n_rows(self->cache);
    lk_status status;
    Py_BEGIN_ALLOW_THREADS
    status = lk_cache_select(self->cache, rows, n_rows);
    Py_END_ALLOW_THREADS
    py_unclaim(self);
    PyMem_Free(rows);
    if (status == LK_E_SHAPE)
        return PyErr_Format(PyExc_ValueError, "rows: expected at least one row, got %zd", n_rows);
    if (status == LK_E_VALUE)
        return PyErr_Format(PyExc_ValueError, "rows: expected indices 0 to %lld, got %R", now - 1,
                            arg);
    if (status != LK_OK) return py_raise(status, "select");
    Py_RETURN_NONE;
}

/* ------------------------------------------------------------------------------------------- reports */

static PyObject *layer_cache_gather(PyObject *object, PyObject *arg) {
    py_layer_cache *self = (py_layer_cache *)object;
    py_integer row_arg = {"row", 0};
    if (!py_parse_integer(arg, &row_arg) || !py_claim(self)) return NULL;
    const long long row = row_arg.value;
    PyObject *k = NULL, *v = NULL, *both = NULL;
    const long long n_rows = lk_cache_n_rows(self->cache);
    if (row < 0 || row >= n_rows) {
        PyErr_Format(PyExc_IndexError, "row: expected 0 to %lld, got %lld", n_rows - 1, row);
        goto done;
    }
    const int64_t len = lk_cache_length(self->cache, row);
    const int type_num = py_type_num(self->config.dtype);
    npy_intp shape[3] = {self->config.n_heads, len, self->config.head_dim};
    k = PyArray_SimpleNew(3, shape, type_num);
    shape[2] = self->config.v_dim;
    v = PyArray_SimpleNew(3, shape, type_num);
    if (!k || !v) goto done;
    lk_status status;
    Py_BEGIN_ALLOW_THREADS
    status = lk_cache_gather(self->cache, row, PyArray_DATA((PyArrayObject *)k),
                             PyArray_DATA((PyArrayObject *)v));
    Py_END_ALLOW_THREADS
    if (status != LK_OK) py_raise(status, "gather");
    else both = PyTuple_Pack(2, k, v);
done:
    py_unclaim(self);
    Py_XDECREF(k);
    Py_XDECREF(v);
    return both;
}

static PyObject *layer_cache_memory(PyObject *object, PyObject *unused) {
    (void)unused;
    py_layer_cache *self = (py_layer_cache *)object;
    if (!py_claim(self)) return NULL;
    const lk_memory memory = lk_cache_memory(self->cache);
    py_unclaim(self);
    return py_memory_dict(&memory);
}

/* An int64 array with one value of each row. */
static PyObject *per_row(PyObject *object, int64_t (*value)(const lk_cache *, int64_t)) {
    py_layer_cache *self = (py_layer_cache *)object;
    if (!py_claim(self)) return NULL;
    npy_intp n_rows = lk_cache_n_rows(self->cache);
    PyObject *array = PyArray_SimpleNew(1, &n_rows, NPY_INT64);
    for (npy_intp b = 0; array && b < n_rows; b++)
        ((int64_t *)PyArray_DATA((PyArrayObject *)array))[b] = value(self->cache, b);
    py_unclaim(self);
    return array;
}

static PyObject *get_lengths(PyObject *self, void *closure) {
    (void)closure;
    return per_row(self, lk_cache_length);
}
static PyObject *get_prompt_lengths(PyObject *self, void *closure) {
    (void)closure;
    return per_row(self, lk_cache_prompt);
}
static PyObject *get_lo(PyObject *self, void *closure) {
    (void)closure;
    return per_row(self, lk_cache_lo);
}

static PyObject *get_real(PyObject *object, void *closure) {
    (void)closure;
    py_layer_cache *self = (py_layer_cache *)object;
    if (!py_claim(self)) return NULL;
    npy_intp shape[2] = {lk_cache_n_rows(self->cache), lk_cache_n_columns(self->cache)};
    PyObject *array = PyArray_SimpleNew(2, shape, NPY_BOOL);
    for (npy_intp b = 0; array && b < shape[0]; b++)
        lk_cache_real(self->cache, b,
                      (uint8_t *)PyArray_DATA((PyArrayObject *)array) + b * shape[1]);
    py_unclaim(self);
    return array;
}

static PyObject *get_keep(PyObject *object, void *closure) {
    (void)closure;
    py_layer_cache *self = (py_layer_cache *)object;
    npy_intp shape[2] = {self->config.n_heads, self->config.head_dim};
    PyObject *array = PyArray_SimpleNew(2, shape, NPY_BOOL);
    if (array)
        memcpy(PyArray_DATA((PyArrayObject *)array), self->keep, (size_t)(shape[0] * shape[1]));
    return array;
}

static PyObject *whole_cache(PyObject *object, int64_t (*value)(const lk_cache *)) {
    py_layer_cache *self = (py_layer_cache *)object;
    if (!py_claim(self)) return NULL;
    const long long number = value(self->cache);
    py_unclaim(self);
    return PyLong_FromLongLong(number);
}
static PyObject *get_n_rows(PyObject *self, void *closure) {
    (void)closure;
    return whole_cache(self, lk_cache_n_rows);
}
static PyObject *get_n_columns(PyObject *self, void *closure) {
    (void)closure;
    return whole_cache(self, lk_cache_n_columns);
}
static PyObject *get_n_heads(PyObject *self, void *closure) {
    (void)closure;
    return PyLong_FromLong(((py_layer_cache *)self)->config.n_heads);
}
static PyObject *get_head_dim(PyObject *self, void *closure) {
    (void)closure;
    return PyLong_FromLong(((py_layer_cache *)self)->config.head_dim);
}
static PyObject *get_v_dim(PyObject *self, void *closure) {
    (void)closure;
    return PyLong_FromLong(((py_layer_cache *)self)->config.v_dim);
}
static PyObject *get_dtype(PyObject *self, void *closure) {
    (void)closure;
    return PyUnicode_FromString(py_dtype_name(((py_layer_cache *)self)->config.dtype));
}
static PyObject *get_sink(PyObject *self, void *closure) {
    (void)closure;
    return PyLong_FromLongLong(((py_layer_cache *)self)->config.sink);
}
static PyObject *get_recent(PyObject *self, void *closure) {
    (void)closure;
    return PyLong_FromLongLong(((py_layer_cache *)self)->config.recent);
}
static PyObject *get_slack(PyObject *self, void *closure) {
    (void)closure;
    return PyLong_FromLongLong(((py_layer_cache *)self)->config.slack);
}
static PyObject *get_max_tokens(PyObject *self, void *closure) {
    (void)closure;
    const int64_t max_tokens = ((py_layer_cache *)self)->max_tokens;
    if (max_tokens < 0) Py_RETURN_NONE;
    return PyLong_FromLongLong(max_tokens);
}

PyObject *py_predict_memory(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"keep",  "lengths", "sink",       "recent",   "slack",
                            "dtype", "v_dim",   "max_tokens", "max_call", NULL};
    PyObject *keep, *lengths_arg, *dtype = NULL, *v_dim = NULL, *max_tokens_arg = NULL;
    py_integer sink = {"sink", PY_MISSING}, recent = {"recent", PY_MISSING};
    py_integer slack = {"slack", 64}, max_call = {"max_call", 1};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|$O&O&O&OOOO&:predict_memory", names, &keep,
                                     &lengths_arg, py_parse_integer, &sink, py_parse_integer,
                                     &recent, py_parse_integer, &slack, &dtype, &v_dim,
                                     &max_tokens_arg, py_parse_integer, &max_call))
        return NULL;
    if (py_is_missing(&sink) || py_is_missing(&recent)) return NULL;
    lk_config config;
    int64_t max_tokens;
    if (!py_parse_config(keep, dtype, v_dim, &sink, &recent, &slack, &config)) return NULL;
    if (!py_parse_limit(max_tokens_arg, "max_tokens", &max_tokens)) return NULL;
    if (!py_check_least(&max_call, 1)) return NULL;
    const int64_t *array =
        py_check_contiguous(lengths_arg, "lengths", NPY_INT64, 1, (int64_t[]){PY_ANY});
    if (!array) return NULL;
    const npy_intp n_rows = PyArray_DIM((PyArrayObject *)lengths_arg, 0);
    lk_memory memory;
    lk_status status = LK_E_NOMEM;
    int64_t *lengths = copy_numbers(array, n_rows);
    uint8_t *own_keep = copy_keep(&config);
    if (lengths && own_keep) {
        config.keep = own_keep;
        status = lk_predict_memory(&config, lengths, n_rows, max_tokens, max_call.value, &memory);
    }
    PyMem_Free(lengths);
    PyMem_Free(own_keep);
    if (PyErr_Occurred()) return NULL;
    if (status == LK_E_VALUE)
        return PyErr_Format(PyExc_ValueError,
                            "lengths: expected 0 or more and less than 2**60 tokens, got %R",
                            lengths_arg);
    if (status != LK_OK) return py_raise(status, "predict_memory");
    return py_memory_dict(&memory);
}

/* clang-format off */
static PyMethodDef methods[] = {
    {"expect_prompt", layer_cache_expect_prompt, METH_O,
     "expect_prompt($self, n_columns, /)\n--\n\nAnnounce that the first n_columns columns are the prompt."},
    {"append", (PyCFunction)(void (*)(void))layer_cache_append, METH_VARARGS | METH_KEYWORDS,
     "append($self, k, v, valid=None)\n--\n\nStore K [B, Hkv, T, D] and V [B, Hkv, T, Dv] of T new columns."},
    {"crop", layer_cache_crop, METH_O,
     "crop($self, n_columns, /)\n--\n\nKeep the first n_columns columns."},
    {"hold", layer_cache_hold, METH_O,
     "hold($self, on, /)\n--\n\nOn: crops to the present columns lose nothing, beyond slack too; off: free what that held."},
    {"select", layer_cache_select, METH_O,
     "select($self, rows, /)\n--\n\nMake row i the former row rows[i] (int64 array); pages are shared."},
    {"reset", layer_cache_reset, METH_NOARGS, "reset($self)\n--\n\nMake every row empty."},
    {"copy", layer_cache_copy, METH_NOARGS, "copy($self)\n--\n\nReturn a cache that shares all pages until one writes."},
    {"gather", layer_cache_gather, METH_O,
     "gather($self, row, /)\n--\n\nReturn (k [Hkv, L, D], v [Hkv, L, Dv]) of one row; NaN where nothing is stored."},
    {"memory", layer_cache_memory, METH_NOARGS, "memory($self)\n--\n\nReturn the bytes of live pages and twins."},
    {"__deepcopy__", layer_cache_deepcopy, METH_O, NULL},
    {"__copy__", layer_cache_copy, METH_NOARGS, NULL},
    {"__reduce__", layer_cache_reduce, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef getset[] = {
    {"keep", get_keep, NULL, "bool [Hkv, D], a copy of the mask.", NULL},
    {"n_rows", get_n_rows, NULL, "B.", NULL},
    {"n_columns", get_n_columns, NULL, "Columns stored, padding included.", NULL},
    {"n_heads", get_n_heads, NULL, "Hkv.", NULL},
    {"head_dim", get_head_dim, NULL, "D.", NULL},
    {"v_dim", get_v_dim, NULL, "Dv.", NULL},
    {"dtype", get_dtype, NULL, "'float32', 'bfloat16' or 'float16'.", NULL},
    {"sink", get_sink, NULL, "S0, tokens at the start that keep every channel.", NULL},
    {"recent", get_recent, NULL, "W, tokens at the end that keep every channel.", NULL},
    {"slack", get_slack, NULL, "Tokens beyond W whose dropped channels stay, for crops.", NULL},
    {"max_tokens", get_max_tokens, NULL, "Limit of a reserved cache, None if it grows.", NULL},
    {"lengths", get_lengths, NULL, "int64 [B], tokens of each row.", NULL},
    {"prompt_lengths", get_prompt_lengths, NULL, "int64 [B], -1 while the prompt is not complete.", NULL},
    {"lo", get_lo, NULL, "int64 [B], first position after the sink whose dropped channels are stored.", NULL},
    {"real", get_real, NULL, "bool [B, columns], False where a column is padding.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
/* clang-format on */

PyDoc_STRVAR(doc,
             "LayerCache(keep, *, n_rows, sink, recent, slack=64, dtype='float32', v_dim=None, "
             "max_tokens=None, "
             "max_call=1)\n--\n\n"
             "Packed K and V of one attention layer.\n\n"
             "Keys of the first `sink` and last `recent` tokens keep all D channels, the others "
             "only those of the\n"
             "mask `keep` (bool [Hkv, D]); heads that keep nothing store no K and no V there.\n\n"
             "Parameters\n----------\n"
             "keep : bool array [Hkv, D]\n    Each head keeps a multiple of 8 channels.\n"
             "n_rows : int\n    B.\n"
             "sink, recent : int\n    Tokens of the window.\n"
             "slack : int\n    Tokens beyond `recent` that stay whole so that crops lose nothing.\n"
             "dtype : {'float32', 'bfloat16', 'float16'}\n    Arrays of bfloat16 cross as uint16.\n"
             "v_dim : int, optional\n    Dv; default: D.\n"
             "max_tokens : int, optional\n"
             "    Allocate for rows of this many tokens now. None: grow.\n"
             "max_call : int\n"
             "    With `max_tokens`: tokens of the longest call after the prompt.\n\n"
             "Raises\n------\n"
             "ValueError, TypeError\n    An argument does not fit; the message names it.\n"
             "MemoryError\n"
             "    An allocation failed; a cache is then as it was before the call.\n\n"
             "Notes\n-----\n"
             "Source: LeanK, arXiv 2508.02215, section 3.");

static PyType_Slot slots[] = {
    {Py_tp_new, layer_cache_new}, {Py_tp_dealloc, layer_cache_dealloc},
    {Py_tp_methods, methods},     {Py_tp_getset, getset},
    {Py_tp_doc, (void *)doc},     {0, NULL},
};

PyType_Spec py_layer_cache_spec = {
    .name = "leank.LayerCache",
    .basicsize = sizeof(py_layer_cache),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = slots,
};
