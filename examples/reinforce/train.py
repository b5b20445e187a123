"""Pretraining on the text, then GRPO with a reward for words: sample, score, compare within the group, update.

Shapes: B sequences in G groups of the same prompt, T bytes of a completion.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from compiled_logprobs import cross_entropy_from_logits
from examples.reinforce import text
from examples.reinforce.model import CONTEXT, ByteModel
from examples.reinforce.ways import Way, plain_torch


@dataclass(frozen=True)
class Settings:
    """How much of everything; the defaults are those of the chart."""

    seed: int = 0
    pretraining_steps: int = 400
    pretraining_batch: int = 48
    pretraining_rate: float = 2e-3
    steps: int = 30
    groups: int = 12
    completions: int = 8
    """Of each prompt; they are compared with one another."""
    prompt_bytes: int = 24
    completion_bytes: int = 48
    updates: int = 2
    """How often each batch is learned from; from the second on, the policy is no longer the one that wrote it."""
    rate: float = 5e-4
    clip: float = 0.2
    """How far a ratio of probabilities may move from 1 before it stops to pay."""


@dataclass
class Curve:
    """What one way has seen, a number a step."""

    way: str
    reward: list[float] = field(default_factory=list)
    """Mean over the completions: share of them that is words."""
    log_prob: list[float] = field(default_factory=list)
    """Mean of what the training worker's function returned before the first update, in nats a byte."""
    first_ratio: list[float] = field(default_factory=list)
    """The largest ratio of new to old probability before the first update, when both are of the same model."""
    apart: list[float] = field(default_factory=list)
    """The largest difference of such a log-probability from plain float32 torch on the same logits, in nats."""
    sample: str = ""
    """The best of the last completions."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def pretrain(data: Tensor, settings: Settings) -> tuple[ByteModel, list[float]]:
    """Train a model of the text. Return it with the loss of each step, in nats a byte."""
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    model, losses = ByteModel(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.pretraining_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.pretraining_rate, total_steps=settings.pretraining_steps, pct_start=0.1
    )
    for _ in range(settings.pretraining_steps):
        tokens = text.windows(data, settings.pretraining_batch, CONTEXT, generator)
        loss = cross_entropy_from_logits(model(tokens)[:, :-1], tokens[:, 1:])
        _step(model, optimizer, loss)
        schedule.step()
        losses.append(loss.item())
    return model, losses


def reinforce(start: ByteModel, way: Way, data: Tensor, words: frozenset[str], settings: Settings) -> Curve:
    """Train a copy of `start` for the reward with `way`'s log-probabilities."""
    model = ByteModel()
    model.load_state_dict(start.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(settings.seed + 1)  # the same for every way
    curve = Curve(way.name)
    for _ in range(settings.steps):
        prompts = text.prompts(data, settings.groups, settings.prompt_bytes, generator)
        tokens = model.complete(
            prompts.repeat_interleave(settings.completions, 0), settings.completion_bytes, generator
        )
        labels = tokens[:, settings.prompt_bytes :]
        completions = [bytes(row.tolist()).decode("latin-1") for row in labels]
        rewards = torch.tensor([text.reward(one, words) for one in completions])
        advantages = _within_groups(rewards.view(settings.groups, settings.completions)).view(-1, 1)
        with torch.no_grad():
            logits = _logits(model, tokens, settings)
            old, right = way.keeps(logits, labels), plain_torch(logits, labels)
        for update in range(settings.updates):
            new = way.trains(_logits(model, tokens, settings), labels)
            ratio = (new - old).exp()
            if update == 0:
                curve.reward.append(rewards.mean().item())
                curve.log_prob.append(new.mean().item())
                curve.first_ratio.append(ratio.max().item())
                curve.apart.append((new - right).abs().max().item())
                curve.sample = completions[int(rewards.argmax())]
            clipped = ratio.clamp(1 - settings.clip, 1 + settings.clip)
            _step(model, optimizer, -torch.minimum(ratio * advantages, clipped * advantages).mean())
    return curve


def _logits(model: ByteModel, tokens: Tensor, settings: Settings) -> Tensor:
    """[B, T, V], the logits of each byte of the completion: a view, not a copy."""
    logits: Tensor = model(tokens)
    return logits[:, settings.prompt_bytes - 1 : -1]


def _within_groups(rewards: Tensor) -> Tensor:
    """[G, B / G] rewards -> standard deviations above the mean of the group."""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)


def _step(model: ByteModel, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
