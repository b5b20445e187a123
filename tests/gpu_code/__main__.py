"""What backends do on a GPU, read from the code that is generated and assembled for it. Needs triton and no GPU."""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from typing import get_args

import pandas as pd

from compiled_logprobs.errors import LogProbsError
from compiled_logprobs.problem import Layout, Problem
from compiled_logprobs.tuning.presets import dtype_of, rows_of, vocab_of
from tests.gpu_code.data_sheets import GPUS, data_sheet
from tests.gpu_code.hand_written import inspect_triton
from tests.gpu_code.inspection import NOT_MEASURED, Direction, Inspection, inspect

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
            needs_grad=options.grad or options.inplace,
            entropy=options.entropy,
            inplace_backward=options.inplace,
            layout=options.layout,
        )
        with redirect_stdout(sys.stderr):  # whatever compilers say
            inspection = inspect(problem, data_sheet(options.arch, options.gpu))
            triton = inspect_triton(problem, inspection.gpu)
    except LogProbsError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return COULD_NOT_RUN
    of_triton = {name: None if direction is None else asdict(direction) for name, direction in triton.items()}
    as_json = {**inspection.to_dict(), "triton": of_triton}
    print(json.dumps(as_json, indent=2) if options.json else _table(inspection, triton))
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
    parser.add_argument("--layout", default="flat", choices=get_args(Layout), help="slice: logits[:, :-1] of [B, T, V]")
    parser.add_argument("--grad", action="store_true", help="backward as well")
    parser.add_argument("--inplace", action="store_true", help="backward as well, over the logits")
    parser.add_argument("--entropy", action="store_true", help="with the entropy")
    parser.add_argument("--json", action="store_true", help="for programs")
    return parser


def _table(inspection: Inspection, triton: dict[str, Direction | None]) -> str:
    """A column for each direction of each backend, and below it what is no number."""
    columns, notes = {}, []
    for backend, directions in (
        ("compiled", vars(inspection)),
        ("triton", triton),
        ("flash_attn", inspection.flash_attn),
    ):
        if isinstance(directions, str):
            notes.append(f"{backend}: {directions}")
            continue
        for name in ("forward", "backward"):
            if directions[name] is not None:
                facts = columns[f"{backend} {name}"] = asdict(directions[name])
                for fact in ("kernel_reports", "operations", "notes"):
                    notes += [f"{backend} {name}, {fact}: {text}" for text in facts.pop(fact)]
    gpu = inspection.gpu
    head = f"{inspection.problem} on {gpu.name} ({gpu.arch}, {gpu.source}): {NOT_MEASURED}"
    return "\n".join([head, pd.DataFrame(columns).to_string(float_format="{:.4g}".format), *notes])


if __name__ == "__main__":
    sys.exit(main())
