"""`compiled-logprobs dashboard`: this process becomes the server, so that a signal ends it and nothing is left behind."""

import errno
import os
import re
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

from compiled_logprobs.errors import InputError, LogProbsError

ADDRESS = "127.0.0.1"
PORT = 8501
NEEDED = {"pandas": (2, 2), "plotly": (7, 0), "streamlit": (1, 67)}
"""The lowest releases, as the extra `dashboard` asks for them."""
INSTALL = 'pip install "compiled-logprobs[dashboard]"'


def launch(port: int = PORT, *, browser: bool = True) -> None:
    """Become the dashboard's server. Returns only if that fails.

    Args:
        port: of 127.0.0.1; 0 takes any that is free.
        browser: whether to open one, where there is a screen.

    Raises:
        LogProbsError: the dashboard's packages are not installed.
        InputError: the port cannot be had.
    """
    require_packages()
    require_port(port)
    command = [sys.executable, "-m", "compiled_logprobs_dashboard.__main__", f"--port={port}"]
    command += [] if browser else ["--no-browser"]
    # It imports what this process would import, and not what happens to lie in the current directory.
    path = os.pathsep.join(dict.fromkeys(map(os.path.abspath, sys.path)))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    sys.stdout.flush()
    sys.stderr.flush()
    if sys.platform == "win32":  # which starts another process for it, and lets the shell go on beside that
        raise SystemExit(subprocess.call(command, env=environment))
    os.execve(command[0], command, environment)


def require_packages() -> None:
    """Raise LogProbsError if a package that the dashboard needs is missing or too old."""
    for name, lowest in NEEDED.items():
        valid = ".".join(map(str, lowest))
        try:
            found = version(name)
        except PackageNotFoundError:
            raise LogProbsError(f"the dashboard needs {name}, which is not installed. {INSTALL} brings it.") from None
        if tuple(map(int, re.findall("[0-9]+", found)[:2])) < lowest:
            raise LogProbsError(
                f"the dashboard needs {name} {valid} or newer; {found} is installed. {INSTALL} renews it."
            )


def require_port(port: int) -> None:
    """Raise InputError if nothing can listen on `port`."""
    with socket.socket() as probe:
        if os.name != "nt":  # where it would let two listen on one port
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((ADDRESS, port))
        except OSError as error:
            why = {
                errno.EADDRINUSE: "which something else listens on; perhaps another dashboard",
                errno.EACCES: "which this user may not listen on",
            }.get(error.errno or 0, f"which cannot be had: {error.strerror}")
            raise InputError(
                f"got port {port}, {why}. Name another, e.g. --port {PORT + 1}, or --port 0 for any."
            ) from None
