/* py_mask.c: channel selection and mask checks over mask.c. */
#include "py_args.h"

#include <math.h>

PyObject *py_select_channels(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"scores", "ratio", "align", NULL};
    PyObject *scores_arg;
    double ratio;
    py_integer align_arg = {"align", 0};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OdO&:select_channels", names, &scores_arg,
                                     &ratio, py_parse_integer, &align_arg))
        return NULL;
    const long long align = align_arg.value;
    const float *scores = py_check_contiguous(scores_arg, "scores", NPY_FLOAT32, 3,
                                              (int64_t[]){PY_ANY, PY_ANY, PY_ANY});
    if (!scores) return NULL;
    npy_intp *shape = PyArray_DIMS((PyArrayObject *)scores_arg);
    if (shape[0] < 1 || shape[1] < 1 || shape[2] < 1 || shape[2] > LK_MAX_HEAD_DIM)
        return PyErr_Format(
            PyExc_ValueError,
            "scores: expected [N, Hkv, D] with no empty axis and D at most %d, got (%zd, %zd, %zd)",
            LK_MAX_HEAD_DIM, shape[0], shape[1], shape[2]);
    if (!(ratio >= 0.0 && ratio <= 1.0)) {
        PyObject *got = PyFloat_FromDouble(ratio);
        if (got) PyErr_Format(PyExc_ValueError, "ratio: expected 0 to 1, got %S", got);
        Py_XDECREF(got);
        return NULL;
    }
    if (align < 1 || shape[2] % align != 0)
        return PyErr_Format(PyExc_ValueError,
                            "align: expected a divisor of the head dim %zd, got %lld", shape[2],
                            align);
    PyObject *keep = PyArray_SimpleNew(3, shape, NPY_BOOL);
    if (!keep) return NULL;
    lk_status status;
    Py_BEGIN_ALLOW_THREADS
    status = lk_mask_select(scores, shape[0] * shape[1], shape[2], ratio, align,
                            PyArray_DATA((PyArrayObject *)keep));
    Py_END_ALLOW_THREADS
    if (status == LK_OK) return keep;
    Py_DECREF(keep);
    if (status == LK_E_VALUE)
        return PyErr_Format(PyExc_ValueError,
                            "scores: expected finite values, got NaN or infinity");
    return py_raise(status, "select_channels");
}

PyObject *py_check_mask(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"keep", "align", NULL};
    PyObject *keep_arg;
    py_integer align_arg = {"align", 0};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO&:check_mask", names, &keep_arg,
                                     py_parse_integer, &align_arg))
        return NULL;
    const long long align = align_arg.value;
    const uint8_t *keep =
        py_check_contiguous(keep_arg, "keep", NPY_BOOL, 3, (int64_t[]){PY_ANY, PY_ANY, PY_ANY});
    if (!keep) return NULL;
    npy_intp *shape = PyArray_DIMS((PyArrayObject *)keep_arg);
    int64_t bad_head;
    const lk_status status = lk_mask_check(keep, shape[0] * shape[1], shape[2], align, &bad_head);
    if (status == LK_OK) Py_RETURN_NONE;
    if (status == LK_E_SHAPE)
        return PyErr_Format(
            PyExc_ValueError,
            "keep: expected [N, Hkv, D] with D a multiple of %d up to %d, got (%zd, %zd, %zd)",
            LK_CHANNEL_STEP, LK_MAX_HEAD_DIM, shape[0], shape[1], shape[2]);
    if (bad_head < 0)
        return PyErr_Format(PyExc_ValueError, "align: expected a multiple of %d, got %lld",
                            LK_CHANNEL_STEP, align);
    return PyErr_Format(PyExc_ValueError,
                        "keep: expected each head to keep a multiple of %lld channels, layer %lld "
                        "head %lld does not",
                        align, (long long)(bad_head / shape[1]), (long long)(bad_head % shape[1]));
}
