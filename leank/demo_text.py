"""The long text of ``leank demo``: a lighthouse log, written for LeanK, with one fact hidden in it.

72 entries are put together from the sentences below. The choice is a fixed arithmetic
sequence, so the text is the same on every machine, offline, and for every Python version.
"""

from collections.abc import Iterator

QUESTION = "What is the new telephone number of the doctor?"
FACT = "The new telephone number of the doctor is 7391."
SOURCE = "a lighthouse log written for this demo"
N_ENTRIES = 72

_OPENING = (
    "This is the log of the lighthouse at Carrow Point, kept by Edda Marsh and her brother Tom. "
    "We write in it every evening, after the lamp is lit and before the kettle is cold."
)
_MONTHS = (
    ("March", 31),
    ("April", 30),
    ("May", 31),
    ("June", 30),
)
_WEATHER = (
    "Wind from the {wind}, {number} knots at noon, and a low grey sky that never lifted.",
    "A bright morning, then cloud from the {wind} and light rain until supper.",
    "Thick fog before dawn. We sounded the horn for {number} minutes in every hour.",
    "Calm, so calm that the {bird}s sat on the water like painted ones.",
    "The glass fell all day and by dusk it blew hard from the {wind}.",
    "Frost on the gallery rail at sunrise, gone by ten, and a clear cold afternoon.",
    "Heavy swell on the {place} side, though there was hardly any wind to explain it.",
    "Warm for the season. Tom worked with his sleeves rolled up and complained of the heat.",
    "Hail at breakfast, sunshine at lunch, "
    "and a double rainbow over the bay at {number} past four.",
)
_SHIPS = (
    "The {ship} passed at {number} past eight, bound for {port} with timber on her deck.",
    "Counted {number} fishing boats beyond the bar, all of them home before the lamp was lit.",
    "A grey steamer we did not know stood off for an hour and then made for {port}.",
    "The {ship} signalled for the state of the tide and thanked us with three blasts.",
    "No vessel at all today, only a raft of weed and one lost oar from the {ship}.",
    "The mail boat was late from {port} because her engine would not start in the damp.",
    "Saw the {ship} under full sail in the evening, the finest sight of this week.",
    "A yacht from {port} came too near the {place} and we waved her off with the red flag.",
)
_WORK = (
    "Cleaned the {part} with vinegar and soft cloth, which took the two of us until noon.",
    "Tom painted the {part} white and afterwards, by accident, the cat.",
    "Found a cracked pane on the {wind} side of the lantern and put in a new one.",
    "Wound the clockwork twice, since the weight sticks when the air is damp.",
    "Carried {number} cans of oil up the stairs. There are more stairs every year.",
    "Trimmed the wicks, oiled the {part}, and swept the stairs from top to bottom.",
    "The {part} squeaks again. Grease helps for a day and then it comes back.",
    "Mended the path to the {place} with flat stones that the winter had thrown up.",
    "Took stock of the stores: flour for {number} days, lamp oil enough, coffee nearly gone.",
)
_HOUSE = (
    "The hens gave {number} eggs, which is more than they have any right to in this weather.",
    "Baked two loaves and burned the second one while watching a {bird} on the window sill.",
    "{person} came on the mail boat with newspapers and stayed for soup.",
    "A letter from {person}, who is well and asks whether we still have the old telescope.",
    "Planted beans behind the wall near the {place}, where the salt does not reach.",
    "Tom read aloud from the almanac until I begged him to stop at page {number}.",
    "The kitchen stove smokes when the wind is in the {wind}. I wrote to {port} for a cowl.",
    "{person} taught us a card game and won {number} matches from each of us.",
    "Found the nest of a {bird} under the stairs of the boathouse and left it alone.",
    "We ate the last of the apples that {person} brought and saved the seeds.",
)
_WORDS = {
    "wind": ("north", "north-east", "east", "south-east", "south", "south-west", "west"),
    "bird": ("gull", "tern", "cormorant", "puffin", "gannet"),
    "place": ("boathouse", "landing", "old quarry", "signal mast", "seal rocks", "chapel"),
    "ship": ("Marigold", "Sir Rowan", "Two Sisters", "Halcyon", "Lady of Brae", "Otter", "Perseus"),
    "port": ("Brannock", "Hull", "Skelby", "Port Anders", "Leith", "Wick"),
    "part": ("lens", "brass rail", "lamp house door", "rotation gear", "flag locker", "gallery"),
    "person": ("Mrs Gale", "the harbour master", "young Peter", "Doctor Lund", "Cousin Ada"),
    "number": (
        "six",
        "nine",
        "eleven",
        "twelve",
        "fourteen",
        "seventeen",
        "twenty",
        "twenty-three",
    ),
}


def _numbers() -> Iterator[int]:
    """Yield a fixed sequence of integers that looks irregular (a 31-bit linear congruence)."""
    state = 20250822
    while True:
        state = (1103515245 * state + 12345) % (1 << 31)
        yield state >> 12  # the low bits of such a sequence repeat quickly


def _sentence(bank: tuple[str, ...], numbers: Iterator[int], last: dict[int, str]) -> str:
    """Pick a sentence other than the last one of the same bank, and fill its blanks."""
    choices = [sentence for sentence in bank if sentence != last.get(id(bank))]
    template = choices[next(numbers) % len(choices)]
    last[id(bank)] = template
    words = {name: values[next(numbers) % len(values)] for name, values in _WORDS.items()}
    text = template.format(**words)
    return text[0].upper() + text[1:]


def logbook(fact: str = FACT, n_entries: int = N_ENTRIES) -> str:
    """Return the log with `fact` as the last sentence of its middle entry.

    Examples
    --------
    >>> text = logbook("The cat is called Biscuit.")
    >>> text.count("The cat is called Biscuit."), len(text.split()) > 4000
    (1, True)
    """
    numbers = _numbers()
    last: dict[int, str] = {}
    days = [f"{day} {month}" for month, n_days in _MONTHS for day in range(1, n_days + 1)]
    if not 1 <= n_entries <= len(days):
        raise ValueError(f"n_entries: expected 1 to {len(days)}, got {n_entries}")
    entries = [_OPENING]
    for i, day in enumerate(days[:n_entries]):
        sentences = [_sentence(bank, numbers, last) for bank in (_WEATHER, _SHIPS, _WORK, _HOUSE)]
        if i == n_entries // 2:
            sentences.append(fact)
        entries.append(f"{day}. " + " ".join(sentences))
    return "\n\n".join(entries)
