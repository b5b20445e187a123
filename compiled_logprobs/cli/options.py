"""What the commands share: exit codes, options that mean the same everywhere, reading arguments, telling errors."""

import contextlib
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.markup import escape

from compiled_logprobs.arguments import checked_device
from compiled_logprobs.backends import backends, register_backend, registered_names
from compiled_logprobs.backends.base import AnyBackend, HiddenBackend
from compiled_logprobs.cli.progress import Bar, JsonLines, Progress
from compiled_logprobs.errors import InputError, LogProbsError, is_out_of_memory
from compiled_logprobs.store import bundled_store, user_store
from compiled_logprobs.store.files import Store

PASSED, WRONG, COULD_NOT_RUN, INTERRUPTED = 0, 1, 2, 130
SILENCE_S = 10.0
"""After how long a command says what it is doing where that is no terminal."""

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")]
Where = Annotated[
    str | None,
    typer.Option(
        "--device",
        show_default=False,
        metavar="cpu|cuda|cuda:1",
        autocompletion=lambda: ["cpu", "cuda"],
        help="By default the GPU if there is one.",
    ),
]
Folder = Annotated[
    Path | None,
    typer.Option(
        "--store",
        show_default=False,
        exists=True,
        file_okay=False,
        help="Folder of profiles; by default all that are used, each once.",
    ),
]
Shown = Annotated[
    Literal["bar", "jsonl", "none"],
    typer.Option("--progress", help="jsonl: events on standard output, one a line, and no table."),
]


def subject_of(target: str) -> str | Callable[..., Any]:
    """What `target` names: a registered backend, or something that is imported."""
    if target in registered_names():
        return target
    module_name, colon, attribute = target.partition(":")
    respelled = re.sub(r"^\./|\.py\b", "", target).replace("/", ".")
    respelled = respelled if colon else ":".join(respelled.rsplit(".", 1))
    if not (module_name and colon and attribute):
        raise InputError(
            f"got target {target!r}; a backend's name ({', '.join(backends())}) or package.module:function is valid."
            + _nearest(target, [*backends(), respelled])
        )
    sys.path.insert(0, "")
    names = [respelled]
    try:
        with busy(f"importing {module_name}"):
            subject: Any = import_module(module_name)
        names += [f"{module_name}:{name}" for name in vars(subject)]
        for name in attribute.split("."):
            subject = getattr(subject, name)
    except (Exception, SystemExit) as error:  # a foreign module may do anything when it is imported
        raise InputError(
            f"got target {target!r}, which cannot be imported: {type(error).__name__}: {error}. Valid is a module that "
            "Python finds from the current directory, a colon and the function's name; install what the module needs."
            + _nearest(target, names)
        ) from error
    if isinstance(subject, AnyBackend) or (isinstance(subject, type) and issubclass(subject, AnyBackend)):
        called: str = getattr(subject, "name", "")
        kind = subject if isinstance(subject, type) else type(subject)
        register_backend(called, target, from_hidden=issubclass(kind, HiddenBackend))
        return called
    if not callable(subject):
        raise InputError(f"got target {target!r}, which is of type {type(subject).__name__}; a function is valid.")
    return subject  # type: ignore[no-any-return]  # narrowed to a callable from Any


def _nearest(text: str, names: Iterable[str]) -> str:
    close = get_close_matches(text, [name for name in names if name != text], 1, 0.7)
    return f" Did you mean {close[0]}?" if close else ""


@contextlib.contextmanager
def busy(doing: str) -> Iterator[Callable[[str], None]]:
    """Say on a terminal what takes so long, and elsewhere from time to time; the steps of it are what is yielded told.

    What foreign code prints goes to standard error, apart from results.
    """
    console = Console(stderr=True)
    said_at = time.monotonic()
    with console.status(doing) as status, contextlib.redirect_stdout(sys.stderr):

        def tell(step: str) -> None:
            nonlocal said_at
            status.update(escape(f"{doing}: {step}"))
            if not console.is_terminal and time.monotonic() - said_at > SILENCE_S:
                said_at = time.monotonic()
                sys.stderr.write(f"{doing}: {step}\n")

        yield tell


@contextlib.contextmanager
def reported_errors() -> Iterator[None]:
    """Print what went wrong on standard error, and exit; not with Python's code for it, which here means 'wrong'."""
    try:
        yield
    except LogProbsError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        raise typer.Exit(COULD_NOT_RUN) from None
    except BrokenPipeError:  # whoever read the output has gone, and what is still to be flushed has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:  # noqa: BLE001  memory, or a mistake in this library
        if is_out_of_memory(error):
            sys.stderr.write(f"out of memory: {error}\nAsk for fewer rows, or free some memory.\n")
            raise typer.Exit(COULD_NOT_RUN) from None
        traceback.print_exc()
        raise typer.Exit(COULD_NOT_RUN) from None


def progress_of(kind: str, as_json: bool) -> Progress:
    """What --progress asks for."""
    if kind == "jsonl" and as_json:
        raise InputError(
            "got --progress jsonl and --json, which both write to standard output; one is valid. Leave one out."
        )
    return {"bar": Bar, "jsonl": JsonLines, "none": Progress}[kind]()


def backend_name_of(text: str) -> str:
    """The name of the backend that `text` means, which is registered if it was not."""
    subject = subject_of(text)
    if not isinstance(subject, str):
        raise InputError(f"got --backend {text}, which is a function; a Backend is valid. `check` takes functions.")
    return subject


def store_of(text: str) -> Store:
    """The profiles that `text` means: user, bundled, or a folder that is there."""
    named = {"user": user_store, "bundled": bundled_store}
    if text not in named and not Path(text).is_dir():
        raise InputError(f"got --from {text}, which is no folder; {', '.join(named)} or a folder of profiles is valid.")
    return named.get(text, lambda: Store(Path(text)))()


def device_of(text: str | None) -> torch.device:
    """The device that was asked for, if it is here; by default the accelerator, else the CPU."""
    device = checked_device(text or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"got --device {text}; profiles are measured on cpu and cuda. Name one of them.")
    if device.type == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
