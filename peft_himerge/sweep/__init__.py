"""Sweeps: many merges with other options, one file for W&B's server and for the local driver.

The file is a W&B sweep configuration. Its parameters are named `himerge.<option>` so that they can
never meet a training argument of the same name (transformers writes all of those into the run's
config); `himerge.base` and `himerge.adapters`, or `himerge.recipe`, say what is merged. The local
driver reads the same file and needs no server: Optuna, with the study in a SQLite file, so that it
resumes and several workers share it.
"""

from .agent import Merge as Merge
from .agent import merger as merger
from .agent import run_agent as run_agent
from .local import Outcome as Outcome
from .local import run_local as run_local
from .recipe import Sweep as Sweep
from .recipe import read_sweep as read_sweep

__all__ = ["Merge", "Outcome", "Sweep", "merger", "read_sweep", "run_agent", "run_local"]
