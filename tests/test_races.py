"""Arrays that change during a call, forks and thread counts; each case in a process of its own.

A crash or a call that waits for ever then fails one test with its traceback, and nothing else.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from leank import _C

NEEDS_TASKS = pytest.mark.skipif(
    not Path("/proc/self/task").exists() or not _C.build_info()["openmp"],
    reason="needs /proc and OpenMP",
)
ASAN = "asan" in os.environ.get("LD_PRELOAD", "")

HEADER = """
import mmap, os, signal, time
import numpy as np
from leank import _C, LayerCache, decode

rng = np.random.default_rng(20250820)

def draw(*shape):
    return rng.standard_normal(shape, np.float32)

def flipping(first, second, pause=0.0):
    '''An array that another process fills with the two in turn, while this one lives.'''
    shared, parent = mmap.mmap(-1, first.nbytes), os.getpid()
    shared[:] = first.tobytes()
    if os.fork() == 0:
        signal.alarm(60)
        one, two = first.tobytes(), second.tobytes()
        while os.getppid() == parent:
            for values in (one, two) * 100:
                shared[:] = values
                if pause:
                    time.sleep(pause)
        os._exit(0)
    return np.frombuffer(shared, first.dtype).reshape(first.shape)

def assert_whole(cache):
    assert cache.lengths.tolist() == cache.real.sum(axis=1).tolist()
    predicted = _C.predict_memory(cache.keep, cache.lengths, sink=2, recent=4, slack=0)
    for name, value in cache.memory().items():
        assert name == "slab_bytes" or value == predicted[name], (name, value, predicted[name])

def in_child(work):
    '''Exit status of a forked child that does `work`; a child that hangs is ended by a signal.'''
    child = os.fork()
    if child == 0:
        signal.alarm(40)
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""


def run_alone(code, **environment):
    """Run a program in a fresh interpreter; returns what it printed."""
    command = [sys.executable, "-X", "faulthandler", "-c", HEADER + code]
    quiet = {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        command,
        env=os.environ | quiet | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, f"status {done.returncode}\n{done.stderr[-3000:]}"
    return done.stdout.strip()


# --------------------------------------------------------------------- arrays that change meanwhile


@pytest.mark.parametrize("second", ["1", "2**40", "-(2**40)"])
def test_rows_may_change_during_select(second):
    """NumPy drops the GIL while it writes to an array, so that holding it protects nothing."""
    run_alone(f"""
cache = LayerCache(np.ones((1, 8), bool), n_rows=2, sink=2, recent=4, slack=0)
valid = np.arange(9) >= np.array([[4], [0]])
cache.append(draw(2, 1, 9, 8), draw(2, 1, 9, 8), valid)
rows = flipping(np.zeros(2000, np.int64), np.full(2000, {second}, np.int64))
for _ in range(150):
    copy = cache.copy()
    try:
        copy.select(rows)
    except ValueError as error:
        assert "rows: expected indices 0 to 1, got" in str(error)
    assert set(copy.lengths.tolist()) <= {{5, 9}} and set(copy.prompt_lengths.tolist()) <= {{5, 9}}
    assert copy.lengths.tolist() == copy.real.sum(axis=1).tolist()
    copy.reset()
    assert copy.memory()["n_pages"] == 0
assert_whole(cache)
""")


def test_valid_may_change_during_append():
    run_alone("""
cache = LayerCache(np.ones((1, 8), bool), n_rows=2, sink=2, recent=4, slack=0)
k, v = draw(2, 1, 4096, 8), draw(2, 1, 4096, 8)
valid = flipping(np.arange(8192).reshape(2, 4096) % 3 > 0, np.arange(8192).reshape(2, 4096) % 2 > 0)
for _ in range(150):
    cache.append(k, v, valid)
    assert_whole(cache)
    real = cache.real
    for b in range(2):
        np.testing.assert_array_equal(cache.gather(b)[0][0], k[b, 0, real[b]])
    cache.reset()
""")


def test_valid_may_change_during_decode():
    """What is stored, and which columns of the output are 0, follow one reading of valid."""
    run_alone("""
q, k, v = draw(2, 2, 600, 8), draw(2, 2, 600, 8), draw(2, 2, 600, 8)
valid = flipping(np.arange(1200).reshape(2, 600) % 3 > 0, np.arange(1200).reshape(2, 600) % 2 > 0)
keep = np.arange(16).reshape(2, 8) < 8
for _ in range(100):
    cache = LayerCache(keep, n_rows=2, sink=2, recent=4, slack=0)
    o = decode(cache, q, k, v, valid=valid)
    assert_whole(cache)
    real = cache.real
    assert (o.any(axis=3) == real[:, None]).all()
    np.testing.assert_array_equal(decode(cache.__class__(keep, n_rows=2, sink=2, recent=4, slack=0),
                                         q, k, v, valid=real), o)
""")


def test_keep_may_change_during_creation():
    """The mask that a cache reports is the one by which it stores."""
    run_alone("""
keep = flipping(np.ones((256, 256), bool), np.zeros((256, 256), bool), pause=5e-5)
made, k = 0, draw(1, 256, 3, 256)
for _ in range(400):
    try:
        cache = LayerCache(keep, n_rows=1, sink=2, recent=4, slack=0)
    except ValueError:
        continue
    made += 1
    cache.append(k, k)
    assert_whole(cache)
    np.testing.assert_array_equal(cache.gather(0)[0], k[0])
assert made
""")


@pytest.mark.parametrize("first", ["np.ones((1, 512), bool)", "rng.random((1, 512)) < 0.5"])
def test_keep_may_change_during_prediction(first):
    """What is counted is a mask that was checked: multiples of 8 channels."""
    run_alone(f"""
first = {first}
keep, lengths = flipping(first, ~first), np.array([640])
for _ in range(40000):
    try:
        memory = _C.predict_memory(keep, lengths, sink=0, recent=1, slack=0)
    except ValueError:
        continue
    n_kept, odd = divmod(memory["k_bytes"] // (64 * 4) - 512, 9)
    assert odd == 0 and n_kept % 8 == 0, memory
    assert (memory["n_pages"], memory["n_twins"]) == (10, n_kept < 512)
""")


# ------------------------------------------------------------------------------------- forks


@pytest.mark.parametrize("first_call", ["decode", "append"])
def test_a_forked_child_goes_on(first_call):
    """OpenMP's workers do not exist in a child; calls there must not wait for them."""
    run_alone(f"""
keep = np.arange(128).reshape(2, 64) % 64 < 24
cache = LayerCache(keep, n_rows=2, sink=2, recent=4, slack=0)
q, k, v = draw(2, 8, 1500, 64), draw(2, 2, 1500, 64), draw(2, 2, 1500, 64)
if "{first_call}" == "decode":
    decode(cache, q, k, v, n_threads=2)
else:
    cache.append(k, v)
if _C.build_info()["openmp"] and os.path.exists("/proc/self/task"):
    assert len(os.listdir("/proc/self/task")) > 1  # otherwise this shows nothing
same = cache.copy()

def work(cache):
    cache.append(k, v)
    return decode(cache, q, k, v, n_threads=2)

def child():
    o = work(cache)
    assert in_child(lambda: work(cache)) == 0
    np.testing.assert_array_equal(o, expected)

expected = work(same)
assert in_child(child) == 0
np.testing.assert_array_equal(work(cache), expected)
""")


@NEEDS_TASKS
def test_a_child_goes_on_where_others_used_openmp():
    """The workers may be those of another library, started before LeanK's first call."""
    run_alone("""
import ctypes
paths = {line.split()[-1] for line in open("/proc/self/maps") if "/libgomp" in line}
for path in paths:
    nothing = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: None)
    ctypes.CDLL(path).GOMP_parallel(nothing, None, 2, 0)
    assert len(os.listdir("/proc/self/task")) > 1
cache = LayerCache(np.arange(128).reshape(2, 64) % 64 < 24, n_rows=2, sink=2, recent=4)
q, k, v = draw(2, 8, 1500, 64), draw(2, 2, 1500, 64), draw(2, 2, 1500, 64)
assert in_child(lambda: decode(cache, q, k, v, n_threads=2)) == 0
""")


# -------------------------------------------------------------------------------- thread counts

# Calls that pack more elements, and attend to more, than one thread would be given alone.
LARGE = """
def tasks():
    return len(os.listdir("/proc/self/task"))

cache = LayerCache(np.arange(128).reshape(2, 64) % 64 < 24, n_rows=1, sink=2, recent=4, slack=0)
q, k, v = draw(1, 4, 3000, 64), draw(1, 2, 3000, 64), draw(1, 2, 3000, 64)
before = tasks()
"""


@NEEDS_TASKS
def test_one_thread_starts_no_other():
    run_alone(
        LARGE
        + """
decode(cache, q, k, v, n_threads=1)
for _ in range(3):
    decode(cache, q[:, :, :1], k[:, :, :1], v[:, :, :1], n_threads=1)
assert tasks() == before, (before, tasks())
decode(cache, q, k, v, n_threads=2)
assert tasks() == before + 1, (before, tasks())
""",
        OMP_NUM_THREADS="4",
    )


@NEEDS_TASKS
def test_packing_follows_openmp():
    """append has no n_threads: it packs with as many threads as OpenMP says."""
    for count in (1, 3):
        run_alone(
            LARGE + f"cache.append(k, v)\nassert tasks() - before == {count - 1}, tasks()",
            OMP_NUM_THREADS=str(count),
        )


@pytest.mark.skipif(ASAN, reason="ASan needs more address space than there is")
def test_any_number_of_threads_may_be_asked_for():
    """With room for the stacks of a thousand threads a million do not start; libgomp would exit."""
    run_alone(
        """
import resource
keep = np.arange(4 * 8).reshape(4, 8) % 8 < 8
q, k, v = draw(64, 16, 256, 8), draw(64, 4, 256, 8), draw(64, 4, 256, 8)
cache = LayerCache(keep, n_rows=64, sink=2, recent=4)
size = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 30),) * 2)
o = decode(cache, q, k, v, n_threads=10**6)
other = LayerCache(keep, n_rows=64, sink=2, recent=4)
np.testing.assert_array_equal(decode(other, q, k, v, n_threads=1), o)
for n_threads in (2**31 - 1, -1, -(2**31)):
    decode(cache, q[:, :, :1], k[:, :, :1], v[:, :, :1], n_threads=n_threads)
""",
        OMP_STACKSIZE="1M",
        MALLOC_ARENA_MAX="1",
    )
