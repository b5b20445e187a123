"""What a vocabulary costs that is split over ranks: `python -m benchmarks.ranks`, from a checkout.

Each rank is a process of one thread on this CPU. In a round all ranks do their own columns at the same time, without a
group and then with it, or the other way round. All begin at one moment, from which each counts: after a barrier, the
rank that leaves it first would count its waiting for the others, but only with a group. Without a group they take as
long as the slowest; the ratios are those of one round. What is sent is counted, and sent once more in the same rounds
without a group, by itself: what the sending alone costs here is the least that a group can.
"""

import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter_ns
from typing import Annotated, Any

import torch
import typer
from rich.text import Text
from torch import Tensor, distributed
from torch.multiprocessing.spawn import spawn

from compiled_logprobs import autotune, log_probs_from_logits
from compiled_logprobs.cli.output import Column, print_table

LIMIT = 1.2
"""How many times as long as without a group a rank may take with it."""
ALONE, TOGETHER, SENDING = "alone", "group", "sending"
LEAD_NS = 2_000_000
"""How far ahead the moment lies at which all ranks begin, for all to hear of it."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def ranks(
    rows: Annotated[int, typer.Option(min=1)] = 512,
    vocab: Annotated[int, typer.Option(min=2, help="Of all ranks together.")] = 151936,
    count: Annotated[int, typer.Option("--ranks", min=2)] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="For each direction and with the entropy.")] = 30,
    backend: Annotated[str, typer.Option(help="auto looks up, and measures nothing.")] = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", show_default=False, help="File for all figures.")] = None,
) -> None:
    """Time the columns of ranks with a group beside the same columns without one, all ranks at once, on this CPU."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (count, rows, vocab // count, rounds, backend, folder)
        spawn(_rank, arguments, count)  # type: ignore[no-untyped-call]  # torch's gap
        figures = [json.loads(Path(folder, str(rank)).read_text()) for rank in range(count)]
    result = [{"rank": rank, **row} for rank, of_rank in enumerate(figures) for row in of_rank]
    _print(result)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps({"rows": rows, "vocab": vocab, "ranks": count, "figures": result}, indent=2))


def _rank(rank: int, count: int, rows: int, columns: int, rounds: int, backend: str, folder: str) -> None:
    """One rank, which writes its figures into the folder."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=count, init_method=f"file://{folder}/meeting")
    torch.manual_seed(0)
    labels, upstream = torch.randint(count * columns, (rows,)), torch.randn(rows)
    logits = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rank)).requires_grad_()
    figures = [
        {
            "gradient": grad,
            "entropy": entropy,
            **_figures(
                logits if grad else logits.detach(), labels, upstream if grad else None, entropy, backend, rounds
            ),
        }
        for grad in (False, True)
        for entropy in (False, True)
    ]
    Path(folder, str(rank)).write_text(json.dumps(figures))
    distributed.barrier()
    distributed.destroy_process_group()


def _figures(
    logits: Tensor, labels: Tensor, upstream: Tensor | None, entropy: bool, backend: str, rounds: int
) -> dict[str, Any]:
    options: dict[str, Any] = {"return_entropy": entropy, "backend": backend}
    own = labels % logits.shape[-1]
    calls: dict[str, Callable[[], Any]] = {
        ALONE: lambda: log_probs_from_logits(logits, own, **options),
        TOGETHER: lambda: log_probs_from_logits(logits, labels, group=distributed.group.WORLD, **options),
        SENDING: lambda: _send(calls[ALONE](), sent),
    }

    def run(name: str) -> float:
        began = _moment_to_begin()
        while perf_counter_ns() < began:  # a sleep would end later on one rank than on another
            pass
        result = calls[name]()
        if upstream is not None:
            results = list(result) if entropy else [result]
            torch.autograd.grad(results, logits, [upstream] * len(results))
        return (perf_counter_ns() - began) / 1e6

    millis: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(1)  # the same on all ranks
    with autotune("lookup"):
        sent = _sent(lambda: run(TOGETHER))
        for count in range(rounds + 1):
            for name in order.sample(list(calls), len(calls)):
                taken = run(name)
                if name == ALONE:  # until the last one is done, since with a group all wait for that
                    taken = _largest(taken)
                if count:  # the first round compiles
                    millis[name].append(taken)
    ratios = {
        name: median(taken / alone for taken, alone in zip(millis[name], millis[ALONE], strict=True))
        for name in (TOGETHER, SENDING)
    }
    return {
        **{f"{name}_ms": median(times) for name, times in millis.items()},
        "times_as_long": ratios[TOGETHER],
        "sending_times_as_long": ratios[SENDING],
        "collectives": len(sent),
        "bytes": sum(sent),
    }


def _moment_to_begin() -> int:
    """The same on all ranks, by the clock of this machine."""
    moment = torch.tensor(perf_counter_ns() + LEAD_NS)
    distributed.broadcast(moment, 0)
    return int(moment)


def _largest(taken: float) -> float:
    """Over all ranks."""
    largest = torch.tensor(taken)
    distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    return float(largest)


def _sent(call: Callable[[], Any]) -> list[int]:
    """Bytes of each sum or maximum over the ranks, of one rank, in the call."""
    sent: list[int] = []
    real = distributed.all_reduce

    def counted(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return real(tensor, *arguments, **options)

    distributed.all_reduce = counted
    try:
        call()
    finally:
        distributed.all_reduce = real
    return sent


def _send(results: Any, sizes: list[int]) -> Any:
    """`results`, after a maximum and a sum of so many bytes over the ranks."""
    for size, operation in zip(sizes, (distributed.ReduceOp.MAX, distributed.ReduceOp.SUM), strict=True):
        distributed.all_reduce(torch.zeros(size // 4), operation)
    return results


def _print(rows: list[dict[str, Any]]) -> None:
    table: list[tuple[str | Text, ...]] = []
    for row in rows:
        ratio = row["times_as_long"]
        direction = ("forward + backward" if row["gradient"] else "forward") + (", entropy" if row["entropy"] else "")
        times = (f"{row[f'{name}_ms']:.2f}" for name in (ALONE, TOGETHER))
        shown = Text(f"{ratio:.2f}", "green" if ratio <= LIMIT else "red")
        least = f"{row['sending_times_as_long']:.2f}"
        table.append((str(row["rank"]), direction, *times, shown, least, str(row["collectives"]), f"{row['bytes']:,}"))
    numbers = ("alone, ms", "group, ms", "x alone", "sending, x alone", "collectives", "bytes")
    columns: list[Column | str] = ["rank", "direction", *(Column(name, right=True) for name in numbers)]
    print_table(f"Ranks of one thread each; at most {LIMIT} x alone is the target", columns, table)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.ranks")
