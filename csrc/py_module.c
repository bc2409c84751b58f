/* py_module.c: the extension leank._C: method table, module state, start-up. */
#define LK_IMPORTS_ARRAY_API
#include "py_args.h"

/* A dict of the variants that were built, best first: name -> whether it can run here. */
static PyObject *isa_built(PyObject *module, PyObject *unused) {
    (void)module;
    (void)unused;
    PyObject *built = PyDict_New();
    int available;
    const char *name;
    for (int i = 0; built && (name = lk_isa_built(i, &available)); i++)
        if (PyDict_SetItemString(built, name, available ? Py_True : Py_False) != 0) Py_CLEAR(built);
    return built;
}

static PyObject *raise_isa(PyObject *module, const char *source, const char *name) {
    PyObject *built = isa_built(module, NULL);
    if (built)
        PyErr_Format(PyExc_ValueError, "%s: expected one that is True in %R, got '%s'", source,
                     built, name);
    Py_XDECREF(built);
    return NULL;
}

static PyObject *isa(PyObject *module, PyObject *unused) {
    (void)unused;
    const char *name;
    if (lk_isa(&name) == LK_OK) return PyUnicode_FromString(name);
    const char *wanted = getenv("LEANK_ISA");
    return raise_isa(module, "LEANK_ISA", wanted ? wanted : "");
}

static PyObject *force_isa(PyObject *module, PyObject *arg) {
    const char *name = PyUnicode_AsUTF8(arg);
    if (!name) return NULL;
    if (lk_isa_force(name) != LK_OK) return raise_isa(module, "name", name);
    Py_RETURN_NONE;
}

static PyObject *fail_allocation(PyObject *module, PyObject *arg) {
    (void)module;
    const long long n = PyLong_AsLongLong(arg);
    if (n == -1 && PyErr_Occurred()) return NULL;
    lk_test_fail_allocation(n);
    Py_RETURN_NONE;
}

static PyObject *set_poison(PyObject *module, PyObject *arg) {
    (void)module;
    const int on = PyObject_IsTrue(arg);
    if (on < 0) return NULL;
    lk_test_poison(on);
    Py_RETURN_NONE;
}

static PyObject *build_info(PyObject *module, PyObject *unused) {
    (void)module;
    (void)unused;
#ifdef _OPENMP
    const int openmp = _OPENMP;
#else
    const int openmp = 0;
#endif
#if defined(__clang__)
    const char *compiler = "clang " __clang_version__;
#elif defined(__GNUC__)
    const char *compiler = "gcc " __VERSION__;
#else
    const char *compiler = "unknown";
#endif
    return Py_BuildValue("{s:s,s:i,s:i}", "compiler", compiler, "openmp", openmp, "threads",
                         lk_thread_count(0));
}

/* clang-format off */
static PyMethodDef methods[] = {
    {"decode", (PyCFunction)(void (*)(void))py_decode, METH_VARARGS | METH_KEYWORDS,
     "decode(cache, q, k=None, v=None, *, valid=None, scale=None, softcap=None, sinks=None, out=None, n_threads=0)"
     "\n--\n\n"
     "Attend by LeanK's rule to a cache and to new tokens, which are stored.\n\n"
     "Parameters\n----------\n"
     "cache : LayerCache\n"
     "q : array [B, Hq, T, D]\n    Of the cache's dtype, the last axis contiguous; Hq is a multiple of Hkv.\n"
     "k, v : arrays [B, Hkv, T, D] and [B, Hkv, T, Dv], optional\n"
     "    Of the new tokens. None: they are stored already (T = 1).\n"
     "valid : bool array [B, T], optional\n    False where a column is padding of that row. None: all are tokens.\n"
     "scale : float, optional\n    Default: 1/sqrt(D).\n"
     "softcap : float, optional\n    Above 0, logits become softcap * tanh(logit / softcap).\n"
     "sinks : float32 array [Hq], optional\n"
     "    Logits of one more key per query head that has no value; neither scaled nor capped.\n"
     "out : array [B, Hq, T, Dv], optional\n    To write to. None: a new one.\n"
     "n_threads : int\n    0: what OpenMP would use.\n\n"
     "Returns\n-------\n"
     "array [B, Hq, T, Dv]\n    0 for padding columns.\n\n"
     "Raises\n------\n"
     "TypeError, ValueError\n    An argument does not fit; the cache is as it was.\n"
     "MemoryError\n    An allocation failed; the cache is as it was.\n"
     "RuntimeError\n    Another thread uses the cache.\n\n"
     "Notes\n-----\n"
     "Source: LeanK, arXiv 2508.02215, section 3."},
    {"learn_forward", (PyCFunction)(void (*)(void))py_learn_forward, METH_VARARGS | METH_KEYWORDS,
     "learn_forward(q, k_context, v_context, k, v, alpha, *, sink, recent, scale, start=None, hidden=None, "
     "n_threads=0)\n--\n\n"
     "Attend by the mixed rule of mask learning: middle keys count with alpha.\n\n"
     "Parameters\n----------\n"
     "q : array [B, Hq, T, D], float32, float16, or uint16 with the bits of bfloat16\n"
     "k_context, v_context : arrays [B, Hkv, Lc, D] and [B, Hkv, Lc, Dv] of what comes before the span\n"
     "k, v : arrays [B, Hkv, T, D] and [B, Hkv, T, Dv] of the span\n"
     "alpha : float32 array [Hkv, D], C-contiguous\n"
     "sink, recent, scale : the window and the factor of the logits\n"
     "start : int64 array [B], columns before it are padding; None: there is none\n"
     "hidden : bool array [Hkv], True where a head attends to no middle key; None: nowhere\n"
     "n_threads : int, 0: what OpenMP would use\n\n"
     "Returns\n-------\n"
     "o : array [B, Hq, T, Dv], 0 for padding columns\n"
     "lse : float32 array [B, Hq, T], -inf for padding columns\n\n"
     "Raises\n------\n"
     "TypeError, ValueError : an argument does not fit\n"
     "MemoryError : an allocation failed\n\n"
     "Source: LeanK, arXiv 2508.02215, section 3."},
    {"learn_backward", (PyCFunction)(void (*)(void))py_learn_backward, METH_VARARGS | METH_KEYWORDS,
     "learn_backward(d_o, o, lse, q, k_context, v_context, k, v, alpha, *, sink, recent, scale, start=None, "
     "hidden=None, n_threads=0)\n--\n\n"
     "Return (dq, dk, dv, dalpha) for the gradient d_o of o; o and lse are what learn_forward returned."},
    {"predict_memory", (PyCFunction)(void (*)(void))py_predict_memory, METH_VARARGS | METH_KEYWORDS,
     "predict_memory(keep, lengths, *, sink, recent, slack=64, dtype='float32', v_dim=None, max_tokens=None, "
     "max_call=1)\n--\n\nReturn what LayerCache.memory() will report for rows of these lengths (int64 array)."},
    {"select_channels", (PyCFunction)(void (*)(void))py_select_channels, METH_VARARGS | METH_KEYWORDS,
     "select_channels(scores, ratio, align)\n--\n\n"
     "Return the bool [N, Hkv, D] mask that keeps the best blocks of `align` channels within the exact budget."},
    {"check_mask", (PyCFunction)(void (*)(void))py_check_mask, METH_VARARGS | METH_KEYWORDS,
     "check_mask(keep, align)\n--\n\nRaise ValueError unless each head of [N, Hkv, D] keeps a multiple of align."},
    {"isa", isa, METH_NOARGS, "isa()\n--\n\nReturn the name of the instruction set variant in use."},
    {"isa_built", isa_built, METH_NOARGS,
     "isa_built()\n--\n\nReturn {name: can run here} of the variants that were built, best first."},
    {"build_info", build_info, METH_NOARGS, "build_info()\n--\n\nReturn compiler, OpenMP version and default threads."},
    {"_force_isa", force_isa, METH_O, "Use this variant from now on (tests and benchmarks)."},
    {"_fail_allocation", fail_allocation, METH_O, "Let the n-th allocation from now fail; 0: none (tests)."},
    {"_poison", set_poison, METH_O, "Fill new pages with NaN (tests)."},
    {NULL, NULL, 0, NULL},
};
/* clang-format on */

static int module_exec(PyObject *module) {
    py_state *state = PyModule_GetState(module);
    if (PyArray_ImportNumPyAPI() < 0) return -1;
    lk_watch_forks();
    state->layer_cache_type =
        (PyTypeObject *)PyType_FromModuleAndSpec(module, &py_layer_cache_spec, NULL);
    if (!state->layer_cache_type) return -1;
    if (PyModule_AddObjectRef(module, "LayerCache", (PyObject *)state->layer_cache_type) != 0)
        return -1;
    if (PyModule_AddIntConstant(module, "PAGE_TOKENS", LK_PAGE_TOKENS) != 0) return -1;
    if (PyModule_AddIntConstant(module, "CHANNEL_STEP", LK_CHANNEL_STEP) != 0) return -1;
    return PyModule_AddIntConstant(module, "MAX_HEAD_DIM", LK_MAX_HEAD_DIM);
}

static int module_traverse(PyObject *module, visitproc visit, void *arg) {
    py_state *state = PyModule_GetState(module);
    Py_VISIT(state->layer_cache_type);
    return 0;
}

static int module_clear(PyObject *module) {
    py_state *state = PyModule_GetState(module);
    Py_CLEAR(state->layer_cache_type);
    return 0;
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec},
#ifdef Py_mod_gil
    {Py_mod_gil, Py_MOD_GIL_USED}, /* a free-threaded Python turns it on, and says so */
#endif
    {0, NULL},
};

static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT,
    .m_name = "leank._C",
    .m_doc = "The C core of LeanK: packed caches, attention over them, mask selection.",
    .m_size = sizeof(py_state),
    .m_methods = methods,
    .m_slots = module_slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
};

PyMODINIT_FUNC PyInit__C(void) { return PyModuleDef_Init(&module_def); }
