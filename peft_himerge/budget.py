"""What a merge may cost: a listener that ends it, with the journal's scores kept."""

from __future__ import annotations

import time

from .errors import BudgetError, ConfigError
from .events import Event, MergeStarted, StateScored

__all__ = ["Budget"]


class Budget:
    """Ends a merge that may need too many scores, or that takes too long; give it as a callback.

    Args:
        scores: refuse, before anything is scored, a merge that may need more.
        seconds: stop after the first score that ends later, counted from now. A score that is
            being computed is never cut short.
        advice: what an error says of going on; the default speaks of `journal=`.

    Raises:
        ConfigError: a number is not above 0.
        BudgetError: raised when it is called; the merge ends with it and the model is put back.
    """

    def __init__(
        self, scores: int | None = None, seconds: float | None = None, advice: str = ""
    ) -> None:
        for name, value in (("scores", scores), ("seconds", seconds)):
            if value is not None and not (type(value) in (int, float) and value > 0):
                raise ConfigError(
                    f"{name} of a budget must be a number > 0 or None, got {value!r}."
                )
        self._scores = scores
        self._seconds = seconds
        self._advice = advice or "With journal=, the same call goes on where it stopped."
        self._start = time.monotonic()

    def __call__(self, event: Event) -> None:
        """Hear of an event."""
        if isinstance(event, MergeStarted) and self._scores is not None:
            if event.scores > self._scores:
                raise BudgetError(
                    f"the merge may need {event.scores} scores, and budget.scores is "
                    f"{self._scores}. Raise it, or need fewer: density and scale as numbers, "
                    f"reanalyze='once', accept='always'."
                )
        if not isinstance(event, StateScored) or event.stage == "test" or self._seconds is None:
            return
        took = time.monotonic() - self._start
        if took > self._seconds:
            raise BudgetError(
                f"stopped after {took:.0f} s and {event.done} of at most {event.total} scores: "
                f"budget.seconds is {self._seconds:g}. {self._advice}"
            )
