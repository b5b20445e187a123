"""torchtitan's `torchtitan.components.loss`.

Kept: float32 results; a label of -100 counts 0, but its row has an entropy; the entropy carries no gradient. Of a
DTensor the local rows are taken, as in the original.

Not kept: columns that are split over ranks are not gathered, neither of a DTensor nor of the plain part that the
"spmd_types" backend passes. `cross_entropy_loss` is the sum of a rank's rows as a plain tensor, whatever the logits.
"""

import sys
from typing import Any, cast

from torch import Tensor

from compiled_logprobs import cross_entropy_from_logits
from compiled_logprobs.compat import conventions, missing
from compiled_logprobs.errors import InputError

missing.advise(globals())


def compute_logprobs(logits: Tensor, labels: Tensor, *, return_entropy: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each label, [...] float32, and, where asked for, the entropy of each row, [...] float32.

    Args:
        logits: [..., V], already divided by the temperature, whole or split over ranks: as a DTensor, or, under
            "spmd_types", in equal parts. Not modified.
        labels: [...], of the whole vocabulary; -100 counts 0.
        return_entropy: also return the entropy, without a gradient.

    Raises:
        InputError: a DTensor holds partial sums.
    """
    logits, split = _of_this_rank(logits)
    if not return_entropy:
        return conventions.log_probs(logits, labels, **split)
    # An ignored row would have no entropy, so each gets a label that counts.
    ignored = labels == -100
    log_probs, entropy = conventions.gathered_log_probs_and_entropy(logits, labels.masked_fill(ignored, 0), **split)
    return log_probs.masked_fill(ignored, 0.0), entropy.detach()


def cross_entropy_loss(pred: Tensor, labels: Tensor, *, global_vocab_size: int | None = None) -> Tensor:
    """The sum of the cross entropies of `labels`, a float32 scalar, for logits as in `compute_logprobs`.

    With `global_vocab_size`, as torchtitan passes it under "spmd_types", the last rank may have fewer columns.
    """
    logits, split = _of_this_rank(pred, global_vocab_size)
    return cross_entropy_from_logits(logits, labels, reduction="sum", **split)


def _of_this_rank(logits: Any, vocab: int | None = None) -> tuple[Tensor, dict[str, Any]]:
    """The part of the logits that lies on this rank, and the options that say which it is."""
    if not hasattr(logits, "placements"):
        group = _tensor_parallel_ranks()
        return logits, {} if group is None else {"group": group} if vocab is None else _columns(group, vocab)
    options: dict[str, Any] = {}
    for dim, (placement, ranks) in enumerate(zip(logits.placements, logits.device_mesh.shape, strict=True)):
        if ranks > 1 and placement.is_partial():
            raise InputError(
                f"got a DTensor with {placement} over {ranks} ranks; whole rows and a shard of the columns are valid. "
                "Call logits.redistribute(...) first, which adds the partial sums up."
            )
        if ranks > 1 and (placement.is_shard(logits.ndim - 1) or placement.is_shard(-1)):
            options = _columns(logits.device_mesh.get_group(dim), logits.shape[-1])
    return cast(Tensor, logits.to_local()), options


def _columns(group: Any, vocab: int) -> dict[str, Any]:
    """All ranks have as many of them but the last ones, which have what is left."""
    width = -(-vocab // group.size())
    return {"group": group, "vocab_start_index": min(vocab, group.rank() * width), "vocab_size": vocab}


def _tensor_parallel_ranks() -> Any:
    """The group that plain logits are split over under torchtitan's spmd_types backend, None where they are whole."""
    backend = sys.modules.get("torchtitan.distributed.utils")
    mesh = sys.modules.get("torchtitan.distributed.spmd_types")
    if backend is None or mesh is None or backend.get_spmd_backend() != "spmd_types" or mesh.spmd_mesh_size("tp") == 1:
        return None
    return mesh.current_spmd_mesh().get_group("tp")
