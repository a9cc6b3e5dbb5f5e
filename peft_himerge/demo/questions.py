"""Two multiple-choice tasks, made from the CLDR data in `babel`.

"en", in English: which code has the language that this territory's name is written in? Four
related languages to choose from. "zh", in Chinese: where does the territory of this name lie?
Four continents. Both quote a name in some European language, so they read alike and ask for
different things. Answers are one token of Gemma, and no prompt is long: a score is cheap.

Every territory belongs to one split, so the test asks about territories never seen in training.
All choices are made by SHA-256, not by a random generator: the same rows in every process.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, TypeVar

from peft_himerge.errors import MissingExtraError
from peft_himerge.evals import MultipleChoiceRow

__all__ = ["SPLITS", "Splits", "load_tasks", "territories"]

SPLITS: Mapping[str, float] = MappingProxyType({"train": 0.55, "validation": 0.15, "test": 0.30})
"""Share of the territories in each split."""

_FAMILIES = (
    ("es", "it", "pt", "fr", "ro"),
    ("de", "nl", "sv", "da", "is"),
    ("pl", "cs", "sk", "hr", "sl"),
    ("hu", "fi", "tr", "cy", "et"),  # of no common family
)
_LANGUAGES = tuple(tag for family in _FAMILIES for tag in family)
_NAMES_IN = ("en", "de", "fr", "it", "es", "pt", "nl", "sv", "tr", "id")
_CONTINENTS = MappingProxyType(
    {"Africa": "非洲", "America": "美洲", "Asia": "亚洲", "Europe": "欧洲"}
)
_TWO_CONTINENTS = frozenset({"CY", "RU", "TR"})
_PER_TERRITORY = MappingProxyType(
    {
        "en": {"train": 20, "validation": 4, "test": 4},
        "zh": {"train": 10, "validation": 5, "test": 5},
    }
)

_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True)
class Splits:
    """The rows of one task. Any first n rows of a split are a fair sample of it.

    Args:
        train: Rows to train an adapter on.
        validation: Rows for analysis, search and tuning.
        test: Rows for the table, about territories that are in no other split.
    """

    train: tuple[MultipleChoiceRow, ...]
    validation: tuple[MultipleChoiceRow, ...]
    test: tuple[MultipleChoiceRow, ...]


def load_tasks() -> dict[str, Splits]:
    """Return the tasks "en" and "zh" with their train, validation and test rows.

    Raises:
        MissingExtraError: If `babel` is not installed.

    Example:
        >>> load_tasks()["en"].test[0].lang
        'en'
    """
    return {
        "en": Splits(**{split: _language_rows(split) for split in SPLITS}),
        "zh": Splits(**{split: _continent_rows(split) for split in SPLITS}),
    }


@lru_cache(maxsize=1)
def territories() -> Mapping[str, tuple[str, ...]]:
    """Return the territory codes of each split; every split's are its own."""
    names = _locale("en").territories
    groups: dict[str, list[str]] = {}
    for code in sorted(_zones()):
        if len(code) == 2 and code.isalpha() and code in names:
            groups.setdefault(_continent(code) or "", []).append(code)
    result: dict[str, list[str]] = {split: [] for split in SPLITS}
    for group in groups.values():  # each continent is cut alike, so that no split lacks one
        codes, start, share = _shuffled(group, "split"), 0, 0.0
        for split, part in SPLITS.items():
            share += part
            stop = round(share * len(codes))
            result[split] += codes[start:stop]
            start = stop
    return MappingProxyType({split: tuple(codes) for split, codes in result.items()})


def _language_rows(split: str) -> tuple[MultipleChoiceRow, ...]:
    rows: list[MultipleChoiceRow] = []
    for code in territories()[split]:
        names = {tag: _name(code, tag) for tag in _LANGUAGES}
        counts = Counter(name.casefold() for name in names.values())
        english = _name(code, "en").casefold()
        clear = [
            tag
            for tag, name in names.items()
            if counts[name.casefold()] == 1 and name.casefold() != english
        ]
        chosen = _shuffled(clear, "en", code)[: _PER_TERRITORY["en"][split]]
        rows.extend(_language_row(code, tag, names[tag]) for tag in chosen)
    return tuple(_shuffled(rows, "en", split))


def _language_row(code: str, tag: str, name: str) -> MultipleChoiceRow:
    family = next(family for family in _FAMILIES if tag in family)
    wrong = _shuffled((other for other in family if other != tag), "wrong", code, tag)[:3]
    tags = _shuffled([tag, *wrong], "order", code, tag)
    return MultipleChoiceRow(
        prompt=f'The language code of "{name}" is',
        choices=tuple(f" {other}" for other in tags),
        answer=tags.index(tag),
        options=tuple(str(_locale("en").languages[other]) for other in tags),
        lang="en",
    )


def _continent_rows(split: str) -> tuple[MultipleChoiceRow, ...]:
    rows: list[MultipleChoiceRow] = []
    for code in territories()[split]:
        continent = _continent(code)
        if continent is None:
            continue
        names = dict.fromkeys(_name(code, tag) for tag in _shuffled(_NAMES_IN, "zh", code))
        for name in list(names)[: _PER_TERRITORY["zh"][split]]:
            rows.append(
                MultipleChoiceRow(
                    prompt=f"“{name}”位于",
                    choices=tuple(option[0] for option in _CONTINENTS.values()),
                    answer=list(_CONTINENTS).index(continent),
                    options=tuple(_CONTINENTS.values()),
                    lang="zh",
                )
            )
    return tuple(_shuffled(rows, "zh", split))


def _continent(code: str) -> str | None:
    """The continent of a territory by its time zones; None if unclear or not one of the four."""
    parts = Counter(zone.split("/")[0] for zone in _zones()[code])
    name, count = parts.most_common(1)[0]
    clear = count / parts.total() >= 0.8 and code not in _TWO_CONTINENTS
    return name if clear and name in _CONTINENTS else None


def _name(code: str, tag: str) -> str:
    return str(_locale(tag).territories[code])


def _zones() -> Mapping[str, Any]:
    from babel.core import get_global

    _locale("en")
    zones: Mapping[str, Any] = get_global("territory_zones")
    return zones


@lru_cache(maxsize=64)
def _locale(tag: str) -> Any:
    try:
        from babel import Locale
    except ImportError as exc:
        raise MissingExtraError(
            'the demo\'s questions need babel; run: pip install "peft-himerge[demo]"'
        ) from exc
    return Locale.parse(tag)


def _shuffled(items: Iterable[_Item], *key: str) -> list[_Item]:
    """The items in an order that depends on their values and the key alone."""

    def digest(item: _Item) -> bytes:
        return hashlib.sha256("\0".join([*key, repr(item)]).encode()).digest()

    return sorted(items, key=digest)
