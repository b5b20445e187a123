"""Say what to use instead of a framework's function that `compat` does not have, to whoever imports it.

`from compiled_logprobs.compat.trl import add_fused_lm_head` raises an ImportError with the advice below. A name
that is not listed is missing in the ordinary way.
"""

from typing import Any, NoReturn

HIDDEN = "Call {} with the labels that follow each token, ignore_index where a sequence ends, and group."
KERNEL = "Call {}, which takes the fastest kernel by itself."
K_LABELS = "Call {}, which takes K labels a position."
ADVICE: dict[str, list[tuple[str, str, str]]] = {
    "easyr1": [("log_probs_from_logits_flash_attn", KERNEL, "log_probs_from_logits")],
    "verl": [
        ("logprobs_from_logits_flash_attn logprobs_from_logits_torch_npu", KERNEL, "logprobs_from_logits"),
    ],
    "skyrl": [
        ("logprobs_from_logits_flash_attn", KERNEL, "logprobs_from_logits"),
        (
            "logprobs_from_logits_v2",
            "Call {}, which is the same.",
            "compiled_logprobs.compat.verl.logprobs_from_logits_v2",
        ),
        ("chunked_cross_entropy_from_log_probs", "Call {} with the logits.", "chunked_entropy_from_logits"),
        (
            "from_parallel_hidden_to_logprobs_packed_sequences from_parallel_hidden_to_entropy_packed_sequences",
            HIDDEN,
            "compiled_logprobs.log_probs_from_hidden",
        ),
        (
            "vocab_parallel_entropy_packed_sequences vocab_parallel_entropy_weighted_sum",
            "Call {}, and weight its result.",
            "vocab_parallel_entropy",
        ),
    ],
    "torchtitan": [
        (
            "_LossParallelCrossEntropy",
            "Call {} with group, vocab_start_index and vocab_size.",
            "compiled_logprobs.cross_entropy_from_logits",
        )
    ],
    "trl": [
        (
            "add_fused_lm_head patch_chunked_lm_head",
            "Call {}, with which TRL's own has what it adds computed here.",
            "compiled_logprobs.compat.patch('trl')",
        )
    ],
    "rlinf": [
        ("logprobs_from_logits_flash_attn logprobs_from_logits_liger_kernel", KERNEL, "compute_logprobs_from_logits")
    ],
    "nemo_rl": [
        (
            "ChunkedDistributedHiddenStatesToLogprobs",
            "Call {}, which shifts by itself.",
            "from_parallel_hidden_states_to_logprobs",
        ),
        (
            "DistributedLogprobWithSampling ChunkedDistributedLogprobWithSampling",
            "Call {} with sampling_params; its tokens are not shifted yet.",
            "get_next_token_logprobs_from_logits",
        ),
        (
            "dtensor_from_parallel_logits_to_logprobs get_logprobs_from_vocab_parallel_logits",
            "Call {}, which takes a DTensor that is sharded over its vocabulary.",
            "get_next_token_logprobs_from_logits",
        ),
        ("ChunkedDistributedGatherLogprob", K_LABELS, "compiled_logprobs.log_probs_from_logits(logits, indices)"),
        (
            "get_distillation_topk_logprobs_from_logits",
            f"With zero_outside_topk=True: {K_LABELS} Else keep the framework's own.",
            "compiled_logprobs.log_probs_from_logits(student_logits, teacher_topk_indices)",
        ),
    ],
}
"""By framework: its functions and classes of log-probabilities, the advice, and what to call."""


def advise(module: dict[str, Any]) -> None:
    """Have a module of `compat`, given as its `globals()`, raise ImportError with the advice for what is missing.

    The module's `__getattr__` is set, not defined, so that type checkers still report names that are mistyped.
    """
    module_name = module["__name__"]
    advice = {
        name: text.format(instead)
        for names, text, instead in ADVICE[module_name.rpartition(".")[2]]
        for name in names.split()
    }

    def raise_error(name: str) -> NoReturn:
        if name in advice:
            # No AttributeError, whose text `from ... import ...` does not show.
            raise ImportError(f"{module_name} has no {name}. {advice[name]}", name=module_name)
        raise AttributeError(f"module {module_name!r} has no attribute {name!r}", name=name)

    module["__getattr__"] = raise_error
