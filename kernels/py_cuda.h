/* py_cuda.h: what the wrappers of leank._cuda share. */
#ifndef LEANK_PY_CUDA_H
#define LEANK_PY_CUDA_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "leank_cuda.h"

/* For "O&": an address crosses as an int; None is NULL. `out` points to a pointer of any type. */
int py_to_address(PyObject *object, void *out);

/* None, or the exception for a status; `what` failed. */
PyObject *py_done_or_raise(lk_status status, const char *what, int32_t cuda_error);

/* py_learn_cuda.c */
PyObject *py_learn_work_bytes(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *py_learn_forward(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *py_learn_backward(PyObject *module, PyObject *args, PyObject *kwargs);

#endif
