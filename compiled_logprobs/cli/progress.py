"""What a profile run shows while it goes on: a bar for people, lines of JSON for programs, or nothing.

The bar is not drawn while candidates are timed: on a CPU it would take time from them.
"""

import json
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichBar
from rich.table import Column
from rich.text import Text

from compiled_logprobs.choose.verify import Verification
from compiled_logprobs.cli.output import verified_in_words
from compiled_logprobs.decision import Decision, short, speedup_in_words
from compiled_logprobs.errors import LogProbsError
from compiled_logprobs.problem import Problem, problem_to_dict

Event = dict[str, Any]


class Progress:
    """Told what happens during a run, and shows nothing of it; a context manager."""

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def start(self, problems: list[Problem], device: str, environment: str) -> None:
        """The run begins."""

    def event(self, event: Event) -> None:
        """A problem begins ('problem', with the Problem itself), or an event of the worker program."""

    def result(self, result: Decision | Verification | LogProbsError) -> None:
        """A problem ends."""

    def end(self, done: int, seconds: float, *, interrupted: bool) -> None:
        """The run ends."""


class JsonLines(Progress):
    """One JSON object a line on standard output: start, problem, the worker program's events, decision, end."""

    def start(self, problems: list[Problem], device: str, environment: str) -> None:
        self._total, self._index = len(problems), 0
        listed = [problem_to_dict(problem) for problem in problems]
        self._write({"event": "start", "device": device, "environment": environment, "problems": listed})

    def event(self, event: Event) -> None:
        if event["event"] == "problem":
            self._index += 1
            event = {**event, "problem": problem_to_dict(event["problem"]), "index": self._index, "total": self._total}
        elif event["event"] in ("ready", "started", "done"):  # of the worker program, which runs for each problem
            return
        self._write(event)

    def result(self, result: Decision | Verification | LogProbsError) -> None:
        if isinstance(result, Decision):
            self._write({"event": "decision", "decision": result.to_dict()})
        elif isinstance(result, Verification):
            self._write({"event": "verified", "verification": result.to_dict()})
        else:
            self._write({"event": "failed", "reason": str(result)})

    def end(self, done: int, seconds: float, *, interrupted: bool) -> None:
        counts = {"done": done, "total": self._total, "seconds": seconds}
        self._write({"event": "end", **counts, "interrupted": interrupted})

    def _write(self, event: Event) -> None:
        sys.stdout.write(json.dumps(event, allow_nan=False) + "\n")
        sys.stdout.flush()


class Bar(Progress):
    """A bar with the time that is left, and a line for each problem that is done, on standard error."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        # The text alone gives way where the terminal is narrow.
        doing = TextColumn(
            "{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")
        )
        columns = (BarColumn(12), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), doing)
        self._bar = RichBar(
            *columns,
            console=self._console,
            auto_refresh=False,
            transient=True,
            expand=True,
            speed_estimate_period=3600.0,
        )
        self._problem = ""
        self._drawn = 0.0

    def __enter__(self) -> "Bar":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def start(self, problems: list[Problem], device: str, environment: str) -> None:
        self._task = self._bar.add_task("starting", total=len(problems))
        self._bar.refresh()

    def event(self, event: Event) -> None:
        if event["event"] == "problem":
            self._problem = short(event["problem"])
            if event.get("undecided"):
                text = f"{self._problem}: undecided before; measured again for up to {event['budget_s']:.0f} s"
                self._console.print(Text(text), soft_wrap=True)
            self._draw(self._problem)
        elif event["event"] == "step" and event["step"] != "time":
            doing = f"{event['step']} {event['candidate'] or ''}".strip()
            self._draw(f"{doing}: {self._problem}")
        elif event["event"] == "memory":  # the last before the rounds
            self._draw(f"timing: {self._problem}")

    def result(self, result: Decision | Verification | LogProbsError) -> None:
        if isinstance(result, Decision):
            text = f"{short(result.problem)}: {speedup_in_words(result)}"
        elif isinstance(result, Verification):
            text = f"{result.outcome}: {verified_in_words(result)}"
        else:
            text = f"{self._problem}: not decided: {result}"
        self._console.print(Text(text), soft_wrap=True)
        self._bar.advance(self._task)
        self._bar.refresh()

    def end(self, done: int, seconds: float, *, interrupted: bool) -> None:
        if interrupted:
            self._console.print(f"interrupted after {done} problems; what is finished is kept")

    def _draw(self, text: str) -> None:
        self._bar.update(self._task, description=text)
        if time.monotonic() - self._drawn > 0.2:
            self._drawn = time.monotonic()
            self._bar.refresh()
