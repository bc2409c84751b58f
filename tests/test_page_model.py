"""The page model against the rule on full histories, under random operations; its promises."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from .page_model import PageModel
from .reference import History, attend

FRACTION = st.integers(0, 16).map(lambda n: n / 16)


def draw_valid(kind, n_rows, n_columns, rng):
    """Which columns of a call are tokens: all, padding on the left or the right, or anything."""
    real = rng.integers(0, n_columns + 1, (n_rows, 1))
    column = np.arange(n_columns)
    return {
        "all": np.ones((n_rows, n_columns), bool),
        "left": column >= real,
        "right": column < real,
        "any": rng.random((n_rows, n_columns)) < 0.6,
    }[kind]


class Operations(RuleBasedStateMachine):
    """A few caches that share pages: a model and a history for each, operated in step.

    A subclass may set the sizes, and hook a third party in: `other_*` methods get each operation.
    """

    P, D, V_DIM, WIDTHS = 4, 4, 3, (0, 1, 4)
    MAX_T, MAX_COLUMNS = 14, 60
    SINKS, RECENTS, SLACKS = (0, 3, 4, 6), (1, 4, 7), (0, 4, 5)

    def other_create(self):
        return None

    def other_check(self, cache):
        """Compare what is stored, after any operation."""

    def other(self, cache, operation, *args):
        """Do the same operation on the third party."""

    @initialize(data=st.data())
    def create(self, data):
        widths = data.draw(st.lists(st.sampled_from(self.WIDTHS), min_size=1, max_size=2), "widths")
        self.rng = np.random.default_rng(data.draw(st.integers(0, 1000), "seed"))
        self.keep = np.zeros((len(widths), self.D), bool)
        for g, width in enumerate(widths):
            self.keep[g, self.rng.permutation(self.D)[:width]] = True
        self.window = {
            "sink": data.draw(st.sampled_from(self.SINKS), "sink"),
            "recent": data.draw(st.sampled_from(self.RECENTS), "recent"),
            "slack": data.draw(st.sampled_from(self.SLACKS), "slack"),
        }
        self.n_q_heads = len(widths) * data.draw(st.sampled_from((1, 2)), "R")
        self.n_rows = data.draw(st.integers(1, 3), "n_rows")
        model = PageModel(self.keep, self.n_rows, v_dim=self.V_DIM, page=self.P, **self.window)
        history = History(self.n_rows, page=self.P, **self.window)
        self.caches = [(model, history, self.other_create())]
        self.scale = 1 / math.sqrt(self.D)

    def pick(self, which):
        return self.caches[which % len(self.caches)]

    def normal(self, *shape):
        return self.rng.standard_normal(shape).astype(np.float32)

    @rule(
        which=st.integers(0, 2),
        n_columns=st.integers(0, 6) | st.integers(1, 1000),
        kind=st.sampled_from(("all", "all", "left", "right", "any")),
        attends=st.booleans(),
    )
    def call(self, which, n_columns, kind, attends):
        model, history, other = self.pick(which)
        n_columns = min(n_columns % (self.MAX_T + 1), self.MAX_COLUMNS - model.n_columns)
        n_rows, n_heads = len(model.rows), len(self.keep)
        valid = draw_valid(kind, n_rows, n_columns, self.rng)
        k = self.normal(n_rows, n_heads, n_columns, self.D)
        v = self.normal(n_rows, n_heads, n_columns, self.V_DIM)
        q = self.normal(n_rows, self.n_q_heads, n_columns, self.D)
        if attends:
            model.put(k, v, valid)
            history.put(k, v, valid)
            o = model.attend(q.astype(np.float64), self.scale)
            for b in range(n_rows):
                truth, positions = history.attend(b, q[b].astype(np.float64), self.keep, self.scale)
                np.testing.assert_allclose(
                    o[b][..., : truth.shape[-1]], truth, rtol=1e-10, atol=1e-12
                )
                assert not o[b][:, np.array(positions, int) < 0].any()
            self.other((model, history, other), "decode", q, k, v, valid, o)
            model.settle()
        else:
            model.append(k, v, valid)
            history.put(k, v, valid)
            self.other((model, history, other), "append", k, v, valid)
        history.settle()

    @rule(which=st.integers(0, 2), keep=FRACTION)
    def crop(self, which, keep):
        model, history, other = self.pick(which)
        n_columns = int(model.n_columns * keep)
        model.crop(n_columns)
        history.crop(n_columns)
        self.other((model, history, other), "crop", n_columns)

    @rule(which=st.integers(0, 2), on=st.booleans())
    def hold(self, which, on):
        model, history, other = self.pick(which)
        model.hold(on)
        history.hold(on)
        self.other((model, history, other), "hold", on)

    @rule(which=st.integers(0, 2), rows=st.lists(st.integers(0, 2), min_size=1, max_size=3))
    def select(self, which, rows):
        model, history, other = self.pick(which)
        rows = [b % len(model.rows) for b in rows]
        model.select(rows)
        history.select(rows)
        self.other((model, history, other), "select", rows)

    @rule(which=st.integers(0, 2), n_columns=st.integers(1, 1000))
    def announce(self, which, n_columns):
        model, history, other = self.pick(which)
        n_columns = n_columns % (2 * self.MAX_T) + 1
        if model.n_columns:
            with pytest.raises(RuntimeError):
                model.expect_prompt(n_columns)
        else:
            model.expect_prompt(n_columns)
            history.expect_prompt(n_columns)
        self.other((model, history, other), "expect_prompt", n_columns)

    @precondition(lambda self: len(self.caches) < 3)
    @rule(which=st.integers(0, 2))
    def copy(self, which):
        model, history, other = self.pick(which)
        self.caches.append((model.copy(), history.copy(), other.copy() if other else None))

    @precondition(lambda self: len(self.caches) > 1)
    @rule(which=st.integers(0, 2))
    def free(self, which):
        self.caches.pop(which % len(self.caches))[0].free()

    @invariant()
    def stored(self):
        for model, history, other in self.caches:
            assert model.n_columns == history.n_columns
            for b, (row, told) in enumerate(zip(model.rows, history.rows, strict=True)):
                assert (row.len, row.lo, row.n0, row.real) == (
                    len(told.k),
                    told.lo,
                    told.n0,
                    told.real,
                )
                if row.len:
                    k, v, k_stored, v_stored = history.stored(b, self.keep)
                    k_got, v_got = model.gather(b)
                    np.testing.assert_array_equal(k_got, np.where(k_stored, k, np.nan))
                    np.testing.assert_array_equal(v_got, np.where(v_stored, v, np.nan))
            self.other_check((model, history, other))

    @invariant()
    def counted(self):
        """References count tables that hold a page; an uncropped row holds what was predicted."""
        tables = [
            table
            for model, _, _ in self.caches
            for row in model.rows
            for table in (row.page, row.twin)
        ]
        held = Counter(id(page) for table in tables for page in table if page is not None)
        for page in (page for table in tables for page in table if page is not None):
            assert page.refs == held[id(page)]
        for model, _, _ in self.caches:
            for row in model.rows:
                old = (row.len - model.recent - model.slack) // self.P * self.P
                if row.n0 < math.inf and row.lo == max(model.sink, old):
                    n_twins = sum(twin is not None for twin in row.twin) * (not self.keep.all())
                    assert (len(row.page), n_twins) == model.predict([row.len])

    def teardown(self):
        for model, _, _ in getattr(self, "caches", []):
            tables = [table for row in model.rows for table in (row.page, row.twin)]
            model.free()
            assert not any(table for table in tables if any(page is not None for page in table))


TestOperations = Operations.TestCase
TestOperations.settings = settings(max_examples=150, stateful_step_count=25)

KEEP = np.array([[True, False, True, False], [False] * 4])
RULE = {"sink": 3, "recent": 5, "slack": 4}


def sequence(rng, n_tokens):
    """Q, k and v of one row, [1, 2, L, 4] each."""
    return rng.standard_normal((3, 1, 2, n_tokens, 4))


def run(model, q, k, v, cuts, valid=None):
    """Feed the columns in calls that end at `cuts`; return the outputs of all columns."""
    valid = np.ones((q.shape[0], q.shape[2]), bool) if valid is None else valid
    parts = []
    for begin, end in zip([0, *cuts], [*cuts, q.shape[2]], strict=True):
        model.put(k[:, :, begin:end], v[:, :, begin:end], valid[:, begin:end])
        parts.append(model.attend(q[:, :, begin:end], 0.5))
        model.settle()
    return np.concatenate(parts, axis=2)


@pytest.mark.parametrize("n0", [1, 9, 30, 47])
def test_cuts_do_not_matter(rng, n0):
    q, k, v = sequence(rng, 47)
    truth = attend(q[0], k[0], v[0], range(47), KEEP, sink=3, recent=5, lo=3, n0=n0, scale=0.5)[0]
    for n_cuts in [0, 1, 2, 5, 20, 46]:
        cuts = sorted(rng.permutation(np.arange(1, 47))[:n_cuts].tolist())
        model = PageModel(KEEP, 1, page=4, **RULE)
        model.expect_prompt(n0)
        np.testing.assert_allclose(run(model, q, k, v, cuts)[0], truth, atol=1e-12)
        assert model.live() == model.predict([47])


def test_prompt_of_first_call(rng):
    q, k, v = sequence(rng, 40)
    announced = PageModel(KEEP, 1, page=4, **RULE)
    announced.expect_prompt(17)
    o = run(PageModel(KEEP, 1, page=4, **RULE), q, k, v, [17, 18, 30])
    np.testing.assert_array_equal(o, run(announced, q, k, v, [17, 18, 30]))
    # The rule shows: a longer prompt gives something else.
    longer = run(PageModel(KEEP, 1, page=4, **RULE), q, k, v, [30])
    assert np.abs(o - longer).max() > 1e-3


def test_padding_does_not_matter(rng):
    """Rows of a batch that is padded on the left, and in between, give what they give alone."""
    lengths, n0 = [40, 25, 1], [30, 15, 1]
    alone = [sequence(rng, n) for n in lengths]
    valid = np.zeros((3, 60), bool)
    q, k, v = rng.standard_normal((3, 3, 2, 60, 4))
    for b, (n, prompt) in enumerate(zip(lengths, n0, strict=True)):
        valid[b, 40 - prompt : 40] = True
        valid[b, 40 + rng.permutation(20)[: n - prompt]] = True
        for x, one in zip((q, k, v), alone[b], strict=True):
            x[b, :, valid[b]] = np.moveaxis(one[0], 1, 0)
    together = PageModel(KEEP, 3, page=4, **RULE)
    together.expect_prompt(40)
    o = run(together, q, k, v, [13, 40, 41, 52], valid)
    assert not np.moveaxis(o, 1, 2)[~valid].any()
    for b, (n, prompt) in enumerate(zip(lengths, n0, strict=True)):
        model = PageModel(KEEP, 1, page=4, **RULE)
        model.expect_prompt(prompt)
        expected = run(model, *alone[b], [prompt] if n > prompt else [])
        np.testing.assert_allclose(o[b][:, valid[b]], expected[0], atol=1e-12)
    assert together.live() == together.predict(lengths)


def test_rejected_drafts_within_the_slack_leave_no_trace(rng):
    q, k, v = sequence(rng, 60)
    plain = run(PageModel(KEEP, 1, page=4, **RULE), q, k, v, [10, *range(11, 60)])
    model = PageModel(KEEP, 1, page=4, **RULE)
    run(model, q[:, :, :10], k[:, :, :10], v[:, :, :10], [])
    for n in range(10, 60):
        drafts = sequence(rng, RULE["slack"] + 1)
        for draft, x in zip(drafts, (q, k, v), strict=True):
            draft[:, :, 0] = x[:, :, n]
        o = run(model, *drafts, [])
        model.crop(n + 1)
        np.testing.assert_allclose(o[:, :, 0], plain[:, :, n], atol=1e-12)
        assert model.rows[0].lo <= max(RULE["sink"], n + 1 - RULE["recent"])


def test_crop_into_a_shared_page_copies_it(rng):
    _, k, v = sequence(rng, 20)
    valid = np.ones((1, 20), bool)
    model = PageModel(KEEP, 1, page=4, **RULE)
    model.append(k, v, valid)
    before = model.gather(0)
    other = model.copy()
    other.crop(14)
    other.append(-k[:, :, :1], -v[:, :, :1], valid[:, :1])
    np.testing.assert_array_equal(model.gather(0), before)
    np.testing.assert_array_equal(other.gather(0)[0][:, 14, KEEP[0]][0], -k[0, 0, 0, KEEP[0]])


def test_reading_what_retired_raises(rng):
    """The model's alarm works: a row that claims to hold more than it does cannot be read."""
    q, k, v = sequence(rng, 40)
    model = PageModel(KEEP, 1, page=4, **RULE)
    model.append(k, v, np.ones((1, 40), bool))
    assert model.rows[0].lo > 8
    model.rows[0].lo, model.rows[0].n0 = 3, 1000
    with pytest.raises((KeyError, AttributeError)):
        model.attend(q[:, :, -1:], 0.5)
