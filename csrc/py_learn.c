/* py_learn.c: the mixed attention of mask learning, forward and backward. */
#include "py_args.h"

#include <math.h>

/* What both calls take, as Python gave it. */
typedef struct {
    PyObject *q, *k_context, *v_context, *k, *v, *alpha, *scale, *start, *hidden;
    py_integer sink, recent, n_threads;
} inputs;

static inputs no_inputs(void) {
    return (inputs){.start = Py_None,
                    .hidden = Py_None,
                    .sink = {"sink", PY_MISSING},
                    .recent = {"recent", PY_MISSING},
                    .n_threads = {"n_threads", 0}};
}

/* The dtype of q decides; false with an exception. */
static bool dtype_of(PyObject *q, lk_dtype *dtype) {
    if (!PyArray_Check(q)) {
        PyErr_Format(PyExc_TypeError, "q: expected a NumPy array, got %s", Py_TYPE(q)->tp_name);
        return false;
    }
    for (int i = 0; i < 3; i++) {
        *dtype = (lk_dtype)i;
        if (PyArray_TYPE((PyArrayObject *)q) == py_type_num(*dtype)) return true;
    }
    PyErr_Format(PyExc_TypeError,
                 "q: expected dtype float32, float16 or uint16 (the bits of bfloat16), got %S",
                 PyArray_DESCR((PyArrayObject *)q));
    return false;
}

static bool parse_strided(PyObject *object, const char *name, lk_dtype dtype, const int64_t *shape,
                          lk_strided *out) {
    PyArrayObject *array =
        py_check_array(object, name, py_type_num(dtype), 4, shape, false); /* borrowed */
    if (!array) return false;
    out->data = PyArray_DATA(array);
    py_elem_strides(array, 3, out->stride);
    return true;
}

static int64_t dim(PyObject *array, int axis) { return PyArray_DIM((PyArrayObject *)array, axis); }

static bool check_range(int64_t value, int64_t most, const char *what) {
    if (value >= 1 && value <= most) return true;
    PyErr_Format(PyExc_ValueError, "%s from 1 to %lld, got %lld", what, (long long)most,
                 (long long)value);
    return false;
}

static bool parse_start(const inputs *in, lk_learn_args *args) {
    if (in->start == Py_None) return true;
    const int64_t n_keys = args->n_context + args->n_columns;
    args->start = py_check_contiguous(in->start, "start", NPY_INT64, 1, (int64_t[]){args->n_rows});
    if (!args->start) return false;
    for (int64_t b = 0; b < args->n_rows; b++) {
        if (args->start[b] >= 0 && args->start[b] <= n_keys) continue;
        PyErr_Format(PyExc_ValueError,
                     "start: expected values from 0 to %lld, got %lld for row %lld",
                     (long long)n_keys, (long long)args->start[b], (long long)b);
        return false;
    }
    return true;
}

static bool parse(const inputs *in, lk_learn_args *args) {
    const py_integer scale_given = {"scale", in->scale ? 0 : PY_MISSING};
    if (py_is_missing(&in->sink) || py_is_missing(&in->recent) || py_is_missing(&scale_given))
        return false;
    if (!py_check_threads(&in->n_threads)) return false;
    *args = (lk_learn_args){
        .sink = in->sink.value, .recent = in->recent.value, .n_threads = (int)in->n_threads.value};
    const int64_t any = PY_ANY;
    if (!dtype_of(in->q, &args->dtype)) return false;
    if (!parse_strided(in->q, "q", args->dtype, (int64_t[]){any, any, any, any}, &args->q))
        return false;
    const int64_t n_rows = dim(in->q, 0), n_columns = dim(in->q, 2), head_dim = dim(in->q, 3);
    args->n_rows = n_rows;
    args->n_q_heads = dim(in->q, 1);
    args->n_columns = n_columns;
    args->head_dim = (int32_t)head_dim;
    if (!check_range(n_rows, INT32_MAX, "q: expected a number of rows")) return false;
    if (!check_range(n_columns, INT32_MAX, "q: expected a number of columns")) return false;
    if (!check_range(head_dim, LK_MAX_HEAD_DIM, "q: expected a head dim")) return false;
    if (!parse_strided(in->k, "k", args->dtype, (int64_t[]){n_rows, any, n_columns, head_dim},
                       &args->k))
        return false;
    const int64_t n_heads = args->n_heads = dim(in->k, 1);
    if (!check_range(n_heads, INT32_MAX, "k: expected a number of heads")) return false;
    if (args->n_q_heads < 1 || args->n_q_heads % n_heads != 0) {
        PyErr_Format(PyExc_ValueError, "q: expected a multiple of %lld heads, got %lld",
                     (long long)n_heads, (long long)args->n_q_heads);
        return false;
    }
    if (!parse_strided(in->v, "v", args->dtype, (int64_t[]){n_rows, n_heads, n_columns, any},
                       &args->v))
        return false;
    const int64_t v_dim = dim(in->v, 3);
    if (!check_range(v_dim, LK_MAX_HEAD_DIM, "v: expected a value dim")) return false;
    args->v_dim = (int32_t)v_dim;
    if (!parse_strided(in->k_context, "k_context", args->dtype,
                       (int64_t[]){n_rows, n_heads, any, head_dim}, &args->k_context))
        return false;
    args->n_context = dim(in->k_context, 2);
    if (!parse_strided(in->v_context, "v_context", args->dtype,
                       (int64_t[]){n_rows, n_heads, args->n_context, v_dim}, &args->v_context))
        return false;
    args->alpha =
        py_check_contiguous(in->alpha, "alpha", NPY_FLOAT32, 2, (int64_t[]){n_heads, head_dim});
    if (!args->alpha) return false;
    if (!py_check_least(&in->sink, 0) || !py_check_least(&in->recent, 1)) return false;
    const double scale = PyFloat_AsDouble(in->scale);
    if (scale == -1.0 && PyErr_Occurred()) return false;
    /* Logits are in base 2 inside, so it is multiplied by log2(e), in float32. */
    if (!isfinite((float)(scale * 1.4426950408889634))) {
        PyErr_Format(PyExc_ValueError, "scale: expected a finite number, got %R", in->scale);
        return false;
    }
    args->scale = (float)scale;
    if (!parse_start(in, args)) return false;
    if (in->hidden == Py_None) return true;
    args->hidden = py_check_contiguous(in->hidden, "hidden", NPY_BOOL, 1, (int64_t[]){n_heads});
    return args->hidden != NULL;
}

/* A new array [B, n_heads, T, n]. */
static PyObject *new_array(const lk_learn_args *args, int64_t n_heads, int64_t n) {
    npy_intp shape[4] = {args->n_rows, n_heads, args->n_columns, n};
    return PyArray_SimpleNew(4, shape, py_type_num(args->dtype));
}

static void *data_of(PyObject *array) { return PyArray_DATA((PyArrayObject *)array); }

PyObject *py_learn_forward(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"q",      "k_context", "v_context", "k",     "v",
                            "alpha",  "sink",      "recent",    "scale", "start",
                            "hidden", "n_threads", NULL};
    (void)module;
    inputs in = no_inputs();
    lk_learn_args call;
    PyObject *o = NULL, *lse = NULL, *result = NULL;
    if (!PyArg_ParseTupleAndKeywords(
            args, kwargs, "OOOOOO|$O&O&OOOO&:learn_forward", names, &in.q, &in.k_context,
            &in.v_context, &in.k, &in.v, &in.alpha, py_parse_integer, &in.sink, py_parse_integer,
            &in.recent, &in.scale, &in.start, &in.hidden, py_parse_integer, &in.n_threads))
        return NULL;
    if (!parse(&in, &call)) return NULL;
    o = new_array(&call, call.n_q_heads, call.v_dim);
    npy_intp lse_shape[3] = {call.n_rows, call.n_q_heads, call.n_columns};
    lse = PyArray_SimpleNew(3, lse_shape, NPY_FLOAT32);
    if (!o || !lse) goto done;

    lk_status status;
    Py_BEGIN_ALLOW_THREADS
    status = lk_learn_forward(&call, data_of(o), data_of(lse));
    Py_END_ALLOW_THREADS
    if (status == LK_OK) result = PyTuple_Pack(2, o, lse);
    else py_raise(status, "learn_forward");
done:
    Py_XDECREF(o);
    Py_XDECREF(lse);
    return result;
}

PyObject *py_learn_backward(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"d_o",   "o",      "lse",       "q",    "k_context", "v_context",
                            "k",     "v",      "alpha",     "sink", "recent",    "scale",
                            "start", "hidden", "n_threads", NULL};
    (void)module;
    inputs in = no_inputs();
    lk_learn_args call;
    lk_learn_grads grads = {0};
    PyObject *d_o, *o, *lse, *result = NULL;
    PyObject *dq = NULL, *dk = NULL, *dv = NULL, *dalpha = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOOOOOOO|$O&O&OOOO&:learn_backward", names,
                                     &d_o, &o, &lse, &in.q, &in.k_context, &in.v_context, &in.k,
                                     &in.v, &in.alpha, py_parse_integer, &in.sink, py_parse_integer,
                                     &in.recent, &in.scale, &in.start, &in.hidden, py_parse_integer,
                                     &in.n_threads))
        return NULL;
    if (!parse(&in, &call)) return NULL;
    const int64_t shape[4] = {call.n_rows, call.n_q_heads, call.n_columns, call.v_dim};
    if (!parse_strided(d_o, "d_o", call.dtype, shape, &grads.d_o)) return NULL;
    if (!parse_strided(o, "o", call.dtype, shape, &grads.o)) return NULL;
    grads.lse = py_check_contiguous(lse, "lse", NPY_FLOAT32, 3, shape);
    if (!grads.lse) return NULL;
    dq = new_array(&call, call.n_q_heads, call.head_dim);
    dk = new_array(&call, call.n_heads, call.head_dim);
    dv = new_array(&call, call.n_heads, call.v_dim);
    npy_intp alpha_shape[2] = {call.n_heads, call.head_dim};
    dalpha = PyArray_SimpleNew(2, alpha_shape, NPY_FLOAT32);
    if (!dq || !dk || !dv || !dalpha) goto done;
    grads.dq = data_of(dq);
    grads.dk = data_of(dk);
    grads.dv = data_of(dv);
    grads.dalpha = data_of(dalpha);

    lk_status status;
    Py_BEGIN_ALLOW_THREADS
    status = lk_learn_backward(&call, &grads);
    Py_END_ALLOW_THREADS
    if (status == LK_OK) result = PyTuple_Pack(4, dq, dk, dv, dalpha);
    else py_raise(status, "learn_backward");
done:
    Py_XDECREF(dq);
    Py_XDECREF(dk);
    Py_XDECREF(dv);
    Py_XDECREF(dalpha);
    return result;
}
