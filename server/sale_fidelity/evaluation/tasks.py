"""Retrieval tasks in the manner of RULER (arXiv 2404.06654), generated from a seed and real text.

An item is a document, a question whose answer stands in it, and candidate answers of the same form. It is solved where
every right candidate is likelier than every wrong one: sharp, since no generated text is parsed; cheap, since one
prefill serves all candidates; and harder than generation, since most wrong candidates stand in the document as well.

RULER's own generators, as lm-eval ships them, fetch texts and packages from the network, but for a haystack of one
repeated sentence; and what they ask is scored by generated text. The forms here are those that a model of 135M
parameters answers well above chance at 2K to 8K tokens.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .haystack import Haystack, planted

#: Tokens kept for the chat template; a template that takes more makes prompts that much longer.
_TEMPLATE_TOKENS = 64
_PAIRS_IN_TEXT = 10
_WRONG = 4

_CITIES = (
    *("Athens", "Bangkok", "Berlin", "Boston", "Brussels", "Cairo", "Chicago", "Copenhagen", "Dallas", "Delhi"),
    *("Denver", "Dublin", "Geneva", "Hamburg", "Helsinki", "Istanbul", "Jakarta", "Lagos", "Lisbon", "London"),
    *("Madrid", "Manila", "Melbourne", "Miami", "Milan", "Montreal", "Moscow", "Mumbai", "Munich", "Nairobi"),
    *("Oslo", "Paris", "Prague", "Rome", "Seattle", "Seoul", "Shanghai", "Singapore", "Stockholm", "Sydney"),
    *("Tokyo", "Toronto", "Vancouver", "Venice", "Vienna", "Warsaw", "Zagreb", "Zurich"),
)
_WORDS = (
    *("anchor", "apple", "basket", "bridge", "candle", "carpet", "castle", "cherry", "circle", "cloud", "copper"),
    *("cotton", "dragon", "eagle", "engine", "falcon", "feather", "forest", "garden", "ginger", "glacier", "hammer"),
    *("harbor", "honey", "island", "jacket", "jungle", "kettle", "ladder", "lemon", "lion", "magnet", "maple"),
    *("marble", "meadow", "mirror", "needle", "ocean", "orange", "oyster", "paper", "pepper", "piano", "pilot"),
    *("planet", "pocket", "rabbit", "ribbon", "river", "rocket", "saddle", "silver", "spider", "summer", "tiger"),
    *("timber", "tunnel", "turtle", "valley", "velvet", "violin", "walnut", "willow", "window", "winter", "zebra"),
)
_NAMES = tuple(f"{first} {second}" for first in _WORDS for second in _WORDS if first != second)


@dataclass(frozen=True)
class Item:
    """One question about one document.

    Attributes:
        task: name of the generator, a key of `TASKS`.
        seed: with the task, the length and the depth, all that the item was made from.
        tokens: aimed at for the prompt with its longest candidate; never above, with templates of ordinary length.
        depth: where the answer stands, 0 at the start of the document and 1 at its end.
        prompt: what the user says: instruction, document, question.
        lead: how the answer begins; candidates go on from it, without a space.
        candidates: answers of one form; the right ones come first.
        num_right: how many are right.
    """

    task: str
    seed: int
    tokens: int
    depth: float
    prompt: str
    lead: str
    candidates: tuple[str, ...]
    num_right: int


@dataclass(frozen=True)
class _Question:
    """An item before its text: what to plant where, and what to ask."""

    instruction: str
    needles: Sequence[str]
    depths: Sequence[float]
    question: str
    lead: str
    candidates: Sequence[str]
    num_right: int = 1
    is_whole_document: bool = False


def make_item(task: str, haystack: Haystack, seed: int, tokens: int, depth: float) -> Item:
    """The item of these arguments: the same on every machine, for the same text and tokenizer.

    Raises:
        ValueError: an unknown task, or too few tokens for its question.
    """
    if task not in TASKS:
        raise ValueError(f"there is no task {task!r}; there are {', '.join(TASKS)}")
    source = random.Random(f"{task}/{seed}/{tokens}/{depth:.6f}")
    asked = TASKS[task](source, tokens, depth, haystack)
    frame = (asked.instruction, *asked.needles, asked.question, asked.lead, max(asked.candidates, key=len))
    room = tokens - _TEMPLATE_TOKENS - sum(haystack.tokens(text) for text in frame)
    if room < 0:
        raise ValueError(f"{tokens} tokens are too few for the task {task!r}; it takes {tokens - room}")
    paragraphs = [] if asked.is_whole_document else haystack.sample(source, room)
    document = planted(paragraphs, asked.needles, asked.depths)
    prompt = f"{asked.instruction}\n\n{document}\n\n{asked.question}"
    return Item(task, seed, tokens, depth, prompt, asked.lead, tuple(asked.candidates), asked.num_right)


def _needle(source: random.Random, tokens: int, depth: float, haystack: Haystack) -> _Question:
    """One number in the text; each wrong candidate differs from it by one digit."""
    city, number = source.choice(_CITIES), str(source.randrange(10**6, 10**7))
    wrong = [_with_other_digit(number, place, source) for place in range(len(number))]
    return _Question(
        "Remember the magic number in this text.",
        [f'The magic number of {city} is "{number}".'],
        [depth],
        f"What is the magic number of {city}?",
        f'The magic number of {city} is "',
        [number, *wrong],
    )


def _multi_key(source: random.Random, tokens: int, depth: float, haystack: Haystack) -> _Question:
    """Many pairs strewn over the text; wrong candidates are the values of other keys."""
    keys, values = source.sample(_NAMES, _PAIRS_IN_TEXT), _numbers(source, _PAIRS_IN_TEXT)
    return _Question(
        "Remember the pairs of key and value in this text.",
        [_pair(key, value) for key, value in zip(keys, values, strict=True)],
        [depth, *(source.random() for _ in keys[1:])],
        f'What is the value of "{keys[0]}"?',
        _pair_up_to_value(keys[0]),
        values[: 1 + _WRONG],
    )


def _multi_value(source: random.Random, tokens: int, depth: float, haystack: Haystack) -> _Question:
    """One key with two values; both must be likelier than the values of three other keys."""
    first, *others = source.sample(_NAMES, 4)
    keys, values = [first, first, *others], _numbers(source, 5)
    return _Question(
        "Remember the pairs of key and value in this text.",
        [_pair(key, value) for key, value in zip(keys, values, strict=True)],
        [depth, *(source.random() for _ in keys[1:])],
        f'What are the values of "{first}"?',
        _pair_up_to_value(first),
        values,
        num_right=2,
    )


def _tracking(source: random.Random, tokens: int, depth: float, haystack: Haystack) -> _Question:
    """Variables set from variables: a candidate names the one between and the number at the end of the chain."""
    chains = 2
    names, values = source.sample(_NAMES, 2 * chains), _numbers(source, chains)
    middles, lasts = names[:chains], names[chains:]
    needles: list[str] = []
    depths: list[float] = []
    for middle, last, value in zip(middles, lasts, values, strict=True):
        place = source.random() if depths else depth
        needles += [_pair(middle, value), _pair(last, middle)]
        depths += [place, place + (1 - place) * source.random()]
    other_chains = [_hop(middle, value) for middle, value in zip(middles[1:], values[1:], strict=True)]
    other_values = [_hop(middles[0], value) for value in values[1:]]
    return _Question(
        'For example, {"north gate": "south gate"} and {"south gate": "11111"} say that the value of "north gate" is '
        '11111:\n{"north gate": "south gate"}\n{"south gate": "11111"}\n\nFollow the variables in this text from name '
        "to value.",
        needles,
        depths,
        f'What is the value of "{lasts[0]}"?',
        _pair_up_to_value(lasts[0]),
        [_hop(middles[0], values[0]), *other_chains, *other_values],
    )


def _key_value(source: random.Random, tokens: int, depth: float, haystack: Haystack) -> _Question:
    """Nothing but pairs, as many as fit; wrong candidates are the values of other keys."""
    instruction = "Remember these pairs of key and value."
    frame = haystack.tokens(instruction) + 3 * haystack.tokens(_pair("velvet harbor", "00000"))
    room = tokens - _TEMPLATE_TOKENS - frame
    names = source.sample(_NAMES, len(_NAMES))
    keys: list[str] = []
    while room > 0 and names:
        keys.append(names.pop())
        room -= haystack.tokens(_pair(keys[-1], "00000"))
    keys, values = keys[:-1], _numbers(source, len(keys) - 1)
    if len(keys) <= _WRONG:
        raise ValueError(f"{tokens} tokens are too few for the task 'key_value'")
    asked = round(depth * (len(keys) - 1))
    wrong = source.sample(values[:asked] + values[asked + 1 :], _WRONG)
    return _Question(
        instruction,
        [_pair(key, value) for key, value in zip(keys, values, strict=True)],
        [0.0] * len(keys),
        f'What is the value of "{keys[asked]}"?',
        _pair_up_to_value(keys[asked]),
        [values[asked], *wrong],
        is_whole_document=True,
    )


#: Generators by name.
TASKS: dict[str, Callable[[random.Random, int, float, Haystack], _Question]] = {
    "needle": _needle,
    "multi_key": _multi_key,
    "multi_value": _multi_value,
    "tracking": _tracking,
    "key_value": _key_value,
}


def _pair(key: str, value: str) -> str:
    return json.dumps({key: value})


def _pair_up_to_value(key: str) -> str:
    return f'{{"{key}": "'


def _hop(middle: str, value: str) -> str:
    return f'{middle}"}}\n{_pair_up_to_value(middle)}{value}'


def _numbers(source: random.Random, count: int) -> list[str]:
    return [str(number) for number in source.sample(range(10_000, 100_000), count)]


def _with_other_digit(number: str, place: int, source: random.Random) -> str:
    digit = (int(number[place]) + source.randrange(1, 10)) % 10
    return f"{number[:place]}{digit}{number[place + 1 :]}"
