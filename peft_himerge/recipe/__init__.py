"""Recipes: a merge written down in YAML, for users who write no Python.

`read_recipe` reads and checks a file, `examine` looks at what it names without loading a weight of
the base model, `examine_file` does both and tells all faults at once, `run_recipe` merges. Nothing
that a recipe names is executed: a Python file with eval functions must be given by the caller
(`--eval` on the command line), and so must a folder with tasks of lm-evaluation-harness.
"""

from .examine import Examined as Examined
from .examine import Look as Look
from .examine import examine as examine
from .examine import examine_file as examine_file
from .faults import Fault as Fault
from .faults import RecipeError as RecipeError
from .read import read_recipe as read_recipe
from .run import Merged as Merged
from .run import run_recipe as run_recipe
from .schema import Recipe as Recipe
from .start import Start as Start
from .start import start as start

__all__ = [
    "Examined",
    "Fault",
    "Look",
    "Merged",
    "Recipe",
    "RecipeError",
    "Start",
    "examine",
    "examine_file",
    "read_recipe",
    "run_recipe",
    "start",
]
