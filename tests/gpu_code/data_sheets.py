"""What data sheets say of GPUs: nothing here was measured."""

from dataclasses import dataclass

from compiled_logprobs.errors import InputError


@dataclass(frozen=True)
class Gpu:
    """A GPU as its maker describes it."""

    name: str
    arch: str
    """What the assembler calls its architecture, e.g. sm_90."""
    multiprocessors: int
    bandwidth: float
    """Of its memory, bytes a second."""
    threads_per_multiprocessor: int
    source: str
    """Of the bandwidth."""

    @property
    def capability(self) -> tuple[int, int]:
        number = int(self.arch.removeprefix("sm_"))
        return number // 10, number % 10


# The first of an architecture stands for it.
GPUS = (
    Gpu(
        *("A100", "sm_80", 108, 2.039e12, 2048),
        source="https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf",
    ),
    Gpu(*("H100", "sm_90", 132, 3.35e12, 2048), source="https://www.nvidia.com/en-us/data-center/h100/"),
    Gpu(*("H200", "sm_90", 132, 4.8e12, 2048), source="https://www.nvidia.com/en-us/data-center/h200/"),
    Gpu(*("B200", "sm_100", 148, 8.0e12, 2048), source="https://www.nvidia.com/en-us/data-center/dgx-b200/"),
    Gpu(*("L40S", "sm_89", 142, 0.864e12, 1536), source="https://www.nvidia.com/en-us/data-center/l40s/"),
    Gpu(
        *("RTX 4090", "sm_89", 128, 1.008e12, 1536),
        source="https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf",
    ),
)


def gpu_for(arch: str | None = None, name: str | None = None) -> Gpu:
    """The GPU called `name`, or else the first of `arch`; an H100 where neither is given.

    Raises:
        InputError: there is none of that name or architecture, or the two do not fit together.
    """
    known = ", ".join(f"{gpu.name} ({gpu.arch})" for gpu in GPUS)
    found = [gpu for gpu in GPUS if name is None or _plain(gpu.name) == _plain(name)]
    if not found:
        raise InputError(f"got GPU {name!r}; {known} are valid. Name one of them.")
    wanted = arch or ("sm_90" if name is None else found[0].arch)
    for gpu in found:
        if gpu.arch == wanted:
            return gpu
    if name is not None:
        raise InputError(
            f"got arch {wanted!r} and GPU {name!r}, whose arch is {found[0].arch}; {known} are valid. Leave one of the two out."
        )
    architectures = ", ".join(dict.fromkeys(gpu.arch for gpu in GPUS))
    raise InputError(f"got arch {wanted!r}; {architectures} are valid. Name one of them.")


def _plain(name: str) -> str:
    return name.lower().replace(" ", "").replace("-", "").replace("_", "")
