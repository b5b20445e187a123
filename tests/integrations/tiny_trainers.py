"""GRPO and DPO by TRL's own trainers, on a randomly initialised GPT-2 of two layers, on the CPU, without a network.

What each step computes is recorded: loss, gradient, and what computing them took. GPT-2, since it computes in the dtype
of its weights throughout, float64 too, where newer models go through float32 in places.
"""

import contextlib
import ctypes
import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from compiled_logprobs.compat import conventions

VOCAB = 16384
STEPS = 4
LEARNING_RATE = 1e-2
SEQUENCES, PROMPT, COMPLETION = 8, 8, 16


@dataclass
class Steps:
    """What the steps of one training computed."""

    losses: list[float] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    """Of all parameters, one vector a step."""
    completions: list[list[list[int]]] = field(default_factory=list)
    """Of GRPO: what was sampled, generation by generation."""
    seconds: list[float] = field(default_factory=list)
    """That loss and gradient took."""
    peak_bytes: list[int] = field(default_factory=list)
    """Resident memory at its peak meanwhile, over what there was before."""
    calls: list[int] = field(default_factory=list)
    """How often the loss of each step called this library."""

    @property
    def all_gradients(self) -> Tensor:
        return torch.cat(self.gradients).double()


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def model(dtype: torch.dtype) -> GPT2LMHeadModel:
    """The same numbers for each dtype: those of bfloat16, drawn wide enough that the probabilities differ by token."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        initializer_range=0.3,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    return GPT2LMHeadModel(config).to(torch.bfloat16).to(dtype)


def text(length: int) -> str:
    return " ".join(f"w{i}" for i in torch.randint(3, VOCAB, (length,)).tolist())


def share_of_even_words(completions, completion_ids, **_) -> list[float]:
    return [sum(token % 2 == 0 for token in ids) / max(1, len(ids)) for ids in completion_ids]


def options(folder: Path, learning_rate: float) -> dict:
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": SEQUENCES,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "constant",
        "optim": "sgd",  # whose steps are as far apart as the gradients are
        "max_grad_norm": 0.0,  # none is clipped
        "bf16": False,  # which would be autocast; the model's own dtype is what is wanted
        "gradient_checkpointing": False,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "seed": 1,
    }


def train_grpo(
    dtype: torch.dtype, folder: Path, learning_rate: float = LEARNING_RATE, replayed: Steps | None = None
) -> Steps:
    """Train with GRPO; the completions of `replayed` stand in for sampling, which differs from dtype to dtype."""
    steps = Steps()

    class Recorded(_recording(GRPOTrainer, steps)):
        def _generate_single_turn(self, *arguments, **named):
            if replayed is None:
                completions, others = super()._generate_single_turn(*arguments, **named)
            else:
                completions, others = replayed.completions[len(steps.completions)], None
            steps.completions.append(completions)
            return completions, others

    torch.manual_seed(1)
    trainer = Recorded(
        model=model(dtype),
        reward_funcs=share_of_even_words,
        args=GRPOConfig(
            **options(folder, learning_rate),
            num_generations=4,
            num_iterations=2,  # the second with ratios other than 1
            max_completion_length=COMPLETION,
            temperature=0.9,
        ),
        train_dataset=Dataset.from_dict({"prompt": [text(PROMPT) for _ in range(16)]}),
        processing_class=tokenizer(),
    )
    trainer.train()
    return steps


def train_dpo(dtype: torch.dtype, folder: Path, learning_rate: float = LEARNING_RATE) -> Steps:
    """Train with DPO."""
    steps = Steps()
    torch.manual_seed(1)
    pairs = [
        {"prompt": text(PROMPT) + " ", "chosen": text(COMPLETION), "rejected": text(COMPLETION)} for _ in range(16)
    ]
    trainer = _recording(DPOTrainer, steps)(
        model=model(dtype),
        ref_model=model(dtype),
        args=DPOConfig(**{**options(folder, learning_rate), "per_device_train_batch_size": SEQUENCES // 2}, beta=0.1),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer(),
    )
    trainer.train()
    return steps


def _recording(base: type, steps: Steps) -> type:
    """The trainer `base`, which writes into `steps` what it computes."""

    class Recording(base):
        def compute_loss(self, *arguments, **named):
            self.before = _resident("VmRSS:")
            _reset_peak()
            steps.calls.append(0)
            self.start = time.perf_counter()
            with _counting(steps.calls):
                return super().compute_loss(*arguments, **named)

        def training_step(self, trained, *arguments, **named):
            gc.collect()
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            loss = super().training_step(trained, *arguments, **named)
            steps.seconds.append(time.perf_counter() - self.start)
            steps.peak_bytes.append(_resident("VmHWM:") - self.before)
            steps.losses.append(loss.item())
            steps.gradients.append(torch.cat([one.grad.double().flatten() for one in trained.parameters()]))
            return loss

    return Recording


@contextlib.contextmanager
def _counting(calls: list[int]) -> Iterator[None]:
    """Add the calls of `compat`'s adapters meanwhile to the last of `calls`."""
    public = conventions.log_probs_from_logits

    def counting(*arguments, **options):
        calls[-1] += 1
        return public(*arguments, **options)

    conventions.log_probs_from_logits = counting
    try:
        yield
    finally:
        conventions.log_probs_from_logits = public


def _resident(field_name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field_name))


def _reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
