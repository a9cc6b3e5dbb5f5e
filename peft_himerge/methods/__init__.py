"""Merging methods as plain functions in family rooms; importing this room registers them all.

Sums of whole deltas: `linear`, `angles` (means on the sphere), `depth` (per layer). Entry by entry:
`sparse` (prune and vote), `compete` (entries judged by all adapters). In joint coordinates:
`subspace`, `wudi`, `widen`. By scores: `soup`, `pareto`, `tuned`. From what the live model does on
inputs: `regmean`, `fisher`, `learned`, `experts`. `spaces` lends small coordinates to the methods
that work entry by entry, `bank` keeps several adapters in less room. A method reads `stack`s, and
`scored.Scorer` or `mixture.Evidence` if it needs scores or inputs.
"""

from . import angles as angles
from . import compete as compete
from . import depth as depth
from . import experts as experts
from . import fisher as fisher
from . import learned as learned
from . import linear as linear
from . import pareto as pareto
from . import regmean as regmean
from . import soup as soup
from . import sparse as sparse
from . import subspace as subspace
from . import tuned as tuned
from . import widen as widen
from . import wudi as wudi
from .registry import MethodInfo as MethodInfo
from .registry import get_method as get_method
from .registry import list_methods as list_methods
from .registry import method as method
from .stack import Delta as Delta
from .stack import Dense as Dense
from .stack import Factored as Factored
from .stack import Stack as Stack
from .stack import StackLike as StackLike
