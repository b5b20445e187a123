"""Profiles as tables, and an index of them, so that thousands of decisions are not read again at every look.

A root's index is one file in the user's cache folder, named after the root's path. It holds a row for each decision and when its
file was last written; only files that were added or written since are read. It can always be rebuilt: what cannot be read of
it, or was made by other code than today's, counts as nothing. Like a decision, it is complete before it gets its name, so that
several processes may read and write it at once.
"""

import hashlib
import os
import secrets
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache as once
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from compiled_logprobs import decision as records
from compiled_logprobs import problem
from compiled_logprobs.cli import output as printing
from compiled_logprobs.errors import ProfileError
from compiled_logprobs.machine.environment import Environment, environments
from compiled_logprobs.store import files as store
from compiled_logprobs.store import stores
from compiled_logprobs.store.files import FACTS, VERSION, read_decision, read_facts
from compiled_logprobs.tuning import presets as profiling
from compiled_logprobs_dashboard import rows as row_schemas
from compiled_logprobs_dashboard.facts import device_name, environment_rows, is_fingerprint, plain_facts, staleness
from compiled_logprobs_dashboard.rows import CANDIDATES, DECISIONS, candidate_rows, decision_row, table_of

SOURCES = {"user store": "yours", "project profiles": "project", "bundled profiles": "bundled"}
"""What the dashboard calls a store, by the label of `stores`."""
MAGIC = b"compiled-logprobs dashboard index\n"
EVERY = 100
"""Files between two reports of progress."""

Progress = Callable[[int, int], None]
"""Is told how many files of how many have been read."""


@dataclass(frozen=True)
class Source:
    """A folder of profiles."""

    name: str
    """"yours", "project" or "bundled"."""
    root: Path


@dataclass(frozen=True)
class Tables:
    """All that the sources hold."""

    decisions: pd.DataFrame
    """One row a decision: the columns of `rows.DECISIONS`, and source, device, stale (a reason, or missing) and key."""
    candidates: pd.DataFrame
    """One row a candidate: the columns of `rows.CANDIDATES`, and those of its decision that are most asked for; `key` is its."""
    environments: pd.DataFrame
    """One row a source and environment: the facts of `Environment`, device, `here` (is it this machine's), and counts."""
    broken: pd.DataFrame
    """One row a file that could not be read: source, environment, path (below the root), reason."""
    sources: tuple[Source, ...] = ()
    state: int = 0
    """What `state` said of the sources when their files were read."""

    @cached_property
    def backends(self) -> tuple[str, ...]:
        """The names of all candidates, sorted: how each is drawn follows from all of them, and so is the same on all pages."""
        return tuple(sorted(self.candidates["backend"].unique()))


def sources() -> list[Source]:
    """The folders that the library looks into, those that are there, each once, in its order."""
    return [Source(SOURCES[label], store.root) for label, store in stores().items() if store.root.is_dir()]


def load(found: Sequence[Source], cache: Path, progress: Progress | None = None) -> Tables:
    """The tables of `found`. Files that have not changed since the index in the folder `cache` was written are not opened."""
    here = environments()
    scans = [_scan(source.root) for source in found]
    parts: list[Tables] = []
    for source, scan in zip(found, scans, strict=True):
        start = sum(len(part.decisions) for part in parts)
        parts.append(_of_source(source, scan.decisions, cache, progress, here, start))
    parts = parts or [_tables(Source("yours", Path()), _NOTHING, {}, {}, here, 0)]
    # Columns without any value would decide the type of the whole, so that empty tables are left out.
    whole = {
        name: pd.concat([part for part in of_one if len(part)] or of_one[:1], ignore_index=True)
        for name, of_one in ((name, [getattr(part, name) for part in parts]) for name in _TABLES)
    }
    return Tables(**whole, sources=tuple(found), state=_state(scans))


_TABLES = ("decisions", "candidates", "environments", "broken")


def signature(found: Sequence[Source]) -> tuple[tuple[str, int], ...]:
    """Changes whenever a file is added to, renamed in or removed from the folders of `found`; costs a look at each folder.

    A file that something else than the store writes over, in place, changes it not.
    """
    folders = [folder for source in found for folder in (source.root / VERSION, *_folders(source.root))]
    return tuple((str(path), _written(path)) for folder in folders for path in (folder, folder / "decisions"))


def state(found: Sequence[Source]) -> int:
    """Changes with every change of a file that `load` reads, however it was written; costs a look at each of them."""
    return _state([_scan(source.root) for source in found])


# Reading files


class _Stamp(NamedTuple):
    """When a file got its content; a store gives it a new inode with every new content."""

    mtime_ns: int
    size: int
    inode: int


class _Scan(NamedTuple):
    """The files under a root. Paths are below the version's folder, as environment/name."""

    decisions: dict[str, _Stamp]
    facts: dict[str, _Stamp]


def _state(scans: Sequence[_Scan]) -> int:
    return hash(tuple(tuple(files.items()) for scan in scans for files in scan))


@dataclass
class _Read:
    """What has been read of a root."""

    stamps: dict[str, _Stamp]
    """By path below the version's folder, as environment/name."""
    reasons: dict[str, str]
    """Why a file could not be read."""
    decisions: pa.Table
    candidates: pa.Table


_NOTHING = _Read({}, {}, DECISIONS.empty_table(), CANDIDATES.empty_table())


def _of_source(
    source: Source,
    stamps: dict[str, _Stamp],
    cache: Path,
    progress: Progress | None,
    here: Sequence[Environment],
    start: int,
) -> Tables:
    place = cache / f"{hashlib.sha256(os.fsencode(os.path.realpath(source.root))).hexdigest()[:16]}.index"
    known = _kept(place)
    changed = [file for file, stamp in stamps.items() if known.stamps.get(file) != stamp]
    if changed or len(known.stamps) > len(stamps):
        known = _renewed(source.root, known, stamps, changed, progress)
        _keep(place, known)
    facts, broken = _facts(source.root, known)
    return _tables(source, known, facts, broken, here, start)


def _folders(root: Path) -> list[Path]:
    with suppress(OSError):
        return sorted(path for path in (root / VERSION).iterdir() if is_fingerprint(path.name))
    return []


def _written(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_mtime_ns
    return -1


def _scan(root: Path) -> _Scan:
    """The files under `root`, but for decisions whose names are no text: no store writes such, and no table holds them."""
    found, facts = {}, {}
    for folder in _folders(root):
        with suppress(OSError):
            facts[f"{folder.name}/{FACTS}"] = _stamp((folder / FACTS).stat())
        with suppress(OSError), os.scandir(folder / "decisions") as entries:
            for entry in entries:
                if entry.name.endswith(".json") and entry.name.count(".") == 1 and entry.name.isascii():
                    with suppress(OSError):  # removed meanwhile
                        found[f"{folder.name}/{entry.name}"] = _stamp(entry.stat())
    return _Scan(dict(sorted(found.items())), facts)


def _stamp(info: os.stat_result) -> _Stamp:
    return _Stamp(info.st_mtime_ns, info.st_size, info.st_ino)


def _path(root: Path, file: str) -> Path:
    environment, name = file.split("/")
    return root / VERSION / environment / "decisions" / name


def _renewed(
    root: Path, known: _Read, stamps: dict[str, _Stamp], changed: list[str], progress: Progress | None
) -> _Read:
    """`known` with `changed` files read, and without what is no longer in `stamps`."""
    gone = (known.stamps.keys() - stamps.keys()) | set(changed)
    stay = np.array([file not in gone for file in known.decisions["file"].to_pylist()], dtype=bool)
    position = np.cumsum(stay) - 1
    number = known.candidates["number"].to_numpy()
    with_stay = stay[number] if len(number) else np.zeros(0, dtype=bool)
    decisions, candidates = [known.decisions.filter(pa.array(stay))], []
    old = known.candidates.filter(pa.array(with_stay))
    candidates.append(old.set_column(0, "number", pa.array(position[number[with_stay]], pa.int64())))
    kept = int(stay.sum())

    reasons = {file: why for file, why in known.reasons.items() if file not in gone}
    rows: list[dict[str, Any]] = []
    more: list[dict[str, Any]] = []
    for done, file in enumerate(changed):
        if progress is not None and done % EVERY == 0:
            progress(done, len(changed))
        try:
            decision = read_decision(_path(root, file))
            if decision is None:
                continue  # removed meanwhile
        except ProfileError as error:
            reasons[file] = str(error)
            continue
        more += candidate_rows(kept + len(rows), decision)
        rows.append(decision_row(file.split("/")[0], file, decision))
        if len(more) >= 20_000:  # rows of a table take a tenth of the memory of dictionaries
            decisions.append(table_of(rows, DECISIONS))
            candidates.append(table_of(more, CANDIDATES))
            kept, rows, more = kept + len(rows), [], []
    if progress is not None:
        progress(len(changed), len(changed))
    decisions.append(table_of(rows, DECISIONS))
    candidates.append(table_of(more, CANDIDATES))
    return _Read(stamps, reasons, pa.concat_tables(decisions), pa.concat_tables(candidates))


# The index


@once
def _code() -> bytes:
    """A digest of the code that makes rows of files, and says why one cannot be read."""
    modules = (problem, printing, profiling, records, store, row_schemas, sys.modules[__name__])
    return hashlib.sha256(b"".join(Path(str(module.__file__)).read_bytes() for module in modules)).digest()


def _kept(place: Path) -> _Read:
    """What the index at `place` holds; nothing where it is not there, not whole, or of other code."""
    try:
        with place.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC or file.read(32) != _code():
                return _NOTHING
            digest, data = file.read(32), file.read()
        if hashlib.sha256(data).digest() != digest:
            return _NOTHING
        buffer, tables, start = pa.py_buffer(data), [], 0
        for schema in (_FILES, DECISIONS, CANDIDATES):
            length = int.from_bytes(data[start : start + 8], "big")
            with pa.ipc.open_stream(buffer.slice(start + 8, length)) as reader:
                tables.append(reader.read_all().cast(schema))
            start += 8 + length
        files, decisions, candidates = tables
        lists = files.to_pydict()
        names = lists["file"]
        stamps = dict(zip(names, map(_Stamp, lists["mtime_ns"], lists["size"], lists["inode"]), strict=True))
        reasons = {name: why for name, why in zip(names, lists["reason"], strict=True) if why is not None}
        number = candidates["number"]
        if len(number) and not 0 <= pc.min(number).as_py() <= pc.max(number).as_py() < len(decisions):
            return _NOTHING
    except (OSError, ValueError, TypeError, MemoryError, pa.ArrowException):
        return _NOTHING
    return _Read(stamps, reasons, decisions, candidates)


_FILES = pa.schema(
    {"file": pa.string(), "mtime_ns": pa.int64(), "size": pa.int64(), "inode": pa.uint64(), "reason": pa.string()}
)


def _keep(place: Path, read: _Read) -> None:
    """Write the index. Where that is not possible, the files are read anew the next time."""
    names = list(read.stamps)
    columns = [names, *(zip(*read.stamps.values(), strict=True) if names else ([], [], []))]
    files = pa.table([list(column) for column in columns] + [[read.reasons.get(name) for name in names]], schema=_FILES)
    data = b""
    for table in (files, read.decisions, read.candidates):
        part = _stream(table)
        data += len(part).to_bytes(8, "big") + part
    temporary = place.with_name(f".{secrets.token_hex(8)}.tmp")
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(MAGIC + _code() + hashlib.sha256(data).digest() + data)
            os.replace(temporary, place)
        finally:
            temporary.unlink(missing_ok=True)


def _stream(table: pa.Table) -> bytes:
    """`table` in Arrow's format, each text that comes often once."""
    for number, field in enumerate(table.schema):
        if field.type == pa.string():
            table = table.set_column(number, field.name, table[field.name].combine_chunks().dictionary_encode())
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


# Facts of environments


def _facts(root: Path, read: _Read) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The facts of each environment that has decisions, and why a file of facts could not be read, by environment."""
    found, broken = {}, {}
    first: dict[str, str] = {}
    for file in reversed(read.decisions["file"].to_pylist()):
        first[file.split("/")[0]] = file
    for folder in _folders(root):
        content = None
        try:
            content = read_facts(folder / FACTS)
        except ProfileError as error:
            broken[folder.name] = str(error)
        if folder.name not in first:
            continue
        facts = content
        if facts is None:  # each decision tells them, too
            with suppress(ProfileError):
                decision = read_decision(_path(root, first[folder.name]))
                facts = None if decision is None else decision.environment
        found[folder.name] = plain_facts(facts)
    return found, broken


# Tables


def _tables(
    source: Source,
    read: _Read,
    facts: dict[str, dict[str, Any]],
    broken: dict[str, str],
    here: Sequence[Environment],
    start: int,
) -> Tables:
    decisions = read.decisions.to_pandas()
    decisions.insert(0, "source", source.name)
    devices = {environment: device_name(known) for environment, known in facts.items()}
    decisions.insert(2, "device", decisions["environment"].map(devices))
    decisions["key"] = np.arange(start, start + len(decisions), dtype=np.int64)

    candidates = read.candidates.to_pandas()
    number = candidates.pop("number").to_numpy()
    for place, column in enumerate(_SHARED):
        candidates.insert(place, column, decisions[column].take(number).array)
    for column in ("repeatable", "row_invariant"):
        candidates[column] = candidates[column].astype("boolean")

    chosen = candidates[candidates["chosen"]].set_index("key")["fingerprint"]
    decisions["stale"] = staleness(decisions, decisions["key"].map(chosen), facts, here)

    version = VERSION
    lost = [(file.split("/")[0], _path(Path(), file), why) for file, why in read.reasons.items()]
    lost += [(environment, Path(version, environment, FACTS), why) for environment, why in broken.items()]
    table = pd.DataFrame(
        [(source.name, environment, path.as_posix(), why) for environment, path, why in lost],
        columns=["source", "environment", "path", "reason"],
    )
    return Tables(decisions, candidates, environment_rows(source.name, facts, decisions, here), table)


_SHARED = ("key", "source", "environment", "device", "device_type", "rows", "vocab", "dtype", "mode")
