"""Calls of leank._C that succeed and calls that are refused, for tests of what holds for all."""

import copy

import numpy as np

from leank import _C, LayerCache, decode

B, HKV, HQ, D, DV = 2, 3, 6, 16, 24


def good(T=2):
    """Arguments of a call that succeeds."""
    return {
        "q": np.ones((B, HQ, T, D), np.float32),
        "k": np.ones((B, HKV, T, D), np.float32),
        "v": np.ones((B, HKV, T, DV), np.float32),
    }


def misaligned(x):
    raw = np.zeros(x.nbytes + 1, np.uint8)
    return raw[1:].view(x.dtype).reshape(x.shape)


def gaps(x):
    return np.repeat(x, 2, axis=-1)[..., ::2]


def odd_strides(x):
    """Rows that are no whole number of elements apart."""
    raw = np.zeros((*x.shape[:-1], x.shape[-1] * 4 + 2), np.uint8)
    return np.ndarray(x.shape, x.dtype, raw, strides=(*raw.strides[:-1], 4))


def read_only(x):
    x.flags.writeable = False
    return x


ONES = good()
SINKS = np.zeros(HQ, np.float32)
OUT = np.zeros((B, HQ, 2, DV), np.float32)
REFUSED = [
    (TypeError, r"q: expected a NumPy array, got list", {"q": ONES["q"].tolist()}),
    (TypeError, r"q: expected a NumPy array, got NoneType", {"q": None}),
    (TypeError, r"k: expected a NumPy array, got memoryview", {"k": memoryview(ONES["k"])}),
    (TypeError, r"q: expected dtype float32, got float64", {"q": ONES["q"].astype(float)}),
    (TypeError, r"k: expected dtype float32, got uint16", {"k": ONES["k"].astype(np.uint16)}),
    (TypeError, r"v: expected dtype float32, got >f4", {"v": ONES["v"].astype(">f4")}),
    (TypeError, r"out: expected dtype float32, got float16", {"out": OUT.astype(np.float16)}),
    (ValueError, r"q: expected \(2, any, any, 16\), got \(2, 6, 2, 8\)", {"q": ONES["q"][..., :8]}),
    (ValueError, r"q: expected \(2, any, any, 16\), got \(1, 6, 2, 16\)", {"q": ONES["q"][:1]}),
    (ValueError, r"q: expected \(2, any, any, 16\), got \(6, 2, 16\)", {"q": ONES["q"][0]}),
    (ValueError, r"q: expected a multiple of 3 heads, got 4", {"q": ONES["q"][:, :4]}),
    (ValueError, r"q: expected a multiple of 3 heads, got 0", {"q": ONES["q"][:, :0]}),
    (ValueError, r"k: expected \(2, 3, 2, 16\), got \(2, 3, 1, 16\)", {"k": ONES["k"][:, :, :1]}),
    (ValueError, r"k: expected \(2, 3, 2, 16\), got \(2, 6, 2, 16\)", {"k": ONES["q"]}),
    (ValueError, r"v: expected \(2, 3, 2, 24\), got \(2, 3, 2, 16\)", {"v": ONES["k"]}),
    (ValueError, r"out: expected \(2, 6, 2, 24\), got \(2, 6, 2, 16\)", {"out": ONES["q"].copy()}),
    (ValueError, r"q: expected .*aligned.*, got", {"q": misaligned(ONES["q"])}),
    (ValueError, r"k: expected .*contiguous.*, got", {"k": gaps(ONES["k"])}),
    (ValueError, r"v: expected .*contiguous.*, got", {"v": odd_strides(ONES["v"])}),
    (ValueError, r"out: expected .*contiguous.*, got", {"out": gaps(OUT)}),
    (
        ValueError,
        r"out: expected a writable array, got a read-only",
        {"out": read_only(OUT.copy())},
    ),
    (ValueError, r"valid: expected \(2, 2\), got \(2, 3\)", {"valid": np.ones((2, 3), bool)}),
    (ValueError, r"valid: expected .*contiguous.*, got", {"valid": np.ones((2, 4), bool)[:, ::2]}),
    (TypeError, r"valid: expected dtype bool, got int64", {"valid": np.ones((2, 2), int)}),
    (ValueError, r"scale: expected a finite number, got nan", {"scale": float("nan")}),
    (ValueError, r"scale: expected a finite number, got inf", {"scale": float("inf")}),
    (ValueError, r"scale: expected", {"scale": 3e38}),
    (ValueError, r"scale: expected", {"scale": -3e38}),
    (TypeError, r"real number", {"scale": "1"}),
    (ValueError, r"softcap: expected 0 or a positive finite .*, got -1.0", {"softcap": -1.0}),
    (ValueError, r"softcap: expected .*, got nan", {"softcap": float("nan")}),
    (ValueError, r"softcap: expected .*, got inf", {"softcap": float("inf")}),
    (ValueError, r"softcap: expected .*, got -inf", {"softcap": -float("inf")}),
    (ValueError, r"softcap: expected .*, got 1e\+39", {"softcap": 1e39}),
    (ValueError, r"softcap: expected .*, got 1e-60", {"softcap": 1e-60}),
    (TypeError, r"real number", {"softcap": "1"}),
    (TypeError, r"sinks: expected a NumPy array, got list", {"sinks": SINKS.tolist()}),
    (TypeError, r"sinks: expected dtype float32, got float64", {"sinks": SINKS.astype(float)}),
    (ValueError, r"sinks: expected \(6,\), got \(3,\)", {"sinks": SINKS[:3]}),
    (ValueError, r"sinks: expected \(6,\), got \(6, 1\)", {"sinks": SINKS[:, None]}),
    (
        ValueError,
        r"sinks: expected \(6,\), got \(\)",
        {"sinks": SINKS.sum(keepdims=True)[0:1].reshape(())},
    ),
    (
        ValueError,
        r"sinks: expected .*contiguous.*, got",
        {"sinks": np.zeros(2 * HQ, np.float32)[::2]},
    ),
    (ValueError, r"sinks: expected .*aligned.*, got", {"sinks": misaligned(SINKS)}),
    (TypeError, r"k, v: expected both or neither, got one", {"v": None}),
    (TypeError, r"valid: expected only .* k and v", {"k": None, "v": None, "valid": OUT}),
    (ValueError, r"q: expected one column .*, got 2 columns", {"k": None, "v": None}),
    (ValueError, r"q: expected at least one column, got 0", {"q": ONES["q"][:, :, :0]}),
    (TypeError, r"n_threads: expected an integer, got float", {"n_threads": 1.5}),
    (ValueError, r"n_threads: expected -\d+ to 2147483647, got 2147483648", {"n_threads": 2**31}),
    (ValueError, r"n_threads: expected .*2\*\*60 in size, got 11805", {"n_threads": 2**70}),
    (TypeError, r"keyword", {"threads": 1}),
]

KEEP = np.arange(HKV * D).reshape(HKV, D) % D < np.array([[0], [8], [D]])
WINDOW = {"sink": 4, "recent": 8}
LENGTHS, ROWS = np.array([5, 90]), np.array([1, 1, 0])
ALPHA, SCORES = np.ones((HKV, D), np.float32), np.linspace(0, 1, HKV * D, dtype=np.float32)
LEARN = {"sink": 1, "recent": 2, "scale": 0.1}
EMPTY = {name: x[:, :, :0] for name, x in ONES.items()}
LEARN_INPUTS = (ONES["q"], EMPTY["k"], EMPTY["v"], ONES["k"], ONES["v"], ALPHA)
FORWARD = _C.learn_forward(*LEARN_INPUTS, **LEARN)


def small_cache(n_tokens=90):
    """Make a cache of 2 rows for the calls below."""
    cache = LayerCache(KEEP, n_rows=B, v_dim=DV, **WINDOW)
    cache.append(*(np.ones((B, HKV, n_tokens, dim), np.float32) for dim in (D, DV)))
    return cache


# By name: what succeeds, given a cache. It may change the cache.
CALLS = {
    "create": lambda cache: LayerCache(KEEP, n_rows=2, **WINDOW),
    "create reserved": lambda cache: LayerCache(KEEP, n_rows=2, max_tokens=200, **WINDOW),
    "append": lambda cache: cache.append(ONES["k"], ONES["v"], np.ones((B, 2), bool)),
    "decode": lambda cache: decode(cache, **good(), sinks=SINKS, softcap=2.0),
    "decode one": lambda cache: decode(cache, ONES["q"][:, :, :1]),
    "decode into out": lambda cache: decode(cache, **good(), out=OUT.copy()),
    "copy": lambda cache: cache.copy(),
    "deepcopy": lambda cache: copy.deepcopy(cache),
    "select": lambda cache: cache.select(ROWS),
    "crop": lambda cache: cache.crop(30),
    "hold": lambda cache: cache.hold(True),
    "reset": lambda cache: cache.reset(),
    "gather": lambda cache: cache.gather(0),
    "memory": lambda cache: cache.memory(),
    "arrays": lambda cache: (cache.lengths, cache.lo, cache.prompt_lengths, cache.real, cache.keep),
    "numbers": lambda cache: (cache.n_rows, cache.n_columns, cache.max_tokens, cache.dtype),
    "predict_memory": lambda cache: _C.predict_memory(KEEP, LENGTHS, **WINDOW),
    "select_channels": lambda cache: _C.select_channels(SCORES.reshape(1, HKV, D), 0.5, 8),
    "check_mask": lambda cache: _C.check_mask(KEEP[None], 8),
    "build_info": lambda cache: (_C.isa(), _C.isa_built(), _C.build_info()),
    "learn_forward": lambda cache: _C.learn_forward(*LEARN_INPUTS, **LEARN),
    "learn_backward": lambda cache: _C.learn_backward(FORWARD[0], *FORWARD, *LEARN_INPUTS, **LEARN),
}


def refused_decode(change):
    return lambda cache: decode(cache, **(good() | change))


# By name: what raises; the cache stays as it is. Messages: test_boundary, test_cache_errors.
ERRORS = {
    "append shape": lambda cache: cache.append(ONES["k"], ONES["v"][:1]),
    "append dtype": lambda cache: cache.append(LENGTHS, ONES["v"]),
    "append without v": lambda cache: cache.append(ONES["k"]),
    "crop": lambda cache: cache.crop(999),
    "crop huge": lambda cache: cache.crop(2**70),
    "crop text": lambda cache: cache.crop("1"),
    "select index": lambda cache: cache.select(LENGTHS),
    "select none": lambda cache: cache.select(ROWS[:0]),
    "select dtype": lambda cache: cache.select(SINKS),
    "gather": lambda cache: cache.gather(9),
    "expect_prompt": lambda cache: cache.expect_prompt(3),
    "expect_prompt text": lambda cache: cache.expect_prompt("3"),
    "reduce": lambda cache: cache.__reduce__(),
    "no such attribute": lambda cache: cache.nothing,
    "create rows": lambda cache: LayerCache(KEEP, n_rows=0, **WINDOW),
    "create dtype": lambda cache: LayerCache(KEEP, n_rows=1, dtype="x", **WINDOW),
    "create keep": lambda cache: LayerCache(KEEP[:, :9], n_rows=1, **WINDOW),
    "create window": lambda cache: LayerCache(KEEP, n_rows=1, sink=0),
    "create huge": lambda cache: LayerCache(KEEP, n_rows=1, sink=2**70, recent=8),
    "create limit": lambda cache: LayerCache(KEEP, n_rows=1, max_tokens=2**60, **WINDOW),
    "hold reserved": lambda cache: LayerCache(KEEP, n_rows=1, max_tokens=9, **WINDOW).hold(True),
    "predict_memory": lambda cache: _C.predict_memory(KEEP, -LENGTHS, **WINDOW),
    "select_channels": lambda cache: _C.select_channels(SCORES, 0.5, 8),
    "select_channels ratio": lambda cache: _C.select_channels(SCORES.reshape(1, HKV, D), 2.0, 8),
    "select_channels nan": lambda cache: _C.select_channels(ALPHA[None] * np.nan, 0.5, 8),
    "check_mask": lambda cache: _C.check_mask(KEEP[None], 16),
    "force_isa": lambda cache: _C._force_isa("none"),
    "learn_forward": lambda cache: _C.learn_forward(*LEARN_INPUTS, **(LEARN | {"recent": 0})),
    "learn_forward shape": lambda cache: _C.learn_forward(*LEARN_INPUTS[::-1], **LEARN),
    "learn_backward": lambda cache: _C.learn_backward(*LEARN_INPUTS, **LEARN),
} | {
    f"decode {i}: {message}": refused_decode(change)
    for i, (_, message, change) in enumerate(REFUSED)
}
