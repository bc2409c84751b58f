"""The items of `leank eval`: RULER by its definitions, lengths, second turns, what is refused."""

import re
from collections import Counter

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from leank.evaluation import ruler  # noqa: E402
from leank.evaluation.items import ALL_TASKS, TASKS, SuiteSettings  # noqa: E402
from leank.learning.tasks import CONTINUATION  # noqa: E402
from leank.learning.text import DataError, split  # noqa: E402

from .eval_tools import LENGTH, QA_TEXT, make_corpus, make_suite  # noqa: E402
from .learn_run_tools import character_tokenizer  # noqa: E402

DOCUMENTS = tuple(QA_TEXT.split("\n\n"))
QUESTIONS = (ruler.Question("Where does Dunville lie?", ("river Duna", "Duna"), (DOCUMENTS[3],)),)
NEEDLE = re.compile(r"One of the special magic (numbers|uuids) for (\S+) is: ([\w-]+)\.")


@pytest.fixture(scope="module")
def corpus():
    return make_corpus()


@pytest.fixture(scope="module")
def items(corpus):
    """One item of each task, and what its parts say."""
    suite = make_suite(corpus, tasks=(*TASKS, "qa"), questions=QUESTIONS, documents=DOCUMENTS)
    return {item.task: item for item in suite}


def letters(ids):
    """Return the text of tokens, which are characters."""
    return "".join(character_tokenizer().convert_ids_to_tokens(ids.tolist()))


def parts(item):
    """Context, question with cue, and answer, as text."""
    first, stop = item.sample.answer
    span = item.sample.span
    pieces = (item.sample.context, span[:first], span[first:stop])
    return [letters(ids) for ids in pieces]


def test_all_tasks_are_made(items):
    assert set(items) == set(TASKS) | {"qa"} and set(TASKS) < set(ALL_TASKS)
    for task, item in items.items():
        n_used = len(item.prompt) + item.max_new_tokens
        if task in ruler.TASKS:
            assert item.max_new_tokens == ruler.TASKS[task].max_new_tokens
            assert n_used <= LENGTH, task
            assert n_used > (0 if task == "qa" else 0.95 * LENGTH), task
        if task == CONTINUATION:
            assert item.n_first == LENGTH - 256
            continue
        assert item.n_first == len(item.prompt)
        n_written = 1 if task == "qa" else len(item.sample.expected)
        assert len(item.sample.values) == n_written
        for value, (a, b) in zip(item.sample.expected, item.sample.values, strict=False):
            assert letters(item.sample.span[a:b]) == value


@pytest.mark.parametrize(
    "task, n_needles, n_asked",
    [
        ("niah_single_1", 1, 1),
        ("niah_single_2", 1, 1),
        ("niah_single_3", 1, 1),
        ("niah_multikey_1", 4, 1),
        ("niah_multikey_2", 40, 1),
        ("niah_multikey_3", 20, 1),
        ("niah_multivalue", 4, 1),
        ("niah_multiquery", 4, 4),
    ],
)
def test_needles(items, task, n_needles, n_asked):
    item = items[task]
    context, question, answer = parts(item)
    found = NEEDLE.findall(context)
    assert len(found) >= n_needles if n_needles > 4 else len(found) == n_needles
    asked = re.search(r"special magic \w+ for (.*?) mentioned in the provided text\?", question)[1]
    keys = asked.replace("and ", "").split(", ")
    assert len(keys) == n_asked
    wanted = {value for _, key, value in found if key in keys}
    assert wanted == set(item.sample.expected) and len(wanted) == len(item.sample.expected)
    assert answer == " " + ", ".join(item.sample.expected)
    uuids = "uuid" in found[0][0]
    shape = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}" if uuids else r"\d{7}"
    assert all(re.fullmatch(shape, value) for _, _, value in found)
    one = len(wanted) == 1
    what = found[0][0].removesuffix("s") if one else found[0][0]
    head = f"{'A' if one else 'Some'} special magic {what} {'is' if one else 'are'} hidden within"
    assert context.startswith(head)
    assert question.startswith(f"\nWhat {'is' if one else 'are all'} the special magic {what} for")
    assert (item.depth is not None) == one
    if one:
        [(a, b)] = item.sample.needles
        needle = context[a:b]
        assert NEEDLE.fullmatch(needle)[3] == item.sample.expected[0]
        assert item.depth == a / len(item.prompt)


def test_variables(items):
    context, question, _ = parts(items["vt"])
    example, asked = context.split("\n\nMemorize")
    assert example.count("VAR") > 5 and "they are: " in example
    value = re.search(r"assigned the value (\d+) in", question)[1]
    names = [re.search(rf"VAR (\w+) = {value}", asked)[1]]
    while following := re.search(rf"VAR (\w+) = VAR {names[-1]}\b", asked):
        names.append(following[1])
    assert tuple(names) == items["vt"].sample.expected and len(names) == 5
    places = [asked.index(f"VAR {name} =") for name in names]
    assert places == sorted(places)


def test_common_words(items):
    context, _, answer = parts(items["cwe"])
    example, asked = context.split("often.\n")[1:]
    assert "The top 10 words that appear most often in the list are: 1. " in example
    counts = Counter(re.findall(r"\d+\. ([a-z]+)", asked))
    assert [n for _, n in counts.most_common(11)] == [30] * 10 + [3]
    assert set(items["cwe"].sample.expected) == {word for word, _ in counts.most_common(10)}
    assert answer.startswith(" 1. ") and " 10. " in answer


def test_frequent_words(items):
    context, _, _ = parts(items["fwe"])
    counts = Counter(context.split("coded words. ")[1].split())
    (first, _), *words = counts.most_common(5)
    assert first == "..." and all(re.fullmatch("[a-z]{6}", word) for word, _ in words)
    assert tuple(word for word, _ in words[:3]) == items["fwe"].sample.expected
    # The zeta distribution with alpha 2: rank k comes in 1 of k^2.
    assert words[0][1] / counts["..."] == pytest.approx(1 / 4, rel=0.1)
    assert words[2][1] < words[1][1] < words[0][1]


def test_questions(items):
    context, question, answer = parts(items["qa"])
    assert DOCUMENTS[3] in context and context.count("Document ") == len(DOCUMENTS)
    assert "Question: Where does Dunville lie? " not in context
    assert "Question: Where does Dunville lie?" in question and answer == " river Duna"
    assert items["qa"].sample.expected == ("river Duna", "Duna")
    assert ruler.score("qa", "at the duna", items["qa"].sample.expected) == 1
    assert ruler.score("vt", "AB, cd", ["AB", "CD", "EF", "GH"]) == 0.5


def test_an_item_does_not_depend_on_the_others(corpus, items):
    alone = make_suite(corpus, tasks=("vt", "copy"), lengths=(LENGTH, 5000), n_items=2)
    assert len(alone) == 8
    assert [(i.task, i.length, i.index) for i in alone][:3] == [
        ("vt", LENGTH, 0),
        ("copy", LENGTH, 0),
        ("vt", 5000, 0),
    ]
    for i, task in enumerate(("vt", "copy")):
        np.testing.assert_array_equal(alone[i].prompt, items[task].prompt)
    other = make_suite(corpus, tasks=("vt",), seed=1)
    assert other[0].sample.expected != items["vt"].sample.expected
    assert alone[4].sample.expected != alone[0].sample.expected


def test_second_turn(corpus, items):
    """The text is the first call; other text and the question are a second one."""
    suite = make_suite(corpus, tasks=("niah_single_2", CONTINUATION), second_turn=500)
    one = make_suite(corpus, tasks=("niah_single_2", CONTINUATION), lengths=(LENGTH - 500,))
    for item, alone in zip(suite, one, strict=True):
        np.testing.assert_array_equal(item.sample.context, alone.sample.context)
        np.testing.assert_array_equal(item.sample.span[500:], alone.sample.span)
        assert item.n_first == len(item.sample.context) and item.sample.n_dense == 0
        for (a, b), (c, d) in zip(item.sample.values, alone.sample.values, strict=True):
            np.testing.assert_array_equal(item.sample.span[a:b], alone.sample.span[c:d])
        assert len(item.prompt) + item.max_new_tokens <= LENGTH + 16 * (item.task == CONTINUATION)
    turn = letters(suite[0].sample.span[:500])
    assert any(turn[100:180] in "\n\n".join(corpus.validation[i : i + 2]) for i in range(200))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tasks": ("niah",)}, "tasks: expected some of niah_single_1, .*, got 'niah'"),
        ({"tasks": ()}, r"tasks: expected one or more, each once, got \[\]"),
        ({"lengths": (100, 100)}, "lengths: expected one or more, each once, got .100, 100."),
        ({"lengths": (0,)}, "lengths: expected at least 1, got 0"),
        ({"n_items": 0}, "items: expected at least 1, got 0"),
        ({"seed": -1}, "seed: expected at least 0, got -1"),
        ({"second_turn": 4096}, "second-turn: expected less than the lengths, .* 4096 of 4096"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(DataError, match=message):
        SuiteSettings(**options)


def test_what_cannot_be_made_is_found_at_once(corpus):
    with pytest.raises(DataError, match="room for task vt and 30 new tokens, got 600 tokens"):
        make_suite(corpus, tasks=("vt",), lengths=(600,))
    with pytest.raises(DataError, match="qa: expected task qa .* got no file of questions"):
        make_suite(corpus, tasks=("qa",))
    few = split(["\n".join(f"The number {i} has the square {i * i}.\n" for i in range(9000))])
    with pytest.raises(DataError, match=r"at least \d+ different words for task cwe, got 2"):
        make_suite(few, tasks=("cwe",))


@pytest.mark.parametrize(
    "line, message",
    [
        ("no json", r"line 2: expected \{\"question\": .*got no json"),
        ('{"question": "Who?", "answers": "Ada"}', "line 2: expected"),
        ('{"question": "Who?", "answers": []}', "line 2: expected"),
        ('["Who?"]', "line 2: expected"),
        (
            '{"question": "Who?", "answers": ["Zed"]}',
            "line 2: expected a paragraph with 'Zed', got none",
        ),
    ],
)
def test_questions_are_checked(tmp_path, line, message):
    path = tmp_path / "qa.jsonl"
    good = '{"question": "Mills?", "answers": ["6", "six"], "evidence": "dunville"}'
    path.write_text(f"{good}\n{line}\n")
    with pytest.raises(DataError, match=message):
        ruler.read_questions(path, DOCUMENTS)
    path.write_text(good + "\n\n")
    assert ruler.read_questions(path, DOCUMENTS) == (
        ruler.Question("Mills?", ("6", "six"), (DOCUMENTS[3],)),
    )
    path.write_text("\n")
    with pytest.raises(DataError, match="qa: expected at least one question, got none"):
        ruler.read_questions(path, DOCUMENTS)
    with pytest.raises(DataError, match="qa: expected a UTF-8 file, got .*No such file"):
        ruler.read_questions(tmp_path / "none", DOCUMENTS)
