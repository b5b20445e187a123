"""Compiled C++: built once for a machine, and mended or refused in words when something is in the way."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import platformdirs
import pytest

from compiled_logprobs.backends import cpp_build as module
from compiled_logprobs.backends.cpp_build import is_kept, shared_library
from compiled_logprobs.errors import BackendUnavailable


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "compiled-logprobs" / "libraries"


def source(folder: Path, answer: int = 42) -> Path:
    file = folder / "answer.cpp"
    file.write_text(f'extern "C" int answer() {{ return {answer}; }}\n')
    return file


def test_it_is_built_once_and_kept(cache, tmp_path, monkeypatch):
    assert not is_kept(source(tmp_path), ())
    assert shared_library(source(tmp_path), ()).answer() == 42
    monkeypatch.setattr(module, "_build", lambda *_: pytest.fail("it is built again"))
    assert is_kept(source(tmp_path), ())
    assert shared_library(source(tmp_path), ()).answer() == 42
    assert [file.suffix for file in cache.iterdir()] == [".so"]


def test_another_source_flag_or_processor_is_another_library_and_another_compiler_is_none(cache, tmp_path, monkeypatch):
    shared_library(source(tmp_path), ())
    assert shared_library(source(tmp_path, 43), ()).answer() == 43
    (tmp_path / "including.cpp").write_text('#include "answer.cpp"\n')
    for answer in (44, 45):
        source(tmp_path, answer)
        assert shared_library(tmp_path / "including.cpp", ()).answer() == answer
    shared_library(source(tmp_path), ("-O1",))
    monkeypatch.setattr(module, "_processor", lambda: ["flags : fewer"])
    shared_library(source(tmp_path), ())
    assert len(list(cache.iterdir())) == 6


def test_a_library_in_the_cache_needs_no_compiler_and_no_place_to_write(cache, tmp_path, monkeypatch):
    shared_library(source(tmp_path), ())
    (built,) = cache.iterdir()
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(module, "_is_writable", lambda folder: False)
    assert shared_library(source(tmp_path), ()).answer() == 42
    built.chmod(0o722)
    with pytest.raises(
        BackendUnavailable, match="its library in the cache can be written by somebody else, and there is"
    ):
        shared_library(source(tmp_path), ())
    (cache / f"answer-{module._digest(source(tmp_path), ('-O2',))}.so").write_bytes(b"no library")
    with pytest.raises(
        BackendUnavailable, match="its library in the cache cannot be loaded .*, and there is no C.. compi"
    ):
        shared_library(source(tmp_path), ("-O2",))


@pytest.mark.slow
def test_a_damaged_library_is_built_anew(cache, tmp_path):
    """As a full disk or a crash leaves it; in a process that has not loaded it."""
    program = f"""
import sys; from pathlib import Path; from compiled_logprobs.backends.cpp_build import shared_library
print(shared_library(Path({str(source(tmp_path))!r}), ()).answer())
"""
    for content in (None, b"", b"\x7fELF\x02\x01\x01", b"no library"):
        if content is not None:
            (built,) = cache.iterdir()
            built.write_bytes(content)
        assert subprocess.check_output([sys.executable, "-c", program], text=True, timeout=300) == "42\n"


def test_many_at_once(cache, tmp_path):
    file = source(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        assert {library.answer() for library in pool.map(lambda _: shared_library(file, ()), range(8))} == {42}
    assert [file.suffix for file in cache.iterdir()] == [".so"]


def test_where_nothing_can_be_written(tmp_path, monkeypatch):
    """The cache lies below a file, which nobody, root included, can write to."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert shared_library(source(tmp_path), ()).answer() == 42


def test_errors_say_what_the_compiler_said(cache, tmp_path, monkeypatch):
    broken = tmp_path / "broken.cpp"
    broken.write_text("int answer() { return unknown; }\n")
    with pytest.raises(BackendUnavailable) as error:
        shared_library(broken, ())
    said = str(error.value)
    assert said.startswith(
        "broken.cpp cannot be compiled and loaded here: the compiler failed with exit code 1: broken.cpp:"
    )
    assert "unknown" in said and str(tmp_path) not in said
    assert said.endswith("Mend what it names, or use another backend.")
    assert not list(cache.iterdir())

    with monkeypatch.context() as patch:
        patch.setenv("CXX", "true")
        with pytest.raises(BackendUnavailable, match="the compiler, true, wrote nothing"):
            shared_library(broken, ())
    monkeypatch.setattr(module, "COMPILING_S", 1e-6)
    with pytest.raises(BackendUnavailable, match="the compiler took longer than 1e-06 s"):
        shared_library(broken, ())
    monkeypatch.setattr(module, "cpp_compiler", lambda: None)
    with pytest.raises(
        BackendUnavailable, match="its library is not in the cache, and there is no C\\+\\+ compiler on"
    ):
        shared_library(broken, ())


def test_a_library_that_somebody_else_can_write_is_not_loaded(cache, tmp_path):
    shared_library(source(tmp_path), ())
    (built,) = cache.iterdir()
    for what, mode in ((built, 0o722), (cache, 0o777)):
        what.chmod(mode)
        assert isinstance(module._load(built), str)
        assert shared_library(source(tmp_path), ()).answer() == 42  # built anew, elsewhere where the folder is not safe
        what.chmod(0o700)


def test_a_user_without_a_home(tmp_path, monkeypatch):
    def homeless(*_, **__):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(platformdirs, "user_cache_path", homeless)
    assert shared_library(source(tmp_path), ()).answer() == 42
