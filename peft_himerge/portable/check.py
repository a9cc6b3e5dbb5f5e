"""`check_adapter`: all rules on one folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, suggest
from ..json_file import read_object
from .finding import ENGINES, Finding
from .folder import read_folder
from .rules import RULES

__all__ = ["Report", "check_adapter"]


@dataclass(frozen=True, slots=True)
class Report:
    """What was found in one folder.

    Attributes:
        folder: the folder.
        engines: the engines that were asked about.
        findings: errors first, each only with the engines that were asked about.
    """

    folder: Path
    engines: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """True if there is no error; warnings are allowed."""
        return all(finding.severity != "error" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return {
            "format": "peft_himerge.check/1",
            "folder": str(self.folder),
            "engines": list(self.engines),
            "ok": self.ok,
            "findings": [asdict(finding) for finding in self.findings],
        }


def check_adapter(
    folder: str | Path, engines: Sequence[str] = ENGINES, *, base: str | Path | None = None
) -> Report:
    """Say whether engines will read an adapter folder, and read the model that PEFT reads.

    Only the config and the header of the weights are read: no model, no weight, no network.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.
        engines: some of "vllm", "llama.cpp", "peft".
        base: folder of the base model; with it, rules that depend on tied weights are sure.

    Returns:
        A `Report`; `ok` if nothing is refused or read as another model.

    Raises:
        ConfigError: no such folder, engine or base.
    """
    source = Path(folder)
    if not source.is_dir():
        raise ConfigError(f"{str(folder)!r} is not a folder.")
    if not engines:
        raise ConfigError(f"engines is empty. Allowed: {', '.join(ENGINES)}.")
    for engine in engines:
        if engine not in ENGINES:
            raise ConfigError(f"no engine {engine!r}.{suggest(str(engine), ENGINES)}")
    files, found = read_folder(source, _base_config(base))
    if files is not None:
        found = tuple(finding for rule in RULES for finding in rule(files))
    wanted = []
    for finding in found:
        concerned = tuple(e for e in finding.engines if e in engines)
        if concerned:
            parts = (finding.severity, finding.found, finding.fix)
            wanted.append(Finding(finding.rule, concerned, *parts))
    wanted.sort(key=lambda finding: finding.severity)  # stable: "error" before "warning"
    return Report(source, tuple(dict.fromkeys(engines)), tuple(wanted))


def _base_config(base: str | Path | None) -> Mapping[str, Any] | None:
    if base is None:
        return None
    path = Path(base) / "config.json"
    if not path.is_file():
        raise ConfigError(f"the base {str(base)!r} has no config.json: not a model folder.")
    return read_object(path)
