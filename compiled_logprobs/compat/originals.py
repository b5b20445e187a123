"""Where each framework keeps the functions that `compat` replaces, with which arguments, and who calls them.

As read in the frameworks' sources from May to November 2026. Modules are named, never imported, here.
"""

from typing import NamedTuple


class Original(NamedTuple):
    """One function of a framework."""

    module: str
    name: str
    signatures: tuple[str, ...]
    """Its arguments with their defaults in each version known, as `inspect.signature` prints them without annotations."""
    required: bool = True
    """Whether a framework without it cannot be patched; False for what only some versions have."""


class Framework(NamedTuple):
    """What `patch` replaces by the functions of the same names in the framework's module of `compat`."""

    distribution: str
    """Name of the installed package, whose version is reported."""
    originals: tuple[Original, ...]
    callers: tuple[str, ...] = ()
    """Modules that train with them: `patch` says which of these do not call them in the installed version."""
    where_it_went: str = ""
    """What newer versions call instead, for that report."""


_VERL = "verl.utils.torch_functional"
_TRL = "trl.trainer.utils"
_SKYRL = "skyrl.backends.skyrl_train.utils.torch_utils"
_OPENRLHF = "openrlhf.models.utils"
_AREAL = "areal.utils.functional.vocab_parallel"
_PRIME_RL = "prime_rl.trainer.rl.loss"
_TORCHTUNE = "torchtune.rlhf.sequence_processing"
_ROLL = "roll.utils.functionals"
_RLINF = "rlinf.utils.utils"
_NEMO_RL = "nemo_rl.distributed.model_utils"

FRAMEWORKS = {
    "easyr1": Framework(
        "verl",  # the name that EasyR1 kept
        (Original(_VERL, "log_probs_from_logits", ("(logits, labels)",)),),
        ("verl.workers.actor.dp_actor",),
    ),
    "verl": Framework(
        "verl",
        (
            Original(_VERL, "logprobs_from_logits", ("(logits, labels, inplace_backward=True)", "(logits, labels)")),
            Original(_VERL, "logprobs_from_logits_v2", ("(logits, labels)",), required=False),
            Original(_VERL, "logprobs_from_logits_naive", ("(logits, labels)",), required=False),
            Original(_VERL, "entropy_from_logits", ("(logits)",), required=False),
            Original(_VERL, "entropy_from_logits_with_chunking", ("(logits, chunk_size=2048)",), required=False),
            Original(_VERL, "calculate_sum_pi_squared_from_logits", ("(logits)",), required=False),
            Original(
                _VERL, "log_probs_from_logits_response", ("(input_ids, logits, response_length)",), required=False
            ),
        ),
        ("verl.workers.engine.fsdp.transformer_impl", "verl.workers.actor.dp_actor"),
    ),
    "skyrl": Framework(
        "skyrl",
        (
            Original(_SKYRL, "logprobs_from_logits", ("(logits, labels, inplace_backward=True)",)),
            Original(
                _SKYRL,
                "chunked_entropy_from_logits",
                ("(logits, requires_grad=False, attention_mask=None, chunk_size=1024)",),
                required=False,
            ),
        ),
        ("skyrl.backends.skyrl_train.workers.model_wrapper",),
    ),
    "trl": Framework(
        "trl",
        (
            Original(
                _TRL, "selective_log_softmax", ("(logits, index, temperature=1.0, row_mask=None)", "(logits, index)")
            ),
            Original(
                _TRL,
                "selective_log_softmax_and_entropy",  # since 1.14
                ("(logits, index, entropy_requires_grad=True, temperature=1.0, row_mask=None)",),
                required=False,
            ),
            Original(_TRL, "entropy_from_logits", ("(logits, chunk_size=128)",), required=False),
        ),
        ("trl.trainer.grpo_trainer", "trl.trainer.dpo_trainer", "trl.trainer.rloo_trainer", "trl.trainer.kto_trainer"),
        "Since TRL 1.15 these trainers compute log-probabilities from hidden states (add_fused_lm_head), which patching does "
        "not change; 1.14 is the last version whose trainers call the functions.",
    ),
    "openrlhf": Framework(
        "openrlhf",
        (
            Original(_OPENRLHF, "log_probs_from_logits", ("(logits, labels, temperature=1.0)",)),
            Original(_OPENRLHF, "compute_entropy", ("(logits)",), required=False),
        ),
        ("openrlhf.models.actor",),
    ),
    "areal": Framework(
        "areal",
        tuple(
            Original(_AREAL, name, ("(logits, labels, temperature=1.0, tp_group=None, chunk_size=1024)",))
            for name in ("gather_logprobs", "gather_logprobs_entropy")
        ),
        ("areal.engine.fsdp_engine", "areal.engine.megatron_engine"),
    ),
    "slime": Framework(
        "slime",
        (
            Original(
                "slime.utils.ppo_utils",
                "calculate_log_probs_and_entropy",
                (
                    "(logits, tokens, tp_group, with_entropy=False, chunk_size=-1, log_prob_keep_mask=None, "
                    "with_entropy_grad=True)",
                ),
            ),
        ),
        ("slime.backends.megatron_utils.loss",),
    ),
    "prime_rl": Framework(
        "prime-rl",
        (
            Original(_PRIME_RL, "selective_log_softmax", ("(logits, index)",)),
            Original(_PRIME_RL, "compute_entropy", ("(shifted_logits)",), required=False),
        ),
        ("prime_rl.trainer.rl.train",),
    ),
    "torchtune": Framework(
        "torchtune",
        (
            Original(_TORCHTUNE, "logits_to_logprobs", ("(logits, sequences, temperature=1.0)",)),
            Original(
                _TORCHTUNE,
                "batched_logits_to_logprobs",
                ("(logits, sequences, temperature=1.0, chunk_size=4)",),
                required=False,
            ),
            Original(
                _TORCHTUNE,
                "get_batch_log_probs",
                ("(logits, labels, label_pad_token_id=-100, return_average_logprobs=False)",),
                required=False,
            ),
        ),
    ),
    "torchforge": Framework(
        "forge",  # the name that its sources give it
        (Original("forge.util.ops", "compute_logprobs", ("(logits, input_ids, temperature=1.0, align=True)",)),),
        ("forge.actors.reference_model", "forge.losses.reinforce_loss"),
    ),
    "torchtitan": Framework(
        "torchtitan",
        (Original("torchtitan.components.loss", "compute_logprobs", ("(logits, labels, *, return_entropy=False)",)),),
        ("torchtitan.experiments.rl.losses.dapo",),
    ),
    "roll": Framework(
        "roll",
        (
            Original(_ROLL, "log_probs_from_logits", ("(logits, labels)",)),
            Original(_ROLL, "entropy_from_logits", ("(logits)",), required=False),
            Original(
                "mcore_adapter.parallel_functions.vocab_parallel",
                "vocab_parallel_logprobs",
                ("(vocab_parallel_logits, target, use_fused_kernel=True)",),
                required=False,
            ),
        ),
        ("roll.distributed.strategy.strategy", "roll.distributed.strategy.fsdp2_strategy"),
    ),
    "rlinf": Framework(
        "rlinf",
        (
            Original(_RLINF, "compute_logprobs_from_logits", ("(logits, target, op_type='torch')",)),
            Original(_RLINF, "compute_entropy_from_logits", ("(logits, dim=-1)",), required=False),
        ),
        ("rlinf.workers.actor.fsdp_actor_worker",),
    ),
    "nemo_rl": Framework(
        "nemo-rl",
        (
            Original(
                _NEMO_RL,
                "get_next_token_logprobs_from_logits",
                (
                    "(input_ids, next_token_logits, seq_index=None, vocab_parallel_rank=None, vocab_parallel_group=None, "
                    "context_parallel_group=None, sampling_params=None, chunk_size=None)",
                ),
            ),
            Original(
                _NEMO_RL,
                "from_parallel_logits_to_logprobs",
                (
                    "(vocab_parallel_logits, target, vocab_start_index, vocab_end_index, tp_group, inference_only=False, "
                    "cp_group=None, chunk_size=None, sampling_params=None)",
                ),
            ),
        ),
        ("nemo_rl.algorithms.loss.utils", "nemo_rl.models.megatron.train"),
    ),
}
"""By the name of the module in `compiled_logprobs.compat`."""
