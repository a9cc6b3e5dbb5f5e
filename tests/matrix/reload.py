"""A process that knows transformers and PEFT alone: reads folders, says what their models say.

One line of JSON in (base, dtype, tasks, folder), one line out; the outputs lie in the folder.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from peft import PeftModel

from matrix import bases


def answer(job: dict[str, Any]) -> None:
    """Read one folder as any user of PEFT does, and keep what the model says beside it."""
    dtype = getattr(torch, job["dtype"])
    model = PeftModel.from_pretrained(bases.build(job["base"], dtype), job["folder"]).eval()
    said = {t: bases.outputs(model, bases.inputs(job["base"], t, dtype)) for t in job["tasks"]}
    torch.save(said, Path(job["folder"]) / "said.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        answer(json.loads(line))
        assert "peft_himerge" not in sys.modules
        print("done", flush=True)
