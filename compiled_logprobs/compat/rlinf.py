"""RLinf's `rlinf.utils.utils`.

Kept: float32 log-probabilities, entropies in the dtype of the logits, labels of -100 (result 0, gradient 0).

Not kept: `op_type` changes nothing. The originals "torch" and "liger_kernel" compute in the dtype of the logits and
convert the rounded result; "flash_attn" and "liger_kernel" overwrite the logits, which are not modified here.
"""

from typing import Literal, get_args

from torch import Tensor

from compiled_logprobs.compat import conventions, missing
from compiled_logprobs.errors import InputError

OpType = Literal["torch", "flash_attn", "liger_kernel"]

missing.advise(globals())


def compute_logprobs_from_logits(logits: Tensor, target: Tensor, op_type: OpType = "torch") -> Tensor:
    """Log-probability of each label, [...] float32.

    Args:
        logits: [..., V], already divided by the temperature. Not modified.
        target: [...]; -100 counts 0.
        op_type: one of the original's three, else InputError; all give the same here.
    """
    if op_type not in get_args(OpType):
        valid = ", ".join(map(repr, get_args(OpType)))
        raise InputError(f"got op_type={op_type!r}; {valid} are valid. All of them give the same here.")
    return conventions.log_probs(logits, conventions.as_rows(target, logits))


def compute_entropy_from_logits(logits: Tensor, dim: int = -1) -> Tensor:
    """Entropy of softmax(logits) along `dim`, in the dtype of `logits`; a token of probability 0 counts 0."""
    return conventions.entropy(logits.movedim(dim, -1), out_dtype=None)
