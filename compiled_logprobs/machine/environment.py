"""What machine this is: its silicon, the versions on it, and a fingerprint of those that decide how fast a backend is.

Nothing here names the host, the user or a path of theirs: it is stored, printed and published.
"""

import contextlib
import hashlib
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from compiled_logprobs.machine.clock import with_index

SCHEMA = 1
"""Of the fingerprint and of what is stored under it."""

VERSIONS_MATCHED = ("torch", "triton", "cuda")
MATCHED = {
    "cpu": ("cpu_model", "cpu_capability", "cpu_threads", "torch", "cuda"),  # where nothing runs on triton
    "cuda": ("compute_capability", "multiprocessors", "l2_bytes", "memory_bytes", *VERSIONS_MATCHED),
}
"""The facts that make an environment what it is, by type of device; all others are recorded and may differ."""
MEMORY_STEP = 8 * 2**30
"""A GPU's memory counts as rounded up to this: it tells parts of the same chip apart, and a driver keeps some of it."""


@dataclass(frozen=True)
class Environment:
    """One device, and the versions of what runs on it. None where a fact does not apply or cannot be found out."""

    device_type: str
    """As torch names it, so that ROCm is 'cuda' too."""
    system: str
    """Such as 'Linux x86_64'."""
    cpu_model: str
    cpu_capability: str
    """The widest vector instructions that torch uses, such as 'AVX2'."""
    cpu_threads: int
    """How many threads torch uses."""
    memory_bytes: int | None
    """Of the device."""
    gpu_name: str | None
    compute_capability: str | None
    """Such as '9.0'; under ROCm such as 'gfx942'."""
    multiprocessors: int | None
    l2_bytes: int | None
    driver: str | None
    python: str
    torch: str
    triton: str | None
    cuda: str | None
    """What torch was built for, such as '13.0' or 'ROCm 7.0'; None for a CPU build."""
    flash_attn: str | None
    compiled_logprobs: str | None
    """None where the package is not installed but lies on the import path."""

    def matched(self) -> dict[str, Any]:
        """The facts that another machine has to share for its measurements to count here."""
        names = MATCHED.get(self.device_type, MATCHED["cpu"])
        facts = {name: as_matched(name, getattr(self, name)) for name in names}
        return {"schema": SCHEMA, "device_type": self.device_type, **facts}

    def fingerprint(self) -> str:
        """A digest of `matched()`, fit for a folder's name."""
        return hashlib.sha256(json.dumps(self.matched(), sort_keys=True).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """For programs: plain values only, the fingerprint among them."""
        return {"fingerprint": self.fingerprint(), **asdict(self)}


def as_matched(name: str, value: Any) -> Any:
    """What counts of a fact, of any source, where it has to be the same."""
    if name == "memory_bytes" and isinstance(value, (int, float)) and math.isfinite(value):
        return math.ceil(value / MEMORY_STEP) * MEMORY_STEP
    return value


def environment_of(device: torch.device | str = "cpu") -> Environment:
    """The environment that `device` and this process make up."""
    device = torch.device(device)
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    rocm = torch.version.hip
    capability = None
    if gpu is not None:
        capability = gpu.gcnArchName.split(":")[0] if rocm else f"{gpu.major}.{gpu.minor}"
    return Environment(
        device_type=device.type,
        system=f"{platform.system()} {platform.machine()}",
        cpu_model=_cpu_model(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        cpu_threads=torch.get_num_threads(),
        memory_bytes=int(psutil.virtual_memory().total) if gpu is None else gpu.total_memory,
        gpu_name=None if gpu is None else gpu.name,
        compute_capability=capability,
        multiprocessors=None if gpu is None else gpu.multi_processor_count,
        l2_bytes=None if gpu is None else gpu.L2_cache_size,
        driver=None if gpu is None else _driver(),
        python=platform.python_version(),
        torch=str(torch.__version__),
        triton=_version("triton", "pytorch-triton", "pytorch-triton-rocm"),
        cuda=f"ROCm {rocm}" if rocm else torch.version.cuda,
        flash_attn=_version("flash-attn"),
        compiled_logprobs=_version("compiled-logprobs"),
    )


def fingerprint_of(device: torch.device) -> str:
    """The environment that `device` makes up at present."""
    return environment_at(device).fingerprint()


def environment_at(device: torch.device) -> Environment:
    """The same, with all its facts; remembered, since to find them out takes milliseconds."""
    return _environment(str(with_index(device)), torch.get_num_threads())


@lru_cache(maxsize=64)
def _environment(device: str, threads: int) -> Environment:
    return environment_of(device)


def environments() -> list[Environment]:
    """Of the CPU and of each GPU that is visible."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else range(0)
    return [environment_of(), *(environment_of(f"cuda:{index}") for index in gpus)]


def cpp_compiler() -> str | None:
    """Where the C++ compiler is that torch.compile takes on the CPU; None if it would find none."""
    usual = {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
    return shutil.which(os.environ.get("CXX", usual))


def cpp_compiler_version() -> str | None:
    """Name and version of `cpp_compiler()`, without its place; None if there is none, or it cannot be run."""
    compiler = cpp_compiler()
    if compiler is None:
        return None
    if Path(compiler).stem == "cl":
        return "cl"  # has no option that only prints the version
    try:
        answer = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return without_paths(next(iter(answer.splitlines()), Path(compiler).name))


def without_paths(text: str) -> str:
    """Cut each absolute path in `text` down to its last part: paths tell names, and messages of libraries hold them."""
    try:
        home = Path.home()
    except RuntimeError:  # a user without an entry in the system's list, as in containers, has none
        home = Path()
    if home != Path(home.anchor):
        text = text.replace(str(home), "/~")  # first, and as a whole, since it may hold spaces
    return re.sub(r"(?<![\w.:/\\])(?:[A-Za-z]:(?=\\))?[/\\](?:[^\s/\\:'\"]+[/\\])*(?=[^\s/\\])", "", text)


def _cpu_model() -> str:
    with contextlib.suppress(OSError, StopIteration):  # some systems lack the file, some processors the line
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def _driver() -> str | None:
    for place in ("nvidia", "amdgpu"):
        file = Path("/sys/module", place, "version")
        if file.is_file():
            return file.read_text(encoding="utf-8").strip()
    return None


def _version(*distributions: str) -> str | None:
    for distribution in distributions:
        with contextlib.suppress(PackageNotFoundError):
            return version(distribution)
    return None
