"""Batches are checked before anything runs, and padding is told from tokens."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from snapshot import rng_states
from tiny import tiny_model
from torch import Tensor, nn
from torch.utils.data import DataLoader

from peft_himerge.batches import Batches, counted_tokens, predictions, read_batches
from peft_himerge.errors import ConfigError


def ids(rows: int = 2, length: int = 4) -> Tensor:
    return torch.arange(rows * length).reshape(rows, length) + 3


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return tiny_model("llama")


def test_lists_loaders_and_iterators_are_read_once_and_draw_nothing(llama: nn.Module) -> None:
    rows = [{"input_ids": ids(1)[0], "attention_mask": torch.ones(4)} for _ in range(5)]
    before = rng_states()
    read = read_batches(
        llama,
        ["a", "b", "c"],
        {
            "c": [{"input_ids": ids()}],
            "a": DataLoader(rows, batch_size=2, shuffle=True),
            "b": iter([UserDict(input_ids=ids()), {"input_ids": ids(3)}]),
        },
    )
    assert rng_states() == before
    assert list(read.of) == ["a", "b", "c"]
    assert [len(read.of[n]) for n in "abc"] == [3, 2, 1]
    assert [read.count(n) for n in "abc"] == [5, 5, 2]
    assert read.longest == 3


def test_reading_restores_random_states_even_when_it_fails(llama: nn.Module) -> None:
    def broken() -> Any:
        torch.rand(3)
        yield {"input_ids": ids()}
        raise KeyboardInterrupt

    before = rng_states()
    with pytest.raises(KeyboardInterrupt):
        read_batches(llama, ["a"], {"a": broken()})
    assert rng_states() == before


FAULTS: dict[str, tuple[Any, str]] = {
    "no dict": ([1], "must be a dict, adapter -> batches, got list"),
    "unknown": ({"a": [{"input_ids": ids()}], "bb": []}, "names 'bb'. Did you mean 'b'"),
    "missing": ({"a": [{"input_ids": ids()}]}, "no batches for adapter 'b'"),
    "one batch": ({"a": {"input_ids": ids()}}, "Put a single batch into a list"),
    "tensor": ({"a": ids()}, "must be a list"),
    "number": ({"a": 3}, "must be a list"),
    "empty": ({"a": []}, r"inputs\['a'\] has no batches"),
    "spent": ({"a": iter(())}, "has no batches"),
    "texts": ({"a": ["hello"]}, "must be a dict of tensors, got 'hello'"),
    "no keys": ({"a": [{}]}, "must be a dict of tensors"),
    "lists": ({"a": [{"input_ids": [[1, 2]]}]}, "'input_ids' must be a tensor, got list"),
    "typo": (
        {"a": [{"input_ids": ids(), "atention_mask": ids()}]},
        "has 'atention_mask'. Did you mean 'attention_mask'",
    ),
    "no main input": ({"a": [{"attention_mask": ids()}]}, "has no 'input_ids', only attention_"),
    "sizes": ({"a": [{"input_ids": ids(), "labels": ids(3)}]}, "must count the same examples"),
    "no rows": ({"a": [{"input_ids": ids(2)[:0]}]}, "at least one"),
    "square mask": (
        {"a": [{"input_ids": ids(), "attention_mask": torch.ones(2, 1, 4, 4)}]},
        "attention_mask must be",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_inputs_are_named(fault: str, llama: nn.Module) -> None:
    given, text = FAULTS[fault]
    if isinstance(given, dict) and fault not in ("unknown", "missing"):
        given = {**given, "b": [{"input_ids": ids()}]}
    with pytest.raises(ConfigError, match=text):
        read_batches(llama, ["a", "b"], given)


def test_a_forward_that_takes_anything_is_not_second_guessed() -> None:
    class Loose(nn.Module):
        def forward(self, **kwargs: Any) -> Any:
            return kwargs

    read = read_batches(Loose(), ["a"], {"a": [{"whatever": ids(), "number": torch.tensor(3)}]})
    assert read.count("a") == 2
    first, second = read.singles("a")
    assert torch.equal(first["whatever"], ids()[:1])
    assert torch.equal(second["whatever"], ids()[1:])
    assert first["number"] == 3


def test_labels_are_asked_for_by_name() -> None:
    batches = Batches({"a": ({"x": ids(), "labels": ids()}, {"x": ids()})})
    with pytest.raises(ConfigError, match=r"atlas needs labels, but batch 1 of inputs\['a'\]"):
        batches.need_labels("atlas")


def test_turns_start_over_with_the_shorter_task() -> None:
    batches = Batches({"a": ({"x": ids(1)},), "b": ({"x": ids(2)}, {"x": ids(3)})})
    sizes = [[(n, len(b["x"])) for n, b in turn] for turn in batches.turns(3)]
    assert sizes == [[("a", 1), ("b", 2)], [("a", 1), ("b", 3)], [("a", 1), ("b", 2)]]


MASK = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]])


def test_tokens_are_told_from_padding_by_shape() -> None:
    batch = {"input_ids": ids(), "attention_mask": MASK}
    assert torch.equal(counted_tokens(batch, (2, 4), decoder=False), MASK.bool())
    assert torch.equal(counted_tokens(batch, (8,), decoder=False), MASK.bool().flatten())
    assert counted_tokens(batch, (2,), decoder=False) is None  # a pooler sees one row per example
    assert counted_tokens(batch, (2, 4), decoder=True) is None
    assert counted_tokens({"input_ids": ids()}, (2, 4), decoder=False) is None


@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    left=st.booleans(),
    seed=st.integers(0, 9),
)
def test_predictions_are_those_of_a_loop_over_tokens(
    lengths: list[int], left: bool, seed: int
) -> None:
    logits = torch.randn(len(lengths), 5, 3, generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(len(lengths), 5, dtype=torch.long)
    every, last = [], []
    for n, length in enumerate(lengths):
        places = range(5 - length, 5) if left else range(length)
        for t in places:
            mask[n, t] = 1
            every.append(logits[n, t])
        last += every[-1:] if length else []
    batch = {"input_ids": mask, "attention_mask": mask}
    for where, want in (("all", every), ("last", last)):
        got = predictions(batch, logits, where, decoder=False)
        assert torch.equal(got, torch.stack(want) if want else logits[:0, 0])


def test_predictions_at_all_tokens_or_the_last_one() -> None:
    logits = torch.arange(24.0).reshape(2, 4, 3)
    batch = {"input_ids": ids(), "attention_mask": MASK}
    every = predictions(batch, logits, "all", decoder=False)
    assert torch.equal(every, torch.stack([logits[0, 0], logits[0, 1], *logits[1, 1:]]))
    last = predictions(batch, logits, "last", decoder=False)
    assert torch.equal(last, torch.stack([logits[0, 1], logits[1, 3]]))
    unmasked = predictions({"input_ids": ids()}, logits, "last", decoder=False)
    assert torch.equal(unmasked, logits[:, 3])
    classes = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(predictions(batch, classes, "last", decoder=False), classes)
    labels = torch.tensor([[5, -100, -100, -100], [5, 5, -100, -100]])
    told = predictions({**batch, "labels": labels}, logits, "all", decoder=True)
    assert torch.equal(told, torch.stack([logits[0, 0], logits[1, 0], logits[1, 1]]))
