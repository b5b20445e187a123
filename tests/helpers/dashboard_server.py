"""A dashboard that runs, for the tests that talk to it as a browser does."""

import contextlib
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

LIMIT_S = 120


class Server(NamedTuple):
    """One that answers."""

    process: "subprocess.Popen[str]"
    url: str
    """Without a slash at its end."""
    output: Path
    """What it printed."""

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


def environment_in(folder: Path, **more: str) -> dict[str, str]:
    """Of a user whose home is `folder`: no settings, no profiles, no runs."""
    places = {f"XDG_{name}_HOME": str(folder / name.lower()) for name in ("CACHE", "CONFIG", "DATA", "STATE")}
    places |= {"HOME": str(folder), "COMPILED_LOGPROBS_PROFILES": str(folder / "profiles")}
    return {**os.environ, "COMPILED_LOGPROBS_MODE": "off", **places, **more}


@contextlib.contextmanager
def dashboard(
    folder: Path, *, command: Sequence[str] = (sys.executable, "-m", "compiled_logprobs"), cwd: Any = None, **more: str
) -> Iterator[Server]:
    """Start one as a user does, on a free port, and end it in the end."""
    output, command = folder / "output.txt", [*command, "dashboard", "--port", "0", "--no-browser"]
    with output.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, text=True, env=environment_in(folder, **more), cwd=cwd
        )
    try:
        until = time.monotonic() + LIMIT_S
        url = None
        while url is None or not is_healthy(url):
            assert process.poll() is None and time.monotonic() < until, output.read_text()
            time.sleep(0.1)
            words = output.read_text().split()
            url = next((word for word in words if word.startswith("http://127.0.0.1:")), None)
        yield Server(process, url, output)
    finally:
        process.kill()
        process.wait()


def is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/_stcore/health", timeout=10) as answer:
            return bool(answer.read() == b"ok")
    except OSError:
        return False
