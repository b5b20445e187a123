"""Run all three ways, and write what they saw: `python -m examples.reinforce`. Some three minutes on two cores."""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from compiled_logprobs import autotune, explain
from compiled_logprobs.machine.environment import environment_of
from examples.reinforce import text
from examples.reinforce.chart import draw, write_html, write_png
from examples.reinforce.model import VOCAB
from examples.reinforce.train import Curve, Settings, pretrain, reinforce
from examples.reinforce.ways import WAYS

BUILD = Path("build/reinforce")


def run(settings: Settings) -> tuple[dict[str, Any], list[Curve]]:
    """Pretrain once, then each way from the same model, prompts and random numbers."""
    began = time.perf_counter()
    english = text.read_documentation()
    data, words = text.to_bytes(english), text.find_words(english)
    model, losses = pretrain(data, settings)
    print(f"pretrained for {_since(began)}: {losses[0]:.2f} -> {losses[-1]:.2f} nats a byte", flush=True)
    curves, seconds = [], {}
    for way in WAYS:
        started = time.perf_counter()
        curve = reinforce(model, way, data, words, settings)
        curves.append(curve)
        seconds[way.name] = round(time.perf_counter() - started, 1)
        print(f"{way.name}: reward {curve.reward[0]:.2f} -> {curve.reward[-1]:.2f} in {_since(started)}", flush=True)
        print(f"  log-probability {curve.log_prob[-1]:+.2f}, first ratio at most {max(curve.first_ratio):.4g}")
        print(f"  {curve.sample!a}", flush=True)
    results = {
        "machine": environment_of().to_dict(),
        "settings": asdict(settings),
        "backend": _explain_backend(settings),
        "pretraining_loss": losses,
        "seconds": {"all": round(time.perf_counter() - began, 1), **seconds},
        "curves": [curve.to_dict() for curve in curves],
    }
    return results, curves


def _explain_backend(settings: Settings) -> str | None:
    """Name the backend of this library that gave the log-probabilities."""
    rows = settings.groups * settings.completions, settings.completion_bytes
    logits = torch.empty(rows[0], settings.prompt_bytes + rows[1], VOCAB, requires_grad=True)
    with autotune("lookup"):
        return explain(logits[:, settings.prompt_bytes - 1 : -1], torch.zeros(rows, dtype=torch.int64)).backend


def _since(began: float) -> str:
    return f"{time.perf_counter() - began:.0f} s"


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the options, run, and write."""
    defaults = Settings()
    parser = argparse.ArgumentParser(prog="python -m examples.reinforce", description=__doc__)
    parser.add_argument("--steps", type=int, default=defaults.steps, help="of reinforcement learning, each way")
    parser.add_argument("--pretraining-steps", type=int, default=defaults.pretraining_steps)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--json", type=Path, default=BUILD / "results.json", help="what was seen, for programs")
    parser.add_argument("--html", type=Path, default=BUILD / "chart.html")
    parser.add_argument("--png", type=Path, help="the chart as a picture, which a browser draws")
    options = parser.parse_args(arguments)
    settings = replace(defaults, steps=options.steps, pretraining_steps=options.pretraining_steps, seed=options.seed)
    results, curves = run(settings)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    chart = draw(curves)
    write_html(chart, options.html)
    if options.png is not None:
        write_png(chart, options.png)
    print(f"written: {', '.join(str(file) for file in (options.json, options.html, options.png) if file)}")


if __name__ == "__main__":
    main()
