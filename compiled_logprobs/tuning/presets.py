"""What a profile run measures: vocabularies by the name of a model, modes by a word, and the presets made of them."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from compiled_logprobs.errors import InputError
from compiled_logprobs.problem import MODES, Problem, as_it_lies, short_name

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

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Preset:
    """A grid of problems. The rows depend on the device: an accelerator is idle with what keeps a CPU busy for
    seconds."""

    vocabs: tuple[int, ...]
    rows_cpu: tuple[int, ...]
    rows_accelerator: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    modes: tuple[str, ...] = ("forward", "backward")

    def rows(self, device_type: str) -> tuple[int, ...]:
        return self.rows_cpu if device_type == "cpu" else self.rows_accelerator


PRESETS = {
    "quick": Preset((MODELS["qwen3"],), (256,), (4096,)),
    "standard": Preset((MODELS["qwen3"], MODELS["llama3"]), (64, 512), (64, 1024, 8192)),
    "full": Preset(
        tuple(MODELS.values()), (1, 8, 64, 512, 2048), (1, 16, 128, 1024, 4096, 16384), DTYPES, tuple(MODES)
    ),
}


def grid(
    device_type: str,
    preset: str = "standard",
    *,
    vocabs: Sequence[int] = (),
    rows: Sequence[int] = (),
    dtypes: Sequence[torch.dtype] = (),
    modes: Sequence[str] = (),
) -> list[Problem]:
    """The problems of `preset`, with what is named in place of its own values.

    Those that share compiled code follow one another.
    """
    if preset not in PRESETS:
        raise InputError(f"got preset {preset!r}; {', '.join(PRESETS)} are valid. Name one of them.")
    base = PRESETS[preset]
    return [
        as_it_lies(Problem(device_type, n, vocab, dtype, **MODES[mode]))
        for vocab, dtype, mode, n in itertools.product(
            vocabs or base.vocabs, dtypes or base.dtypes, modes or base.modes, rows or base.rows(device_type)
        )
    ]


def vocab_of(text: str) -> int:
    """The vocabulary that a model's name or a number means."""
    if text.lower() in MODELS:
        return MODELS[text.lower()]
    return _positive(text, "vocabulary", f"a number or one of {', '.join(MODELS)}")


def rows_of(text: str) -> int:
    """The number of rows that `text` says."""
    return _positive(text, "number of rows", "a whole number from 1 on")


def dtype_of(text: str) -> torch.dtype:
    """The dtype of that name."""
    for dtype in DTYPES:
        if short_name(dtype) == text:
            return dtype
    raise InputError(f"got dtype {text!r}; {', '.join(map(short_name, DTYPES))} are valid. Name one of them.")


def mode_of(text: str) -> str:
    """`text`, if it is a mode."""
    if text not in MODES:
        raise InputError(f"got mode {text!r}; {', '.join(MODES)} are valid. Name one of them.")
    return text


def _positive(text: str, what: str, valid: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() else 0
    if not 1 <= number < 2**31:
        raise InputError(f"got {what} {text!r}; {valid} is valid, below 2^31. Correct it.")
    return number
