"""Problems in the words of people: the calls in their code, and what sets them apart."""

from collections import defaultdict
from collections.abc import Iterable

import torch

from compiled_logprobs.problem import Problem, results_of, short_name

LOGITS = {"flat": "logits", "rows": "logits[..., :V]", "slice": "logits[:, :-1]"}
TEMPERATURES = {"none": "", "number": "temperature=0.7", "per_token": "temperature=one_a_token"}
GRADIENTS = {(False,): "", (True,): ", with gradient", (False, True): ", with and without gradient"}


def calls_of(problems: Iterable[Problem]) -> list[str]:
    """Lines that say which calls `problems` stand for, those of the same sizes together."""
    measured: dict[str, dict[bool, set[tuple[int, str, int]]]] = defaultdict(lambda: defaultdict(set))
    for problem in problems:
        size = problem.vocab, short_name(problem.dtype), problem.rows
        measured[call_of(problem)][problem.needs_grad].add(size)
    groups: dict[str, list[str]] = defaultdict(list)
    for call, by_gradient in measured.items():
        same = len(set(map(frozenset, by_gradient.values()))) == 1
        for gradients in [tuple(sorted(by_gradient))] if same else [(False,), (True,)]:
            vocabs, dtypes, rows = map(_listed, zip(*by_gradient[gradients[0]], strict=True))
            groups[f"Decided for V of {vocabs}, {dtypes}, N near {rows}{GRADIENTS[gradients]}:"].append(f"  {call}")
    return [line for heading, calls in groups.items() for line in (heading, *calls)]


def call_of(problem: Problem) -> str:
    """A call that poses `problem`, but for its sizes and whether the logits require a gradient."""
    options = [
        TEMPERATURES[problem.temperature],
        *(f"return_{name}=True" for name in results_of(problem)),
        "masked_logits=True" if problem.masked_logits else "",
        "inplace_backward=True" if problem.inplace_backward else "",
        "" if problem.out_dtype == torch.float32 else "out_dtype=None",
    ]
    labels = "labels" if problem.labels_per_row == 1 else f"labels[..., :{problem.labels_per_row}]"
    if problem.hidden is None:
        function, given = "log_probs_from_logits", [LOGITS[problem.layout]]
    else:
        function, given = "log_probs_from_hidden", [f"hidden[..., :{problem.hidden}]", "weight"]
        options += [
            "bias=bias" if problem.bias else "",
            "softcap=softcap" if problem.softcap else "",
            "" if problem.memory_limit is None else f"memory_limit={problem.memory_limit}",
        ]
    arguments = [*given, labels, *(option for option in options if option)]
    return f"{function}({', '.join(arguments)})"


def options_of(problem: Problem) -> str:
    """All else that sets it apart from a plain call, in few words."""
    words = [
        "" if problem.hidden is None else f"hidden {problem.hidden}",
        "frozen weight" if problem.hidden is not None and problem.needs_grad and not problem.weight_grad else "",
        "bias" if problem.bias else "",
        "soft cap" if problem.softcap else "",
        "" if problem.memory_limit is None else f"within {problem.memory_limit / 2**20:g} MiB",
        "" if problem.layout == "flat" else problem.layout,
        {"none": "", "number": "temperature", "per_token": "temperature a token"}[problem.temperature],
        *(name.replace("_", " ") for name in results_of(problem)),
        "" if problem.labels_per_row == 1 else f"{problem.labels_per_row} labels",
        "masked" if problem.masked_logits else "",
        "unaligned" if problem.layout != "flat" and not problem.aligned else "",
        "" if problem.out_dtype == torch.float32 else f"result {short_name(problem.out_dtype)}",
    ]
    return ", ".join(word for word in words if word)


def _listed(values: Iterable[int | str]) -> str:
    *others, last = map(str, sorted(set(values)))
    return f"{', '.join(others)} and {last}" if others else last
