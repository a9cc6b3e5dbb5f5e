"""The model card of a merged adapter: base, method, sources and their licences."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, metadata_load
from yaml import YAMLError

from .errors import ConfigError, suggest
from .report import render_markdown

__all__ = ["licences_of", "render_card"]

_HI = ("Hi-Merging", "https://arxiv.org/abs/2506.12379")
_MOST_BYTES = 1 << 22  # of a card
_LONGEST = 200  # characters of a licence, and of a name
_UNREADABLE = "unknown (its model card cannot be read)"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def licences_of(
    folders: Mapping[str, str | Path] | None, names: Mapping[str, Any]
) -> dict[str, str]:
    """Return adapter -> licence, for the folders whose model card (README.md) names one.

    Args:
        folders: adapter -> folder or card it came from; None reads nothing.
        names: the merged adapters.

    Raises:
        ConfigError: a name is no merged adapter.
    """
    found = {}
    for name, folder in (folders or {}).items():
        if name not in names:
            raise ConfigError(f"sources names {name!r}.{suggest(str(name), names)}")
        card = Path(folder) / "README.md" if Path(folder).is_dir() else Path(folder)
        if not card.is_file():
            continue
        try:
            licence = _licence(card)
        except (OSError, ValueError, RecursionError, YAMLError):
            licence = _UNREADABLE  # a merge of hours is not lost over a comma
        if licence:
            found[name] = licence
    return found


def _licence(card: Path) -> str | None:
    """Return what a model card's metadata says, which is anyone's text."""
    if card.stat().st_size > _MOST_BYTES:
        raise ValueError("too large")
    fields = metadata_load(card) or {}
    licence = fields.get("license")
    if licence == "other":
        licence = fields.get("license_name") or licence
    names = licence if isinstance(licence, list) else [] if licence is None else [licence]
    if not all(isinstance(name, str) and name.isprintable() for name in names):
        raise ValueError("no names")
    return ", ".join(names)[:_LONGEST]


def render_card(
    facts: Mapping[str, Any], base: str | None, licences: Mapping[str, str] | None = None
) -> str:
    """Return the model card of a merged adapter, with its metadata block.

    Args:
        facts: of `MergeResult.to_dict`, `FolderMerge.to_dict` or `AdapterMerge.to_dict`.
        base: the base model's name; a path of this machine is not put into the metadata.
        licences: adapter -> licence, as far as they are known. If every source has the same one,
            it is the card's; what else it is to be is not for a program to say.
    """
    method = facts.get("method")
    title, url = (method["title"], method["url"]) if method else _HI
    sources = facts["sources"] if method else facts["plan"]["sources"]
    licences = licences or {}
    known = {name: licence for name, licence in licences.items() if licence != _UNREADABLE}
    common = set(known.values()) if set(known) >= set(sources) else set()
    on_hub = base is not None and len(base) <= _LONGEST and bool(_HUB_NAME.fullmatch(base))
    data = ModelCardData(
        base_model=base if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        license=common.pop() if len(common) == 1 else None,
        library_name="peft",
        tags=["peft", "lora", "merge", method["name"] if method else "hi-merging"],
    )
    text = f"# {facts['adapter_name']}\n\nA LoRA adapter merged from\n\n"
    text += "\n".join(_source(name, digest, licences) for name, digest in sources.items())
    text += f"\n\nby {title}" + (f" ([paper]({url}))" if url else "")
    # Learned coefficients (AdaMerging) and statistics (RegMean) are of examples.
    learned = "examples" in facts.get("fitted", {})
    text += " with `peft_himerge`, "
    text += "on examples of the tasks. " if learned else "without training or training data. "
    story = "`report.json` holds every number.\n"
    if not method:
        story = "`plan.json` holds every decision and rebuilds it.\n"
    story += render_markdown(facts).split("\n", 1)[1]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}{story}"))


def _source(name: str, digest: str, licences: Mapping[str, str]) -> str:
    licence = f", licence {licences[name]}" if name in licences else ""
    return f"- `{name}`, digest `{digest[:16]}`{licence}"
