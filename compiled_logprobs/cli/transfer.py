"""`export`, `import` and `prune`: carry stored decisions to another machine, and remove those that serve nobody."""

import sys
from functools import partial
from pathlib import Path
from typing import IO, Annotated

import typer

from compiled_logprobs.choose import pruning
from compiled_logprobs.cli.options import (
    COULD_NOT_RUN,
    PASSED,
    AsJson,
    Backends,
    backend_name_of,
    reported_errors,
    split,
    store_of,
)
from compiled_logprobs.cli.output import exported_in_words, print_json, print_line, print_merged, print_waste
from compiled_logprobs.errors import InputError
from compiled_logprobs.machine.environment import environments
from compiled_logprobs.store import archive, user_store
from compiled_logprobs.store.files import Entry, Store

STANDARD = "-"
"""In place of a file's name: standard input or output."""

Folder = Annotated[
    Path | None, typer.Option("--store", show_default=False, help="Folder of profiles; by default the user's.")
]


def export(
    file: Annotated[
        str | None,
        typer.Argument(
            show_default=False,
            help="The archive to write; - is standard output. By default compiled-logprobs.jsonl, or, of one environment alone, "
            "compiled-logprobs-FINGERPRINT.jsonl, in the current folder.",
        ),
    ] = None,
    environment: Annotated[
        list[str] | None,
        typer.Option(show_default=False, help="Fingerprint of an environment; by default those of this machine."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="The decisions of all environments.")] = False,
    source: Annotated[
        str, typer.Option("--from", help="Which profiles: user, project, bundled, or a folder of them.")
    ] = "user",
    evidence: Annotated[
        bool,
        typer.Option("--evidence/--no-evidence", help="Whether raw times and details of the checks come along."),
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write stored decisions into one file, for `compiled-logprobs import` on another machine."""
    with reported_errors():
        if environment and every:
            raise InputError("got --environment and --all; one of them is valid. Leave one out.")
        if file == STANDARD and as_json:
            raise InputError("got - and --json, which both write to standard output; one is valid. Leave one out.")
        here = [one.fingerprint() for one in environments()]
        which = None if every else split(environment) or here
        write = partial(archive.export, store_of(source), environments=which, evidence=evidence)
        if file == STANDARD:
            done = write(sys.stdout.buffer)
            sys.stdout.flush()
            sys.stderr.write(exported_in_words(done) + "\n")
            return
        name = f"compiled-logprobs-{which[0]}.jsonl" if which and len(which) == 1 else "compiled-logprobs.jsonl"
        path = Path(name if file is None else file)
        done = archive.save(path, write, overwrite=overwrite)
    if as_json:
        print_json({"file": str(path), **vars(done)})
    else:
        print_line(f"{path}: {exported_in_words(done)}")


def import_(
    file: Annotated[
        str, typer.Argument(help="The archive, as `compiled-logprobs export` wrote it; - is standard input.")
    ],
    out: Annotated[
        Path | None, typer.Option(show_default=False, help="Folder to store in; by default the user's profiles.")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace also what is stored and newer.")] = False,
    as_json: AsJson = False,
) -> None:
    """Store the decisions of an archive, and say what became of each: what is stored and as new, or newer, is kept.

    Nothing is stored unless all of the archive is as it should be.
    """
    with reported_errors():
        store = user_store() if out is None else Store(out)
        entries = _entries_in(file)
        merged = archive.merge(store, entries, replace=replace)
        here = {environment.fingerprint() for environment in environments()}
    if as_json:
        print_json({"store": str(store.root), "decisions": [one.to_dict() for one in merged]})
        return
    print_merged(merged, here)
    fates = [one.fate for one in merged]
    counts = ", ".join(f"{fates.count(fate)} {fate}" for fate in dict.fromkeys(fates))
    print_line(f"{len(merged)} decisions: {counts}; in {store.root}")
    if not any(one.entry.environment in here for one in merged):
        print_line(
            "None is for this machine: its processor or GPU, threads, or versions of torch, triton or CUDA are others."
        )


def _entries_in(file: str) -> list[Entry]:
    if file == STANDARD:
        return archive.read_archive(sys.stdin.buffer)
    try:
        opened: IO[bytes] = open(file, "rb")  # noqa: SIM115 - so that only an error of opening is told as one
    except (OSError, ValueError) as error:
        raise InputError(
            f"got {file!r}, which cannot be opened ({getattr(error, 'strerror', None) or error}); the name of an archive is "
            "valid, or - for standard input. Correct it."
        ) from error
    with opened:
        return archive.read_archive(opened)


def prune(
    older_than: Annotated[
        float | None,
        typer.Option(show_default=False, min=0.0, metavar="DAYS", help="Decisions that were measured longer ago."),
    ] = None,
    other_environments: Annotated[
        bool,
        typer.Option(
            "--other-environments",
            help="Decisions that are not used on this machine as it is now: those of another machine, and also of another "
            "number of threads or another torch.",
        ),
    ] = False,
    stale: Annotated[
        bool, typer.Option("--stale", help="Decisions whose winner has other code than what was measured.")
    ] = False,
    unregistered: Annotated[
        bool,
        typer.Option(
            "--unregistered",
            help="Decisions whose winner is not registered here, though programs of yours may do that.",
        ),
    ] = False,
    broken: Annotated[
        bool,
        typer.Option(
            "--broken",
            help="Files that cannot be read, and what killed writers left. Alone where nothing is asked for.",
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    folder: Folder = None,
    backend: Backends = None,
    as_json: AsJson = False,
) -> None:
    """Remove what serves nobody any more from the profiles, and say what, and how many bytes.

    Without options, only files that are broken. What a newer release wrote always stays.
    """
    with reported_errors():
        for text in split(backend):
            backend_name_of(text)
        store = user_store() if folder is None else Store(folder)
        here = {environment.fingerprint() for environment in environments()}
        asked = pruning.Asked(broken, stale, unregistered, older_than, other_environments)
        found = pruning.prune(store, asked, here, dry_run=dry_run)
    left = [one for one in found if one.failed is not None]
    size = sum(one.bytes for one in found if one.failed is None)
    if as_json:
        print_json(
            {"store": str(store.root), "dry_run": dry_run, "bytes": size, "files": [one.to_dict() for one in found]}
        )
    else:
        print_waste(found, store.root)
        what = "would be removed from" if dry_run else "removed from"
        print_line(f"{len(found) - len(left)} files, {size} bytes, {what} {store.root}")
    raise typer.Exit(COULD_NOT_RUN if left else PASSED)
