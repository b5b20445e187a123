"""A C++ file as a shared library: compiled for this machine on first use, and kept for later processes."""

import contextlib
import ctypes
import hashlib
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from compiled_logprobs.errors import BackendUnavailable
from compiled_logprobs.machine.environment import cpp_compiler, cpp_compiler_version, without_paths

TORCH_HEADERS = Path(torch.__file__).parent / "include"
COMPILING_S = 300
"""A compiler that takes longer is taken for hung."""
FLAGS = ("-O3", "-march=native", "-std=c++20", "-fPIC", "-shared", "-fopenmp")


def shared_library(source: Path) -> ctypes.CDLL:
    """The library made of `source`, which may use torch's vector headers and OpenMP.

    Raises:
        BackendUnavailable: it cannot be compiled or loaded; the message has the compiler's first complaint.
    """
    command = _command(source)
    try:
        name = f"{source.stem}-{_digest(source, command)}.so"
        kept = _cache() / name
        if _is_own(kept):
            with contextlib.suppress(OSError):  # cut short by whatever befell the disk: it is built anew
                return ctypes.CDLL(str(kept))
        file = (kept.parent if _is_writable(kept.parent) else Path(_own_folder().name)) / name
        _build(command, file)
        return ctypes.CDLL(str(file))
    except OSError as error:
        raise BackendUnavailable(
            f"{source.name} cannot be compiled and loaded here: {without_paths(str(error))}. "
            "Mend what it names, or use another backend."
        ) from error


def _command(source: Path) -> list[str]:
    compiler = cpp_compiler()
    if compiler is None:
        raise BackendUnavailable(
            f"{source.name} needs a C++ compiler, and there is none on the PATH. Install one, or name it in CXX."
        )
    capability = torch.backends.cpu.get_cpu_capability()
    vectors = "DEFAULT" if capability == "NO AVX" else capability
    defines = (f"-DCPU_CAPABILITY={vectors}", f"-DCPU_CAPABILITY_{vectors}")
    return [compiler, *FLAGS, *defines, f"-I{TORCH_HEADERS}", str(source)]


def _digest(source: Path, command: list[str]) -> str:
    """Of everything that decides what comes out; `-march=native` also asks the processor."""
    facts = (*command[1:-2], cpp_compiler_version(), torch.__version__, _processor())
    return hashlib.sha256(repr(facts).encode() + source.read_bytes()).hexdigest()[:16]


def _processor() -> list[str]:
    """What a compiler may use of the first processor: other machines may share the home directory."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    except OSError:
        return []
    names = ("model", "model name", "cpu family", "stepping", "flags", "Features", "CPU part", "CPU variant")
    return [line for line in lines if line.partition(":")[0].strip() in names]


def _cache() -> Path:
    """Where libraries are kept for this user."""
    from platformdirs import user_cache_path

    try:
        return user_cache_path("compiled-logprobs", appauthor=False) / "libraries"
    except RuntimeError:  # a user without a home
        return Path(_own_folder().name)


def _is_own(file: Path) -> bool:
    """Whether there is such a file, and nobody but this user can have put it there: what it holds is going to run."""
    try:
        statuses = (file.stat(), file.parent.stat())
    except OSError:
        return False
    return all(one.st_uid in (os.geteuid(), 0) and not one.st_mode & 0o022 for one in statuses)


def _is_writable(folder: Path) -> bool:
    """Whether this user, and nobody else, can write there."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
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
        built.chmod(0o700)
        os.replace(built, file)
