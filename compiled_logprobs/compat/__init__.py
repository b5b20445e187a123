"""Drop-in functions for frameworks that train language models with reinforcement learning, one module a framework.

from compiled_logprobs.compat.verl import logprobs_from_logits     # in place of verl.utils.torch_functional's
compat.patch("verl")                                               # or: everywhere in an installed verl

Each module has the names, order of arguments, shapes and dtypes of the framework's own functions. Its docstring says
what is kept and what is not. It calls this library's public functions and does not import its framework.
"""

from compiled_logprobs.compat.originals import FRAMEWORKS
from compiled_logprobs.compat.patching import Patch, patch, unpatch

__all__ = ["FRAMEWORKS", "Patch", "patch", "unpatch"]
