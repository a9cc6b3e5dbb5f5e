"""Module paths to layers."""

from __future__ import annotations

import random

import pytest

from peft_himerge.layers import OUTSIDE, group_modules, layer_of


@pytest.mark.parametrize(
    ("module", "layer"),
    [
        ("model.layers.7.self_attn.q_proj", "model.layers.7"),
        ("model.layers.17", "model.layers.17"),
        ("transformer.h.0.attn.c_attn", "transformer.h.0"),
        ("encoder.block.3.layer.0.SelfAttention.q", "encoder.block.3"),
        ("decoder.block.3.layer.2.DenseReluDense.wo", "decoder.block.3"),
        ("model.layers.2.mlp.experts.5.up_proj", "model.layers.2"),
        ("0.q", "0"),
        ("12", "12"),
        ("bert.pooler.dense", OUTSIDE),
        ("lm_head", OUTSIDE),
        ("model.embed_tokens", OUTSIDE),
        ("block1.q", OUTSIDE),
        ("a.1b.2.c", "a.1b.2"),
    ],
)
def test_layer_of_a_module_is_its_path_up_to_the_first_number(module: str, layer: str) -> None:
    assert layer_of(module) == layer


def test_group_orders_blocks_by_number_and_puts_outside_last() -> None:
    names = [f"model.layers.{i}.{m}" for i in (10, 2, 0) for m in ("v", "q")] + ["lm_head"]
    groups = group_modules(names)
    assert [g.label for g in groups] == [
        "model.layers.0",
        "model.layers.2",
        "model.layers.10",
        OUTSIDE,
    ]
    assert [g.index for g in groups] == [0, 1, 2, 3]
    assert groups[1].modules == ("model.layers.2.q", "model.layers.2.v")
    assert groups[3].modules == ("lm_head",)


def test_group_puts_encoder_blocks_before_decoder_blocks() -> None:
    names = ["decoder.block.0.q", "encoder.block.1.q", "encoder.block.0.q", "decoder.block.1.q"]
    assert [g.label for g in group_modules(names)] == [
        "encoder.block.0",
        "encoder.block.1",
        "decoder.block.0",
        "decoder.block.1",
    ]


def test_group_depends_neither_on_order_nor_on_repeats() -> None:
    names = [f"h.{i}.{m}" for i in range(12) for m in "abc"] + ["head", "wte"]
    want = group_modules(names)
    for seed in range(5):
        shuffled = names + names[:5]
        random.Random(seed).shuffle(shuffled)
        assert group_modules(shuffled) == want


def test_group_of_nothing_is_nothing() -> None:
    assert group_modules([]) == ()
