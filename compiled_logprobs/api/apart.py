"""A step out of a graph of torch.compile, for what it cannot hold; imported by the first call that takes it.

Importing this imports torch's compiler, which takes seconds.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch

_REASON = "a vocabulary that is split over ranks is served outside of graphs"
_options: Any = {"reason": _REASON} if "reason" in inspect.signature(torch.compiler.disable).parameters else {}


@torch.compiler.disable(**_options)  # type: ignore[no-untyped-call, untyped-decorator]  # torch's gap
def outside_of_the_graph(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function` as if nothing were traced; an error of the compiler's where a graph has to be whole."""
    return function(*arguments)
