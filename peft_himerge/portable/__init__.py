"""Will other engines read this adapter folder, and read the same model? Decided from its files.

PEFT, vLLM and llama.cpp read one folder by different rules; where they disagree, most say nothing.
"""

from .check import Report, check_adapter
from .finding import ENGINES, Finding

__all__ = ["ENGINES", "Finding", "Report", "check_adapter"]
