"""Deltas are float32 products though the model may round to TF32, and that setting stays."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from peft_himerge.factors import full_precision

BACKENDS: Any = torch.backends
pytestmark = pytest.mark.skipif(
    not hasattr(BACKENDS, "fp32_precision"), reason="these settings came with torch 2.9"
)
SETTINGS = {
    "default": lambda: None,
    "old": lambda: torch.set_float32_matmul_precision("high"),
    "old, full": lambda: torch.set_float32_matmul_precision("highest"),
    "new": lambda: setattr(BACKENDS, "fp32_precision", "tf32"),
    "new, products alone": lambda: setattr(BACKENDS.cuda.matmul, "fp32_precision", "tf32"),
}


def put_back() -> None:
    owners = (BACKENDS, BACKENDS.cuda.matmul, BACKENDS.mkldnn.matmul)
    for owner in owners:
        owner.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    for owner in owners:
        owner.fp32_precision = "none"


@pytest.fixture(autouse=True)
def _own_settings() -> Iterator[None]:
    put_back()
    yield
    put_back()


def told() -> list[Any]:
    try:
        old = torch.get_float32_matmul_precision()
    except RuntimeError:
        old = None
    return [old, BACKENDS.fp32_precision, BACKENDS.cuda.matmul.fp32_precision]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_gpu_multiplies_in_full_inside_and_as_the_user_says_afterwards(name: str) -> None:
    SETTINGS[name]()
    before = told()
    with full_precision(torch.device("cpu")):
        assert told() == before
    with full_precision(torch.device("cuda")):
        assert BACKENDS.cuda.matmul.fp32_precision in ("none", "ieee")
    assert told() == before


def test_what_was_inherited_still_follows_the_general_setting() -> None:
    BACKENDS.fp32_precision = "tf32"
    with full_precision(torch.device("cuda")):
        assert BACKENDS.cuda.matmul.fp32_precision == "ieee"
    BACKENDS.fp32_precision = "none"
    assert BACKENDS.cuda.matmul.fp32_precision == "none"
