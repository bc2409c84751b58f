/* py_learn_cuda.c: mask learning in leank._cuda. leank/learning/ops_cuda.py has checked the tensors. */
#include "py_cuda.h"

#include <string.h>

/* (B, Hq, Hkv, Lc, T, D, Dv) and the dtype's name. For "O&"; false with an exception. */
static int to_sizes(PyObject *object, void *out) {
    lk_learn_args *a = out;
    long long n[5];
    if (!PyTuple_Check(object)) {
        PyErr_SetString(PyExc_TypeError, "sizes: expected a tuple");
        return 0;
    }
    if (!PyArg_ParseTuple(object, "LLLLLii;sizes: expected 7 ints", &n[0], &n[1], &n[2], &n[3],
                          &n[4], &a->head_dim, &a->v_dim))
        return 0;
    a->n_rows = n[0];
    a->n_q_heads = n[1];
    a->n_heads = n[2];
    a->n_context = n[3];
    a->n_columns = n[4];
    return 1;
}

static int to_dtype(PyObject *object, void *out) {
    const char *name = PyUnicode_Check(object) ? PyUnicode_AsUTF8(object) : NULL;
    if (name && strcmp(name, "bfloat16") == 0) *(lk_dtype *)out = LK_BF16;
    else if (name && strcmp(name, "float16") == 0) *(lk_dtype *)out = LK_F16;
    else if (!PyErr_Occurred())
        PyErr_Format(PyExc_ValueError, "dtype: expected 'bfloat16' or 'float16', got %R", object);
    return !PyErr_Occurred();
}

/* (address, strides of b, h and column in elements). */
static int to_strided(PyObject *object, void *out) {
    lk_strided *x = out;
    long long stride[3];
    if (!PyTuple_Check(object)) {
        PyErr_SetString(PyExc_TypeError, "expected a tuple (address, stride, stride, stride)");
        return 0;
    }
    if (!PyArg_ParseTuple(object, "O&LLL;expected an address and 3 strides", py_to_address,
                          &x->data, &stride[0], &stride[1], &stride[2]))
        return 0;
    for (int i = 0; i < 3; i++) x->stride[i] = stride[i];
    return 1;
}

#define CALL_NAMES                                                                                 \
    "dtype", "sizes", "q", "k_context", "v_context", "k", "v", "alpha", "start", "hidden", "sink", \
        "recent", "scale", "work", "n_blocks", "smem_bytes", "stream"
#define CALL_FORMAT "O&O&O&O&O&O&O&O&O&O&LLfO&iiO&"

/* What both directions take: arguments and launch, and what the parser writes in another type. */
typedef struct {
    lk_learn_args args;
    lk_cuda_learn_launch launch;
    long long sink, recent;
    int32_t cuda_error;
} call;

#define CALL_TARGETS(c)                                                                            \
    to_dtype, &(c)->args.dtype, to_sizes, &(c)->args, to_strided, &(c)->args.q, to_strided,        \
        &(c)->args.k_context, to_strided, &(c)->args.v_context, to_strided, &(c)->args.k,          \
        to_strided, &(c)->args.v, py_to_address, &(c)->args.alpha, py_to_address,                  \
        &(c)->args.start, py_to_address, &(c)->args.hidden, &(c)->sink, &(c)->recent,              \
        &(c)->args.scale, py_to_address, &(c)->launch.work, &(c)->launch.n_blocks,                 \
        &(c)->launch.smem_bytes, py_to_address, &(c)->launch.stream

static void finish_call(call *c) {
    c->args.sink = c->sink;
    c->args.recent = c->recent;
    c->launch.cuda_error = &c->cuda_error;
}

PyObject *py_learn_work_bytes(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"sizes", "backward", "n_blocks", NULL};
    (void)module;
    lk_learn_args a = {0};
    int backward, n_blocks;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "$O&pi:learn_work_bytes", names, to_sizes, &a,
                                     &backward, &n_blocks))
        return NULL;
    return PyLong_FromSize_t(lk_cuda_learn_work_bytes(&a, backward, n_blocks));
}

PyObject *py_learn_forward(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {CALL_NAMES, "o", "lse", NULL};
    (void)module;
    call c = {0};
    void *o, *lse;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "$" CALL_FORMAT "O&O&:learn_forward", names,
                                     CALL_TARGETS(&c), py_to_address, &o, py_to_address, &lse))
        return NULL;
    finish_call(&c);
    const lk_status status = lk_cuda_learn_forward(&c.args, o, lse, &c.launch);
    return py_done_or_raise(status, "learn_forward", c.cuda_error);
}

PyObject *py_learn_backward(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {CALL_NAMES, "d_o", "o", "lse", "dq", "dk", "dv", "dalpha", NULL};
    (void)module;
    call c = {0};
    lk_learn_grads grads = {0};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "$" CALL_FORMAT "O&O&O&O&O&O&O&:learn_backward",
                                     names, CALL_TARGETS(&c), to_strided, &grads.d_o, to_strided,
                                     &grads.o, py_to_address, &grads.lse, py_to_address, &grads.dq,
                                     py_to_address, &grads.dk, py_to_address, &grads.dv,
                                     py_to_address, &grads.dalpha))
        return NULL;
    finish_call(&c);
    const lk_status status = lk_cuda_learn_backward(&c.args, &grads, &c.launch);
    return py_done_or_raise(status, "learn_backward", c.cuda_error);
}
