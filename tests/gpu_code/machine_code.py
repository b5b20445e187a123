"""What one thread of an assembled kernel does: instructions from its machine code, bytes by argument from its PTX.

Each instruction counts once, and inside a loop as often as the source says that the loop runs. Branches are counted as
if nothing were skipped, and lanes that a mask switches off as if they were on. Neither LLVM nor ptxas unrolls the loops
of these kernels: were there others in the machine code than in the source, `read` would say so.
"""

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SASS = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)([^;]*);")
BRANCHES = ("BRA", "BRA.U")
PTX_LABEL = re.compile(r"^(\$L\w+):")
PTX_BRANCH = re.compile(r"\bbra(?:\.uni)?\s+(\$L\w+)")
PTX_PARAMETER = re.compile(r"ld\.param\.b64\s+(%rd\d+), \[\w+_param_(\d+)\]")
PTX_ACCESS = re.compile(r"\b(ld|st)\.global(?:\.nc|\.\w+::\w+)*(?:\.v(\d))?\.[bfus](\d+)\s.*?\[\s*(%rd\d+)")
PTX_REGISTER = re.compile(r"%rd\d+")


@dataclass
class Work:
    """Of one thread."""

    instructions: int = 0
    special: int = 0  # of these, on the special function units
    exponentials: int = 0
    loaded: Counter[str] = field(default_factory=Counter)  # bytes, by the parameter that the address comes from
    stored: Counter[str] = field(default_factory=Counter)


def read(ptx: str, sass: str, parameters: Sequence[str], trips: Sequence[int]) -> Work:
    """Count what a thread does.

    Args:
        ptx: of the kernel.
        sass: of the kernel, as cuobjdump prints it.
        parameters: names of the parameters that are there at run time, in order.
        trips: how often each loop runs, in order; a RuntimeError where the code does not have these loops.
    """
    work = Work()
    code = [(int(address, 16), opcode, operands) for address, opcode, operands in SASS.findall(sass)]
    targets = {
        at: int(where[-1], 16) for at, op, rest in code if op in BRANCHES and (where := re.findall("0x[0-9a-f]+", rest))
    }
    times = _times([at for at, _, _ in code], targets, trips)
    for at, opcode, _ in code:
        if opcode != "NOP" and targets.get(at) != at:  # padding: after the last instruction comes an endless loop
            work.instructions += times[at]
            work.special += times[at] * opcode.startswith("MUFU")
            work.exponentials += times[at] * opcode.startswith("MUFU.EX2")

    lines = ptx.splitlines()
    labels = {label[1]: at for at, line in enumerate(lines) if (label := PTX_LABEL.match(line))}
    targets = {at: labels[to[1]] for at, line in enumerate(lines) if (to := PTX_BRANCH.search(line))}
    times = _times(range(len(lines)), targets, trips)
    sources = _sources(lines, parameters)
    for at, line in enumerate(lines):
        if access := PTX_ACCESS.search(line):
            kind, vector, bits, address = access.groups()
            for parameter in sources[address]:
                moved = work.loaded if kind == "ld" else work.stored
                moved[parameter] += times[at] * int(vector or 1) * int(bits) // 8
    return work


def _times(positions: Sequence[int], targets: Mapping[int, int], trips: Sequence[int]) -> dict[int, int]:
    """How often each position is passed, with loops where a branch leads back."""
    loops = sorted((to, at) for at, to in targets.items() if to < at)
    if len(loops) != len(trips) and (loops or max(trips) > 1):
        raise RuntimeError(f"the source has {len(trips)} loops, and the assembled code {len(loops)}")
    times = dict.fromkeys(positions, 1)
    for (first, last), trip in zip(loops, trips, strict=False):
        for at in positions:
            if first <= at <= last:
                times[at] *= trip
    return times


def _sources(lines: Sequence[str], parameters: Sequence[str]) -> defaultdict[str, set[str]]:
    """For each 64-bit register the parameters that it is computed from, where loaded values count for nothing."""
    sources: defaultdict[str, set[str]] = defaultdict(set)
    for _ in range(2):  # the second time for what a loop hands on to its next round
        for line in lines:
            registers = PTX_REGISTER.findall(line)
            if parameter := PTX_PARAMETER.search(line):
                sources[parameter[1]].update(parameters[int(parameter[2]) :][:1])  # the last are triton's own
            elif registers and not PTX_ACCESS.search(line):
                sources[registers[0]].update(*(sources[register] for register in registers[1:]))
    return sources


def trips(source: str, values: Mapping[str, Any]) -> list[int]:
    """How often each loop of a Triton function runs, without those that are unrolled or not compiled.

    What is done to ignored rows only counts as not done: a call without ignored labels.

    `values` are the numbers among its arguments, by name; a RuntimeError where they do not say how often.
    """
    function = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)][-1]
    values = dict(values)
    numbers: list[int] = []

    def value(node: ast.AST) -> Any:
        return eval(ast.unparse(node), {"__builtins__": {}}, values)

    def walk(statements: Sequence[ast.stmt], share: int) -> None:
        for statement in statements:
            if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant):
                values.update(
                    {name.id: statement.value.value for name in statement.targets if isinstance(name, ast.Name)}
                )
            elif isinstance(statement, ast.If):
                try:
                    branches = statement.body if value(statement.test) else statement.orelse
                except Exception:  # noqa: BLE001  not known when it is compiled
                    rare = "tl.load(ignored" in ast.unparse(statement.test)
                    walk(statement.body, 0 if rare else share)
                    branches = statement.orelse
                walk(branches, share)
            elif isinstance(statement, ast.For):
                assert isinstance(statement.iter, ast.Call)
                if "static_range" not in ast.unparse(statement.iter.func):
                    try:
                        numbers.append(share * len(range(*map(value, statement.iter.args))))
                    except Exception as error:
                        raise RuntimeError(f"how often `{ast.unparse(statement.iter)}` loops is not known") from error
                walk(statement.body, share)

    walk(function.body, 1)
    return numbers
