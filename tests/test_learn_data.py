"""The offline data of mask learning: parts that share nothing, exact tokens, repeatable samples."""

import doctest
import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors  # noqa: E402
from tokenizers.trainers import BpeTrainer  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from leank.learning import tasks, text  # noqa: E402
from leank.learning.data import samples  # noqa: E402
from leank.learning.sample import Sample, collate, describe  # noqa: E402
from leank.learning.tasks import ALL_KINDS, CONTINUATION, KINDS, score  # noqa: E402
from leank.learning.text import PARTS, Corpus, DataError, split  # noqa: E402

CHAT = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] | trim }}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
LENGTH = 700


@pytest.fixture(scope="module")
def documents():
    return text.default_text()


@pytest.fixture(scope="module")
def corpus(documents):
    return split(documents)


def bpe(corpus, chat=None, bos=False, prefix_space=False):
    """Train a byte-level tokenizer of 2,000 tokens on a little text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=2000,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=letters,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.train[:100], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=chat,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="module", params=["chat", "plain", "bos"])
def tokenizer(request, corpus):
    """Tokenizers that differ in what they put around a text."""
    return bpe(corpus, CHAT if request.param == "chat" else None, request.param == "bos")


@pytest.fixture(scope="module")
def chat(corpus):
    return bpe(corpus, CHAT)


def same(a, b):
    return (a.kind, a.answer, a.expected, a.needles, a.values) == (
        b.kind,
        b.answer,
        b.expected,
        b.needles,
        b.values,
    ) and (np.array_equal(a.context, b.context) and np.array_equal(a.span, b.span))


# --------------------------------------------------------------------------------------- text


def windows(passages):
    return {p[i : i + text.WINDOW] for p in passages for i in range(len(p) - text.WINDOW + 1)}


def test_the_parts_of_the_default_text_share_no_window(corpus):
    found = {name: windows(corpus.part(name)) for name in PARTS}
    for a, b in itertools.combinations(PARTS, 2):
        assert not found[a] & found[b]


def test_the_default_text_is_large_and_the_same_again(documents, corpus):
    assert sum(map(len, documents)) > 2_000_000
    shares = np.array([sum(map(len, corpus.part(name))) for name in PARTS])
    assert np.allclose(shares / shares.sum(), text.SHARES, atol=0.06)
    assert text.default_text() == documents
    assert split(documents).digest == corpus.digest


def test_code_is_added_to_the_prose(documents):
    both = text.default_text(code=True)
    assert both[: len(documents)] == documents
    assert sum(map(len, both)) > 2 * sum(map(len, documents))


def test_a_passage_keeps_its_part_beside_other_text(corpus):
    of = {p: name for name in PARTS for p in corpus.part(name)}
    again = split([*corpus.test[:40], *corpus.train[:80], *corpus.validation[:40]])
    again_of = {p: name for name in PARTS for p in again.part(name)}
    assert len(again_of) > 120
    assert all(of[p] == name for p, name in again_of.items())


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 99), st.integers(50, 900)), min_size=1, max_size=4))
def test_copies_never_land_in_two_parts(drawn):
    base = [f"{i} is a line of its own, and {i * i} is its square.\n" for i in range(500)]
    words = np.array("ab cde fghi jklmn opqrst 12 345 \n \n\n \n\n\n -----".split(" "))
    documents = [
        " ".join(np.random.default_rng(seed).choice(words, n).tolist()) for seed, n in drawn
    ]
    corpus = split(["\n".join(base), *documents, *reversed(documents), "  ".join(documents)])
    found = [windows(corpus.part(name)) for name in PARTS]
    assert not (found[0] & found[1] or found[0] & found[2] or found[1] & found[2])


@given(st.text("ab \n", max_size=200), st.text("ab \n", max_size=20))
def test_hashes_are_equal_where_windows_are(middle, before):
    alone, inside = text._rolling(middle), text._rolling(before + middle + "c")
    assert len(alone) == max(0, len(middle) - text.WINDOW + 1)
    assert np.array_equal(alone, inside[len(before) : len(before) + len(alone)])
    found = {middle[i : i + text.WINDOW] for i in range(len(alone))}
    assert len(np.unique(alone)) == len(found)


def test_files_are_read_in_order(tmp_path):
    paths = [tmp_path / "b.txt", tmp_path / "a.txt"]
    for path in paths:
        path.write_text(f"text of {path.name}", encoding="utf-8")
    assert text.read_text(paths) == ["text of b.txt", "text of a.txt"]
    paths[0].write_bytes(b"\xff\xfe\xff")
    for wrong in (paths, [tmp_path / "none.txt"], []):
        with pytest.raises(DataError, match=r"^text: expected .*, got "):
            text.read_text(wrong)


# -------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize("module", [text, tasks])
def test_doctests(module):
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_scores_its_own_answer_alone(kind, corpus):
    for seed in range(40):
        made = [
            KINDS[kind](np.random.default_rng([seed, i]), 4000, corpus.train[seed + i])
            for i in range(2)
        ]
        for own, other in (made, made[::-1]):
            assert score(kind, own.answer, own.values) == 1
            assert score(kind, f" {own.answer}.", own.values) > (0.8 if kind == "copy" else 0.99)
            assert score(kind, other.answer, own.values) == 0
            assert score(kind, "", own.values) == 0
            hidden = "\n".join(own.needles)
            assert all(value in hidden for value in own.values)
            if kind != "variables":
                assert own.answer not in own.question + own.cue


@pytest.mark.parametrize("kind", KINDS)
def test_the_wording_varies(kind, corpus):
    made = [
        KINDS[kind](np.random.default_rng(seed), 4000, corpus.train[seed]) for seed in range(40)
    ]
    assert len({puzzle.needles[0].split()[0] + puzzle.question.split()[0] for puzzle in made}) > 1
    # Words come from a short list.
    assert len({puzzle.answer for puzzle in made}) >= (20 if kind == "words" else len(made))


@pytest.mark.parametrize("kind", KINDS)
def test_needles_differ_in_keys_and_values(kind, corpus):
    for seed in range(20):
        puzzle = KINDS[kind](np.random.default_rng(seed), 4000, corpus.train[seed])
        n_same = 1 if kind == "passkey" else 0  # its needle is there twice
        assert len(set(puzzle.needles)) == len(puzzle.needles) - n_same
        assert len(set(puzzle.values)) == len(puzzle.values)


def test_score_counts_the_share_of_values():
    assert score("multi_value", "12345, 99999", ("12345", "67890")) == 0.5
    assert score("single", "It is Otter-Camel", ("otter-camel",)) == 1
    assert score("single", "123456", ("12345",)) == 0, "part of a longer number"
    assert score("single", "none\n12345", ("12345",)) == 0, "a later line"
    assert score("multi_key", " ".join(map(str, range(10000, 12346))), ("12345",)) == 0, "recited"
    assert score("copy", "one two 3 four", ("one two three four",)) == 0.5
    assert score(CONTINUATION, "one two", ("one two three four",)) == 0.5
    for kind, expected in (("other", ["1"]), ("single", []), ("single", "12345")):
        with pytest.raises(DataError, match=r"^(kinds|expected): expected .*, got "):
            score(kind, "12345", expected)


# ------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_tokens_of_a_sample(kind, corpus, tokenizer):
    made = samples(corpus, "test", tokenizer, kinds=[kind], lengths=LENGTH, n=6, seed=3)
    lengths = [len(sample) for sample in made]
    assert max(lengths) == LENGTH and min(lengths) >= LENGTH - 4
    for sample in made:
        first, stop = sample.answer
        assert stop == len(sample.span) and 0 <= first < stop
        answer = tokenizer.decode(sample.span[first:stop]).strip()
        assert score(kind, answer, sample.expected) == 1
        whole = np.concatenate([sample.context, sample.span])
        if kind == CONTINUATION:
            assert first == 0 and sample.needles == ()
            assert tokenizer.decode(whole).removeprefix("<s>")[:40] in "\n\n".join(corpus.test)
            continue
        assert answer == ", ".join(sample.expected)
        # What the model would see is what it does see.
        again = tokenizer(tokenizer.decode(whole), add_special_tokens=False).input_ids
        assert again == whole.tolist()
        question = tokenizer.decode(sample.span[:first])
        assert question.startswith("Question:") == (tokenizer.chat_template is None)
        assert ("<s>assistant\n" if tokenizer.chat_template else "\nAnswer:") in question
        assert (whole[0] == 0) == (
            tokenizer("a").input_ids[0] == 0 or bool(tokenizer.chat_template)
        )


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_values_are_where_a_sample_says(kind, corpus, tokenizer):
    made = samples(corpus, "test", tokenizer, kinds=[kind], lengths=LENGTH, n=8, seed=9)
    for sample in made:
        assert len(sample.values) == len(sample.expected)
        found = [tokenizer.decode(sample.span[a:b]).strip() for a, b in sample.values]
        # A token may hold the comma after a value as well.
        assert [value.rstrip(",") for value in found] == [
            value.strip().rstrip(",") for value in sample.expected
        ]
        edges = [edge for pair in sample.values for edge in pair]
        assert edges == sorted(edges)
        assert sample.answer == (edges[0], edges[-1])


@pytest.mark.parametrize("kind", KINDS)
def test_needles_are_where_a_sample_says(kind, corpus, tokenizer):
    made = samples(corpus, "train", tokenizer, kinds=[kind], lengths=LENGTH, n=6, seed=4)
    depths = []
    for sample in made:
        found = [tokenizer.decode(sample.context[a:b]).strip() for a, b in sample.needles]
        context = tokenizer.decode(sample.context)
        for value in sample.expected:
            assert any(value in needle for needle in found)
            n_needles = sum(needle.count(value) for needle in found)
            assert context.count(value) == n_needles, "the value is in the text by chance"
        assert all(needle[0].isalnum() or needle[0] == "{" for needle in found)
        assert all(needle[-1] in ".>}=" or kind in ("variables", "copy") for needle in found)
        depths += [a / len(sample.context) for a, _ in sample.needles]
        if kind in ("variables", "lines", "multi_value"):
            assert list(sample.needles) == sorted(sample.needles)
    assert min(depths) < 0.5 < max(depths)


def test_samples_of_a_step_are_equally_long(corpus, chat):
    made = samples(corpus, "train", chat, lengths=(300, 900), n=12, together=4, seed=2)
    lengths = np.array([len(sample) for sample in made]).reshape(3, 4)
    assert (np.ptp(lengths, axis=1) <= 2).all() and np.ptp(lengths) > 30


def test_samples_depend_on_part_seed_and_index_alone(corpus, chat):
    def make(part="train", n=8, **options):
        return samples(corpus, part, chat, lengths=(300, 900), n=n, **{"seed": 5} | options)

    first = list(make())
    resumed = make(n=100)
    worker = pickle.loads(pickle.dumps(resumed))
    for i in (7, 2, 5):  # in another order, as a resumed run or a worker would
        assert same(first[i], resumed[i]) and same(first[i], worker[i])
    others = [*make(seed=6), *make("validation"), *make("test")]
    everything = [(tuple(s.context), tuple(s.span)) for s in [*first, *others]]
    assert len(set(everything)) == len(everything)
    with pytest.raises(IndexError):
        make()[8]


def test_lengths_and_kinds_are_spread(corpus, chat):
    options = {"kinds": ["single", "lines", "copy"], "weights": [2, 1, 0], "n": 80}
    made = list(samples(corpus, "train", chat, lengths=(256, 2048), **options))
    lengths = np.array([len(sample) for sample in made])
    assert lengths.min() >= 250 and lengths.max() <= 2048
    assert 0.3 < (lengths < 724).mean() < 0.7, "half of them below the geometric mean"
    kinds = [sample.kind for sample in made]
    assert kinds.count("copy") == 0 and kinds.count("single") > kinds.count("lines") > 10


def test_special_tokens_of_a_text_are_left_out(corpus, chat):
    passages = tuple(f"</s> {p}" if i % 2 else p for i, p in enumerate(corpus.test))
    dirty = Corpus(corpus.train, corpus.validation, passages)
    made = samples(dirty, "test", chat, kinds=["single"], lengths=LENGTH, n=4)
    end = chat.convert_tokens_to_ids("</s>")
    assert all((sample.context == end).sum() == 0 for sample in made)


def test_single_letters_meet_each_length_exactly(corpus):
    letters = Tokenizer(
        models.WordLevel(
            {c: i for i, c in enumerate(["<unk>", "\n", *map(chr, range(32, 127))])}, "<unk>"
        )
    )
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="<unk>")
    made = samples(corpus, "test", tokenizer, lengths=3000, n=12, n_continued=200)
    for sample in made:
        assert len(sample) == 3000
        if sample.kind != CONTINUATION:
            answer = tokenizer.convert_ids_to_tokens(sample.span[slice(*sample.answer)].tolist())
            assert "".join(answer) == ", ".join(sample.expected)


# ---------------------------------------------------------------------------------- batches


def test_batches_are_padded_on_the_left(corpus, chat):
    batch = list(samples(corpus, "train", chat, lengths=(300, 900), n=9))
    made = collate(batch, pad_id=7, question_weight=0.25, lead_weight=0.5)
    n_span = max(len(sample.span) for sample in batch)
    assert made.span.shape == made.weights.shape == (9, n_span)
    assert made.context.shape == (9, max(map(len, batch)) - n_span)
    whole = torch.cat([made.context, made.span], 1).numpy()
    for b, sample in enumerate(batch):
        start = int(made.start[b])
        assert (whole[b, :start] == 7).all()
        assert np.array_equal(whole[b, start:], np.concatenate([sample.context, sample.span]))
        first, stop = sample.answer
        expected = np.zeros(n_span, np.float32)
        own = expected[n_span - len(sample.span) :]
        own[:first], own[first:stop] = 0.25, 1
        if first:
            own[first - 1] = 0.5
        assert np.array_equal(made.weights[b].numpy(), expected)
    exact = collate(batch, lead_weight=0).weights
    for b, sample in enumerate(batch):
        labelled = chat.decode(made.span[b][exact[b] > 0])
        assert score(sample.kind, labelled, sample.expected) == 1


def test_a_batch_has_context_in_each_row(corpus, chat):
    batch = list(samples(corpus, "train", chat, kinds=["single"], lengths=200, n=2))
    tiny = Sample("single", batch[0].context[:3], batch[0].span[-4:], (0, 4), ("1",), ())
    for wrong in ([], [batch[0], tiny]):
        with pytest.raises(DataError, match=r"^batch: expected .*, got "):
            collate(wrong)


def test_a_preview_shows_needles_and_answer(corpus, chat):
    sample = samples(corpus, "test", chat, kinds=["multi_value"], lengths=LENGTH, seed=1)[0]
    shown = describe(sample, chat)
    assert all(value in shown for value in sample.expected)
    assert len(shown) < 2000 and f"at {sample.needles[0][0]}" in shown


# ----------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("part", {"part": "dev"}),
        ("kinds", {"kinds": ["single", "needle"]}),
        ("kinds", {"kinds": []}),
        ("kinds", {"kinds": "single"}),
        ("kinds", {"kinds": ["single", "single"]}),
        ("weights", {"weights": [1, 2]}),
        ("weights", {"kinds": ["single", "copy"], "weights": [0, 0]}),
        ("weights", {"kinds": ["single", "copy"], "weights": [1, float("nan")]}),
        ("lengths", {"lengths": (900, 300)}),
        ("lengths", {"lengths": (300.0, 900)}),
        ("lengths", {"lengths": 10_000_000}),
        ("lengths", {"lengths": (20, 900), "kinds": ["single"]}),
        ("lengths", {"lengths": (100, 900), "kinds": [CONTINUATION]}),
        ("n", {"n": 0}),
        ("seed", {"seed": -1}),
        ("n_continued", {"n_continued": 0}),
    ],
)
def test_refusals_name_the_argument(name, options, corpus, chat):
    options = {"part": "test", "lengths": (300, 900)} | options
    with pytest.raises(DataError, match=rf"^{name}: expected .*, got "):
        samples(corpus, options.pop("part"), chat, **options)


def test_too_little_text_is_refused(corpus, chat):
    with pytest.raises(DataError, match=r"^text: expected .*, got "):
        split(["a short text"])
    with pytest.raises(DataError, match=r"^shares: expected .*, got "):
        split(corpus.train, (1, 0, 1))
    with pytest.raises(DataError, match=r"^text: expected .*, got "):
        samples(Corpus((), (), ()), "train", chat)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected enough for passages in all three parts, got 0 characters"),
        (b"\xef\xbb\xbf \n\t\n", "expected enough .*, got 0 characters"),
        (b"\0" * 100_000, "expected enough .*, got 0 characters"),
        (bytes(range(256)) * 400, "expected a UTF-8 text file, got .*: 'utf-8' codec can't decode"),
        (b"\xed\xa0\x80" * 1000, "expected a UTF-8 text file, got .*: 'utf-8' codec can't decode"),
    ],
)
def test_what_is_no_text(tmp_path, content, message):
    """As leank learn and leank eval read it."""
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(DataError, match=f"^text: {message}"):
        split(text.read_text([tmp_path / "text"]))


def test_a_text_of_spaces_is_cut_in_an_instant():
    """A million spaces between two letters took hours, since each was a new start of a search."""
    with pytest.raises(DataError, match="got 4 characters"):
        split(["a" + " " * 1_000_000 + "b"])


def test_one_line_without_an_end_is_cut_between_words():
    numbers = " ".join(str(i * i) for i in range(10**9, 10**9 + 5000))
    corpus = split([numbers])
    passages = [passage for part in PARTS for passage in corpus.part(part)]
    assert max(map(len, passages)) <= 2000
    assert sorted(" ".join(passages).split()) == numbers.split()


def test_tokenizers_without_offsets_or_with_odd_templates_are_refused(corpus, chat):
    class Slow:
        is_fast = False

    upper = bpe(corpus, "{{ messages[0]['content'] | upper }}")
    for wrong in (Slow(), upper):
        with pytest.raises(DataError, match=r"^tokenizer: expected .*, got "):
            samples(corpus, "test", wrong)


# ---------------------------------------------------------------------------------- SmolLM2


@pytest.mark.model
def test_smollm2_reads_what_it_would_be_asked(corpus):
    from transformers import AutoTokenizer

    from leank import smollm2

    tokenizer = AutoTokenizer.from_pretrained(smollm2.model_path())
    made = samples(corpus, "validation", tokenizer, lengths=(600, 6000), n=30)
    for sample in made:
        first, stop = sample.answer
        answer = tokenizer.decode(sample.span[first:stop]).strip()
        assert score(sample.kind, answer, sample.expected) == 1
        if sample.kind != CONTINUATION:
            assert answer == ", ".join(sample.expected)
            whole = np.concatenate([sample.context, sample.span]).tolist()
            again = tokenizer(tokenizer.decode(whole), add_special_tokens=False).input_ids
            assert again == whole
