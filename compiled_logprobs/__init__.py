"""Log-probabilities of labels from logits: always right, and as fast as this machine allows."""

import warnings

with warnings.catch_warnings():  # of torch, at each command where numpy is not installed, which nothing here needs
    warnings.filterwarnings("ignore", "Failed to initialize NumPy", UserWarning)
    import torch as _torch  # noqa: F401

from compiled_logprobs.api.functions import cross_entropy_from_logits, entropy_from_logits, log_probs_from_logits
from compiled_logprobs.api.hidden import cross_entropy_from_hidden, log_probs_from_hidden
from compiled_logprobs.api.log_probs import LogProbs
from compiled_logprobs.api.prepare import explain, tune, warm
from compiled_logprobs.backends import backends, register_backend
from compiled_logprobs.check.report import CheckReport
from compiled_logprobs.check.run import check_backend
from compiled_logprobs.choose.explain import Explanation
from compiled_logprobs.decision import Decision
from compiled_logprobs.errors import BackendUnavailable, InputError, LogProbsError, ProfileError
from compiled_logprobs.policy import autotune
from compiled_logprobs.problem import Problem

__all__ = [
    "BackendUnavailable",
    "CheckReport",
    "Decision",
    "Explanation",
    "InputError",
    "LogProbs",
    "LogProbsError",
    "Problem",
    "ProfileError",
    "autotune",
    "backends",
    "check_backend",
    "cross_entropy_from_hidden",
    "cross_entropy_from_logits",
    "entropy_from_logits",
    "explain",
    "log_probs_from_hidden",
    "log_probs_from_logits",
    "register_backend",
    "tune",
    "warm",
]
