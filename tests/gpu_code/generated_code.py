"""The code that torch.compile would run on a GPU, generated and assembled on a machine that has none.

All private interfaces of torch and triton that `python -m tests.gpu_code` needs are used here and nowhere else.
Inductor compiles for fake CUDA tensors and a described device, and is stopped when the code is written. That code is
then run on tensors without memory, where its launches are recorded, and each kernel is assembled with the ptxas of
triton's wheel, in every configuration that the autotuner could choose. It was tested with torch 2.13.0 and triton
3.7.1, and with torch 2.14.1 built for CUDA, on a machine without a driver, and triton 3.8.0.
"""

import itertools
import os
import re
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from compiled_logprobs.backends.compiled_code import options
from tests.gpu_code.data_sheets import DataSheet


@dataclass(frozen=True)
class Assembled:
    """A kernel in one configuration: what was assembled, and what the assembler says of it."""

    constants: dict[str, Any]  # block sizes and other parameters that are known when it is compiled
    parameters: tuple[str, ...]  # the others, in order
    warps: int
    registers: int  # a thread
    spilled_bytes: int  # stack and local memory, a thread
    shared_bytes: int  # a program
    ptx: str
    sass: str


@dataclass(frozen=True)
class Kernel:
    """A Triton kernel."""

    name: str
    source: str  # of the function alone
    parameters: Sequence[str]
    configurations: tuple[Assembled, ...]


@dataclass(frozen=True)
class Launch:
    """A call of a kernel. Tensors are on the meta device: they have shapes and an identity, and no values."""

    kernel: Kernel
    arguments: dict[str, Any]  # tensors and numbers, by the names of the kernel's parameters
    grid: tuple[int, ...] = ()  # where it does not follow from sizes and blocks, as Inductor's does


@dataclass
class Program:
    """What a function does on the GPU."""

    launches: list[Launch] = field(default_factory=list)
    operations: list[tuple[str, int]] = field(default_factory=list)  # torch's own: name, and bytes of their tensors
    buffers: list[Tensor] = field(default_factory=list)  # what was allocated, outputs included
    results: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Generated:
    """The module that Inductor wrote, and what its `call` takes."""

    source: str
    inputs: tuple[str, ...]  # Python expressions over the function's arguments, by name in a dictionary `L`


class _Written(BaseException):
    """Raised when the code is there; not an Exception, which torch would translate."""


_NUMBERS = itertools.count()


def generate(
    function: Callable[..., Any],
    arguments: Mapping[str, Tensor],
    gpu: DataSheet,
    mark: Callable[[Mapping[str, Tensor]], None] | None = None,
    how: Mapping[str, Any] | None = None,
) -> Generated:
    """What Inductor writes for `function(**arguments)` on `gpu`.

    Args:
        function: a function that torch.compile takes whole.
        arguments: tensors, of which shapes, strides and dtypes count.
        gpu: the device to compile for.
        mark: marks dimensions of the arguments as dynamic, as it is to be done before each call.
        how: options of Inductor; without it those of `compiled`.
    """
    sources: list[str] = []
    inputs: list[str] = []

    def backend(graph: Any, example_inputs: list[Any]) -> Any:
        from torch._inductor.compile_fx import compile_fx

        sources_of = (node.meta["grapharg"].source.name for node in graph.graph.nodes if node.op == "placeholder")
        inputs.extend(str(name() if callable(name) else name) for name in sources_of)
        return compile_fx(graph, example_inputs)

    def save(source: str) -> None:
        sources.append(source)
        raise _Written

    # By its code object and its name torch.compile remembers what sizes changed.
    name, code = f"{function.__name__}_{next(_NUMBERS)}", function.__code__
    renamed = FunctionType(
        code.replace(co_name=name), function.__globals__, name, function.__defaults__, function.__closure__
    )
    with _described(gpu) as stack:
        import torch._functorch.config
        import torch._inductor.config
        from torch._inductor.graph import GraphLowering
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        stack.enter_context(patch.object(GraphLowering, "save_output_code", save))
        # The code is to be generated, not found, nor compiled meanwhile by other processes; and it is not to be told
        # which configuration won earlier on.
        settings = {"fx_graph_cache": False, "autotune_local_cache": False, "compile_threads": 1}
        settings["joint_graph_constant_folding"] = False  # it evaluates constants on the device
        stack.enter_context(torch._inductor.config.patch({**settings, **(options() if how is None else how)}))
        stack.enter_context(torch._functorch.config.patch(enable_autograd_cache=False))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(torch.no_grad())
        stack.enter_context(FakeTensorMode(shape_env=ShapeEnv()))
        fakes = {
            name: torch.empty_strided(
                tensor.shape,
                tensor.stride(),
                dtype=tensor.dtype,
                device="cuda" if tensor.device.type != "cpu" else "cpu",
            )
            for name, tensor in arguments.items()
        }
        if mark is not None:
            mark(fakes)
        with suppress(_Written):
            torch.compile(renamed, fullgraph=True, backend=backend)(**fakes)
        if len(sources) != 1:
            raise RuntimeError(f"Inductor wrote {len(sources)} modules")
    return Generated(sources[0], tuple(inputs))


def load(generated: Generated, kernel: Callable[[str, str], Any], device: str) -> Callable[[list[Any]], Any]:
    """The function `call` of the module that Inductor wrote, which allocates on `device` instead.

    `kernel` makes an object that has `run` from a kernel's name and source.
    """
    import torch._C
    import torch._inductor.async_compile as async_compile

    compiler = SimpleNamespace(triton=lambda name, source, device_str: kernel(name, source), wait=lambda scope: None)
    module: dict[str, Any] = {"__name__": "generated"}
    with (
        patch.object(async_compile, "AsyncCompile", lambda: compiler),
        patch.object(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, create=True),
    ):
        exec(compile(generated.source, "generated", "exec"), module)
    module.update(
        empty_strided_cuda=lambda shape, stride, dtype: torch.empty_strided(shape, stride, dtype=dtype, device=device),
        reinterpret_tensor=torch.as_strided,
        copy_if_misaligned=lambda tensor: tensor,
        get_raw_stream=lambda index: 0,
    )
    inner = module["call"]

    def call(arguments: list[Any]) -> Any:
        with (
            patch.object(torch.cuda, "_DeviceGuard", nullcontext),
            patch.object(torch.cuda, "set_device", lambda index: None),
        ):
            return inner(arguments)

    return call


def record(generated: Generated, calls: Sequence[Mapping[str, Tensor]], gpu: DataSheet) -> Program:
    """Run the generated module on tensors without memory, once for each of `calls`, and assemble its kernels."""
    program = Program()
    assemble = cache(_assemble_generated)

    class Recorder:
        def __init__(self, name: str, source: str) -> None:
            self.kernel = assemble(name, source, gpu)

        def run(self, *arguments: Any, stream: int) -> None:
            program.launches.append(Launch(self.kernel, dict(zip(self.kernel.parameters, arguments, strict=False))))

    with _Operations(program):
        for arguments in calls:
            call = load(generated, Recorder, "meta")
            results = call([eval(expression, {"L": arguments}) for expression in generated.inputs])
            program.results += [result for result in results if isinstance(result, Tensor)]
    return program


class _Operations(TorchDispatchMode):
    """Notes what torch itself executes and allocates, apart from views."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, Tensor) or func.is_view:
            return result
        if not any(result is argument for argument in args):
            self.program.buffers.append(result)
        if "empty" not in str(func):
            size = sum(part.nbytes for part in (*args, result) if isinstance(part, Tensor))
            self.program.operations.append((str(func), size))
        return result


def record_launches(
    function: Callable[[], Sequence[Tensor]], owners: Mapping[str, ModuleType], gpu: DataSheet
) -> Program:
    """What `function` launches, of kernels that are written by hand.

    Args:
        function: calls the kernels as `kernel[grid](*arguments, **options)` on tensors on the meta device.
        owners: the module of each kernel by the kernel's name: a function under triton.jit, perhaps with heuristics.
        gpu: the device to assemble them for.
    """
    program = Program()
    kernels: dict[Any, Kernel] = {}

    class Recorder:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*arguments: Any, **options: Any) -> None:
                with _described(gpu):
                    binary = self.kernel.run(*arguments, grid=grid, warmup=True, **options)
                if binary not in kernels:
                    source = binary.src.fn.src
                    kernels[binary] = Kernel(self.name, source, self.kernel.arg_names, (_assembled(binary),))
                named = {**dict(zip(self.kernel.arg_names, arguments, strict=False)), **options}
                program.launches.append(Launch(kernels[binary], named, grid))

            return launch

    with ExitStack() as stack:
        for name, owner in owners.items():
            stack.enter_context(patch.object(owner, name, Recorder(name, getattr(owner, name))))
        stack.enter_context(_Operations(program))
        program.results += function()
    return program


def tuner_of(name: str, source: str, gpu: DataSheet) -> Any:
    """Inductor's autotuner of a kernel: its `fn`, and the `configs` that it would try on `gpu`."""
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.runtime import triton_helpers

    _, path = PyCodeCache.write(source)  # into a file, where triton looks for it
    module: dict[str, Any] = {"__name__": Path(path).stem, "__file__": path}
    with _described(gpu), patch.object(triton_helpers, "set_driver_to_gpu", lambda: None):
        exec(compile(source, path, "exec"), module)
    return module[name]


def _assemble_generated(name: str, source: str, gpu: DataSheet) -> Kernel:
    with _described(gpu):
        import triton
        from triton.compiler import ASTSource

        tuner = tuner_of(name, source, gpu)
        configurations = []
        for configuration in tuner.configs:
            meta = tuner._create_compile_meta(configuration)
            options = tuner._create_compile_options(configuration, meta)
            own = ASTSource(tuner.fn, meta["signature"], meta["constants"], meta["configs"][0])
            configurations.append(_assembled(triton.compile(own, target=_target(gpu), options=options)))
        function = "@triton.jit\n" + source.split("@triton.jit\n", 1)[1]
        return Kernel(name, function, tuner.fn.arg_names, tuple(configurations))


def _assembled(binary: Any) -> Assembled:
    """What there is to know of a compiled kernel of triton's."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", shown)}
    names = binary.src.fn.arg_names
    return Assembled(
        constants={names[place[0]]: value for place, value in binary.src.constants.items()},
        parameters=tuple(name for name, kind in binary.src.signature.items() if kind != "constexpr"),
        warps=binary.metadata.num_warps,
        registers=usage["REG"],
        spilled_bytes=max(usage["STACK"], usage["LOCAL"]),
        shared_bytes=int(binary.metadata.shared),
        ptx=binary.asm["ptx"],
        sass=shown,
    )


def _target(gpu: DataSheet) -> Any:
    from triton.backends.compiler import GPUTarget

    major, minor = gpu.capability
    return GPUTarget("cuda", 10 * major + minor, 32)


@contextmanager
def _described(gpu: DataSheet) -> Iterator[ExitStack]:
    """Within it, torch and triton believe that there is one device, `gpu`. Nothing of it stays."""
    import torch._dynamo.device_interface as interfaces
    import torch._inductor.fx_passes.joint_graph as joint_graph
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.runtime.hints import DeviceProperties
    from torch._subclasses import fake_tensor
    from torch.utils import _triton
    from triton.runtime.driver import driver

    major, minor = gpu.capability
    properties = SimpleNamespace(
        name=gpu.name,
        major=major,
        minor=minor,
        multi_processor_count=gpu.multiprocessors,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=gpu.threads_per_multiprocessor,
        max_threads_per_block=1024,
        warp_size=32,
        gcnArchName="",
    )
    device: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (major, minor),
        "is_initialized": lambda: False,
        "is_bf16_supported": lambda *arguments, **options: True,
        "is_current_stream_capturing": lambda: False,
        "synchronize": lambda device=None: None,
        "get_rng_state": lambda *arguments, **options: torch.zeros(1, device="cpu"),
        "set_rng_state": lambda *arguments, **options: None,
        "_exchange_device": lambda index: 0,
        "_maybe_exchange_device": lambda index: 0,
    }
    copy, invert = torch.ops.aten.copy_.default, torch.ops.aten.bitwise_not.default

    active = SimpleNamespace(
        get_current_target=lambda: _target(gpu),
        get_current_device=lambda: gpu.name,  # by which triton keeps what it compiled
        get_current_stream=lambda device: 0,
    )
    others = [
        (CudaInterface.Worker, "get_device_properties", staticmethod(device["get_device_properties"])),
        # Patterns of attention and matrix products, which would be traced on the device, and which nothing here has.
        (joint_graph, "lazy_init", lambda device=None: None),
        # The Python bindings of these ask for the device's driver, and the operators do not.
        (fake_tensor.FakeTensor, "copy_", lambda a, b: copy(a, b)),
        (fake_tensor.FakeTensor, "__invert__", lambda a: invert(a)),
        (driver, "_active", active),
        # These three matter to a torch built for CUDA, which looks for a driver where others know that there is none.
        (fake_tensor, "init_gpu_context", lambda device: None),
        (torch.cuda.graphs, "is_current_stream_capturing", lambda: False),
        (torch.accelerator, "is_available", lambda: False),
    ]
    # What looks at the device once and remembers it.
    remembered = (DeviceProperties.create, _triton.has_triton, _triton.triton_backend, _triton.triton_hash_with_backend)

    def forget() -> None:
        for function in remembered:
            function.cache_clear()

    cache_folder = os.environ.get("TRITON_CACHE_DIR")
    forget()
    with ExitStack() as stack:
        stack.callback(forget)
        for name, value in device.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
            if name in vars(CudaInterface):
                stack.enter_context(patch.object(CudaInterface, name, staticmethod(value)))
        for owner, name, value in others:
            stack.enter_context(patch.object(owner, name, value, create=True))
        stack.enter_context(patch.dict(interfaces.caching_worker_device_properties))
        try:
            yield stack
        finally:
            if cache_folder is None:
                os.environ.pop("TRITON_CACHE_DIR", None)
