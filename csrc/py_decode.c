/* py_decode.c: leank.decode: one step of one layer. */
#include "py_args.h"

#include <math.h>

/* First and last byte that an array covers, whatever the signs of its strides. */
static void extent(PyArrayObject *array, uintptr_t *first, uintptr_t *last) {
    *first = *last = (uintptr_t)PyArray_DATA(array);
    for (int i = 0; i < PyArray_NDIM(array); i++) {
        const npy_intp reach = (PyArray_DIM(array, i) - 1) * PyArray_STRIDE(array, i);
        if (reach > 0) *last += (uintptr_t)reach;
        else *first -= (uintptr_t)-reach;
    }
    *last += (uintptr_t)PyArray_ITEMSIZE(array) - 1;
}

/* Outputs are written while inputs are still read, and by several threads. */
static bool check_out(PyArrayObject *out, PyObject *const *inputs, const char *const *names,
                      int n) {
    uintptr_t first, last, in_first, in_last;
    if (PyArray_SIZE(out) == 0) return true;
    extent(out, &first, &last);
    for (int i = 0; i < PyArray_NDIM(out); i++) {
        if (PyArray_DIM(out, i) > 1 && PyArray_STRIDE(out, i) == 0) {
            PyErr_Format(PyExc_ValueError,
                         "out: expected elements of their own, got stride 0 on axis %d", i);
            return false;
        }
    }
    for (int i = 0; i < n; i++) {
        if (inputs[i] == Py_None) continue;
        extent((PyArrayObject *)inputs[i], &in_first, &in_last);
        if (first <= in_last && in_first <= last) {
            PyErr_Format(PyExc_ValueError, "out: expected memory of its own, got some that %s uses",
                         names[i]);
            return false;
        }
    }
    return true;
}

/* The factors of the logits; what stands for None is in them already. False with an exception. */
static bool parse_factors(PyObject *scale_arg, PyObject *softcap_arg, double *scale,
                          double *softcap) {
    /* Logits are in base 2 inside, so both are multiplied by log2(e), in float32. */
    const double log2_e = 1.4426950408889634;
    if (scale_arg != Py_None) {
        *scale = PyFloat_AsDouble(scale_arg);
        if (*scale == -1.0 && PyErr_Occurred()) return false;
        if (!isfinite((float)(*scale * log2_e))) {
            PyErr_Format(PyExc_ValueError, "scale: expected a finite number, got %R", scale_arg);
            return false;
        }
    }
    if (softcap_arg != Py_None) {
        *softcap = PyFloat_AsDouble(softcap_arg);
        if (*softcap == -1.0 && PyErr_Occurred()) return false;
        const bool fits = isfinite((float)(*softcap * log2_e)) && *softcap >= 0.0;
        if (!fits || (*softcap > 0.0 && (float)*softcap == 0.0f)) {
            PyErr_Format(PyExc_ValueError,
                         "softcap: expected 0 or a positive finite float32, got %R", softcap_arg);
            return false;
        }
    }
    return true;
}

PyObject *py_decode(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"cache",   "q",     "k",   "v",         "valid", "scale",
                            "softcap", "sinks", "out", "n_threads", NULL};
    py_state *state = PyModule_GetState(module);
    PyObject *cache_arg, *q_arg, *k = Py_None, *v = Py_None, *valid = Py_None, *scale_arg = Py_None;
    PyObject *softcap_arg = Py_None, *sinks = Py_None, *out_arg = Py_None, *result = NULL;
    py_integer n_threads = {"n_threads", 0};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!O|OO$OOOOOO&:decode", names,
                                     state->layer_cache_type, &cache_arg, &q_arg, &k, &v, &valid,
                                     &scale_arg, &softcap_arg, &sinks, &out_arg, py_parse_integer,
                                     &n_threads))
        return NULL;
    if (!py_check_threads(&n_threads)) return NULL;
    py_layer_cache *self = (py_layer_cache *)cache_arg;
    if ((k == Py_None) != (v == Py_None))
        return PyErr_Format(PyExc_TypeError, "k, v: expected both or neither, got one");
    if (k == Py_None && valid != Py_None)
        return PyErr_Format(PyExc_TypeError, "valid: expected only together with k and v");
    double scale = 1.0 / sqrt((double)self->config.head_dim), softcap = 0.0;
    if (!parse_factors(scale_arg, softcap_arg, &scale, &softcap)) return NULL;
    if (!py_claim(self)) return NULL;

    const int64_t n_rows = lk_cache_n_rows(self->cache), n_heads = self->config.n_heads;
    const int type_num = py_type_num(self->config.dtype);
    PyObject *out = NULL;
    lk_span span = {0};
    lk_decode_args call = {.cache = self->cache,
                           .scale = (float)scale,
                           .softcap = (float)softcap,
                           .n_threads = (int)n_threads.value};
    PyArrayObject *q = py_check_array(
        q_arg, "q", type_num, 4, (int64_t[]){n_rows, PY_ANY, PY_ANY, self->config.head_dim}, false);
    if (!q) goto done;
    call.q = PyArray_DATA(q);
    call.n_q_heads = PyArray_DIM(q, 1);
    call.n_columns = PyArray_DIM(q, 2);
    py_elem_strides(q, 3, call.q_stride);
    if (call.n_q_heads < 1 || call.n_q_heads % n_heads != 0) {
        PyErr_Format(PyExc_ValueError, "q: expected a multiple of %lld heads, got %lld",
                     (long long)n_heads, (long long)call.n_q_heads);
        goto done;
    }
    if (call.n_columns < 1) {
        PyErr_Format(PyExc_ValueError, "q: expected at least one column, got 0");
        goto done;
    }
    if (sinks != Py_None) {
        call.sinks =
            py_check_contiguous(sinks, "sinks", NPY_FLOAT32, 1, (int64_t[]){call.n_q_heads});
        if (!call.sinks) goto done;
    }
    if (k != Py_None) {
        if (!py_parse_span(self, k, v, valid, call.n_columns, &span)) goto done;
    } else if (call.n_columns != 1 || lk_cache_n_columns(self->cache) < 1) {
        /* Several queries need what storing their tokens may already have retired. */
        PyErr_Format(
            PyExc_ValueError,
            "q: expected one column and a cache that has it, got %lld columns and a cache of %lld "
            "(pass k and v of new tokens to attend to several at once)",
            (long long)call.n_columns, (long long)lk_cache_n_columns(self->cache));
        goto done;
    }
    npy_intp shape[4] = {n_rows, call.n_q_heads, call.n_columns, self->config.v_dim};
    if (out_arg == Py_None) {
        out = PyArray_SimpleNew(4, shape, type_num);
    } else {
        const int64_t want[4] = {shape[0], shape[1], shape[2], shape[3]};
        out = Py_XNewRef((PyObject *)py_check_array(out_arg, "out", type_num, 4, want, true));
    }
    if (!out) goto done;
    PyObject *const inputs[4] = {q_arg, k, v, sinks};
    if (!check_out((PyArrayObject *)out, inputs, (const char *const[]){"q", "k", "v", "sinks"}, 4))
        goto done;
    call.o = PyArray_DATA((PyArrayObject *)out);
    py_elem_strides((PyArrayObject *)out, 3, call.o_stride);

    lk_status status;
    Py_BEGIN_ALLOW_THREADS
    status = k != Py_None ? lk_attend(self->cache, &span, &call) : lk_decode(&call);
    Py_END_ALLOW_THREADS
    if (status == LK_OK) result = Py_NewRef(out);
    else py_raise_append(self, status, "decode");
done:
    py_unclaim(self);
    Py_XDECREF(out);
    return result;
}
