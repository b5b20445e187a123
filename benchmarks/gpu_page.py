"""The report of `benchmarks.gpu` as a page in Markdown. Imports nothing but Python's standard library, as that does."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

Report = dict[str, Any]
CLOCKS = ("sm_clock_min_mhz", "sm_clock_median_mhz", "sm_clock_max_mhz", "memory_used_max_bytes", "throttle_reasons")


def page(report: Report) -> str:
    """All sections for which there is something; what went wrong last, in its own words."""
    programs = {step["name"]: step["programs"] for step in report["steps"]}
    figures = {
        name: {each: program["figures"] for each, program in those.items() if program["figures"] is not None}
        for name, those in programs.items()
    }
    lines = ["# What a GPU showed", ""]
    lines += [f"{report['began']}, {report['seconds']:.0f} s, commit {report['commit']}, on {report['device']}.", ""]
    lines += _table(("step", "outcome", "seconds", "limit", "reason"), map(_step, report["steps"]))
    sections = (
        ("Machine", [*_machine(figures.get("machine", {}).get("doctor", {}), report)]),
        ("Ceilings", [*_ceilings(figures.get("ceilings", {}).get("ceilings"))]),
        ("Tests", [*_tests(figures.get("tests", {}))]),
        ("Check", _check(programs.get("check", {}))),
        ("Profile", _profile(figures.get("profile", {}).get("profile"))),
        ("Beside the peers", [*_peers(figures.get("peers", {}).get("peers"))]),
        ("What NVML saw", _nvml(figures)),
        ("What was said where a step did not pass", [*_tails(programs)]),
    )
    for title, body in sections:
        if body:
            lines += [f"## {title}", "", *body, ""]
    return re.sub("\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Empty where there are no rows."""
    cells = [[" ".join(_text(cell).split()).replace("|", "\\|") for cell in row] for row in rows]
    if not cells:
        return []
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *cells)] + [""]


def _text(cell: object) -> str:
    if isinstance(cell, float):
        return f"{cell:.4g}" if abs(cell) < 1e4 else f"{cell:.0f}"
    return ", ".join(map(str, cell)) if isinstance(cell, list) else "" if cell is None else str(cell)


def _step(step: Report) -> tuple[object, ...]:
    several = len(step["programs"]) > 1
    reasons = [
        (f"{name}: " if several else "") + one["reason"] for name, one in step["programs"].items() if one["reason"]
    ]
    return step["name"], step["outcome"], round(step["seconds"]), step["limit_s"], step["reason"] or "; ".join(reasons)


def _machine(doctor: Report, report: Report) -> Iterator[str]:
    facts: Report = next((one for one in doctor.get("environments", ()) if one["device_type"] == report["device"]), {})
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version)
    missing = ", ".join(name for name, version in report["versions"].items() if not version)
    own = {"python": report["python"], "installed": versions, "not installed": missing}
    yield from _table(("what", "is"), [row for row in (facts | own).items() if row[1] is not None])
    rows = [
        (one["name"], one["problem"], "yes" if one["can_run"] else one["why_not"]) for one in doctor.get("backends", ())
    ]
    yield from _table(("backend", "problem", "can run"), rows)


def _ceilings(found: Report | None) -> Iterator[str]:
    if found is not None:
        rows = [(name, value / 1e9) for name, value in found["bandwidth"].items()]
        yield from _table(("what", "GB/s, or GB"), rows)


def _tests(found: Report) -> Iterator[str]:
    """Of both programs as of one."""
    if not found:
        return
    failed, skipped, recorded = (
        {name: said for one in found.values() for name, said in one[kind].items()}
        for kind in ("failed", "skipped", "recorded")
    )
    passed = sum(one["passed"] for one in found.values())
    yield f"{passed} passed, {len(failed)} failed, {len(skipped)} skipped."
    yield ""
    yield from _table(("failed", "message"), failed.items())
    why: dict[str, int] = {}
    for reason in skipped.values():
        why[reason] = why.get(reason, 0) + 1
    yield from _table(("skipped", "because"), [(times, reason) for reason, times in why.items()])
    yield from _table(("peak of memory", "is"), recorded.items())


def _check(programs: Report) -> list[str]:
    rows = []
    for name, program in programs.items():
        reports = (program["figures"] or {}).get("reports", [])
        causes = [cause for one in reports for cause in one["causes"]]
        wrong = [reason for one in reports for reason in one["reasons"]]
        rows.append((name, program["outcome"], [*wrong, *map(str, causes)] or program["reason"]))
    return _table(("backend", "outcome", "reason"), rows)


def _profile(found: Report | None) -> list[str]:
    rows: list[tuple[object, ...]] = []
    for decision in (found or {}).get("decisions", ()):
        problem, chosen = decision["problem"], decision["chosen"]
        asked = [name for name in ("needs_grad", "inplace_backward", "entropy") if problem[name]]
        asked += [problem["layout"], f"temperature {problem['temperature']}"]
        for name, one in decision["candidates"].items():
            speedup = one["speedup"] or {}
            interval = [speedup.get(end) for end in ("low", "median", "high")]
            ends = " ".join(map(_text, interval)) if speedup else ""
            seconds = None if one["seconds"] is None else one["seconds"] * 1e3
            where = f"{decision['measured_rows']} x {problem['vocab']}", asked, name + ("*" if name == chosen else "")
            rows.append(
                (
                    *where,
                    one["outcome"],
                    seconds,
                    ends,
                    one["percent_of_bandwidth"],
                    one["extra_multiple"],
                    one["reason"],
                )
            )
    head = (
        "logits",
        "asked",
        "candidate",
        "outcome",
        "ms",
        "times as fast as eager",
        "% of bandwidth",
        "extra x logits",
        "reason",
    )
    return _table(head, rows)


def _peers(found: Report | None) -> Iterator[str]:
    if found is None:
        return
    columns = ("ms", "host_ms", "percent_of_copy", "percent_of_read", "extra_multiple", "error_max")
    rows = [
        (
            f"{row['rows']} x {row['vocab']}",
            row["mode"],
            row["candidate"],
            row["outcome"],
            *map(row.get, columns),
            row.get("reason"),
        )
        for row in found["rows"]
    ]
    yield from _table(("logits", "mode", "candidate", "outcome", *columns, "reason"), rows)
    for name in columns:
        yield f"* {name}: {found['columns'][name]}"


def _nvml(figures: dict[str, Report]) -> list[str]:
    rows: list[tuple[object, ...]] = []
    seen = [(name, figures.get(name, {}).get(name)) for name in ("ceilings", "peers")]
    decisions = figures.get("profile", {}).get("profile", {}).get("decisions", ())
    seen += [(f"profile, {number}", decision) for number, decision in enumerate(decisions, 1)]
    for name, one in seen:
        if one is not None:
            summary = one["telemetry"] or {}
            rows.append((name, *map(summary.get, CLOCKS), one["telemetry_reason"]))
    return _table(("during", *CLOCKS, "not seen because"), rows)


def _tails(programs: dict[str, Report]) -> Iterator[str]:
    for step, those in programs.items():
        for name, program in those.items():
            if program["tail"]:
                yield f"{step}, {name} ({program['outcome']}):"
                yield from ("", "```text", program["tail"].replace("```", "'''"), "```", "")
