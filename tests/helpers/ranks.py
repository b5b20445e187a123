"""Start a module of `tests.helpers` as each of several ranks, and read what went wrong on one."""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest


def go_through(module: str, ranks: int, scenarios: int, folder: Path) -> None:
    """Start `module` as each of the ranks, which may fail in none of its scenarios."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(ranks),
        "METHOD": f"file://{folder / 'meeting'}",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [sys.executable, "-m", f"tests.helpers.{module}"]
    processes = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stdout=-1, stderr=-1, text=True)
        for rank in range(ranks)
    ]
    try:
        printed, errors = zip(*(process.communicate(timeout=220) for process in processes), strict=True)
    except subprocess.TimeoutExpired:
        pytest.fail("a rank hangs")
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for text, error in zip(printed, errors, strict=True):
        results = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        failures = [failure for result in results for failure in result.values() if failure]
        assert not failures, failures[0]
        assert len(results) == scenarios, error


def report(*scenarios: Callable[[], None]) -> None:
    """Go through them as one of the ranks, and print a traceback or null for each, as JSON."""
    for scenario in scenarios:
        try:
            scenario()
            failure = None
        except Exception:  # noqa: BLE001  whatever it is, it is printed
            failure = traceback.format_exc()
        print(json.dumps({scenario.__name__: failure}), flush=True)
