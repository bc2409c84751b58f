"""A model, a tokenizer and a text for evaluations of seconds; its tokens are characters."""

import numpy as np

from leank.evaluation.items import Suite, SuiteSettings
from leank.learning.text import split

from .learn_run_tools import character_tokenizer
from .tiny_models import tiny

LONG = {"max_position_embeddings": 16384}
LENGTH = 8000  # characters; the smallest that all tasks fit into
QA_TEXT = "\n\n".join(
    f"The town of {x}ville lies at the river {x}a and has {i} mills."
    for i, x in enumerate("Abo Bel Cor Dun Eld Fen Gar Hol".split(), 3)
)


def text():
    """Sentences of many different words, 200 kB of them."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(rng.choice(letters, n)) for n in rng.integers(4, 9, 4000)]
    lines = [" ".join(rng.choice(words, 12)) + f" {i}." for i in range(2000)]
    return "\n\n".join("\n".join(lines[i : i + 5]) for i in range(0, len(lines), 5))


def make_corpus():
    return split([text()])


def make_suite(corpus, **options):
    more = {k: options.pop(k) for k in ("questions", "documents") if k in options}
    options = {"lengths": (LENGTH,), "n_items": 1} | options
    return Suite(SuiteSettings(**options), corpus, character_tokenizer(), **more)


def long_tiny():
    return tiny(**LONG)
