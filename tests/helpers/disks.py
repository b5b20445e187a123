"""Places where nothing can be stored."""

import contextlib
import shutil
import subprocess
from pathlib import Path

import pytest


def a_file(tmp_path: Path) -> Path:
    """In the place of a folder."""
    (tmp_path / "file").write_text("")
    return tmp_path / "file"


def a_full_disk(tmp_path: Path) -> Path:
    """A file system without a byte to spare; whoever asks for it ends it with `umount -l`."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs the right to mount a file system")
    with contextlib.suppress(OSError), (place / "all of it").open("wb", buffering=0) as file:
        while True:
            file.write(b"0" * 4096)
    assert shutil.disk_usage(place).free == 0
    return place
