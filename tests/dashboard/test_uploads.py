"""Profiles from elsewhere: nothing is stored unless all of it is as it should be."""

import hashlib
import json
import re

import pytest
from compiled_logprobs_dashboard import uploads

from compiled_logprobs.errors import ProfileError
from compiled_logprobs.store.files import Store
from tests.helpers import dashboard_stores as stores


def archive(tmp_path, name: str = "many", environment=None, *, evidence: bool = True) -> bytes:
    """What `export` writes of a scenario."""
    where = Store(tmp_path / f"from {name}")
    stores.SCENARIOS[name](where)
    return uploads.archive_of(where, (environment or stores.here()).fingerprint(), evidence=evidence)[0]


def files(where: Store) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in where.root.rglob("*") if path.is_file()}


def sealed(lines: list[dict]) -> bytes:
    """`lines` with right digests of the records and a right last line."""
    data = b"".join((json.dumps(line, sort_keys=True) + "\n").encode() for line in lines)
    count = sum(line.get("kind") == "decision" for line in lines)
    end = {"kind": "end", "decisions": count, "sha256": hashlib.sha256(data).hexdigest()}
    return data + (json.dumps(end) + "\n").encode()


def test_what_is_exported_can_be_uploaded(tmp_path):
    content = archive(tmp_path)
    there = Store(tmp_path / "to")
    entries = uploads.read(content)
    foreseen = uploads.foreseen(there, entries)
    assert files(there) == {} and set(foreseen["fate"]) == {"added"} and len(foreseen) == 36
    done = uploads.take(there, entries)
    assert done.equals(foreseen)
    assert uploads.archive_of(there, stores.here().fingerprint(), evidence=True)[0] == content
    assert set(uploads.foreseen(there, entries)["fate"]) == {"same"}


def test_what_is_stored_and_newer_stays(tmp_path):
    there = Store(tmp_path / "to")
    stores.publish(there, stores.good(measured_at="2026-11-21T00:00:00Z", rounds=77))
    done = uploads.take(there, uploads.read(archive(tmp_path, "one")))
    assert done["fate"].tolist() == ["kept"] and "newer" in done["why"][0]
    assert there.read(stores.here().fingerprint(), stores.problem())["rounds"] == 77


def test_raw_times_can_be_left_out(tmp_path):
    assert len(archive(tmp_path, "one", evidence=False)) < len(archive(tmp_path, "one"))


def spoiled(content: bytes, change) -> bytes:
    lines = [json.loads(line) for line in content.splitlines()[:-1]]
    for line in lines:
        if line.get("kind") == "decision":
            change(line)
            text = json.dumps(line["record"], sort_keys=True, separators=(",", ":"))
            line["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    return sealed([line for line in lines if line.get("kind") != "evidence"])


def nested(depth: int):
    return {} if depth == 0 else {"a": nested(depth - 1)}


CHANGES = {
    "markup in a backend's name": lambda line: line["record"]["candidates"].update(
        {stores.HOSTILE: line["record"]["candidates"]["eager"]}
    ),
    "a path in a backend's name": lambda line: line["record"]["candidates"].update(
        {"../../x": line["record"]["candidates"]["eager"]}
    ),
    "a path as environment": lambda line: line.update(environment="../../../etc"),
    "a path as device": lambda line: line["problem"].update(device_type="../../x"),
    "a huge number": lambda line: line["record"].update(rounds=10**400),
    "many rows": lambda line: line["problem"].update(rows=10**30),
    "a negative number of rows": lambda line: line["problem"].update(rows=-1),
    "a time to come": lambda line: line["record"].update(measured_at="9999-01-01T00:00:00Z"),
    "text for a number": lambda line: line["record"].update(rounds="<script>"),
    "deep nesting": lambda line: line["record"].update(telemetry=nested(100)),
    "facts of another machine": lambda line: line["record"]["environment"].update(cpu_model=stores.HOSTILE),
    "nothing chosen": lambda line: line["record"].update(chosen="nothing"),
    "an unknown outcome": lambda line: line["record"]["candidates"]["eager"].update(outcome="<b>"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_hostile_profile_is_refused_and_changes_nothing(name, tmp_path, scenario):
    where = scenario("one")
    before = files(where)
    with pytest.raises(ProfileError, match="the archive cannot be used: line "):
        uploads.read(spoiled(archive(tmp_path, "one"), CHANGES[name]))
    assert files(where) == before


BYTES = {
    "nothing": b"",
    "50 MB": b"[" * 50_000_000,
    "one byte too many": b" " * (uploads.MOST_BYTES + 1),
    "deep nesting": b"[" * 1_000_000,
    "deep objects": b'{"a":' * 500_000,
    "NaN": b'{"archive": "compiled-logprobs", "schema": NaN}\n',
    "infinity": b'{"archive": "compiled-logprobs", "schema": 1, "x": 1e999}\n',
    "a pickle": b"\x80\x04\x95\x10\x00",
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "not UTF-8": b'{"archive": "\xff\xfe"}\n',
    "markup": b"<script>alert(1)</script>",
    "a key twice": b'{"archive": "compiled-logprobs", "schema": 1, "schema": 2}\n',
    "a newer release": b'{"archive": "compiled-logprobs", "schema": 99}\n',
    "a long number": b'{"archive": "compiled-logprobs", "schema": ' + b"9" * 10_000 + b"}\n",
}


@pytest.mark.parametrize("name", BYTES)
def test_what_is_no_archive_is_refused(name):
    with pytest.raises(ProfileError) as caught:
        uploads.read(BYTES[name])
    message = str(caught.value)
    assert re.search("(?i)valid", message) and len(message) < 1000


def test_every_changed_byte_is_noticed(tmp_path):
    content = archive(tmp_path, "one", evidence=False)
    for place in range(0, len(content), max(1, len(content) // 60)):
        with pytest.raises(ProfileError):
            uploads.read(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ProfileError):
            uploads.read(content[:place])
