"""Spread independent pieces of work over the cores that torch was given.

Blocks are small, and a matrix product of a small block split over cores waits longer for the other
core than it computes, most of all on a machine shared with other work. So each worker takes whole
pieces and computes with one core; torch operations and numpy release Python's lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

__all__ = ["one_core", "spread"]

Item = TypeVar("Item")
Result = TypeVar("Result")


def spread(
    work: Callable[[Item], Result], items: Iterable[Item], *, most: int | None = None
) -> Iterator[Result]:
    """Yield ``work(item)`` for every item, in the items' order.

    Args:
        work: must not depend on the order in which items are treated.
        items: taken one by one, at most one more per worker than is being worked on, so that
            results nobody asked for yet do not pile up.
        most: upper bound on the number of workers; the default is `torch.get_num_threads()`.

    While it runs torch computes with one core per worker; the former number is put back at the
    end, also when `work` raises or the caller stops early.
    """
    threads = torch.get_num_threads()
    workers = threads if most is None else min(threads, most)
    if workers <= 1:
        yield from map(work, items)
        return
    pool = ThreadPoolExecutor(workers, "himerge")
    waiting: deque[Future[Result]] = deque()
    try:
        torch.set_num_threads(1)
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)


@contextmanager
def one_core() -> Iterator[None]:
    """Let torch compute with one core inside: faster for a row of small blocks than splitting each.

    The former number is put back at the end.
    """
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)
