"""Merging methods as plain functions in family rooms; importing this room registers them all.

`linear` and `sparse` are the weight-space families that need nothing but the adapters, `subspace`
works on singular vectors, `spaces` lends small coordinates to the methods that work entry by entry.
"""

from .registry import MethodInfo as MethodInfo
from .registry import get_method as get_method
from .registry import list_methods as list_methods
from .registry import method as method
from .stack import Delta as Delta
from .stack import Dense as Dense
from .stack import Factored as Factored
from .stack import Stack as Stack
from .stack import StackLike as StackLike
