"""What data sheets say of GPUs: nothing here was measured.

Bandwidth is from each GPU's `source`. The clock is the one at which its float32 cores reach the float32 rate of the
same page, two operations an instruction: A100 19.5e12 a second, H100 and H200 67e12, B200 75e12, L40S 91.6e12, RTX 4090
82.6e12. The rest holds for all of them by NVIDIA's CUDA C++ Programming Guide: a multiprocessor has four schedulers,
each of which issues an instruction for a warp of 32 threads a clock ("Compute Capabilities"), and computes 16
exponentials, logarithms or reciprocals a clock ("Throughput of Native Arithmetic Instructions").
"""

from dataclasses import dataclass

from compiled_logprobs.errors import InputError

WARP = 32
SCHEDULERS = 4  # of a multiprocessor; each issues for one warp a clock
SPECIAL_PER_CLOCK = 16  # results of a multiprocessor's special function units


@dataclass(frozen=True)
class DataSheet:
    """A GPU as its maker describes it."""

    name: str
    arch: str  # what the assembler calls its architecture, e.g. sm_90
    multiprocessors: int
    bandwidth: float  # of its memory, bytes a second
    clock: float  # at its fastest, a second
    threads_per_multiprocessor: int
    source: str

    @property
    def capability(self) -> tuple[int, int]:
        number = int(self.arch.removeprefix("sm_"))
        return number // 10, number % 10

    @property
    def instructions_per_second(self) -> float:
        """Of single threads."""
        return self.multiprocessors * SCHEDULERS * WARP * self.clock

    @property
    def special_per_second(self) -> float:
        """Results of the special function units, such as exponentials."""
        return self.multiprocessors * SPECIAL_PER_CLOCK * self.clock


SITE = "https://www.nvidia.com"
A100 = f"{SITE}/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"
ADA = "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
# The first of an architecture stands for it.
GPUS = (
    DataSheet("H100", "sm_90", 132, 3.35e12, 1.98e9, 2048, f"{SITE}/en-us/data-center/h100/"),
    DataSheet("H200", "sm_90", 132, 4.8e12, 1.98e9, 2048, f"{SITE}/en-us/data-center/h200/"),
    DataSheet("B200", "sm_100", 148, 8.0e12, 1.98e9, 2048, f"{SITE}/en-us/data-center/dgx-b200/"),
    DataSheet("A100", "sm_80", 108, 2.039e12, 1.41e9, 2048, A100),
    DataSheet("L40S", "sm_89", 142, 0.864e12, 2.52e9, 1536, f"{SITE}/en-us/data-center/l40s/"),
    DataSheet("RTX 4090", "sm_89", 128, 1.008e12, 2.52e9, 1536, ADA),
)


def data_sheet(arch: str | None = None, name: str | None = None) -> DataSheet:
    """The first GPU of this architecture and name, in upper or lower case; an H100 where neither is given."""
    for gpu in GPUS:
        if arch in (None, gpu.arch) and (name is None or name.casefold() == gpu.name.casefold()):
            return gpu
    valid = ", ".join(f"{gpu.name} ({gpu.arch})" for gpu in GPUS)
    got = " and ".join(repr(given) for given in (arch, name) if given)
    raise InputError(f"got {got}, for which there is no data sheet; {valid} are valid. Name one, or its architecture.")
