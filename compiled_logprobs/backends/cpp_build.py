"""A C++ file as a shared library: compiled for this machine on first use, and kept for later processes.

A library that is kept needs no compiler, so that it can be made where one is and brought along, as into the image of a
container, whose cache nobody may write to.
"""

import ctypes
import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from compiled_logprobs.errors import BackendUnavailable
from compiled_logprobs.machine.environment import cpp_compiler, without_paths

TORCH_HEADERS = Path(torch.__file__).parent / "include"
COMPILING_S = 300
"""A compiler that takes longer is taken for hung."""


def shared_library(source: Path, flags: Sequence[str]) -> ctypes.CDLL:
    """The library that a compiler with `flags` makes of `source`, which may use torch's headers.

    Raises:
        BackendUnavailable: it is not kept, and cannot be compiled; or it cannot be loaded. The message has the
            compiler's first complaint.
    """
    kept = _place(source, flags)
    library = _load(kept)
    if not isinstance(library, str):
        return library
    lack = why_not_compile()
    if lack is not None:
        raise BackendUnavailable(f"its library {library}, and {lack}")
    try:
        file = (kept.parent if _is_writable(kept.parent) else Path(_own_folder().name)) / kept.name
        _build([str(cpp_compiler()), "-fPIC", "-shared", *flags, f"-I{TORCH_HEADERS}", str(source)], file)
        return ctypes.CDLL(str(file))
    except OSError as error:
        raise BackendUnavailable(
            f"{source.name} cannot be compiled and loaded here: {without_paths(str(error))}. "
            "Mend what it names, or use another backend."
        ) from error


def is_kept(source: Path, flags: Sequence[str]) -> bool:
    """Whether `shared_library` finds it made, and compiles nothing."""
    return not isinstance(_load(_place(source, flags)), str)


def why_not_compile() -> str | None:
    """Why nothing can be compiled here, as far as that shows before it is tried."""
    if cpp_compiler() is None:
        return "there is no C++ compiler on the PATH: install one, such as the package g++, or name it in CXX"
    if not (TORCH_HEADERS / "ATen" / "cpu" / "vec" / "vec.h").exists():
        return "this torch came without its C++ headers: install one that has them, such as that of PyPI"
    return None


def _place(source: Path, flags: Sequence[str]) -> Path:
    """Where the library is kept."""
    return _cache() / f"{source.stem}-{_digest(source, flags)}.so"


def _load(file: Path) -> ctypes.CDLL | str:
    """The library in `file`, or what is wrong with it."""
    try:
        statuses = (file.stat(), file.parent.stat())
    except OSError:
        return "is not in the cache"
    # What it holds is going to run.
    if any(status.st_uid not in (os.geteuid(), 0) or status.st_mode & 0o022 for status in statuses):
        return "in the cache can be written by somebody else"
    try:
        return ctypes.CDLL(str(file))
    except OSError as error:  # cut short by whatever befell the disk, or made for another C library
        return f"in the cache cannot be loaded ({without_paths(str(error))})"


def _digest(source: Path, flags: Sequence[str]) -> str:
    """Of everything that decides what comes out, what lies beside the source and is included by it too; `-march=native`
    also asks the processor.

    But for the compiler: what another version made of the same is as good, and where the library is brought along there
    is none to ask.
    """
    facts = (*flags, torch.__version__, _processor())
    text = source.read_bytes()
    included = [source.with_name(name.decode()).read_bytes() for name in re.findall(rb'^#include "(.+)"', text, re.M)]
    return hashlib.sha256(b"".join((repr(facts).encode(), text, *included))).hexdigest()[:16]


def _processor() -> list[str]:
    """What a compiler may use of the first processor: other machines may share the home directory."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    except OSError:
        return []
    names = ("model", "model name", "cpu family", "flags", "Features", "CPU part", "CPU variant")
    return [line for line in lines if line.partition(":")[0].strip() in names]


def _cache() -> Path:
    """Where libraries are kept for this user."""
    from platformdirs import user_cache_path

    try:
        return user_cache_path("compiled-logprobs", appauthor=False) / "libraries"
    except RuntimeError:  # a user without a home
        return Path(_own_folder().name)


def _is_writable(folder: Path) -> bool:
    """Whether this user, and nobody else, can write there."""
    try:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return not folder.stat().st_mode & 0o022
    except OSError:
        return False


@cache
def _own_folder() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="compiled-logprobs-")


def _build(command: list[str], file: Path) -> None:
    """Compile beside `file` and move the result there, so that nobody loads half a library."""
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".building-") as folder:
        built = Path(folder, file.name)
        try:
            ran = subprocess.run(
                [*command, "-o", str(built)],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=COMPILING_S,
                env={**os.environ, "LC_ALL": "C"},
            )
        except subprocess.TimeoutExpired as error:
            raise OSError(f"the compiler took longer than {COMPILING_S} s") from error
        if ran.returncode != 0:
            complaints = [line for line in ran.stderr.splitlines() if "error:" in line] or ran.stderr.splitlines()
            raise OSError(
                f"the compiler failed with exit code {ran.returncode}: {next(iter(complaints), 'no message')}"
            )
        if not built.exists():
            raise OSError(f"the compiler, {Path(command[0]).name}, wrote nothing")
        ctypes.CDLL(str(built))  # before others may find it
        built.chmod(0o755)
        os.replace(built, file)
