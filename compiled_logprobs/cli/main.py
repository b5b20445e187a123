"""The command line: reads arguments, calls the library, prints what it returns.

Exit codes: 0 passed; 1 something is wrong; 2 it could not run, and standard error says why; 130 interrupted.
"""

from importlib.metadata import version
from typing import Annotated

import typer

from compiled_logprobs.cli.check import check
from compiled_logprobs.cli.dashboard import dashboard
from compiled_logprobs.cli.options import AsJson, busy, reported_errors
from compiled_logprobs.cli.output import print_inspection, print_json
from compiled_logprobs.cli.profile import profile, verify
from compiled_logprobs.cli.show import doctor, explain, show
from compiled_logprobs.cli.transfer import export, import_, prune
from compiled_logprobs.problem import Problem
from compiled_logprobs.tuning import presets
from tests.gpu_code import inspection
from tests.gpu_code.data_sheets import GPUS, gpu_for

app = typer.Typer(
    help="Log-probabilities of labels from logits: find out which backend is right and fastest on this machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line."""
    app(prog_name="compiled-logprobs")


def _show_version(asked: bool) -> None:
    if asked:
        print(f"compiled-logprobs {version('compiled-logprobs')}")
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Log-probabilities of labels from logits: find out which backend is right and fastest on this machine."""


def inspect(
    arch: Annotated[
        str | None,
        typer.Option(
            show_default=False,
            help=f"What to compile for: {', '.join(dict.fromkeys(one.arch for one in GPUS))}; by default that of --gpu.",
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            show_default=False,
            help=f"Whose data sheet to use: {', '.join(one.name for one in GPUS)}; by default the first of the arch, or H100.",
        ),
    ] = None,
    rows: Annotated[str, typer.Option(help="N: how many positions.")] = "8192",
    vocab: Annotated[str, typer.Option(help="V: a number or a model's name.")] = "151936",
    dtype: Annotated[str, typer.Option(help="Of the logits: float32, bfloat16 or float16.")] = "bfloat16",
    grad: Annotated[bool, typer.Option("--grad", help="Backward as well.")] = False,
    entropy: Annotated[bool, typer.Option("--entropy", help="With the entropy.")] = False,
    inplace: Annotated[
        bool, typer.Option("--inplace", help="Backward as well, with the gradient over the logits.")
    ] = False,
    labels_per_row: Annotated[int, typer.Option(min=1, help="K.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Show what the compiled backend does on a GPU, from the code generated for it. Needs no GPU; nothing is measured."""
    with reported_errors():
        described = gpu_for(arch, gpu)
        problem = Problem(
            "cuda",
            presets.rows_of(rows),
            presets.vocab_of(vocab),
            presets.dtype_of(dtype),
            labels_per_row=labels_per_row,
            needs_grad=grad or inplace,
            entropy=entropy,
            inplace_backward=inplace,
        )
        with busy(f"generating and assembling kernels for {described.arch}"):
            found = inspection.inspect(problem, described)
    if as_json:
        print_json(found.to_dict())
    else:
        print_inspection(found)


# In the order in which help lists them.
app.command()(check)
app.command()(profile)
app.command()(explain)
app.command()(show)
app.command()(export)
app.command("import")(import_)
app.command()(prune)
app.command()(verify)
app.command()(doctor)
app.command()(inspect)
app.command()(dashboard)
