"""Regular expressions that others wrote: refused where matching them might never end.

A config names modules by patterns, and the names they are matched with come from the same stranger.
Python's `re` goes back and forth between the ways to split a name: with nested repetitions there
are exponentially many, with k repetitions side by side on n characters about C(n + k, k).
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable

__all__ = ["FirstMatch", "pattern_fault"]

_MOST_WAYS = 10**8  # about a second
_LONGEST = 1 << 16  # characters of a pattern
_LITERAL = re.compile(r"[\w.-]+")  # a dot stands for any character, all else for itself
_SKIPPED = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)  # escapes and classes


def pattern_fault(pattern: str, longest: int = 128) -> str | None:
    """Return what is wrong with a regular expression, or None.

    Args:
        pattern: the expression.
        longest: length of the longest name it is to be matched with.
    """
    if len(pattern) > _LONGEST:
        return f"has {len(pattern)} characters; at most {_LONGEST} are read"
    if _LITERAL.fullmatch(pattern):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about spellings that later versions may read otherwise
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as exc:
            return f"is no regular expression ({exc})"
    bare = _SKIPPED.sub("x", pattern)
    if re.search(r"\)[*+{]", bare):
        return "repeats a group, so that matching it might never end; write it without"
    repeats = len(re.findall(r"[*+{]", bare))
    if math.comb(longest + repeats, repeats) > _MOST_WAYS:
        return (
            f"has {repeats} repetitions, so that matching it with a name of {longest} characters "
            f"might never end; use fewer"
        )
    return None


class FirstMatch:
    r"""Finds which of many patterns is the first to match the end of a module's path.

    The same answers as PEFT's `get_pattern_key` for rank_pattern and alpha_pattern, whose time
    grows with patterns times modules. Here patterns without special characters but dots, which is
    nearly all there are, are looked up.

    Args:
        patterns: regular expressions without faults; each means ``(.*\.)?(pattern)$``.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        self._patterns = list(patterns)
        self._odd: list[tuple[int, re.Pattern[str]]] = []
        # Length and places of the dots -> what stands between them -> number of the pattern.
        self._plain: dict[tuple[int, tuple[int, ...]], dict[str, int]] = {}
        for number, pattern in enumerate(self._patterns):
            if _LITERAL.fullmatch(pattern):
                dots = tuple(place for place, char in enumerate(pattern) if char == ".")
                known = self._plain.setdefault((len(pattern), dots), {})
                known.setdefault(_between(pattern, dots), number)
            else:
                self._odd.append((number, re.compile(rf"(.*\.)?({pattern})$")))

    def find(self, module: str) -> str | None:
        """Return the first pattern that matches, or None."""
        found = [number for number, pattern in self._odd if pattern.match(module)]
        for (size, dots), known in self._plain.items():
            start = len(module) - size
            if start == 0 or (start > 0 and module[start - 1] == "."):
                number = known.get(_between(module[start:], dots))
                if number is not None:
                    found.append(number)
        return self._patterns[min(found)] if found else None


def _between(text: str, dots: tuple[int, ...]) -> str:
    parts, start = [], 0
    for place in dots:
        parts.append(text[start:place])
        start = place + 1
    return ".".join([*parts, text[start:]])
