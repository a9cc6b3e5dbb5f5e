"""Reports for tests of the page: one of a real tiny merge, and one made up, with hostile names."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import tiny
import torch

from peft_himerge import HiMergeConfig, merge_adapters, merge_adapters_hi

EVIL = "<script>f()</script>"


def save_merge(folder: Path, **options: Any) -> Path:
    """Merge two adapters of a tiny Llama and save the result."""
    names = ["zh", "en"]
    config = HiMergeConfig(**{"max_export_drop": None, "rank": 4, **options})
    result = merge_adapters_hi(
        tiny.peft_model("llama", 2, torch.float32),
        names,
        tiny.eval_fns("llama", names),
        config=config,
    )
    return result.save(folder)


def save_by_method(folder: Path, method: str = "ties", **options: Any) -> Path:
    """Merge the same two adapters by a method of the registry and save the result."""
    model = tiny.peft_model("llama", 2, torch.float32)
    return merge_adapters(model, ["zh", "en"], method, rank=4, **options).save(folder)


def with_test(folder: Path, merged: str = "merged") -> Path:
    """Add a table of test scores to a saved report, as a recipe does, and make its page again."""
    from peft_himerge.page import parse_report, render_page

    told = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    level = {"base": 0.2, "zh": 0.4, "en": 0.5, merged: 0.6}
    told["test"] = {
        "scores": {s: {"zh": v + 0.02, "en": v} for s, v in level.items()},
        "standard_errors": {s: {"zh": 0.02, "en": 0.03} for s in level},
    }
    (folder / "report.json").write_text(json.dumps(told), encoding="utf-8")
    (folder / "report.html").write_text(render_page(parse_report(told)), encoding="utf-8")
    return folder


def facts(*names: str, layers: int = 3) -> dict[str, Any]:
    """Return the content of a report of adapters with these names, with round numbers."""
    adapters = list(names or ("en", "zh"))
    states = ["base", *adapters, "model_wise", "merged", "exported"]
    level = {"base": 0.2, "model_wise": 0.6, "merged": 0.7, "exported": 0.65}
    labels = [f"model.layers.{i}" for i in range(layers)]
    kinds = ["severe", "partial", "mutual"]
    pairs = [(a, b) for i, a in enumerate(adapters) for b in adapters[i + 1 :]]
    scores = {
        s: {t: level.get(s, 1.0 if s == t else 0.1) + 0.01 * i for i, t in enumerate(adapters)}
        for s in states
    }
    parts = ("alpha_alone", "beta_alone", "alpha_merged", "beta_merged", "c_alone", "c_merged")
    return {
        "format": "peft_himerge.report/1",
        "adapter_name": "merged",
        "plan": {
            "fingerprint": "0123456789abcdef" * 4,
            "prune_scope": "model",
            "adapters": {name: {"density": 0.5, "scale": 0.9} for name in adapters},
            "edits": {
                label: {n: {"density": 1.0, "scale": 1.0} for n in adapters} for label in labels
            },
        },
        "scores": scores,
        "standard_errors": {s: dict.fromkeys(adapters, 0.02) for s in states},
        "metrics": {s: {t: {"accuracy": 0.5} for t in adapters} for s in states},
        "contributions": [
            {
                "layer": label,
                "task": task,
                **dict.fromkeys(parts, 0.25),
                "gamma": 0.1 * (i - 1),
                "gamma_se": 0.05,
            }
            for i, label in enumerate(labels)
            for task in adapters
        ],
        "conflicts": [
            {
                "layer": label,
                "kind": kinds[i % 3],
                "Gamma": 0.3 - 0.25 * i,
                "gammas": dict.fromkeys(adapters, 0.1),
                "done": f"kept only {adapters[0]}",
                "accepted": True,
                "before": dict.fromkeys(adapters, 0.5),
                "after": dict.fromkeys(adapters, 0.75),
            }
            for i, label in enumerate(labels)
        ],
        "search": [
            {"adapter": name, "density": d, "scale": s, "value": d + s}
            for name in adapters
            for d in (0.1, 0.5)
            for s in (0.3, 0.9)
        ],
        "export": {
            "rank": 2,
            "relative_error": 0.25,
            "drop": 0.05,
            "modules": [
                {"module": f"{label}.q", "rank": 2, "relative_error": 0.25, "norm": 2.0}
                for label in labels
            ],
        },
        "cost": {"scores": 42, "seconds": 12.5, "blocks_run": 300, "blocks_skipped": 100},
        "options": {"density": "search", "accept": "best"},
        "geometry": {
            "layers": [
                {
                    "layer": label,
                    "norms": dict.fromkeys(adapters, 1.5),
                    "pairs": [
                        {
                            "adapters": list(pair),
                            "cosine": 0.125,
                            "sign_agreement": 0.5625,
                            "sign_agreement_se": 0.0,
                            "entries": 64,
                        }
                        for pair in pairs
                    ],
                }
                for label in labels
            ],
            "singular_values": {f"{label}.q": [1.75, 0.5] for label in labels},
        },
        "versions": {"python": "3.11"},
    }


def without(given: dict[str, Any], *keys: str) -> dict[str, Any]:
    """Return a copy that lacks these keys."""
    made = copy.deepcopy(given)
    for key in keys:
        del made[key]
    return made
