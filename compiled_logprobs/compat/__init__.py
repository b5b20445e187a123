"""Drop-in functions for frameworks that train language models with reinforcement learning, one module a framework.

from compiled_logprobs.compat.verl import logprobs_from_logits     # in place of verl.utils.torch_functional's
compat.patch("verl")                                               # or: everywhere in an installed verl

Each module has the names, order of arguments, shapes and dtypes of the framework's own functions. Its docstring says
what is kept and what is not. It calls this library's public functions and does not import its framework.

In all of them, whatever the original does:

* 16-bit logits are divided by the temperature and summed in float32, and the result is rounded once.
* A label outside [0, V) is an error (on an accelerator NaN), where several originals return 0, a certainty.
* A token of probability 0 counts 0 in an entropy, where most originals give NaN.
* No backend copies all logits, so `chunk_size` changes nothing. From hidden states the products are in the dtype of
  these, and gradients are added up in float32.
* A function that takes a process group, or Megatron's own, takes this rank's columns of the logits, of which all ranks
  have as many, and its results have the same bits on all ranks.
"""

from compiled_logprobs.compat.originals import FRAMEWORKS
from compiled_logprobs.compat.patching import Patch, patch, unpatch

__all__ = ["FRAMEWORKS", "Patch", "patch", "unpatch"]
