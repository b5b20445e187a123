"""What is recorded of a machine, what of it is matched, and what is never told."""

import dataclasses
import json
import socket
from pathlib import Path

import pytest
import torch

from compiled_logprobs.machine import environment
from compiled_logprobs.machine.environment import (
    Environment,
    cpp_compiler_version,
    environment_of,
    environments,
    without_paths,
)


@pytest.fixture
def gpu() -> Environment:
    """An H100 as it would be described; no test needs one."""
    return dataclasses.replace(
        environment_of(),
        device_type="cuda",
        gpu_name="NVIDIA H100 80GB HBM3",
        compute_capability="9.0",
        multiprocessors=132,
        l2_bytes=50 * 2**20,
        driver="580.65.06",
        cuda="13.0",
    )


def test_the_environment_of_the_cpu_is_that_of_this_process():
    found = environment_of("cpu")
    assert found.torch == torch.__version__
    assert found.cpu_threads == torch.get_num_threads()
    assert found.cpu_model
    assert found.gpu_name is None
    assert found == environment_of(torch.device("cpu"))
    assert environments()[0] == found


def test_the_fingerprint_is_the_same_in_another_look_and_fits_a_folder_name():
    fingerprint = environment_of().fingerprint()
    assert fingerprint == environment_of().fingerprint()
    assert fingerprint.isalnum()
    assert len(fingerprint) == 16


@pytest.mark.parametrize(
    "changed",
    [
        {"compute_capability": "10.0"},
        {"multiprocessors": 114},
        {"l2_bytes": 2**20},
        {"torch": "2.14.0"},
        {"triton": None},
        {"cuda": "12.8"},
        {"device_type": "cpu"},
    ],
    ids=str,
)
def test_another_silicon_or_version_is_another_environment(gpu, changed):
    assert dataclasses.replace(gpu, **changed).fingerprint() != gpu.fingerprint()


@pytest.mark.parametrize(
    "changed",
    [
        {"gpu_name": "NVIDIA H100 PCIe"},
        {"driver": "570.1"},
        {"memory_bytes": 1},
        {"cpu_model": "another host processor"},
        {"cpu_threads": 1},
        {"python": "3.14.0"},
        {"flash_attn": None},
        {"compiled_logprobs": "9.9"},
    ],
    ids=str,
)
def test_what_is_only_recorded_leaves_a_gpu_environment_the_same(gpu, changed):
    assert dataclasses.replace(gpu, **changed).fingerprint() == gpu.fingerprint()


@pytest.mark.parametrize(
    "changed", [{"cpu_model": "another"}, {"cpu_capability": "none"}, {"cpu_threads": 999}], ids=str
)
def test_a_cpu_environment_is_its_model_its_instructions_and_its_threads(changed):
    found = environment_of()
    assert dataclasses.replace(found, **changed).fingerprint() != found.fingerprint()


def test_another_schema_is_another_environment(monkeypatch):
    before = environment_of().fingerprint()
    monkeypatch.setattr(environment, "SCHEMA", environment.SCHEMA + 1)
    assert environment_of().fingerprint() != before


def test_an_environment_is_plain_json_without_names_of_host_or_home(gpu):
    for one in (environment_of(), gpu):
        text = json.dumps(one.to_dict(), allow_nan=False)
        assert json.loads(text)["fingerprint"] == one.fingerprint()
        assert str(Path.home()) not in text
        if len(socket.gethostname()) > 3:
            assert socket.gethostname() not in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ImportError: /opt/venv/lib/kernel.so: undefined symbol", "ImportError: kernel.so: undefined symbol"),
        ("no file '/srv/data/x.py', line 3", "no file 'x.py', line 3"),
        ("C:\\Users\\somebody\\x.dll is missing", "x.dll is missing"),
        ("see https://example.org/a/b and/or 3/4", "see https://example.org/a/b and/or 3/4"),
        ("needs a CUDA or ROCm device", "needs a CUDA or ROCm device"),
    ],
)
def test_paths_are_cut_down_to_their_last_part(text, expected):
    assert without_paths(text) == expected


def test_the_home_folder_is_cut_even_if_it_holds_a_space(monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path("/home/some body"))
    assert without_paths("broken: /home/some body/venv/x.so") == "broken: x.so"


def test_the_cpp_compiler_is_the_one_that_torch_takes(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "missing"))
    assert cpp_compiler_version() is None

    compiler = tmp_path / "my-c++"
    compiler.write_text(f"#!/bin/sh\necho '{tmp_path}/my-c++ (a compiler) 1.2.3'\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert cpp_compiler_version() == "my-c++ (a compiler) 1.2.3"

    compiler.write_text("#!/bin/sh\nexit 1\n")
    assert cpp_compiler_version() is None


def test_a_user_without_a_home_has_no_path_to_hide(monkeypatch):
    """As in a container whose user the system does not list."""

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert without_paths("broken: /srv/venv/x.so") == "broken: x.so"


def test_a_home_that_is_empty_hides_nothing(monkeypatch):
    monkeypatch.setenv("HOME", "")
    assert without_paths("version 1.2.3. Done.") == "version 1.2.3. Done."
