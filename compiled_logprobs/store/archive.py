"""Decisions in one file, to be carried from a store to another: export, and import, which trusts nothing that it reads.

An archive is JSON in UTF-8, one object a line, so that it can be written and read piece by piece:

{"archive": "compiled-logprobs", "schema": 1, ...}   what it is
{"kind": "environment", ...}                         the facts of an environment, before its decisions
{"kind": "decision", ...}                            a decision
{"kind": "evidence", ...}                            what the decision before it rests on: raw times, and more
{"kind": "end", "decisions": 1, "sha256": "..."}     of all bytes before: whether it came whole

The lines between the first and the last hold what the files of a store hold (`store.files`). No line names a file:
where a decision goes follows from its environment and problem.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, NoReturn

from compiled_logprobs.decision import Decision, moment
from compiled_logprobs.errors import InputError, ProfileError
from compiled_logprobs.machine.environment import Environment
from compiled_logprobs.problem import Problem, problem_from_dict, problem_to_dict
from compiled_logprobs.store.files import (
    EVIDENCE_LIMIT,
    LIMIT,
    SCHEMA,
    TEMPORARY,
    Entry,
    Record,
    Store,
    check_plain,
    digest,
)

ARCHIVE = "compiled-logprobs"
MOST_BYTES = 2**26
"""Of an archive, so that a wrong one costs little memory; thousands of decisions fit in."""
LONGEST_NAME = 100
"""Characters of a backend's name."""
AHEAD = timedelta(days=1)
"""How far another machine's clock may be ahead: a decision of the year 9999 would win over every later one for ever."""
_FINGERPRINT = re.compile("[0-9a-f]{16}")


@dataclass
class Exported:
    """What went into an archive."""

    decisions: int = 0
    environments: list[str] = field(default_factory=list)
    bytes: int = 0
    left_out: list[str] = field(default_factory=list)
    """Why, for each decision that is stored but that no import would take."""


def export(
    store: Store, target: IO[bytes], *, environments: Collection[str] | None = None, evidence: bool = True
) -> Exported:
    """Write the decisions of `store` to `target` as an archive; the same decisions give the same bytes.

    Args:
        store: where from. What cannot be read there is passed over, with a warning.
        target: where to. What an error interrupts has no last line, so that no import takes it.
        environments: fingerprints; by default all.
        evidence: whether what the decisions rest on, raw times and all, comes along, too.

    Raises:
        ProfileError: there is nothing to write, or more than an archive may hold.
    """
    done, whole = Exported(), hashlib.sha256()

    def write(line: Record) -> None:
        data = (json.dumps(line, sort_keys=True, separators=(",", ":"), allow_nan=False) + "\n").encode()
        done.bytes += len(data)
        if done.bytes > MOST_BYTES:
            raise ProfileError(
                f"the archive would have more than {MOST_BYTES} bytes, the most that is valid. Leave out the evidence "
                "(--no-evidence), or export one environment at a time (--environment)."
            )
        whole.update(data)
        target.write(data)

    for entry in _entries(store, environments, evidence, done.left_out):
        if not done.decisions:
            write({"archive": ARCHIVE, "schema": SCHEMA})
        if entry.environment not in done.environments:
            done.environments.append(entry.environment)
            write(_line("environment", {"environment": entry.environment}, entry.facts))
        key = {"environment": entry.environment, "problem": problem_to_dict(entry.problem)}
        write(_line("decision", key, entry.record))
        if entry.evidence is not None:
            write(_line("evidence", {**key, "decision": digest(entry.record)}, entry.evidence))
        done.decisions += 1
    if not done.decisions:
        which = "" if environments is None else f" for {', '.join(sorted(environments))}"
        but = "".join(f"\n  left out: {why}" for why in done.left_out)
        raise ProfileError(
            f"{store.root} holds no decision{which}, and an archive of one or more is valid.{but}\n`compiled-logprobs profile` "
            "measures some; `compiled-logprobs show --all` lists what is stored for which environment."
        )
    write({"kind": "end", "decisions": done.decisions, "sha256": whole.hexdigest()})
    return done


def save(path: Path, write: Callable[[IO[bytes]], Exported], *, overwrite: bool = False) -> Exported:
    """Have `write` write the file at `path`, which gets its name when all of it is on disk.

    Raises:
        InputError: something is there already, and `overwrite` is false or it is no file.
        ProfileError: it cannot be written, or `write` says so.
    """
    path = Path(os.path.realpath(path))  # so that a link stays one
    try:
        if os.path.lexists(path):
            if not stat.S_ISREG(path.stat().st_mode):
                raise InputError(
                    f"got {path}, which is no file; the name of a file is valid, or - for standard output."
                )
            if not overwrite:
                raise _exists(path)
        temporary = path.with_name(f".{secrets.token_hex(8)}{TEMPORARY}")
        try:
            with temporary.open("xb") as file:
                done = write(file)
                file.flush()
                os.fsync(file.fileno())
            _name(temporary, path, overwrite)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ProfileError(
            f"the archive {path} cannot be written ({error.strerror or error}). Valid is a file in a folder that exists and "
            "that this process may write to, on a disk with room. Name one there."
        ) from error
    return done


def _name(temporary: Path, path: Path, overwrite: bool) -> None:
    if not overwrite:
        try:
            os.link(temporary, path)  # unlike a rename, it replaces nothing that came meanwhile
            return
        except FileExistsError:
            raise _exists(path) from None
        except OSError:  # a file system without links
            if path.exists():
                raise _exists(path) from None
    os.replace(temporary, path)


def _exists(path: Path) -> InputError:
    return InputError(f"got {path}, which exists; a new file is valid. Name another, or add --overwrite.")


def _entries(
    store: Store, environments: Collection[str] | None, evidence: bool, left_out: list[str]
) -> Iterator[Entry]:
    facts = store.environments()
    for environment, problem, record in store.records():
        if environments is not None and environment not in environments:
            continue
        known = facts.get(environment, record.get("environment"))
        beside = store.evidence(environment, problem) if evidence else None
        entry = Entry(environment, known, problem, record, beside)  # type: ignore[arg-type]  # a foreign file's facts are checked
        try:
            _check_entry(entry)
        except ProfileError as error:
            left_out.append(_printable(f"{store.path(environment, problem).name}: {error}"))
            continue
        yield entry


def _line(kind: str, key: Record, record: Record) -> Record:
    return {"kind": kind, "schema": SCHEMA, **key, "sha256": digest(record), "record": record}


# Reading


def read_archive(source: IO[bytes]) -> list[Entry]:
    """The decisions in an archive, each of which may be stored. Nothing is stored here.

    Raises:
        ProfileError: it is not whole, was changed, or anything in it is not as `export` writes it; the message says which line.
    """
    reading = _Reading()
    try:
        while line := source.readline(EVIDENCE_LIMIT + 1):
            reading.take(line)
        reading.end()
    except ProfileError as error:
        raise ProfileError(
            f"the archive cannot be used: line {reading.number}: {_printable(str(error))}.\nValid is a file as "
            "`compiled-logprobs export` writes it, whole and unchanged. Export it again, by a release no newer than this one."
        ) from error
    except OSError as error:
        raise ProfileError(
            f"the archive cannot be read ({error.strerror or error}). A file as `compiled-logprobs export` writes it is "
            "valid. Make it readable, or name another."
        ) from error
    return list(reading.entries.values())


class _Reading:
    """An archive, as far as it has been read."""

    def __init__(self) -> None:
        self.number, self.size = 0, 0
        self.entries: dict[tuple[str, Problem], Entry] = {}
        self.facts: dict[str, Record] = {}
        self._whole = hashlib.sha256()
        self._is_complete = False
        self._last: tuple[str, Problem] | None = None
        """The key of the decision in the line before."""

    def take(self, data: bytes) -> None:
        self.number += 1
        self.size += len(data)
        if self.size > MOST_BYTES:
            raise ProfileError(f"it has more than {MOST_BYTES} bytes")
        if self._is_complete:
            raise ProfileError("something follows the last line")
        if len(data) > EVIDENCE_LIMIT:
            raise ProfileError(f"it has more than {EVIDENCE_LIMIT} bytes")
        if self.number == 1 and len(data) > LIMIT:
            raise ProfileError("it is not the first line of an archive")
        line = _parsed(data)
        if self.number == 1:
            if line.get("archive") != ARCHIVE:
                raise ProfileError("it is not the first line of an archive")
            _check_schema(line)
        elif line.get("kind") == "end":
            self._take_end(line)
        else:
            self._take_record(line, len(data))
        self._whole.update(data)

    def end(self) -> None:
        if not self._is_complete:
            self.number += 1
            raise ProfileError("it is not there: the archive was cut, and its last line says that it is the last")

    def _take_end(self, line: Record) -> None:
        if line.get("sha256") != self._whole.hexdigest():
            raise ProfileError("something before was changed after it was written: the digest is another")
        if line.get("decisions") != len(self.entries) or not self.entries:
            raise ProfileError(
                f"it tells of {line.get('decisions')!r:.40} decisions, and there are {len(self.entries)}"
            )
        self._is_complete = True

    def _take_record(self, line: Record, size: int) -> None:
        kind, environment, record = line.get("kind"), line.get("environment"), line.get("record")
        if kind not in ("environment", "decision", "evidence"):
            raise ProfileError(f"its kind is {kind!r:.40}; environment, decision, evidence or end is valid")
        if kind != "evidence" and size > LIMIT:
            raise ProfileError(f"it has more than {LIMIT} bytes")
        _check_schema(line)
        if not isinstance(environment, str) or not _FINGERPRINT.fullmatch(environment):
            raise ProfileError(f"its environment is {environment!r:.80}; a fingerprint of 16 characters is valid")
        if not isinstance(record, dict) or line.get("sha256") != digest(record):
            raise ProfileError("its record was changed after it was written: the digest is another")
        last, self._last = self._last, None
        if kind == "environment":
            if environment in self.facts:
                raise ProfileError(f"it tells the facts of {environment} again")
            _check_facts(environment, record)
            self.facts[environment] = record
            return
        key = environment, problem_from_dict(line.get("problem"))
        if kind == "evidence":
            if key != last or line.get("decision") != digest(self.entries[key].record):
                raise ProfileError("its evidence is not of the decision in the line before")
            self.entries[key] = self.entries[key]._replace(evidence=record)
            return
        if environment not in self.facts:
            raise ProfileError(f"no line before it tells the facts of {environment}")
        if key in self.entries:
            raise ProfileError("a line before it holds a decision for the same problem")
        entry = Entry(environment, self.facts[environment], key[1], record)
        _check_entry(entry)
        self.entries[key], self._last = entry, key


def _parsed(data: bytes) -> Record:
    try:
        found = json.loads(data.decode(), object_pairs_hook=_without_repeats, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"it is not JSON in UTF-8 ({str(error)[:200]})") from error
    if not isinstance(found, dict):
        raise ProfileError(f"it is a {type(found).__name__}; an object is valid")
    check_plain(found, "it", depth=-1)  # so that a record in it may be as deep as in a store
    return found


def _without_repeats(pairs: list[tuple[str, Any]]) -> Record:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has a key twice")
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a finite number")


def _check_schema(line: Record) -> None:
    schema = line.get("schema")
    if type(schema) is int and schema > SCHEMA:
        raise ProfileError(f"a newer release wrote it, with schema {schema}: upgrade compiled-logprobs")
    if type(schema) is not int or schema != SCHEMA:
        raise ProfileError(f"its schema is {schema!r:.40}; valid is {SCHEMA}")


def _check_entry(entry: Entry) -> None:
    """Raise ProfileError for what no run of this library could have stored."""
    _check_facts(entry.environment, entry.facts)
    decision = Decision.from_record(entry.problem, entry.record)
    for name in (*decision.candidates, *decision.left_out):
        if not name.isidentifier() or len(name) > LONGEST_NAME:
            raise ProfileError(f"{name!r:.80} is no name of a backend; an identifier is valid")
    _check_facts(entry.environment, decision.environment)
    when = moment(decision.measured_at)
    if when is None:
        raise ProfileError(f"it was measured at {decision.measured_at!r:.40}; UTC as 2026-11-24T07:00:00Z is valid")
    if when > datetime.now(timezone.utc) + AHEAD:
        raise ProfileError(f"it was measured at {decision.measured_at}, which is yet to come: a clock is wrong")


def _check_facts(environment: str, facts: object) -> None:
    if not isinstance(facts, dict) or any(isinstance(value, (dict, list, tuple)) for value in facts.values()):
        raise ProfileError("the facts of its environment are no object of single values")
    known: dict[str, Any] = {one.name: facts.get(one.name) for one in fields(Environment)}
    if facts.get("fingerprint") != environment or Environment(**known).fingerprint() != environment:
        raise ProfileError(f"the facts that it tells are those of another environment than {environment}")


def _printable(text: str) -> str:
    """It may quote the file, which may hold anything."""
    return re.sub("[^ -~]", "?", text)[:400]


# Merging

Fate = Literal["added", "replaced", "kept", "same"]


class Merged(NamedTuple):
    """What became of one decision of an archive."""

    entry: Entry
    fate: Fate
    """Added: there was none. Replaced: what was there. Kept: what was there, and not this. Same: it was there already."""
    why: str

    def to_dict(self) -> dict[str, Any]:
        """For programs: plain values only."""
        return {
            "environment": self.entry.environment,
            "problem": problem_to_dict(self.entry.problem),
            "chosen": self.entry.record["chosen"],
            "measured_at": self.entry.record["measured_at"],
            "fate": self.fate,
            "why": self.why,
        }


def merge(store: Store, entries: Sequence[Entry], *, replace: bool = False) -> list[Merged]:
    """Store `entries`, all of them or, on an error, none: what is stored already stays where it is as new or newer.

    What this process has looked up before it goes on using.

    Args:
        store: where to.
        entries: as `read_archive` gives them.
        replace: whether they replace also what is newer. What a newer release wrote is never replaced.

    Raises:
        ProfileError: they cannot be stored. What was stored before is as it was.
    """
    fates: dict[int, Merged] = {}

    def is_due(entry: Entry, stored: Record | None) -> bool:
        fate, why = _fate(entry, stored, replace)
        fates[id(entry)] = Merged(entry, fate, why)
        return fate in ("added", "replaced")

    due = []
    for entry in entries:
        if store.is_newer(entry.environment, entry.problem):
            fates[id(entry)] = Merged(entry, "kept", "a newer release wrote what is stored")
        elif is_due(entry, store.peek(entry.environment, entry.problem)):
            due.append(entry)
    store.publish_all(due, is_due)
    return [fates[id(entry)] for entry in entries]


def plan(store: Store, entries: Sequence[Entry]) -> list[Merged]:
    """What `merge` would make of each of `entries`, as things stand. Nothing is stored."""
    return [
        Merged(entry, "kept", "a newer release wrote what is stored")
        if store.is_newer(entry.environment, entry.problem)
        else Merged(entry, *_fate(entry, store.peek(entry.environment, entry.problem), replace=False))
        for entry in entries
    ]


def _fate(entry: Entry, stored: Record | None, replace: bool) -> tuple[Fate, str]:
    if stored is None:
        return "added", "nothing was stored for it"
    if digest(stored) == digest(entry.record):
        return "same", "it was stored already"
    try:
        there = moment(Decision.from_record(entry.problem, stored).measured_at)
    except ProfileError:
        return "replaced", "what was stored is no decision"
    here = moment(entry.record["measured_at"])
    assert here is not None  # such an entry is not read
    if there is None:
        return "replaced", "what was stored does not say when it was measured"
    if here > there:
        return "replaced", f"what was stored is older, of {there:%Y-%m-%d %H:%M:%S}"
    if replace:
        return "replaced", f"as was asked, though what was stored is of {there:%Y-%m-%d %H:%M:%S}"
    return "kept", f"what is stored is {'newer' if there > here else 'as new'}, of {there:%Y-%m-%d %H:%M:%S}"
