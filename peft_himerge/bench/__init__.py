"""`himerge bench`: Hi-Merging against every merging method of the registry, on adapters and tasks.

Any folder of adapters and any folder of JSONL tasks will do. Every method chooses its coefficients
by the same scores of the same validation rows within the same budget; tables are of test rows.
Results are kept cell by cell, so that a run that was stopped goes on where it was.
"""

from .lineup import LINEUP as LINEUP
from .lineup import Contender as Contender
from .run import run_bench as run_bench

__all__ = ["LINEUP", "Contender", "run_bench"]
