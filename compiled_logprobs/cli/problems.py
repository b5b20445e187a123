"""The options that say what a call can be, the same in every command: several values each, in any combination."""

from collections.abc import Callable, Collection, Iterable
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, NamedTuple

import typer

from compiled_logprobs.cli.options import reported_errors
from compiled_logprobs.errors import InputError
from compiled_logprobs.problem import MODES, RESULTS
from compiled_logprobs.tuning import presets

Asked = dict[str, list[Any]]
"""What the options name, as `presets.grid` and `presets.is_among` take it; empty where one was left out."""


class Several(NamedTuple):
    """An option of several values, as often as it is named or with commas."""

    field: str
    """Of `Asked`."""
    parse: Callable[[str], Any]
    metavar: str
    help: str
    values: Collection[str] = ()
    """That a shell completes."""


DTYPES, TEMPERATURES = ("bf16", "fp16", "fp32"), ("none", "number", "per-token")
SEVERAL = {
    "vocab": Several(
        *("vocabs", presets.vocab_of, "V"),
        f"A number, a model ({', '.join(presets.MODELS)}) or its id on Hugging Face. Options like this one take "
        "several values, as often as you name them or with commas.",
        presets.MODELS,
    ),
    "rows": Several("rows", presets.rows_of, "N", "How many positions."),
    "dtype": Several("dtypes", presets.dtype_of, "|".join(DTYPES), "Of the logits; also as torch names them.", DTYPES),
    "mode": Several(
        *("modes", presets.mode_of, "|".join(MODES)),
        "Forward alone; with the gradient; with the gradient written over the logits.",
        MODES,
    ),
    "temperature": Several(
        *("temperatures", presets.temperature_of, "|".join(TEMPERATURES)), "For all rows, or one a token.", TEMPERATURES
    ),
    "layout": Several(
        *("layouts", presets.layout_of, "|".join(presets.FEWEST_ROWS)),
        "How the logits lie: row after row; with gaps between rows; or as logits[:, :-1].",
        presets.FEWEST_ROWS,
    ),
    "labels": Several("labels", presets.labels_of, "K", "How many labels a position."),
    "hidden": Several(
        *("hidden", presets.hidden_of, "H"), "From hidden states of this size, and the output layer's weight."
    ),
    "memory-limit": Several(
        *("memory_limits", presets.memory_of, "BYTES"),
        "With --hidden: what a call may take beside its arguments, results and gradients, e.g. 512MiB.",
    ),
}
SWITCHES = {
    **{name: f"Whether the {name.replace('_', ' ')} is asked for." for name in RESULTS},
    "masked": "Whether regions of the vocabulary are -inf.",
    "weight_grad": "With --hidden: whether the weight needs a gradient too, as by default, or is frozen.",
    "bias": "With --hidden: whether the output layer has a bias.",
    "softcap": "With --hidden: whether the logits are softly capped.",
}


def takes_problems(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command`, whose first parameter is an `Asked`, the options that name one."""

    def run(**options: Any) -> None:
        with reported_errors():
            asked: Asked = {
                several.field: [several.parse(text) for text in split(options.pop(name.replace("-", "_")))]
                for name, several in SEVERAL.items()
            }
            asked |= {name: options.pop(name) or [] for name in SWITCHES}
        command(asked, **options)

    kinds: dict[str, Any] = {
        name.replace("-", "_"): Annotated[list[str] | None, _option(name, several)] for name, several in SEVERAL.items()
    } | {
        name: Annotated[list[bool] | None, typer.Option(f"--{option}/--no-{option}", show_default=False, help=says)]
        for name, says in SWITCHES.items()
        if (option := name.replace("_", "-"))
    }
    named = [Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=kind) for name, kind in kinds.items()]
    _, *own = signature(command).parameters.values()
    own = [parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in own]
    run.__signature__ = Signature([*named, *own])  # type: ignore[attr-defined]  # what typer makes options of
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run


def split(texts: list[str] | None) -> list[str]:
    """The values of an option that takes several, with commas or one at a time."""
    parts = [part.strip() for text in texts or [] for part in text.split(",")]
    if not all(parts):
        raise InputError(
            f"got {', '.join(map(repr, texts or []))}, in which a value is empty; e.g. 64,512 is valid. Fill it in."
        )
    return parts


def completed_by(values: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """What a shell offers for an option of these `values`, also after a comma."""

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        return [f"{before}{comma}{value}" for value in values() if value.startswith(last)]

    return complete


def _option(name: str, several: Several) -> Any:
    complete = completed_by(lambda: several.values)
    return typer.Option(
        f"--{name}", show_default=False, metavar=several.metavar, autocompletion=complete, help=several.help
    )
