"""leank.LayerCache beside the page model under the same random operations."""

import math

import numpy as np
import pytest
from hypothesis import settings

from leank import _C, LayerCache, decode

from . import test_page_model
from .compare import assert_within_budget


class CacheOperations(test_page_model.Operations):
    """The operations of the page model at the real page size, with the C cache in step."""

    P, D, V_DIM, WIDTHS = _C.PAGE_TOKENS, 16, 8, (0, 8, 16)
    MAX_T, MAX_COLUMNS = 90, 400
    SINKS, RECENTS, SLACKS = (0, 5, 64, 70), (1, 30, 64), (0, 20, 64)

    def other_create(self):
        return LayerCache(self.keep, n_rows=self.n_rows, v_dim=self.V_DIM, **self.window)

    def other(self, cache, operation, *args):
        model, history, other = cache
        if operation == "decode":
            self.decode(model, history, other, *args)
        elif operation == "select":
            other.select(np.array(args[0]))
        elif operation == "expect_prompt" and other.n_columns:
            with pytest.raises(RuntimeError):
                other.expect_prompt(*args)
        else:
            getattr(other, operation)(*args)

    def decode(self, model, history, other, q, k, v, valid, truth):
        if q.shape[2] == 0:
            with pytest.raises(ValueError, match="q: expected at least one column, got 0"):
                decode(other, q, k, v, valid=valid)
            return
        o = decode(other, q, k, v, valid=valid, scale=self.scale)
        for b in range(len(o)):
            plain = history.attend(b, q[b], self.keep, self.scale)[0]
            if plain.size == 0:
                plain = truth[b]
            assert_within_budget(o[b], truth[b], plain, "float32", f"row {b}")

    def other_check(self, cache):
        model, _, other = cache
        assert (other.n_columns, other.n_rows) == (model.n_columns, len(model.rows))
        assert other.lengths.tolist() == [row.len for row in model.rows]
        assert other.lo.tolist() == [row.lo for row in model.rows]
        prompts = [-1 if row.n0 == math.inf else row.n0 for row in model.rows]
        assert other.prompt_lengths.tolist() == prompts
        assert other.real.tolist() == [row.real for row in model.rows]
        memory = other.memory()
        assert (memory["n_pages"], memory["n_twins"]) == model.live()
        assert (memory["k_bytes"], memory["v_bytes"]) == model.bytes(*model.live(), 4)
        for b in range(len(model.rows)):
            for got, told in zip(other.gather(b), model.gather(b), strict=True):
                np.testing.assert_array_equal(got, told.astype(np.float32))

    def teardown(self):
        """With every row empty and every copy gone, nothing is left in the slabs."""
        if caches := getattr(self, "caches", []):
            for _, _, other in caches:
                other.reset()
            assert all(set(other.memory().values()) == {0} for _, _, other in caches)
        super().teardown()


TestCacheOperations = CacheOperations.TestCase
TestCacheOperations.settings = settings(max_examples=150, stateful_step_count=25)
