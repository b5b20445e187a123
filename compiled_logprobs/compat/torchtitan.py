"""torchtitan's `torchtitan.components.loss`, for logits whose vocabulary is not split over ranks.

Kept: float32 results; a label of -100 counts 0, but its row has an entropy; the entropy carries no gradient. Of a
DTensor the local part is taken, as in the original.

Not kept: a vocabulary that is split over ranks is refused, as a DTensor and as the plain part that the "spmd_types"
backend passes.
"""

import sys
from typing import Any, cast

from torch import Tensor

from compiled_logprobs.compat import conventions


def compute_logprobs(logits: Tensor, labels: Tensor, *, return_entropy: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each label, [...] float32, and, where asked for, the entropy of each row, [...] float32.

    Args:
        logits: [..., V], already divided by the temperature. Not modified.
        labels: [...]; -100 counts 0.
        return_entropy: also return the entropy, without a gradient.

    Raises:
        InputError: the vocabulary of the logits is split over ranks.
    """
    if hasattr(logits, "placements"):
        logits = _local(logits)
    else:
        _require_whole_rows()
    if not return_entropy:
        return conventions.log_probs(logits, labels)
    # An ignored row would have no entropy, so each gets a label that counts.
    ignored = labels == -100
    log_probs, entropy = conventions.gathered_log_probs_and_entropy(logits, labels.masked_fill(ignored, 0))
    return log_probs.masked_fill(ignored, 0.0), entropy.detach()


def _local(logits: Any) -> Tensor:
    """The part of a DTensor that lies on this rank, if it has whole rows."""
    vocabulary = logits.ndim - 1
    for placement, ranks in zip(logits.placements, logits.device_mesh.shape, strict=True):
        if ranks > 1 and (placement.is_partial() or placement.is_shard(vocabulary) or placement.is_shard(-1)):
            raise conventions.split_error(
                f"a DTensor with {placement} over {ranks} ranks",
                "whole rows on each rank are valid, as after logits.redistribute(placements=[Replicate()])",
            )
    return cast(Tensor, logits.to_local())


def _require_whole_rows() -> None:
    """Raise InputError where torchtitan's plain tensors are a rank's part of the vocabulary, which does not show."""
    backend = sys.modules.get("torchtitan.distributed.utils")
    mesh = sys.modules.get("torchtitan.distributed.spmd_types")
    if backend is None or mesh is None or backend.get_spmd_backend() != "spmd_types":
        return
    ranks = mesh.spmd_mesh_size("tp")
    if ranks > 1:
        what = f"logits under torchtitan's spmd_types backend with {ranks} tensor-parallel ranks"
        raise conventions.split_error(what, "one rank is valid")
