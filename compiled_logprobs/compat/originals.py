"""Where each framework keeps the functions that `compat` replaces, as read in their sources from May to November 2026.

Modules are named, never imported, here.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Framework:
    """What `patch` replaces by the functions of the same names in the framework's module of `compat`."""

    package: str
    """Name of the installed distribution, whose version is reported."""
    names_by_module: dict[str, str]
    """A framework without the first name is not patched; the others only some versions have."""
    older_arguments: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """What a function took before it took what ours takes, as `inspect.signature` prints it without annotations."""

    other_arguments: dict[str, str] = field(default_factory=dict)
    """What it took where it is left alone, since it returned something else."""

    @property
    def functions(self) -> list[tuple[str, str]]:
        """Module and name of each."""
        return [(module, name) for module, names in self.names_by_module.items() for name in names.split()]


_NEXT = (
    "(input_ids, next_token_logits, seq_index=None, vocab_parallel_rank=None, vocab_parallel_group=None, "
    "context_parallel_group=None{})"
)
_PARALLEL = (
    "(vocab_parallel_logits, target, vocab_start_index, vocab_end_index, tp_group, inference_only=False, "
    "cp_group=None, chunk_size=None)"
)
_PACKED = (
    "(vocab_parallel_logits, target, cu_seqlens_padded, unpacked_seqlen, vocab_start_index, vocab_end_index, group, "
    "inference_only=False, cp_group=None, chunk_size=None{})"
)
FRAMEWORKS = {
    # EasyR1 kept the name of verl, from which it comes.
    "easyr1": Framework("verl", {"verl.utils.torch_functional": "log_probs_from_logits"}),
    "verl": Framework(
        "verl",
        {
            "verl.utils.torch_functional": "logprobs_from_logits logprobs_from_logits_v2 logprobs_from_logits_naive "
            "entropy_from_logits entropy_from_logits_with_chunking calculate_sum_pi_squared_from_logits "
            "log_probs_from_logits_response log_probs_from_logits_response_rmpad log_probs_from_logits_all_rmpad",
            "verl.utils.megatron.tensor_parallel": "vocab_parallel_log_probs_from_logits "
            "vocab_parallel_log_probs_from_logits_response_rmpad vocab_parallel_entropy "
            "vocab_parallel_entropy_with_chunking vocab_parallel_sum_pi_squared",
            "verl.utils.experimental.torch_functional": "FusedLinearForPPOFunction",
        },
        older_arguments={"logprobs_from_logits": ("(logits, labels)",)},
    ),
    "skyrl": Framework(
        "skyrl",
        {
            "skyrl.backends.skyrl_train.utils.torch_utils": "logprobs_from_logits chunked_entropy_from_logits",
            "skyrl.backends.skyrl_train.distributed.megatron.model_utils": "from_parallel_logits_to_logprobs "
            "from_parallel_logits_to_logprobs_packed_sequences from_parallel_hidden_to_logprobs vocab_parallel_entropy",
        },
        older_arguments={
            "from_parallel_logits_to_logprobs_packed_sequences": (_PACKED.format(""),),
            "vocab_parallel_entropy": ("(vocab_parallel_logits)",),
        },
    ),
    "trl": Framework(
        "trl",
        {
            "trl.trainer.utils": "selective_log_softmax selective_log_softmax_and_entropy entropy_from_logits "
            "_ChunkedLogProbFunction"
        },
        older_arguments={"selective_log_softmax": ("(logits, index)",)},
        other_arguments={
            "_ChunkedLogProbFunction": "(last_hidden, weight, bias, targets, temperature, chunk_size, "
            "final_logit_softcapping=None, logit_scale=1.0)"
        },
    ),
    "openrlhf": Framework("openrlhf", {"openrlhf.models.utils": "log_probs_from_logits compute_entropy"}),
    "areal": Framework("areal", {"areal.utils.functional.vocab_parallel": "gather_logprobs gather_logprobs_entropy"}),
    "slime": Framework("slime", {"slime.utils.ppo_utils": "calculate_log_probs_and_entropy"}),
    "prime_rl": Framework(
        "prime-rl",
        {
            "prime_rl.trainer.rl.loss": "selective_log_softmax compute_entropy",
            "prime_rl.trainer.models.layers.lm_head": "_SequenceChunkedLogProbEntropyFn",
            "prime_rl.trainer.models.layers.lm_head_gemma": "_GemmaChunkedLogProbEntropyFn",
        },
    ),
    "torchtune": Framework(
        "torchtune",
        {"torchtune.rlhf.sequence_processing": "logits_to_logprobs batched_logits_to_logprobs get_batch_log_probs"},
    ),
    "torchforge": Framework("forge", {"forge.util.ops": "compute_logprobs"}),
    "torchtitan": Framework("torchtitan", {"torchtitan.components.loss": "compute_logprobs"}),
    "roll": Framework(
        "roll",
        {
            "roll.utils.functionals": "log_probs_from_logits entropy_from_logits",
            "roll.third_party.megatron.tensor_parallel": "vocab_parallel_entropy",
            "mcore_adapter.parallel_functions.vocab_parallel": "vocab_parallel_logprobs",
        },
        older_arguments={
            "vocab_parallel_entropy": ("(vocab_parallel_logits)",),
            "vocab_parallel_logprobs": ("(vocab_parallel_logits, target)",),
        },
    ),
    "rlinf": Framework("rlinf", {"rlinf.utils.utils": "compute_logprobs_from_logits compute_entropy_from_logits"}),
    "nemo_rl": Framework(
        "nemo-rl",
        {
            "nemo_rl.distributed.model_utils": "get_next_token_logprobs_from_logits from_parallel_logits_to_logprobs "
            "from_parallel_logits_to_logprobs_packed_sequences from_parallel_hidden_states_to_logprobs"
        },
        older_arguments={
            "get_next_token_logprobs_from_logits": (_NEXT.format(""), _NEXT.format(", sampling_params=None")),
            "from_parallel_logits_to_logprobs": (_PARALLEL,),
            "from_parallel_logits_to_logprobs_packed_sequences": (
                _PACKED.format(""),
                _PACKED.format(", sampling_params=None"),
            ),
        },
    ),
    "megatron": Framework(
        "megatron-core",
        {
            "megatron.core.tensor_parallel.cross_entropy": "vocab_parallel_cross_entropy",
            "megatron.core.fusions.fused_cross_entropy": "fused_vocab_parallel_cross_entropy",
        },
        older_arguments={"vocab_parallel_cross_entropy": ("(vocab_parallel_logits, target, label_smoothing=0.0)",)},
    ),
}
"""By the name of the module in `compiled_logprobs.compat`."""
