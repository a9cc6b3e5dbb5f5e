"""Points of a grid, proposed one after the other: all of them, at random, or by Optuna's TPE.

    points = propose("optuna", [(0.1, 0.5, 1.0), (0.2, 0.4)], most=5, seed=0)
    explore(points, lambda batch: [score(*point) for point in batch])

No point is proposed twice, and the same values sent back give the same points again, in every
process.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import islice, product
from typing import Any, Literal

from .errors import MissingExtraError

__all__ = ["Kind", "Point", "explore", "import_optuna", "propose", "size"]

Kind = Literal["grid", "random", "optuna"]
Point = tuple[Any, ...]
_Place = tuple[int, ...]  # a point, by the position of its value on every axis

# Up to so many points, drawing at random is shuffling all of them.
_SMALL = 4096
# After so many proposals of points that are known, take one at random.
_PATIENCE = 20


def size(axes: Sequence[Sequence[Any]]) -> int:
    """Return the number of points of the grid."""
    return math.prod(len(axis) for axis in axes)


def propose(
    kind: Kind,
    axes: Sequence[Sequence[Any]],
    most: int | None = None,
    *,
    seed: int = 0,
    first: Sequence[Point] = (),
) -> Generator[list[Point], Sequence[float], None]:
    """Yield batches of points and take back their values, higher is better.

    Args:
        kind: "grid": all points, in order; "random": in random order; "optuna": by its
            tree-structured Parzen estimator, after a first batch that is random.
        axes: the values of every coordinate, each once.
        most: end after so many points; None goes on until all were proposed.
        seed: of what is random.
        first: points to begin with.

    Raises:
        MissingExtraError: Optuna is needed and not installed.
    """
    wanted = size(axes) if most is None else min(most, size(axes))
    start = list(dict.fromkeys(_place(axes, point) for point in first))
    if kind == "optuna":
        yield from _tpe(axes, wanted, seed, start)
        return
    rest = product(*(range(len(a)) for a in axes)) if kind == "grid" else _shuffled(axes, seed)
    for place in islice(_unseen(start, rest), wanted):
        yield [_point(axes, place)]


def explore(
    points: Generator[list[Point], Sequence[float], None],
    score: Callable[[list[Point]], Sequence[float] | None],
) -> None:
    """Score one batch after the other, until there are no more points or `score` gives None."""
    batch = next(points, None)
    while batch is not None:
        values = score(batch)
        if values is None:
            points.close()
            return
        try:
            batch = points.send(values)
        except StopIteration:
            return


def import_optuna(what: str) -> Any:
    """Return the module optuna.

    Args:
        what: who needs it, to begin the error's text with.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import optuna
    except ImportError as exc:
        raise MissingExtraError(f"{what} needs Optuna: pip install 'peft-himerge[sweep]'.") from exc
    return optuna


def _place(axes: Sequence[Sequence[Any]], point: Point) -> _Place:
    return tuple(list(axis).index(value) for axis, value in zip(axes, point, strict=True))


def _point(axes: Sequence[Sequence[Any]], place: _Place) -> Point:
    return tuple(axis[i] for axis, i in zip(axes, place, strict=True))


def _unseen(start: Sequence[_Place], rest: Iterator[_Place]) -> Iterator[_Place]:
    yield from start
    known = set(start)
    yield from (place for place in rest if place not in known)


def _shuffled(axes: Sequence[Sequence[Any]], seed: int) -> Iterator[_Place]:
    """Yield every place once, in random order."""
    draw = random.Random(seed)
    if size(axes) <= _SMALL:
        places = list(product(*(range(len(axis)) for axis in axes)))
        draw.shuffle(places)
        yield from places
        return
    known: set[_Place] = set()
    while len(known) < size(axes):
        place = tuple(draw.randrange(len(axis)) for axis in axes)
        if place not in known:
            known.add(place)
            yield place


def _tpe(
    axes: Sequence[Sequence[Any]], wanted: int, seed: int, start: Sequence[_Place]
) -> Generator[list[Point], Sequence[float], None]:
    optuna = import_optuna("search='optuna'")
    # A third at random, but enough to tell good from bad; they are one batch, so that several
    # processes share them.
    at_random = min(10, max(4, wanted // 3))
    study = _study(optuna, optuna.samplers.TPESampler(seed=seed, n_startup_trials=at_random))
    distributions, orders = _distributions(optuna, axes)
    spare = _shuffled(axes, seed)
    known: set[_Place] = set()

    def ask() -> Any:
        """Return a trial at a place that is not known yet."""
        for _ in range(_PATIENCE):
            trial = study.ask(distributions)
            if (found := _place_of(trial, orders)) not in known:
                known.add(found)
                return trial
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        study.enqueue_trial(_params(next(p for p in spare if p not in known), orders))
        return ask()

    for place in start:
        study.enqueue_trial(_params(place, orders))
    batch = [ask() for _ in range(min(wanted, max(at_random, len(start))))]
    while batch:
        values = yield [_point(axes, _place_of(trial, orders)) for trial in batch]
        for trial, value in zip(batch, values, strict=True):
            study.tell(trial, value)
        batch = [ask()] if len(known) < wanted else []


def _study(optuna: Any, sampler: Any) -> Any:
    """Return a new study in memory, without Optuna's word about it."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.create_study(direction="maximize", sampler=sampler)
    finally:
        optuna.logging.set_verbosity(before)


def _distributions(
    optuna: Any, axes: Sequence[Sequence[Any]]
) -> tuple[dict[str, Any], list[list[int]]]:
    """Return per axis what Optuna draws, and the position on the axis of each thing drawn.

    Numbers are drawn by their rank, so that neighbours are known to be alike.
    """
    distributions: dict[str, Any] = {}
    orders: list[list[int]] = []
    for number, axis in enumerate(axes):
        places = list(range(len(axis)))
        ordered = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in axis)
        orders.append([i for _, i in sorted(zip(axis, places, strict=True))] if ordered else places)
        if ordered:
            found = optuna.distributions.IntDistribution(0, len(axis) - 1)
        else:
            found = optuna.distributions.CategoricalDistribution(places)
        distributions[f"{number:03d}"] = found
    return distributions, orders


def _params(place: _Place, orders: Sequence[Sequence[int]]) -> dict[str, int]:
    pairs = zip(place, orders, strict=True)
    return {f"{number:03d}": list(order).index(i) for number, (i, order) in enumerate(pairs)}


def _place_of(trial: Any, orders: Sequence[Sequence[int]]) -> _Place:
    return tuple(order[trial.params[f"{number:03d}"]] for number, order in enumerate(orders))
