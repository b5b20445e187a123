"""For anyone's test suite: hold a function of log-probabilities to the contract, as `compiled-logprobs check` does."""

from collections.abc import Callable
from typing import Any

from compiled_logprobs.check.function import Returns
from compiled_logprobs.check.run import check_backend
from compiled_logprobs.problem import Problem


def assert_log_probs(
    name_or_callable: str | Callable[..., Any],
    problem: Problem | None = None,
    *,
    short: bool = False,
    ignore_index: bool = True,
    device: str | None = None,
    seed: int | None = None,
    vocab: int | None = None,
    call: str | None = None,
    returns: Returns = "log_prob",
    group: Any = None,
    from_hidden: bool = False,
    tell: Callable[[str], None] | None = None,
) -> None:
    """Check a function, or a backend, and fail where it is wrong. The arguments are those of `check_backend`.

    Raises:
        AssertionError: it is wrong; the text is the verdict with its likely cause, what failed, and the seed.
        InputError, BackendUnavailable: as `check_backend`.
    """
    __tracebackhide__ = True  # by pytest, which then shows the line of the test
    report = check_backend(
        name_or_callable,
        problem,
        short=short,
        ignore_index=ignore_index,
        device=device,
        seed=seed,
        vocab=vocab,
        call=call,
        returns=returns,
        group=group,
        from_hidden=from_hidden,
        tell=tell,
    )
    if report.passed:
        return
    details = {check.name: check.detail for check in reversed(report.checks) if not check.passed}
    failed = [f"  {name}: {' '.join(details[name].split())}" for name in report.reasons]
    raise AssertionError("\n".join([str(report), *failed, f"seed={report.seed} repeats these inputs."]))
