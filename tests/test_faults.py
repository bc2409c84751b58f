"""Allocations that fail, in C and in Python: MemoryError, and the cache is as it was.

tests/test_cache_errors.py has the C allocations of each change of a cache, in more states.
"""

import pytest

from leank import _C

from .boundary_calls import CALLS, ERRORS, small_cache
from .cache_tools import snapshot

_testcapi = pytest.importorskip("_testcapi", reason="this Python has no _testcapi")


def python_allocation(n):
    """Let the n-th allocation of the interpreter fail, 1 being the next."""
    _testcapi.set_nomemory(n - 1, n)


def c_allocation(n):
    _C._fail_allocation(n)


def no_failure():
    _testcapi.remove_mem_hooks()
    _C._fail_allocation(0)


def until_it_does_not_run_out(operation, fail):
    """Let each allocation fail in turn, each time with a new copy of a cache.

    Returns how many there were, and the exception that the operation ends with at last.
    """
    base = small_cache()
    before = snapshot(base)
    for n in range(1, 400):
        cache, error = base.copy(), None
        fail(n)
        try:
            operation(cache)
        except Exception as caught:
            error = caught
        finally:
            no_failure()
        if not isinstance(error, MemoryError):
            del cache
            assert snapshot(base) == before
            return n - 1, error
        del error  # its frames hold the copy
        assert snapshot(cache) == before, f"allocation {n}"
        del cache
        assert snapshot(base) == before, f"allocation {n}"
    raise AssertionError("400 allocations failed and the operation still makes more")


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("fail", [c_allocation, python_allocation])
def test_a_call_runs_out_of_memory(name, fail):
    n_allocations, error = until_it_does_not_run_out(CALLS[name], fail)
    assert error is None
    if fail is c_allocation and name.split()[0] in ("create", "append", "decode", "copy", "select"):
        assert n_allocations > 0


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_message_runs_out_of_memory(name):
    """The message is then MemoryError, or what NumPy makes of it; nothing else happens."""
    n_allocations, error = until_it_does_not_run_out(ERRORS[name], python_allocation)
    assert n_allocations > 0 and isinstance(error, Exception)


@pytest.mark.parametrize("fail", [c_allocation, python_allocation])
def test_the_hooks_fail_what_they_should(fail):
    """Without this the tests above could pass because nothing ever failed."""
    failed = False
    fail(1)
    try:
        CALLS["create"](None)
    except MemoryError:
        failed = True
    finally:
        no_failure()
    assert failed
