"""The stand-in for NVML's library, built, and nvidia-ml-py made to load it: so that nvidia-ml-py's own code runs."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

NAME = "libnvidia-ml.so.1"
SOURCE = Path(__file__).parent / "fake_nvml.c"


def build(folder: Path, *options: str) -> Path:
    """The library, compiled into `folder`. Skips the test where that cannot be done."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or sys.platform != "linux":
        pytest.skip("the stand-in needs Linux and a C compiler")
    subprocess.run([compiler, "-shared", "-fPIC", "-w", *options, str(SOURCE), "-o", str(folder / NAME)], check=True)
    return folder / NAME


def use(path: Path | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have nvidia-ml-py load this library, or find none."""
    pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not made for this system")
    dlopen = ctypes.CDLL

    def by_name(name: str) -> object:
        assert name == NAME
        if path is None:
            raise OSError(f"{name}: cannot open shared object file")
        return dlopen(str(path))

    monkeypatch.setattr(pynvml, "CDLL", by_name)
    monkeypatch.setattr(pynvml, "nvmlLib", None)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
