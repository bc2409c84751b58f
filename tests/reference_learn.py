"""Float64 truth of the mixed attention of mask learning, formula by formula."""

import numpy as np


def dot(x, y):
    """Matrix product by one thread: those of a BLAS wait for each other where cores are busy."""
    return np.einsum("ij,jk->ik", x, y)


def kinds(n_context, n_columns, start, sink, recent):
    """Return (window, middle) bool [T, L] of one row: which pairs are of which kind."""
    query = np.arange(n_context, n_context + n_columns)[:, None]
    key = np.arange(n_context + n_columns)[None, :]
    seen = (key >= start) & (query >= start) & (key <= query)
    window = seen & ((key - start < sink) | (query - key < recent))
    return window, seen & ~window


def forward(q, k, v, alpha, *, n_context, sink, recent, scale, start=None, hidden=None, **options):
    """Return (o, lse, A) of q [B, Hq, T, D] and the k, v [B, Hkv, L, .] of context and span.

    options : `dtype` to compute in, float64 by default; `rounded` rounds A to the dtype of v.
    """
    dtype = options.get("dtype", np.float64)
    rounded = options.get("rounded", lambda x: x)
    q, k, v, alpha = (np.asarray(x, dtype) for x in (q, k, v, alpha))
    (B, Hq, T, _), (Hkv, L) = q.shape, k.shape[1:3]
    o = np.zeros((B, Hq, T, v.shape[3]), dtype)
    lse = np.full((B, Hq, T), -np.inf, dtype)
    A = np.zeros((B, Hq, T, L), dtype)
    for b in range(B):
        window, middle = kinds(n_context, T, 0 if start is None else start[b], sink, recent)
        for h in range(Hq):
            g = h // (Hq // Hkv)
            attended = window if hidden is not None and hidden[g] else window | middle
            plain, pruned = dot(q[b, h], k[b, g].T), dot(q[b, h] * alpha[g], k[b, g].T)
            s = np.where(attended, np.where(middle, pruned, plain) * dtype(scale), -np.inf)
            t = attended.any(1)
            top = s[t].max(1, keepdims=True)
            p = np.exp(s[t] - top)
            total = p.sum(1, keepdims=True)
            lse[b, h, t] = (top + np.log(total))[:, 0]
            A[b, h, t] = rounded(p) / total
            o[b, h, t] = dot(rounded(p), v[b, g]) / total
    return o, lse, A


def backward(d_o, o, A, q, k, v, alpha, *, n_context, sink, recent, scale, start=None, **options):
    """Return (dq, dk, dv, dalpha); dk and dv of the span. `hidden` shows in A alone."""
    dtype = options.get("dtype", np.float64)
    d_o, o, A, q, k, v, alpha = (np.asarray(x, dtype) for x in (d_o, o, A, q, k, v, alpha))
    (B, Hq, T, _), Hkv = q.shape, k.shape[1]
    dq, dk, dv, dalpha = (np.zeros_like(x) for x in (q, k, v, alpha))
    scale = dtype(scale)
    for b in range(B):
        middle = kinds(n_context, T, 0 if start is None else start[b], sink, recent)[1]
        for h in range(Hq):
            g = h // (Hq // Hkv)
            delta = (d_o[b, h] * o[b, h]).sum(1)
            dS = A[b, h] * (dot(d_o[b, h], v[b, g].T) - delta[:, None])
            on_window, on_middle = np.where(middle, 0, dS), np.where(middle, dS, 0)
            middle_k = dot(on_middle, k[b, g])
            dq[b, h] = scale * (dot(on_window, k[b, g]) + alpha[g] * middle_k)
            dalpha[g] += scale * (q[b, h] * middle_k).sum(0)
            dk[b, g] += scale * (dot(on_window.T, q[b, h]) + alpha[g] * dot(on_middle.T, q[b, h]))
            dv[b, g] += dot(A[b, h].T, d_o[b, h])
    return dq, dk[:, :, n_context:], dv[:, :, n_context:], dalpha
