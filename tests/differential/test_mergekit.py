"""Our methods on true deltas against mergekit on full checkpoints, run as an outside program.

``HIMERGE_MERGEKIT_PYTHON=DIR/bin/python python -m pytest -m mergekit tests/differential``, where
DIR is a virtual environment with ``pip install mergekit==0.1.5``. It need not hold this library.

mergekit sees weights, not adapters: float32 checkpoints, made here from A and B by plain torch. It
subtracts the base again, so that its deltas carry the rounding of the weights (up to 1e-7).
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import add_adapters, default_specs, tiny_model
from torch import Tensor

from peft_himerge import merge_adapters

pytestmark = pytest.mark.mergekit
NAMES = ("zh", "en", "math")
CLOSE = 1e-5
RUN = "from mergekit.scripts.run_yaml import main; main()"


@pytest.fixture(scope="session")
def python() -> str:
    found = os.environ.get("HIMERGE_MERGEKIT_PYTHON")
    if not found:
        pytest.skip("HIMERGE_MERGEKIT_PYTHON does not name a Python that has mergekit")
    probe = subprocess.run([found, "-c", "import mergekit"], capture_output=True, check=False)
    if probe.returncode:
        pytest.fail(f"HIMERGE_MERGEKIT_PYTHON={found!r} cannot import mergekit: {probe.stderr!r}")
    return found


@dataclass(frozen=True)
class World:
    """A base and its adapters, live and as full checkpoints."""

    root: Path
    model: PeftModel
    base: Mapping[str, Tensor]
    deltas: Mapping[str, Mapping[str, Tensor]]  # adapter -> module -> (out, in), float64


def delta(layer: Any, name: str) -> Tensor:
    return layer.scaling[name] * (
        layer.lora_B[name].weight.detach().double() @ layer.lora_A[name].weight.detach().double()
    )


def write_world(root: Path, specs: Mapping[str, Mapping[str, Any]], alike: float = 0.0) -> World:
    """Write base and experts; with `alike`, all adapters get a share of the first one's factors."""
    model = add_adapters(tiny_model("llama"), specs)
    layers = {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")}
    first, *others = specs
    with torch.no_grad():
        for layer in layers.values():
            for name in others if alike else ():
                for part in (layer.lora_A, layer.lora_B):
                    part[name].weight.lerp_(part[first].weight, alike)
    tiny_model("llama").save_pretrained(root / "base")
    base = load_file(root / "base" / "model.safetensors")
    deltas = {n: {m: delta(x, n) for m, x in layers.items() if n in x.lora_A} for n in specs}
    for name, parts in deltas.items():
        weights = {
            key: (value.double() + parts[key.removesuffix(".weight")]).float()
            if key.removesuffix(".weight") in parts
            else value
            for key, value in base.items()
        }
        (root / name).mkdir()
        save_file(weights, root / name / "model.safetensors", metadata={"format": "pt"})
        config = (root / "base" / "config.json").read_text(encoding="utf-8")
        (root / name / "config.json").write_text(config, encoding="utf-8")
    return World(root, model, base, deltas)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Return adapters of different ranks, on different modules, rsLoRA and patterns among them."""
    return write_world(tmp_path_factory.mktemp("mixed"), default_specs("llama", 3))


@pytest.fixture(scope="module")
def related(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Return adapters that point to one side, as those of one recipe do."""
    specs = {
        name: {"r": 4, "alpha": 6, "target_modules": ["q_proj", "down_proj"], "seed": i}
        for i, name in enumerate(NAMES)
    }
    return write_world(tmp_path_factory.mktemp("related"), specs, alike=0.6)


def mergekit(
    python: str,
    world: World,
    method: str,
    models: Mapping[str, Mapping[str, Any]],
    base: str = "base",
    **parameters: Any,
) -> dict[str, Tensor]:
    """Return the checkpoint that mergekit makes of full models."""
    target = world.root / f"out-{len(list(world.root.glob('out-*')))}"
    recipe = {
        "merge_method": method,
        "base_model": str(world.root / base),
        "models": [
            {"model": str(world.root / name), "parameters": dict(own)}
            for name, own in models.items()
        ],
        "parameters": parameters,
        "dtype": "float32",
    }
    file = world.root / "recipe.yml"
    file.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    done = subprocess.run(
        [python, "-c", RUN, str(file), str(target)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    weights: dict[str, Tensor] = {}
    for shard in sorted(target.glob("*.safetensors")):
        weights |= load_file(shard)
    return weights


def ours(world: World, method: str, **options: Any) -> dict[str, Tensor]:
    """Return base + exact merged delta, as a checkpoint."""
    result = merge_adapters(
        world.model, list(world.deltas), method, adapter_name="new", overwrite=True, **options
    )
    weights = dict(world.base)
    for record in result.modules:
        key = f"{record.module}.weight"
        weights[key] = weights[key] + result.delta(record.module)
    return weights


def furthest(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Return the largest absolute difference of any weight."""
    assert set(left) == set(right)
    return max(float((left[key].double() - right[key].double()).abs().max()) for key in left)


def weighted(*weights: float, **more: Any) -> dict[str, dict[str, Any]]:
    return {name: {"weight": w, **more} for name, w in zip(NAMES, weights, strict=True)}


WEIGHTS = (1.0, -0.5, 0.75)
# Ours, its options; mergekit's, what it says of the models, of the merge.
CASES: dict[str, tuple[str, dict[str, Any], str, dict[str, dict[str, Any]], dict[str, Any]]] = {
    "task arithmetic": (
        *("task_arithmetic", {"weights": WEIGHTS, "lam": 0.8}),
        *("task_arithmetic", weighted(*WEIGHTS), {"lambda": 0.8}),
    ),
    "average": (
        *("average", {"weights": (1.0, 2.0, 0.5)}),
        *("task_arithmetic", weighted(1.0, 2.0, 0.5), {"normalize": True}),
    ),
    "ties, whole": (
        *("ties_mergekit", {"weights": (1.0, 2.0, 0.5)}),
        *("ties", weighted(1.0, 2.0, 0.5, density=1.0), {"normalize": True}),
    ),
    "ties, a quarter": (
        *("ties_mergekit", {"density": 0.25, "weights": (1.0, 2.0, 0.5), "lam": 1.5}),
        *("ties", weighted(1.0, 2.0, 0.5, density=0.25), {"normalize": True, "lambda": 1.5}),
    ),
    "ties, negative weight, not normalised": (
        *("ties_mergekit", {"density": 0.5, "weights": WEIGHTS, "normalize": False}),
        *("ties", weighted(*WEIGHTS, density=0.5), {"normalize": False}),
    ),
    "dare, nothing dropped": (
        *("dare_linear", {"density": 1.0, "weights": WEIGHTS}),
        *("dare_linear", weighted(*WEIGHTS, density=1.0), {}),
    ),
    "dare with ties, nothing dropped": (
        *("dare_ties_mergekit", {"density": 1.0, "weights": (1.0, 2.0, 0.5), "normalize": True}),
        *("dare_ties", weighted(1.0, 2.0, 0.5, density=1.0), {"normalize": True}),
    ),
    "breadcrumbs": (
        *("breadcrumbs_mergekit", {"density": 0.5, "outliers": 0.125, "weights": WEIGHTS}),
        *("breadcrumbs", weighted(*WEIGHTS, density=0.5, gamma=0.125), {}),
    ),
    "breadcrumbs with ties": (
        *("breadcrumbs_ties", {"density": 0.5, "outliers": 0.125, "weights": (1.0, 2.0, 0.5)}),
        *("breadcrumbs_ties", weighted(1.0, 2.0, 0.5, density=0.5, gamma=0.125), {}),
    ),
    "sce, all entries": (
        *("sce", {"select_topk": 1.0}),
        *("sce", {name: {} for name in NAMES}, {"select_topk": 1.0}),
    ),
    "sce, some entries": (
        *("sce", {"select_topk": 0.3}),
        *("sce", {name: {} for name in NAMES}, {"select_topk": 0.3}),
    ),
    "model stock": (
        *("model_stock", {}),
        *("model_stock", {name: {} for name in NAMES}, {"filter_wise": False}),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_same_numbers_as_mergekit(
    case: str, python: str, mixed: World, related: World, record_property: Any
) -> None:
    method, options, theirs, models, parameters = CASES[case]
    # Unrelated adapters may have a mean cosine below 0, where ours stops at the base on purpose.
    for world in (related,) if method == "model_stock" else (related, mixed):
        want = mergekit(python, world, theirs, models, **parameters)
        apart = furthest(ours(world, method, **options), want)
        record_property("apart", apart)
        print(f"{case}: {apart:.2e}")
        assert apart < CLOSE
        assert furthest(world.base, want) > 100 * CLOSE  # something was merged


def test_model_stock_of_adapters_at_odds_stays_at_the_base(python: str, mixed: World) -> None:
    """Noted as different: below a mean cosine of 0 mergekit goes against the average."""
    models: dict[str, dict[str, Any]] = {name: {} for name in NAMES}
    theirs = mergekit(python, mixed, "model_stock", models, filter_wise=False)
    mine = ours(mixed, "model_stock")
    against = agreeing = 0
    for key, value in mixed.base.items():
        module = key.removesuffix(".weight")
        parts = [parts[module] for parts in mixed.deltas.values() if module in parts]
        if len(parts) < 2:
            continue  # a mean cosine of 0 for both
        if float(((theirs[key] - value).double() * sum(parts)).sum()) < -CLOSE:
            against += 1
            assert torch.equal(mine[key], value)
        else:
            agreeing += 1
            torch.testing.assert_close(mine[key], theirs[key], rtol=0, atol=CLOSE)
    assert against
    assert agreeing


def arc(t: float, x: Tensor, y: Tensor) -> Tensor:
    """Return the point at t of the way from x to y on the arc, in float64."""
    angle = torch.acos((x * y).sum() / x.norm() / y.norm())
    return (torch.sin((1 - t) * angle) * x + torch.sin(t * angle) * y) / torch.sin(angle)


def test_slerp_is_another_path_than_mergekits(python: str, related: World) -> None:
    """Noted as different: mergekit turns whole weights, ours turns deltas.

    Whole weights of one base have a small angle between them, so mergekit's path is nearly the
    straight line, which is shorter than both deltas; ours keeps their length.
    """
    t = 0.3
    pair = {name: related.deltas[name] for name in ("zh", "en")}
    models: dict[str, dict[str, Any]] = {name: {} for name in pair}
    theirs = mergekit(python, related, "slerp", models, base="zh", t=t)
    result = merge_adapters(
        related.model, list(pair), "slerp", adapter_name="arc", t=t, toward="en"
    )
    for module, x in pair["zh"].items():
        y, key = pair["en"][module], f"{module}.weight"
        weight = related.base[key].double()
        on_weights = arc(t, weight + x, weight + y)
        on_deltas = arc(t, x, y)
        line = (1 - t) * x + t * y
        torch.testing.assert_close(theirs[key].double(), on_weights, rtol=0, atol=CLOSE)
        torch.testing.assert_close(result.delta(module).double(), on_deltas, rtol=0, atol=CLOSE)
        size = float(line.norm())
        off_line = float((on_weights - weight - line).norm()) / size
        apart = float((on_deltas - line).norm()) / size
        print(f"{module}: mergekit {off_line:.3f}, ours {apart:.3f} off the line")
        assert apart > 0.02
        assert float(on_deltas.norm()) > size
