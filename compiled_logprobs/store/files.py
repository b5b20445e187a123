"""Profiles on disk: read them, write them.

<root>/v1/<environment>/environment.json                   the facts of that environment
<root>/v1/<environment>/decisions/<problem>.json           one decision: the fields of `Decision`
<root>/v1/<environment>/decisions/<problem>.evidence.json  the evidence that it rests on: the fields of `Evidence`
<root>/v1/<environment>/history/<problem>/<time>.json      the last `KEPT` decisions that a newer one replaced

There is no lock: a file is complete before it gets its name, so a reader meets the old one or the new one.
A file that cannot be read is a miss with a warning, never an error.
"""

import contextlib
import json
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from compiled_logprobs.decision import Decision, Evidence, from_plain, moment, parse_json
from compiled_logprobs.errors import ProfileError, warn
from compiled_logprobs.machine.environment import Environment
from compiled_logprobs.problem import Problem, problem_from_name, problem_name, short_name

VERSION = "v1"
"""The folder of all environments in a store."""
FACTS = "environment.json"
EVIDENCE = ".evidence.json"
HISTORY = "history"
KEPT = 8
"""Decisions of a problem's history."""
TEMPORARY = ".tmp"
LIMIT = 2**20
"""Bytes of a decision, so that a wrong file costs no memory."""
EVIDENCE_LIMIT = 2**24
ROOT_VARIABLE = "COMPILED_LOGPROBS_PROFILES"

Content = TypeVar("Content")
_FINGERPRINT = re.compile("[0-9a-f]{16}")


@dataclass(frozen=True)
class Store:
    """Profiles under one folder, which need not exist. An environment is named by its fingerprint."""

    root: Path

    def read(self, environment: str, problem: Problem) -> Decision | None:
        """The decision for exactly this; None if there is none, or (with a warning) none that can be read."""
        path = self.path(environment, problem)
        if not path.parent.exists():  # an earlier release called the same environment by another name
            _tell_of_an_earlier_release(self)
        return _or_warn(read_decision, path)

    def evidence(self, environment: str, decision: Decision) -> Evidence | None:
        """What `decision`, which was read here, rests on; None if that is not there."""
        path = self.path(environment, decision.problem).with_suffix(EVIDENCE)
        return _or_warn(lambda path: read_evidence(path, decision), path)

    def history(self, environment: str, problem: Problem) -> list[Decision]:
        """The decisions for this that newer ones replaced, the newest last; those that can be read."""
        past = (_or_warn(read_past, path) for path in past_files(self.past_of(environment, problem)))
        return [decision for decision in past if decision is not None]

    def remember(self, environment: str, decision: Decision) -> None:
        """Keep `decision` as one of the past, and of its problem the last `KEPT`. Raises ProfileError if that fails."""
        if moment(decision.measured_at) is None:  # a foreign file, which has no place among the others
            return
        path = self.past(environment, decision)
        with self._writing(path):
            write_bytes(path, decision.to_json())
            for old in past_files(path.parent)[:-KEPT]:
                old.unlink(missing_ok=True)

    def decisions(self, environment: str | None = None) -> Iterator[tuple[str, Decision]]:
        """Environment and decision of all that is stored and can be read, or of one environment's."""
        for folder in self.folders():
            for path in decision_files(folder) if environment in (None, folder.name) else []:
                if decision := _or_warn(read_decision, path):
                    yield folder.name, decision

    def problems(self) -> Iterator[tuple[str, Problem]]:
        """Environment and problem of all that is stored, by the names of the files: none is opened."""
        for folder in self.folders():
            for path in decision_files(folder):
                if problem := problem_from_name(path.stem):
                    yield folder.name, problem

    def environments(self) -> dict[str, dict[str, Any]]:
        """The facts of each stored environment, as `Environment.to_dict` gives them, by fingerprint."""
        facts = {folder.name: _or_warn(read_facts, folder / FACTS) for folder in self.folders()}
        return {name: stored for name, stored in facts.items() if stored is not None}

    def alike(self, environment: str, problem: Problem) -> list[Problem]:
        """The problems stored of the device, vocabulary and dtype of `problem`, by the names of the files."""
        files = decision_files(self.path(environment, problem).parents[1])
        name = re.compile(f"{problem.device_type}-n[0-9]+-v{problem.vocab}-{short_name(problem.dtype)}(-.*)?")
        stored = (problem_from_name(path.stem) for path in files if name.fullmatch(path.stem))
        return [other for other in stored if other is not None]

    def publish(self, environment: Environment, decision: Decision, evidence: Evidence | None = None) -> Path:
        """Store `decision` in place of an older one, which becomes history; its path. Raises ProfileError if that
        fails."""
        path = self.path(environment.fingerprint(), decision.problem)
        facts, is_stored, before = path.parents[1] / FACTS, False, None
        with contextlib.suppress(ProfileError):
            before = read_decision(path)
        if before is not None and before.measured_at != decision.measured_at:
            self.remember(environment.fingerprint(), before)
        with self._writing(path):
            with contextlib.suppress(ProfileError):
                is_stored = read_facts(facts) is not None
            if not is_stored:
                write_bytes(facts, json.dumps(environment.to_dict(), indent=2, allow_nan=False).encode() + b"\n")
            if evidence is None:
                path.with_suffix(EVIDENCE).unlink(missing_ok=True)
            else:
                write_bytes(path.with_suffix(EVIDENCE), evidence.to_json())
            write_bytes(path, decision.to_json())
        return path

    def require_writable(self) -> None:
        """Raise ProfileError if nothing can be published here, before anybody works for it."""
        probe = self.root / VERSION / f".{secrets.token_hex(8)}{TEMPORARY}"
        with self._writing(probe):
            write_bytes(probe, b"0")
            probe.unlink()

    def path(self, environment: str, problem: Problem) -> Path:
        """Where the decision for this is or would be stored. Raises ProfileError if `environment` is no fingerprint."""
        if not _FINGERPRINT.fullmatch(environment):
            raise ProfileError(
                f"{environment!r:.80} is no environment; valid is a fingerprint of 16 characters, as "
                "`compiled-logprobs doctor` prints it"
            )
        return self.root / VERSION / environment / "decisions" / f"{problem_name(problem)}.json"

    def past_of(self, environment: str, problem: Problem) -> Path:
        """The folder of a problem's history."""
        path = self.path(environment, problem)
        return path.parents[1] / HISTORY / path.stem

    def past(self, environment: str, decision: Decision) -> Path:
        """Where `decision` is or would be kept as one of the past."""
        return self.past_of(environment, decision.problem) / f"{re.sub('[-:]', '', decision.measured_at)}.json"

    def folders(self) -> list[Path]:
        """One for each environment."""
        return [path for path in listing(self.root / VERSION) if _FINGERPRINT.fullmatch(path.name)]

    def newest(self) -> int:
        """Changes whenever a file of the store is written, replaced or removed: a key for what was made of it."""
        times = []
        for folder in (self.root / VERSION, *(path for top in self.folders() for path in (top, top / "decisions"))):
            with contextlib.suppress(OSError):
                times.append(folder.stat().st_mtime_ns)
        return max(times, default=0)

    @contextlib.contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        try:
            if str(self.root).startswith("~"):  # such a folder would be made, and removing that one can cost a home
                raise OSError("the home folder of this user is not known")
            yield
        except OSError as error:
            raise ProfileError(
                f"the profile {path} cannot be written: {error.strerror or error}.\nValid is a folder that this "
                f"process may write to, on a disk with room. Make it so, or let {ROOT_VARIABLE} name another folder."
            ) from error


def read_decision(path: Path) -> Decision | None:
    """The decision in the file at `path`; None if there is no file. Raises ProfileError if it cannot be used."""
    data = read_bytes(path, LIMIT)
    return None if data is None else parse_decision(data, path.stem)


def parse_decision(data: bytes, name: str) -> Decision:
    """The decision in a file with this content, and this name without its end.

    Raises ProfileError if it cannot be read, or is of another problem than its name says.
    """
    if name.endswith(("-layout_other", "-layout_other-unaligned")):  # it is called a slice since
        raise EarlierForm("an earlier release wrote it, in another form")
    decision = Decision.from_json(data)
    if problem_name(decision.problem) != name:
        raise ProfileError(f"it is of another problem, {problem_name(decision.problem)}")
    return decision


def read_past(path: Path) -> Decision | None:
    """The same of a file in a problem's history."""
    data = read_bytes(path, LIMIT)
    return None if data is None else parse_decision(data, path.parent.name)


def read_evidence(path: Path, decision: Decision) -> Evidence | None:
    """The evidence in the file at `path`, if it is that of `decision`. Raises ProfileError if it cannot be used."""
    data = read_bytes(path, EVIDENCE_LIMIT)
    return None if data is None else parse_evidence(data, decision)


def parse_evidence(data: bytes, decision: Decision) -> Evidence | None:
    """The evidence in a file with this content, if it is that of `decision`. Raises ProfileError if it is none."""
    evidence = Evidence.from_json(data)
    # Two writers at once, or one killed between its two files, can leave the evidence of another decision.
    return evidence if (evidence.seed, evidence.measured_at) == (decision.seed, decision.measured_at) else None


def read_facts(path: Path) -> dict[str, Any] | None:
    """The facts in the file at `path`; None if there is no file. Raises ProfileError if they cannot be read."""
    data = read_bytes(path, LIMIT)
    if data is None:
        return None
    facts = from_plain(parse_json(data), dict[str, str | int | float | None])
    if facts.get("fingerprint") != path.parent.name:
        raise ProfileError(f"it is of another environment, {facts.get('fingerprint')!r:.80}")
    return facts


class EarlierForm(ProfileError):
    """A file of a release before this form."""


def read_bytes(path: Path, limit: int) -> bytes | None:
    """The content of a regular file of at most `limit` bytes; None if there is none. Raises ProfileError for others."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ProfileError("it is not a regular file")  # and opening a pipe would wait for its writer
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ProfileError(f"it cannot be read ({error.strerror})") from error
    if len(data) > limit:
        raise ProfileError(f"it has more than {limit} bytes")
    if b'"sha256"' in data and b'"record"' in data:
        raise EarlierForm("an earlier release wrote it, in another form")
    return data


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file that is whole before it has its name, in place of an older one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}{TEMPORARY}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            temporary.unlink(missing_ok=True)


def decision_files(folder: Path) -> list[Path]:
    """The files of decisions in an environment's folder."""
    return [path for path in listing(folder / "decisions") if re.fullmatch(r"[^.]+\.json", path.name)]


def past_files(folder: Path) -> list[Path]:
    """The files in the folder of a problem's history, the newest last."""
    return [path for path in listing(folder) if re.fullmatch(r"[0-9]{8}T[0-9]{6}Z\.json", path.name)]


def listing(folder: Path) -> list[Path]:
    """What lies in `folder`, by name; nothing, with a warning, where that cannot be listed."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        pass_over(folder, ProfileError(f"it cannot be listed ({error.strerror})"))
        return []


def pass_over(path: Path, error: ProfileError) -> None:
    """Warn that the file at `path` counts as missing. Python shows the same warning once."""
    if isinstance(error, EarlierForm):
        warn(
            "stored profiles of an earlier release are passed over: their form is another. `compiled-logprobs profile` "
            "measures anew, and `compiled-logprobs prune` removes them."
        )
        return
    message = re.sub("[^ -~]", "?", str(error))[:300]  # it may quote the file, which may hold anything
    warn(
        f"the stored profile {path} is passed over: {message}.\nA profile is JSON of the form that profiles/README.md "
        "describes, under the name of its problem. Make it readable, or delete it: what it told can be measured again."
    )


@cache
def _tell_of_an_earlier_release(store: Store) -> None:
    """Warn, once a process, if `store` holds an environment in the earlier form."""
    for folder in store.folders():
        try:
            read_bytes(folder / FACTS, LIMIT)
        except EarlierForm as error:
            pass_over(folder, error)
            return
        except ProfileError:  # of another environment, which nobody asked for
            continue


def _or_warn(read: Callable[[Path], Content | None], path: Path) -> Content | None:
    """What `read` makes of the file at `path`; None, with a warning, if that cannot be used."""
    try:
        return read(path)
    except ProfileError as error:
        pass_over(path, error)
        return None
