"""Print `name==version` for the lowest version of every dependency that pyproject.toml admits.

Names on the command line take the version in constraints.txt in place of the lowest one.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[1]


def plain(name: str) -> str:
    """Return a package's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def lowest() -> dict[str, str]:
    """Return name -> lowest version, of all dependencies and extras.

    Raises:
        ValueError: a requirement has no lower bound, or a name has two.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    found: dict[str, str] = {}
    for requirement in [*project["dependencies"], *(r for extra in extras for r in extra)]:
        if requirement.startswith(f"{project['name']}["):
            continue
        match = re.fullmatch(r"([A-Za-z0-9._-]+)>=([0-9][0-9.]*)", requirement)
        if match is None:
            raise ValueError(f"{requirement!r}: expected NAME>=VERSION, nothing more.")
        name, version = plain(match[1]), match[2]
        if found.setdefault(name, version) != version:
            raise ValueError(f"{name!r} has the bounds {found[name]} and {version}.")
    return found


def tested() -> dict[str, str]:
    """Return name -> version in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if "==" in line and not line.startswith("#")]
    return {plain(name): version for name, version in pairs}


def main(kept: list[str]) -> None:
    """Print the constraints."""
    versions = lowest()
    versions.update({plain(name): tested()[plain(name)] for name in kept})
    for name, version in sorted(versions.items()):
        print(f"{name}=={version}")


if __name__ == "__main__":
    main(sys.argv[1:])
