"""What backends do on a GPU, read from the code that is generated and assembled for it. Needs triton and no GPU."""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import fields

from compiled_logprobs.errors import LogProbsError
from compiled_logprobs.problem import Problem, short_name
from compiled_logprobs.tuning.presets import dtype_of, rows_of, vocab_of
from tests.gpu_code.data_sheets import GPUS, data_sheet
from tests.gpu_code.inspection import LAYOUTS, NOT_MEASURED, Direction, Inspection, inspect

PASSED, COULD_NOT_RUN = 0, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0 done, 2 it could not run, and standard error says why."""
    options = _parser().parse_args(arguments)
    try:
        problem = Problem(
            "cuda",
            rows_of(options.rows),
            vocab_of(options.vocab),
            dtype_of(options.dtype),
            labels_per_row=options.labels_per_row,
            needs_grad=options.grad or options.inplace,
            entropy=options.entropy,
            inplace_backward=options.inplace,
        )
        with redirect_stdout(sys.stderr):  # whatever compilers say
            inspection = inspect(problem, data_sheet(options.arch, options.gpu), options.layout)
    except LogProbsError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return COULD_NOT_RUN
    print(json.dumps(inspection.to_dict(), indent=2) if options.json else "\n".join(_lines(inspection)))
    return PASSED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_code", description=__doc__)
    architectures = ", ".join(dict.fromkeys(gpu.arch for gpu in GPUS))
    parser.add_argument("--arch", help=f"what to compile for: {architectures}; by default that of --gpu")
    parser.add_argument(
        "--gpu", help=f"whose data sheet to use: {', '.join(gpu.name for gpu in GPUS)}; by default an H100"
    )
    parser.add_argument("--rows", default="8192", help="N: how many positions")
    parser.add_argument("--vocab", default="151936", help="V: a number or a model's name")
    parser.add_argument("--dtype", default="bfloat16", help="of the logits: float32, bfloat16 or float16")
    parser.add_argument("--layout", default="flat", choices=LAYOUTS, help="slice: logits[:, :-1] of [B, T, V]")
    parser.add_argument("--labels-per-row", default=1, type=int, help="K")
    parser.add_argument("--grad", action="store_true", help="backward as well")
    parser.add_argument("--inplace", action="store_true", help="backward as well, over the logits")
    parser.add_argument("--entropy", action="store_true", help="with the entropy")
    parser.add_argument("--json", action="store_true", help="for programs")
    return parser


def _lines(inspection: Inspection) -> list[str]:
    """A table with a column for each direction of each backend, and then what the columns cannot hold."""
    problem, gpu, flash_attn = inspection.problem, inspection.gpu, inspection.flash_attn
    both: dict[str, Direction | None] = {
        "compiled forward": inspection.forward,
        "compiled backward": inspection.backward,
    }
    if not isinstance(flash_attn, str):
        both |= {f"flash_attn {name}": one for name, one in flash_attn.items()}
    columns = {name: one for name, one in both.items() if one is not None}
    details = "".join(f", {text}" for text in (problem.details(), f"for {gpu.name} ({gpu.arch})") if text)
    lines = [f"{problem.rows} x {problem.vocab} {short_name(problem.dtype)}{details}: {NOT_MEASURED}", ""]
    lines.append(" " * 32 + "".join(f"{name:>21}" for name in columns))
    for fact in fields(Direction):
        values = [getattr(direction, fact.name) for direction in columns.values()]
        if not any(isinstance(value, tuple) for value in values):
            lines.append(f"{fact.name.replace('_', ' '):32}" + "".join(f"{value:>21.4g}" for value in values))
    lines.append("")
    for name, direction in columns.items():
        lines += [f"{name}: {kernel}" for kernel in direction.kernel_reports]
        lines += [f"{name}: torch's own {operation}" for operation in direction.operations]
        lines += [f"{name}: {note}" for note in direction.notes]
    if isinstance(flash_attn, str):
        lines.append(f"flash_attn: {flash_attn}")
    return [*lines, f"Rates of the {gpu.name}: {gpu.source}. All figures {NOT_MEASURED}."]


if __name__ == "__main__":
    sys.exit(main())
