"""Places where nothing can be stored."""

from pathlib import Path


def a_file(tmp_path: Path) -> Path:
    """In the place of a folder."""
    (tmp_path / "file").write_text("")
    return tmp_path / "file"
