"""The command line: reads arguments, calls the library, prints what it returns.

Exit codes: 0 passed; 1 something is wrong; 2 it could not run, and standard error says why; 130 interrupted.
"""

import os
from importlib.metadata import version
from typing import Annotated

import typer

from compiled_logprobs.cli.check import check
from compiled_logprobs.cli.dashboard import dashboard
from compiled_logprobs.cli.profile import profile, verify
from compiled_logprobs.cli.show import doctor, explain, show
from compiled_logprobs.cli.transfer import export, import_, prune

app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # whose boxes break in narrow terminals and in pipes
)


def main() -> None:
    """Run the command line."""
    if os.environ.get("COLUMNS") == "0":  # as some programs say of a terminal without a size, where rich prints nothing
        del os.environ["COLUMNS"]
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


# In the order in which help lists them.
for command in (check, profile, explain, show, export, import_, prune, verify, doctor, dashboard):
    app.command(command.__name__.rstrip("_"))(command)
