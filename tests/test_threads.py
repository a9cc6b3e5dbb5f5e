"""Work is spread over cores without a trace: order, errors and the number of threads are kept."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from peft_himerge.threads import one_core, spread


@pytest.fixture(autouse=True)
def three() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("most", [None, 1, 2, 99])
def test_results_come_in_the_order_of_the_items(most: int | None) -> None:
    assert list(spread(lambda i: i * i, range(50), most=most)) == [i * i for i in range(50)]
    assert torch.get_num_threads() == 3


def test_no_items_give_no_results() -> None:
    assert list(spread(abs, [])) == []


def test_an_error_comes_out_and_the_threads_are_put_back() -> None:
    def work(i: int) -> int:
        if i == 5:
            raise ValueError("five")
        return i

    with pytest.raises(ValueError, match="five"):
        list(spread(work, range(100)))
    assert torch.get_num_threads() == 3


def test_a_caller_who_stops_early_puts_the_threads_back_and_leaves_the_rest_undone() -> None:
    done: list[int] = []
    results = spread(lambda i: done.append(i) or i, range(1000))
    assert next(results) == 0
    assert torch.get_num_threads() == 1
    results.close()  # type: ignore[attr-defined]
    assert torch.get_num_threads() == 3
    assert len(done) < 20


def test_each_worker_computes_with_one_core() -> None:
    assert set(spread(lambda _: torch.get_num_threads(), range(6))) == {1}


def test_one_core_gives_the_others_back_also_after_an_error() -> None:
    def interrupted() -> None:
        with one_core():
            assert torch.get_num_threads() == 1
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert torch.get_num_threads() == 3
