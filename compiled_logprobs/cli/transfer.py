"""`export`, `import` and `prune`: carry stored decisions to another machine, and remove those that serve nobody."""

from pathlib import Path
from typing import Annotated

import typer

from compiled_logprobs.cli.options import PASSED, WRONG, AsJson, reported_errors, store_of
from compiled_logprobs.cli.output import print_imported, print_json, print_line, printable
from compiled_logprobs.cli.problems import split
from compiled_logprobs.errors import InputError
from compiled_logprobs.machine.environment import environments
from compiled_logprobs.store import transfer, user_store
from compiled_logprobs.store.files import Store


def export(
    file: Annotated[
        Path | None,
        typer.Argument(
            show_default=False,
            help="The archive to write, a new file. By default compiled-logprobs.tar.gz, or, of one environment alone, "
            "compiled-logprobs-FINGERPRINT.tar.gz, in the current folder.",
        ),
    ] = None,
    environment: Annotated[
        list[str] | None,
        typer.Option(
            show_default=False, metavar="FINGERPRINT", help="Of an environment; by default those of this machine."
        ),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="The decisions of all environments.")] = False,
    source: Annotated[str, typer.Option("--from", help="Which profiles: user, bundled, or a folder of them.")] = "user",
    evidence: Annotated[
        bool,
        typer.Option("--evidence/--no-evidence", help="Whether raw times and details of the checks come along."),
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Write stored decisions into one file, for `import` elsewhere."""
    with reported_errors():
        if environment and every:
            raise InputError("got --environment and --all; one of them is valid. Leave one out.")
        here = [environment.fingerprint() for environment in environments()]
        which = None if every else split(environment) or here
        content, decisions = transfer.export_archive(store_of(source), which, evidence=evidence)
        name = f"compiled-logprobs-{which[0]}.tar.gz" if which and len(which) == 1 else "compiled-logprobs.tar.gz"
        path = Path(name) if file is None else file
        try:
            with path.open("xb") as archive:
                archive.write(content)
        except OSError as error:
            raise InputError(
                f"got {path}, which cannot be written ({error.strerror}). Valid is a new file in a folder that this "
                "process may write to, on a disk with room. Name one there."
            ) from error
    if as_json:
        print_json({"file": str(path), "decisions": decisions, "bytes": len(content)})
    else:
        print_line(f"{path}: {decisions} decisions, {len(content)} bytes")


def import_(
    file: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="The archive, as `compiled-logprobs export` wrote it.")
    ],
    out: Annotated[
        Path | None, typer.Option(show_default=False, help="Folder to store in; by default the user's profiles.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Store the decisions of a file that `export` wrote.

    What became of each is said; what is stored and as new, or newer, is kept. What is broken is passed over, and
    the exit code is 1. Of what is no archive, or was cut, nothing is stored.
    """
    with reported_errors():
        store = user_store() if out is None else Store(out)
        with file.open("rb") as opened:
            imported = transfer.import_archive(store, opened)
        here = {environment.fingerprint() for environment in environments()}
    fates = [item.fate for item in imported]
    if as_json:
        decisions = [item._asdict() | {"decision": item.decision and item.decision.to_dict()} for item in imported]
        print_json({"store": str(store.root), "decisions": decisions})
    else:
        print_imported(imported)
        counts = ", ".join(f"{fates.count(fate)} {fate}" for fate in dict.fromkeys(fates))
        print_line(f"{len(imported)} decisions: {counts}; in {store.root}")
        if not any(item.environment in here for item in imported):
            print_line(
                "None is for this machine: its silicon, threads, or versions of torch, triton or CUDA are others."
            )
    raise typer.Exit(WRONG if "broken" in fates else PASSED)


def prune(
    older_than: Annotated[
        float | None,
        typer.Option(show_default=False, min=0.0, metavar="DAYS", help="Also decisions that were measured longer ago."),
    ] = None,
    other_environments: Annotated[
        bool,
        typer.Option(
            "--other-environments",
            help="Also decisions that are not used on this machine as it is now: those of another machine, and also of "
            "another number of threads or another torch.",
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--store",
            show_default=False,
            exists=True,
            file_okay=False,
            help="Folder of profiles; by default the user's.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Remove files that are broken, and what else is asked for.

    What goes is said, and how many bytes. Broken are files that cannot be used, and what killed writers left. What
    cannot be read at present always stays.
    """
    with reported_errors():
        store = user_store() if folder is None else Store(folder)
        pruned = transfer.prune(
            store,
            {environment.fingerprint() for environment in environments()},
            older_than_days=older_than,
            other_environments=other_environments,
            dry_run=dry_run,
        )
    size = sum(file.bytes for file in pruned)
    if as_json:
        files = [{"path": str(file.path), "why": file.why, "bytes": file.bytes} for file in pruned]
        print_json({"store": str(store.root), "dry_run": dry_run, "bytes": size, "files": files})
    else:
        for file in pruned:
            print_line(printable(f"{file.path.relative_to(store.root)} ({file.bytes} bytes): {file.why}"))
        what = "would be removed from" if dry_run else "removed from"
        print_line(f"{len(pruned)} files, {size} bytes, {what} {store.root}")
