/* py_args.h: what the wrapper files share: array checks, dtype names, status to exception, module state. */
#ifndef LK_PY_ARGS_H
#define LK_PY_ARGS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define NPY_NO_DEPRECATED_API NPY_1_22_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL leank_ARRAY_API
#ifndef LK_IMPORTS_ARRAY_API
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>

#include "leank.h"

#include <stdatomic.h>
#include <stdbool.h>

typedef struct {
    PyTypeObject *layer_cache_type;
} py_state;

/* leank.LayerCache. `busy` is set while a call runs, since calls drop the GIL. */
typedef struct {
    PyObject_HEAD lk_cache *cache;
    lk_config config;   /* config.keep points to `keep` */
    uint8_t *keep;      /* [Hkv, D] */
    int64_t max_tokens; /* -1: growing */
    atomic_bool busy;
} py_layer_cache;

#define PY_ANY (-1) /* a size that is not checked */

/* An integer argument, for "O&" of the argument parser: unlike "L" of its own this names what does not fit. */
typedef struct {
    const char *name;
    long long value;
} py_integer;
int py_parse_integer(PyObject *object, void *integer);

/* Keyword-only arguments that must be given: the argument parser knows none, so they start as this. */
#define PY_MISSING LLONG_MIN
/* True with an exception. */
bool py_is_missing(const py_integer *integer);

/* Check an array without copying: type, element type, axes, sizes (PY_ANY: any), aligned, last axis contiguous,
 * other strides whole elements. Returns it borrowed, or NULL with an exception that names the argument. */
PyArrayObject *py_check_array(PyObject *object, const char *name, int type_num, int n_axes,
                              const int64_t *shape, bool writable);
/* Strides of the leading axes, in elements. */
void py_elem_strides(PyArrayObject *array, int n_axes, int64_t *stride);
/* A C-contiguous array of the type, its data returned; NULL with an exception otherwise. */
const void *py_check_contiguous(PyObject *object, const char *name, int type_num, int n_axes,
                                const int64_t *shape);
int py_type_num(lk_dtype dtype);

bool py_parse_dtype(PyObject *name, lk_dtype *dtype);
const char *py_dtype_name(lk_dtype dtype);

/* The config shared by LayerCache and predict_memory; false with an exception. keep: bool [Hkv, D], borrowed. */
bool py_parse_config(PyObject *keep, PyObject *dtype, PyObject *v_dim, const py_integer *sink,
                     const py_integer *recent, const py_integer *slack, lk_config *config);
/* least <= value < 2**60; false with an exception otherwise. */
bool py_check_least(const py_integer *integer, long long least);
/* 0 and fewer: what OpenMP would use. False with an exception for what is no int of C. */
bool py_check_threads(const py_integer *n_threads);
/* None: -1. */
bool py_parse_limit(PyObject *object, const char *name, int64_t *out);

/* Set the exception of a status; `what` says what was tried. Always returns NULL. */
PyObject *py_raise(lk_status status, const char *what);
/* The same for calls that append; LK_E_LIMIT tells the limits. */
PyObject *py_raise_append(py_layer_cache *self, lk_status status, const char *what);

/* Claim the cache for one call; false with RuntimeError when another thread has it. */
bool py_claim(py_layer_cache *self);
void py_unclaim(py_layer_cache *self);

PyObject *py_memory_dict(const lk_memory *memory);

extern PyType_Spec py_layer_cache_spec;
PyObject *py_predict_memory(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *py_decode(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *py_learn_forward(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *py_learn_backward(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *py_select_channels(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *py_check_mask(PyObject *module, PyObject *args, PyObject *kwargs);

/* span->k, v, valid and strides from the arrays of a call; false with an exception. n_columns PY_ANY: k decides. */
bool py_parse_span(py_layer_cache *self, PyObject *k, PyObject *v, PyObject *valid,
                   int64_t n_columns, lk_span *span);

#endif
