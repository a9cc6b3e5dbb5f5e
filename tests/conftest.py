"""One thread, no network, and hypothesis that draws the same examples in every run."""

from __future__ import annotations

import os
from itertools import chain
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

settings.register_profile(
    "fixed",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.differing_executors],
)
settings.load_profile("fixed")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the matrix of adapters and bases, if this run has looked at it."""
    from matrix.table import summary

    lines = summary(chain.from_iterable(terminalreporter.stats.values()))
    if lines:
        terminalreporter.section("what is merged and what is refused")
        for line in lines:
            terminalreporter.line(line)
