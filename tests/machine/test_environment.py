"""What is recorded of a machine, what of it is matched, and what is never told."""

import dataclasses
import json
import socket
from pathlib import Path

import pytest
import torch

from compiled_logprobs.machine import environment
from compiled_logprobs.machine.environment import cpp_compiler_version, environment_of, environments, without_paths

CPU = environment_of()
GPU = dataclasses.replace(
    CPU,
    device_type="cuda",
    memory_bytes=85_017_493_504,
    gpu_name="NVIDIA H100 80GB HBM3",
    compute_capability="9.0",
    multiprocessors=132,
    l2_bytes=50 * 2**20,
    driver="580.65.06",
    cuda="13.0",
)
"""An H100 as it would be described; no test needs one."""


def test_the_environment_of_the_cpu_is_that_of_this_process():
    assert environment_of(torch.device("cpu")) == environments()[0] == CPU
    assert CPU.torch == torch.__version__ and CPU.cpu_threads == torch.get_num_threads()
    assert CPU.cpu_model and CPU.gpu_name is None


@pytest.mark.parametrize(
    ("base", "change"),
    [
        (GPU, {"compute_capability": "10.0"}),
        (GPU, {"multiprocessors": 114}),
        (GPU, {"l2_bytes": 2**20}),
        (GPU, {"memory_bytes": 99_857_989_632}),  # of 96 GB
        (GPU, {"torch": "2.14.0"}),
        (GPU, {"triton": None}),
        (GPU, {"cuda": "12.8"}),
        (GPU, {"device_type": "cpu"}),
        (CPU, {"cpu_model": "another"}),
        (CPU, {"cpu_capability": "none"}),
        (CPU, {"cpu_threads": 999}),
    ],
    ids=str,
)
def test_another_silicon_or_version_is_another_environment(base, change):
    assert dataclasses.replace(base, **change).fingerprint() != base.fingerprint()


def test_what_is_only_recorded_leaves_a_gpu_environment_the_same():
    recorded = {"gpu_name": "NVIDIA H100 PCIe", "driver": "570.1", "cpu_model": "another host's"}
    recorded |= {"memory_bytes": 84_929_609_728}  # another driver keeps more of it
    recorded |= {"cpu_threads": 1, "python": "3.14.0", "flash_attn": None, "compiled_logprobs": "9.9"}
    assert dataclasses.replace(GPU, **recorded).fingerprint() == GPU.fingerprint()


def test_the_environment_of_a_cpu_is_called_as_it_was():
    """By a digest of these facts, in this form: whatever a GPU's has beside them, profiles of CPUs stay in use."""
    cpu = dataclasses.replace(CPU, cpu_model="a", cpu_capability="AVX512", cpu_threads=2, torch="2.13.0", cuda=None)
    assert cpu.fingerprint() == "58cf823096cc54bc"
    assert dataclasses.replace(cpu, memory_bytes=1).fingerprint() == cpu.fingerprint()


def test_triton_makes_no_difference_to_a_cpu():
    assert dataclasses.replace(CPU, triton="3.7.1").fingerprint() == dataclasses.replace(CPU, triton=None).fingerprint()


def test_another_schema_is_another_environment(monkeypatch):
    before = CPU.fingerprint()
    assert before.isalnum() and len(before) == 16  # fit for a folder's name
    monkeypatch.setattr(environment, "SCHEMA", environment.SCHEMA + 1)
    assert CPU.fingerprint() != before


@pytest.mark.parametrize("which", [CPU, GPU], ids=["cpu", "gpu"])
def test_an_environment_is_plain_json_without_names_of_host_or_home(which):
    text = json.dumps(which.to_dict(), allow_nan=False)
    assert json.loads(text)["fingerprint"] == which.fingerprint()
    assert str(Path.home()) not in text
    assert len(socket.gethostname()) <= 3 or socket.gethostname() not in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ImportError: /opt/venv/lib/kernel.so: undefined symbol", "ImportError: kernel.so: undefined symbol"),
        ("no file '/srv/data/x.py', line 3", "no file 'x.py', line 3"),
        ("C:\\Users\\somebody\\x.dll is missing", "x.dll is missing"),
        ("broken: /home/some body/venv/x.so", "broken: x.so"),  # though its name holds a space
        ("see https://example.org/a/b and/or 3/4", "see https://example.org/a/b and/or 3/4"),
    ],
)
def test_paths_are_cut_down_to_their_last_part(monkeypatch, text, expected):
    monkeypatch.setattr(Path, "home", lambda: Path("/home/some body"))
    assert without_paths(text) == expected


def test_without_a_home_paths_are_cut_all_the_same(monkeypatch):
    """As in a container whose user the system does not list."""

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "home", no_home)
        assert without_paths("broken: /srv/venv/x.so") == "broken: x.so"
    monkeypatch.setenv("HOME", "")
    assert without_paths("version 1.2.3. Done.") == "version 1.2.3. Done."


def test_the_cpp_compiler_is_the_one_that_torch_takes(monkeypatch, tmp_path):
    compiler = tmp_path / "my-c++"
    monkeypatch.setenv("CXX", str(compiler))
    assert cpp_compiler_version() is None
    compiler.write_text(f"#!/bin/sh\necho '{tmp_path}/my-c++ (a compiler) 1.2.3'\n")
    compiler.chmod(0o755)
    assert cpp_compiler_version() == "my-c++ (a compiler) 1.2.3"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    assert cpp_compiler_version() is None
