"""The command `dashboard`: this process becomes the server, so that a signal ends it and nothing is left behind."""

import os
import re
import socket
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from compiled_logprobs.cli.options import COULD_NOT_RUN, reported_errors
from compiled_logprobs.errors import InputError, LogProbsError

ADDRESS = "127.0.0.1"
PORT = 8501
NEEDED = {"pandas": (2, 2), "plotly": (7, 0), "streamlit": (1, 67)}
"""The lowest releases, as the extra `dashboard` asks for them."""
INSTALL = 'pip install "compiled-logprobs[dashboard]"'


def dashboard(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of 127.0.0.1; 0 takes any that is free.")] = PORT,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Open no browser.")] = False,
) -> None:
    """Show the profiles in a browser, and measure from there.

    Reachable from this machine only. Needs the extra "dashboard"; where that is missing, it says what to install.
    Ctrl-C ends it, and a profile run that it started.
    """
    with reported_errors():
        require_packages()
        require_port(port)
        become_server([f"--port={port}", *(["--no-browser"] if no_browser else [])])
    raise typer.Exit(COULD_NOT_RUN)


def require_packages() -> None:
    """Raise LogProbsError if a package that the dashboard needs is missing or too old."""
    for name, lowest in NEEDED.items():
        try:
            installed = version(name)
        except PackageNotFoundError:
            raise LogProbsError(f"the dashboard needs {name}, which is not installed. {INSTALL} brings it.") from None
        if tuple(map(int, re.findall("[0-9]+", installed)[:2])) < lowest:
            valid = ".".join(map(str, lowest))
            raise LogProbsError(
                f"the dashboard needs {name} {valid} or newer; {installed} is installed. {INSTALL} renews it."
            )


def require_port(port: int) -> None:
    """Raise InputError if nothing can listen on `port`."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((ADDRESS, port))
        except OSError as error:
            raise InputError(
                f"got port {port}, which cannot be had: {error.strerror}. Another dashboard may listen on it. Name "
                f"another port, e.g. --port {PORT + 1}, or --port 0 for any."
            ) from None


def become_server(arguments: list[str]) -> None:
    """Replace this process by the dashboard's program. Returns only if that fails."""
    command = [sys.executable, "-m", "compiled_logprobs_dashboard", *arguments]
    # It imports what this process would import, and not what happens to lie in the current directory.
    path = os.pathsep.join(dict.fromkeys(map(os.path.abspath, sys.path)))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(command[0], command, environment)
