"""The command that starts the dashboard."""

from typing import Annotated

import typer
from compiled_logprobs_dashboard.launch import PORT, launch

from compiled_logprobs.cli.options import COULD_NOT_RUN, reported_errors


def dashboard(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of 127.0.0.1; 0 takes any that is free.")] = PORT,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Open no browser.")] = False,
) -> None:
    """Show the stored profiles in a browser, and start profile runs from there. Reachable from this machine only.

    Needs the extra "dashboard"; where that is missing, it says what to install. Ctrl-C ends it; a profile run that it started
    goes on.
    """
    with reported_errors():
        launch(port, browser=not no_browser)
    raise typer.Exit(COULD_NOT_RUN)
