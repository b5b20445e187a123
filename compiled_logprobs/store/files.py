"""Profiles on disk: read, check, publish. What a decision means is for the layers above; here it is a plain dict.

<root>/v1/<environment>/environment.json                   the facts of that environment
<root>/v1/<environment>/decisions/<problem>.json           one decision
<root>/v1/<environment>/decisions/<problem>.evidence.json  what it rests on: the raw times, and the check case by case

There is no lock: a file is complete before it gets its name, so a reader meets the old one or the new one, whoever writes.
Each file says where it belongs and carries a digest of its record; what does not fit is a miss with a warning.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import stat
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from compiled_logprobs.errors import ProfileError
from compiled_logprobs.machine.environment import Environment
from compiled_logprobs.problem import Problem, problem_from_dict, problem_from_name, problem_name, problem_to_dict

Record = dict[str, Any]

SCHEMA = 1
LIMIT = 2**20
"""Bytes of a file, so that a wrong one costs no memory."""
EVIDENCE_LIMIT = 16 * LIMIT
DEPTH = 32
"""Levels of a record, so that who walks through one needs no guard."""
ABANDONED_S = 3600.0
"""After which a temporary file is taken for that of a writer that was killed."""
FACTS = "environment.json"
EVIDENCE = ".evidence.json"
TEMPORARY = ".tmp"
ROOT_VARIABLE = "COMPILED_LOGPROBS_PROFILES"

_FINGERPRINT = re.compile("[0-9a-f]{16}")
_READ_ONLY = ("this process may not write there", "Make it writable")
_CAUSES = {
    errno.ENOSPC: ("the disk is full", "Free some space"),
    errno.EDQUOT: ("the quota is used up", "Free some space"),
    errno.EROFS: ("the file system is read-only", "Make it writable"),
    errno.EACCES: _READ_ONLY,
    errno.EPERM: _READ_ONLY,
}
_warned: set[Path] = set()


class Entry(NamedTuple):
    """A decision, with all that is stored of it."""

    environment: str
    """Its fingerprint."""
    facts: Record
    """Of the environment."""
    problem: Problem
    record: Record
    evidence: Record | None = None


@dataclass(frozen=True)
class Store:
    """Profiles under one folder, which need not exist.

    No file makes a method that reads raise. A key under which nothing can be stored, such as an environment that is not
    a fingerprint, is the caller's mistake: ProfileError.
    """

    root: Path

    def read(self, environment: str, problem: Problem) -> Record | None:
        """The decision stored for exactly this; None if there is none, or (with a warning) none to be trusted."""
        found = _load_or_warn(self.path(environment, problem))
        return found["record"] if found else None

    def peek(self, environment: str, problem: Problem) -> Record | None:
        """The same, without a warning."""
        return _record_at(self.path(environment, problem))

    def evidence(self, environment: str, problem: Problem) -> Record | None:
        """What the decision that `read` returns rests on, if it was stored with it."""
        path = self.path(environment, problem)
        decision, found = _load_or_warn(path), _load_or_warn(path.with_suffix(EVIDENCE))
        # Two writers at once, or one killed between its two files, can leave the evidence of another decision.
        return found["record"] if decision and found and found.get("decision") == decision["sha256"] else None

    def records(self, environment: str | None = None) -> Iterator[tuple[str, Problem, Record]]:
        """Environment, problem and decision of all that is stored and can be trusted, or of one environment's."""
        for folder in self._folders():
            for path in _decisions(folder) if environment in (None, folder.name) else []:
                if found := _load_or_warn(path):
                    yield folder.name, problem_from_dict(found["problem"]), found["record"]

    def problems(self) -> Iterator[tuple[str, Problem]]:
        """Environment and problem of all that is stored, by the names of the files: none is opened."""
        for folder in self._folders():
            for path in _decisions(folder):
                if problem := problem_from_name(path.stem):
                    yield folder.name, problem

    def environments(self) -> dict[str, Record]:
        """The facts of each stored environment, as `Environment.to_dict` gives them, by fingerprint."""
        files = {folder.name: _load_or_warn(folder / FACTS) for folder in self._folders()}
        return {name: found["record"] for name, found in files.items() if found}

    def near(self, environment: str, problem: Problem) -> list[Problem]:
        """The problems stored, and readable, that differ from `problem` in N only, by rising N."""
        folder = self.path(environment, problem).parents[1]
        numbers = [re.match("[^-]+-n([0-9]{1,18})-", path.name) for path in _decisions(folder)]
        others = [problem._replace(rows=n) for n in sorted({int(n[1]) for n in numbers if n} - {problem.rows})]
        return [other for other in others if self.read(environment, other) is not None]

    def publish(
        self, environment: Environment, problem: Problem, record: Record, evidence: Record | None = None
    ) -> Path:
        """Store `record` as the decision for `problem`, in place of an older one. Raises ProfileError if it cannot."""
        entry = Entry(environment.fingerprint(), environment.to_dict(), problem, record, evidence)
        self.publish_all([entry], lambda entry, stored: True)
        return self.path(entry.environment, problem)

    def publish_all(self, entries: Sequence[Entry], is_due: Callable[[Entry, Record | None], bool]) -> list[Entry]:
        """Store those of `entries` that are due, in place of older ones, once all of them are on disk under other names.

        So a full disk leaves the store as it was, and a kill leaves each decision as it was or as it is to be.

        Args:
            entries: one for each decision.
            is_due: whether to store an entry in place of the record that is stored, if one is that can be read. Asked at the
                last moment: another process may have stored one meanwhile.

        Returns:
            Those that were due.

        Raises:
            ProfileError: they could not be stored.
        """
        content = [self._files(entry) for entry in entries]
        for file in dict.fromkeys(file for files in content for file in files):
            if standing(file) == "newer":
                raise _unwritable(file, "a newer release wrote what is there", "Upgrade compiled-logprobs")
        if str(self.root).startswith("~"):  # a folder of that name would be made, and removing that one can cost a home
            raise _unwritable(self.root, "the home folder of this user is not known", "Set HOME")
        done = []
        path = self.path(entries[0].environment, entries[0].problem) if len(entries) == 1 else self.root
        try:
            with _staged({path: data for files in content for path, data in files.items()}) as staged:
                for entry, files in zip(entries, content, strict=True):
                    path = self.path(entry.environment, entry.problem)
                    if is_due(entry, _record_at(path)):
                        for path in files:
                            if path in staged:  # the facts are there for several
                                os.replace(staged[path], path)
                                del staged[path]
                        if entry.evidence is None:
                            path.with_suffix(EVIDENCE).unlink(missing_ok=True)
                        done.append(entry)
        except OSError as error:
            raise _unwritable(
                path, *_CAUSES.get(error.errno or 0, (error.strerror or str(error), "Mend that"))
            ) from error
        return done

    def _files(self, entry: Entry) -> dict[Path, bytes]:
        """What has to be written for `entry`, in this order."""
        path = self.path(entry.environment, entry.problem)
        facts, beside = path.parents[1] / FACTS, path.with_suffix(EVIDENCE)
        key: Record = {"environment": entry.environment, "problem": problem_to_dict(entry.problem)}
        files = {path: _seal(path, key, entry.record)}
        if entry.evidence is not None:
            files[beside] = _seal(beside, {**key, "decision": digest(entry.record)}, entry.evidence)
        if standing(facts) != "whole":
            files = {facts: _seal(facts, {"environment": entry.environment}, entry.facts), **files}
        return files

    def require_writable(self) -> None:
        """Raise ProfileError if nothing can be published here, before anybody works for it."""
        probe = self.root / f"v{SCHEMA}" / f".{secrets.token_hex(8)}{TEMPORARY}"
        if str(self.root).startswith("~"):
            raise _unwritable(probe.parent, "the home folder of this user is not known", "Set HOME")
        try:
            probe.parent.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"0")
            probe.unlink()
        except OSError as error:
            raise _unwritable(
                probe.parent, *_CAUSES.get(error.errno or 0, (error.strerror or str(error), "Mend that"))
            ) from error

    def path(self, environment: str, problem: Problem) -> Path:
        """Where the decision for this is or would be stored."""
        if not _FINGERPRINT.fullmatch(environment):
            raise ProfileError(
                f"{environment!r:.80} is no environment; valid is a fingerprint of 16 characters, as "
                "`compiled-logprobs doctor` prints it"
            )
        return self.root / f"v{SCHEMA}" / environment / "decisions" / f"{problem_name(problem)}.json"

    def is_newer(self, environment: str, problem: Problem) -> bool:
        """Whether a newer release wrote something that the decision for this would replace."""
        path = self.path(environment, problem)
        return any(standing(file) == "newer" for file in (path, path.with_suffix(EVIDENCE), path.parents[1] / FACTS))

    def rubbish(self) -> Iterator[tuple[Path, str]]:
        """Files of this store that serve nobody, and why: broken ones, evidence of no decision, and what killed writers left.

        Not what a newer release wrote, nor what is there but cannot be read at present, nor files that are none of a store's.
        """
        now = time.time()
        for folder in self._folders():
            if why := _why_broken(folder / FACTS):
                yield folder / FACTS, why
            for path in _listing(folder / "decisions"):
                if path.name.endswith(EVIDENCE):
                    if why := _why_broken(path) or _why_orphaned(path):
                        yield path, why
                elif re.fullmatch(r"[^.]+\.json", path.name) and (why := _why_broken(path)):
                    yield path, why
        version = self.root / f"v{SCHEMA}"
        for folder in (version, *self._folders(), *(folder / "decisions" for folder in self._folders())):
            for path in _listing(folder):
                if _is_abandoned(path, now):
                    yield path, "a writer was killed before it had finished it"

    def _folders(self) -> list[Path]:
        return [path for path in _listing(self.root / f"v{SCHEMA}") if _FINGERPRINT.fullmatch(path.name)]


def read_file(path: Path) -> Record | None:
    """The content of a store's file: environment, problem (of all but the facts) and record; None if there is none.

    Raises ProfileError, which says why it is not to be trusted.
    """
    return _load(path)


def _load_or_warn(path: Path) -> Record | None:
    try:
        return _load(path)
    except NewerSchema as error:
        pass_over(path, error, "Upgrade compiled-logprobs")
    except ProfileError as error:
        pass_over(path, error)
    return None


def _record_at(path: Path) -> Record | None:
    try:
        found = _load(path)
    except ProfileError:
        return None
    return found["record"] if found else None


class NewerSchema(ProfileError):
    """A file of a schema that is yet to come: it cannot be read, and must not be replaced."""


def _load(path: Path) -> Record | None:
    """The content of a file that is whole and lies where it belongs; None if there is no file. ProfileError says why not."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ProfileError("it is not a regular file")  # and opening a pipe would wait for its writer
        with path.open("rb") as file:
            data = file.read(_limit(path) + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ProfileError(f"it cannot be read ({error.strerror})") from error
    if len(data) > _limit(path):
        raise ProfileError(f"it has more than {_limit(path)} bytes")
    try:
        content = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"it is not JSON in UTF-8 ({error})" if data else "it is empty") from error
    schema = content.get("schema") if isinstance(content, dict) else None
    if type(schema) is int and schema > SCHEMA:
        raise NewerSchema(f"a newer release wrote it, with schema {schema}")
    check_plain(content, "its content", depth=-1)  # so that the record in it may be as deep as when it was stored
    if type(schema) is not int or schema != SCHEMA or not isinstance(content.get("record"), dict):
        raise ProfileError(f"it is not an object with a record and schema {SCHEMA}")
    if content.get("sha256") != digest(content["record"]):
        raise ProfileError("its record was changed or cut after it was written: the digest is another")
    folder = path.parent if path.name == FACTS else path.parents[1]
    if content.get("environment") != folder.name:
        raise ProfileError(f"it is of another environment, {content.get('environment')!r:.80}")
    if path.name != FACTS:
        name = problem_name(problem_from_dict(content.get("problem")))
        if name != path.name.split(".")[0]:
            raise ProfileError(f"it is of another problem, {name}")
    return content  # type: ignore[no-any-return]  # json.loads returns Any


def pass_over(path: Path, error: Exception, remedy: str = "Make it readable, or delete it") -> None:
    """Warn, once in this process, that the file at `path` counts as missing."""
    if path in _warned:
        return
    _warned.add(path)
    found = re.sub("[^ -~]", "?", str(error))[:300]  # it may quote the file, which may hold anything
    warnings.warn(
        f"the stored profile {path} is passed over: {found}.\nA profile is JSON of schema {SCHEMA} with the digest of its "
        f"record, in the folder of its environment. {remedy}: what it told can be measured again.",
        RuntimeWarning,
        stacklevel=4,
    )


def standing(path: Path) -> Literal["missing", "whole", "broken", "newer"]:
    """What is there."""
    try:
        return "missing" if _load(path) is None else "whole"
    except NewerSchema:
        return "newer"
    except ProfileError:
        return "broken"


def _why_broken(path: Path) -> str | None:
    try:
        _load(path)
    except NewerSchema:
        return None
    except ProfileError as error:
        # That it is not readable for this process, or now, says nothing about what is in it.
        return None if isinstance(error.__cause__, OSError) else str(error)
    return None


def _why_orphaned(path: Path) -> str | None:
    """Why the evidence at `path`, which is whole or of a newer release, is of no decision."""
    decision = path.with_name(path.name.removesuffix(EVIDENCE) + ".json")
    try:
        evidence, found = _load(path), _load(decision)
    except NewerSchema:
        return None
    except ProfileError as error:
        return None if isinstance(error.__cause__, OSError) else "its decision is broken"
    if evidence is None or (found is not None and evidence.get("decision") == found["sha256"]):
        return None
    return "its decision is not there" if found is None else "it is of another decision than the one that is there"


def _listing(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        pass_over(folder, ProfileError(f"it cannot be listed ({error.strerror})"))
        return []


def _decisions(folder: Path) -> list[Path]:
    return [path for path in _listing(folder / "decisions") if re.fullmatch(r"[^.]+\.json", path.name)]


def _limit(path: Path) -> int:
    return EVIDENCE_LIMIT if path.name.endswith(EVIDENCE) else LIMIT


def digest(record: Record) -> str:
    """What a file says of its record, to tell whether it is whole."""
    return hashlib.sha256(json.dumps(record, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _seal(path: Path, key: Record, record: Record) -> bytes:
    """The bytes of the file at `path`: `record`, where it belongs, and its digest."""
    check_plain(record, "record")
    content = {"schema": SCHEMA, **key, "sha256": digest(record), "record": record}
    indent = None if path.name.endswith(EVIDENCE) else 2  # a line for each of thousands of numbers helps no reader
    data = (json.dumps(content, sort_keys=True, indent=indent, allow_nan=False) + "\n").encode()
    if len(data) > _limit(path):
        raise ProfileError(
            f"{path.name} would have {len(data)} bytes; valid are at most {_limit(path)}. Store less in it."
        )
    return data


def check_plain(value: object, where: str, depth: int = 0) -> None:
    """Raise ProfileError for what JSON cannot give back as it was."""
    if depth > DEPTH:
        raise ProfileError(f"{where:.80} is nested deeper than {DEPTH} levels. Store it flatter.")
    if isinstance(value, dict):
        for name, item in value.items():
            if not isinstance(name, str):
                raise ProfileError(f"{where} has the key {name!r:.80}; valid are strings. Name it by one.")
            check_plain(item, f"{where}.{name}", depth + 1)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            check_plain(item, f"{where}[{index}]", depth + 1)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ProfileError(f"{where} is {value}; valid are finite numbers. Store null, and the reason beside it.")
    elif isinstance(value, int):
        if abs(value) >= 2**63:
            raise ProfileError(f"{where} is an integer of {value.bit_length()} bits; valid are 63. Store it as text.")
    elif value is not None and not isinstance(value, str):
        raise ProfileError(f"{where} is a {type(value).__name__}; valid are JSON's own types. Convert it to one.")


@contextlib.contextmanager
def _staged(files: dict[Path, bytes]) -> Iterator[dict[Path, Path]]:
    """Have all `files` on disk under other names, given by their places; what is still in there at the end is removed."""
    staged: dict[Path, Path] = {}
    try:
        for folder in dict.fromkeys(path.parent for path in files):
            folder.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(folder)
        for path, data in files.items():
            staged[path] = path.with_name(f".{secrets.token_hex(8)}{TEMPORARY}")
            with staged[path].open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        yield staged
    finally:
        for temporary in staged.values():
            with contextlib.suppress(OSError):  # the first error is the one to tell
                temporary.unlink(missing_ok=True)
    for folder in {folder for path in files for folder in path.parents[:4]}:  # which may be new in those above them
        _sync(folder)


def _sync(folder: Path) -> None:
    with contextlib.suppress(OSError):  # Windows and some network file systems cannot; the files are whole all the same
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove_abandoned(folder: Path) -> None:
    now = time.time()
    for path in folder.iterdir():
        if _is_abandoned(path, now):
            with contextlib.suppress(OSError):  # another writer was quicker
                path.unlink()


def _is_abandoned(path: Path, now: float) -> bool:
    if not re.fullmatch(rf"\.[0-9a-f]{{16}}{re.escape(TEMPORARY)}", path.name):
        return False
    try:
        return now - path.stat().st_mtime > ABANDONED_S
    except OSError:
        return False


def _unwritable(path: Path, why: str, remedy: str) -> ProfileError:
    return ProfileError(
        f"the profile {path} cannot be written: {why}.\nValid is a folder that this process may write to, on a disk with "
        f"room. {remedy}, or let {ROOT_VARIABLE} name another folder."
    )
