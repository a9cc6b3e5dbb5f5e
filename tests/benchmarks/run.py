"""All benchmarks by one command: ``python tests/benchmarks/run.py`` (``--rows`` picks some).

Each script runs in its own process and puts its rows into results.json. Threads that wait are
told to sleep (OMP_WAIT_POLICY): spinning ones cost several times the work on a busy machine.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

SCRIPTS = ("exact_merge", "analysis", "one_score", "seven_b", "lazy_fold", "growth", "families")


def main() -> int:
    """Run the scripts; return 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", choices=SCRIPTS, default=SCRIPTS)
    parser.add_argument("--mergekit", help="virtual environment with mergekit, for one_score")
    parser.add_argument("--threads", help="torch threads (not for seven_b)")
    chosen = parser.parse_args()
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
    failed = []
    for name in chosen.rows:
        command = [sys.executable, str(Path(__file__).with_name(f"{name}.py"))]
        if name == "one_score" and chosen.mergekit:
            command += ["--mergekit", chosen.mergekit]
        if name != "seven_b" and chosen.threads:
            command += ["--threads", chosen.threads]
        print(f"== {name}", flush=True)
        if subprocess.run(command, env=environment, check=False).returncode:
            failed.append(name)
    if failed:
        print("failed:", ", ".join(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
