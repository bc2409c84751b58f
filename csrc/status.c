/* status.c: status codes and element types as text and sizes. */
#include "leank.h"

const char *lk_status_text(lk_status status) {
    switch (status) {
    case LK_OK: return "no error";
    case LK_E_NOMEM: return "out of memory";
    case LK_E_SHAPE: return "a size does not fit the cache, or sizes overflow";
    case LK_E_VALUE: return "an argument is outside its range";
    case LK_E_LIMIT: return "the call would pass the limits of a reserved cache";
    case LK_E_STATE: return "the cache is in a state that does not allow this call";
    case LK_E_ISA: return "unknown instruction set, or not available on this machine";
    case LK_E_DEVICE: return "CUDA refused a call";
    }
    return "unknown status";
}

size_t lk_dtype_bytes(lk_dtype dtype) {
    switch (dtype) {
    case LK_F32: return 4;
    case LK_BF16:
    case LK_F16: return 2;
    }
    return 0;
}
