"""What a profile run measures: vocabularies by the name of a model, kinds of calls, and the presets made of them."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from compiled_logprobs.errors import InputError
from compiled_logprobs.problem import (
    MODES,
    RESULTS,
    Layout,
    Problem,
    Temperature,
    as_it_lies,
    bucket,
    short_name,
    why_not_posed,
)

MODELS = {
    "qwen3": 151936,
    "llama3": 128256,
    "gemma3": 262144,
    "deepseek-v3": 129280,
    "gpt-oss": 201088,
    "gpt2": 50257,
    "llama2": 32000,
}
"""V, the last dimension of the logits, of families of models."""
HUGGING_FACE = {
    r"Qwen/Qwen3-(\d+|0\.6|1\.7)B(-.*)?": 151936,
    r"Qwen/Qwen2\.5-((Coder|Math)-)?(0\.5|1\.5|3)B(-Instruct)?": 151936,
    r"Qwen/Qwen2\.5-((Coder|Math)-)?(7|14|32|72)B(-Instruct)?": 152064,
    r"meta-llama/(Meta-)?Llama-3(\.[123])?-\d+B(-Instruct)?": 128256,
    r"meta-llama/Llama-2-\d+b(-chat)?(-hf)?": 32000,
    r"google/gemma-3-(270m|1b)(-it|-pt)?": 262144,
    r"google/gemma-3-(4|12|27)b-(it|pt)": 262208,
    r"deepseek-ai/DeepSeek-(V3(\.1)?|R1)(-Base|-0324|-0528|-Zero|-Terminus)?": 129280,
    r"openai/gpt-oss-(20|120)b": 201088,
    r"(openai-community/)?gpt2(-medium|-large|-xl)?": 50257,
}
"""V of the logits by the id of a model: the `vocab_size` of its config, padding included. Whole ids, in any case."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OTHER_NAMES = {"fp32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}
"""Of dtypes, as people write them."""
FEWEST_ROWS = {"flat": 1, "rows": 2, "slice": 4}
"""With fewer, logits do not lie like that: one row lies flat, and a slice takes two sequences of two positions."""


@dataclass(frozen=True)
class Calls:
    """Every combination of these."""

    modes: Sequence[str] = ("forward", "backward")
    layouts: Sequence[Layout] = ("flat",)
    temperatures: Sequence[Temperature] = ("none",)
    labels: Sequence[int] = (1,)
    entropy: Sequence[bool] = (False,)
    logsumexp: Sequence[bool] = (False,)
    argmax: Sequence[bool] = (False,)
    sum_p_squared: Sequence[bool] = (False,)
    masked: Sequence[bool] = (False,)
    hidden: Sequence[int | None] = (None,)
    weight_grad: Sequence[bool | None] = (None,)
    """None: where there is a gradient, from hidden states."""
    bias: Sequence[bool] = (False,)
    softcap: Sequence[bool] = (False,)
    memory_limits: Sequence[int | None] = (None,)


@dataclass(frozen=True)
class Preset:
    """A grid of problems. The rows depend on the device: an accelerator is idle with what keeps a CPU busy for
    seconds."""

    vocabs: tuple[int, ...]
    rows_cpu: tuple[int, ...]
    rows_accelerator: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    calls: tuple[Calls, ...] = (Calls(),)
    budget_s: float = 60.0
    """For the rounds of each problem, where none is named."""

    def rows(self, device_type: str) -> tuple[int, ...]:
        return self.rows_cpu if device_type == "cpu" else self.rows_accelerator


PRESETS = {
    "quick": Preset((MODELS["qwen3"],), (256,), (4096,)),
    "standard": Preset((MODELS["qwen3"], MODELS["llama3"]), (64, 512), (64, 1024, 8192)),
    "full": Preset(
        tuple(MODELS.values()),
        (1, 8, 64, 512, 2048),
        (1, 16, 128, 1024, 4096, 16384),
        DTYPES,
        (Calls(tuple(MODES)), Calls(("forward",), entropy=(True,))),
    ),
    "rl": Preset(
        (MODELS["qwen3"],),
        (256,),
        (4096,),
        (torch.bfloat16,),
        (
            Calls(layouts=("flat", "slice"), temperatures=("none", "number")),
            Calls(("inplace",), temperatures=("none", "number")),
            Calls(temperatures=("number",), entropy=(True,)),
        ),
        budget_s=20.0,
    ),
}
"""`rl` is what a trainer of reinforcement learning calls: with and without gradient, on whole logits and on
`logits[:, :-1]`, with and without a temperature; in place; and with the entropy."""


FIELDS = {
    "vocabs": "vocab",
    "dtypes": "dtype",
    "modes": "mode",
    "layouts": "layout",
    "temperatures": "temperature",
    "labels": "labels_per_row",
    **{name: name for name in RESULTS},
    "masked": "masked_logits",
    "hidden": "hidden",
    "weight_grad": "weight_grad",
    "bias": "bias",
    "softcap": "softcap",
    "memory_limits": "memory_limit",
    "rows": "rows",
}
"""Of a problem, by what several values of it are called; the rows last, since they share compiled code."""


def grid(device_type: str, preset: str = "standard", **named: Sequence[Any]) -> list[Problem]:
    """The problems of `preset`, with what is named in place of its own values.

    Args:
        device_type: such as 'cpu'.
        preset: one of `PRESETS`.
        named: values by the names in `FIELDS`. What is empty is left to the preset.

    Raises:
        InputError: there is no such preset, or too few rows for a layout: see `FEWEST_ROWS`; or what is named does not
            go together, such as an in-place gradient with a hidden size. Where only some combinations are so, these are
            left out.
    """
    if preset not in PRESETS:
        raise InputError(f"got preset {preset!r}; {', '.join(PRESETS)} are valid. Name one of them.")
    assert named.keys() <= FIELDS.keys()
    base = PRESETS[preset]
    usual = {"vocabs": base.vocabs, "dtypes": base.dtypes, "rows": base.rows(device_type)}
    asked = {name: values for name, values in named.items() if values}
    posed: dict[Problem, None] = {}
    unfit: str | None = None
    for calls in base.calls:
        values = {**usual, **vars(calls), **asked}
        for combination in itertools.product(*(values[name] for name in FIELDS)):
            fields: dict[str, Any] = dict(zip(FIELDS.values(), combination, strict=True))
            problem = Problem(device_type, **MODES[fields.pop("mode")], **fields)
            if problem.weight_grad is None or not problem.needs_grad:
                problem = problem._replace(weight_grad=problem.hidden is not None and problem.needs_grad)
            if (reason := why_not_posed(problem)) is not None:
                unfit = reason
            elif problem.rows >= FEWEST_ROWS[problem.layout]:
                posed[as_it_lies(problem)] = None
    if not posed and unfit is not None:
        raise InputError(f"got {unfit}. Leave one of them out.")
    if not posed:
        fewest = ", ".join(f"{layout} {least}" for layout, least in FEWEST_ROWS.items())
        raise InputError(
            f"got rows {', '.join(map(str, asked['rows']))} for a layout that needs more; at least {fewest} are valid. "
            "Ask for more rows, or for another layout."
        )
    return list(posed)


def is_among(problem: Problem, **named: Sequence[Any]) -> bool:
    """Whether `problem` has values that are named, as for `grid`; N and a limit of memory by its bucket.

    What is empty leaves all in.
    """
    tops = [bucket(problem._replace(rows=n)).rows for n in named.get("rows", ())]
    limits = [bucket(problem._replace(memory_limit=limit)).memory_limit for limit in named.get("memory_limits", ())]
    asked = {**named, "rows": tops, "memory_limits": limits}
    bucketed = bucket(problem)
    return all(getattr(bucketed, FIELDS[name]) in values for name, values in asked.items() if values)


def vocab_of(text: str) -> int:
    """The vocabulary that a number, the name of a family or the id of a model on Hugging Face means."""
    if text.lower() in MODELS:
        return MODELS[text.lower()]
    for pattern, vocab in HUGGING_FACE.items():
        if re.fullmatch(pattern, text, re.IGNORECASE):
            return vocab
    if "/" in text:
        raise InputError(
            f"got model {text!r}, whose vocabulary is not known here; a number is valid. Name it as the model's config "
            "has it, as in --vocab 151936."
        )
    return _positive(text, "vocabulary", f"a number, one of {', '.join(MODELS)} or an id such as Qwen/Qwen3-8B")


def rows_of(text: str) -> int:
    """The number of rows that `text` says."""
    return _positive(text, "number of rows", "a whole number from 1 on")


def labels_of(text: str) -> int:
    """The number of labels a row that `text` says."""
    return _positive(text, "number of labels", "a whole number from 1 on")


def hidden_of(text: str) -> int:
    """The hidden size that `text` says."""
    return _positive(text, "hidden size", "a whole number from 1 on")


def memory_of(text: str) -> int:
    """Bytes, such as 512MiB, 2GiB or 536870912."""
    found = re.fullmatch(r"(\d{1,9}|\d+(?=$))\s*([KMG]i?B)?", text, re.IGNORECASE | re.ASCII)
    if found is None or not 0 < int(found[1]) < 10**18:
        raise InputError(f"got memory limit {text!r}; bytes, or a number of KiB, MiB or GiB, as 512MiB, are valid.")
    unit = (found[2] or "B").upper()
    base: int = 1024 if "I" in unit else 1000
    bytes_of_unit: int = base ** "BKMG".index(unit[0])
    return int(found[1]) * bytes_of_unit


def dtype_of(text: str) -> torch.dtype:
    """The dtype of that name, such as bfloat16 or bf16."""
    names = {short_name(dtype): dtype for dtype in DTYPES}
    return names[_one_of(names, OTHER_NAMES.get(text, text), "dtype")]


def mode_of(text: str) -> str:
    """`text`, if it is a mode."""
    return _one_of(MODES, text, "mode")


def layout_of(text: str) -> Layout:
    """`text`, if it is a layout."""
    return _one_of(FEWEST_ROWS, text, "layout")  # type: ignore[return-value]  # its keys are the layouts


def temperature_of(text: str) -> Temperature:
    """The kind of temperature: none, number or per-token."""
    kinds: dict[str, Temperature] = {"none": "none", "number": "number", "per-token": "per_token"}
    return kinds[_one_of(kinds, text.replace("_", "-"), "temperature")]


def _one_of(valid: Sequence[str] | dict[str, Any], text: str, what: str) -> str:
    if text not in valid:
        raise InputError(f"got {what} {text!r}; {', '.join(valid)} are valid. Name one of them.")
    return text


def _positive(text: str, what: str, valid: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() else 0
    if not 1 <= number < 2**31:
        raise InputError(f"got {what} {text!r}; {valid} is valid, below 2^31. Correct it.")
    return number
