"""GRPO and DPO by TRL's own trainers, on a randomly initialised GPT-2 of two layers, on the CPU, without a network.

What each step computes is recorded. GPT-2, since it computes in the dtype
of its weights throughout, float64 too, where newer models go through float32 in places.
"""

from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

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
    gradients: list[Tensor] = field(default_factory=list)  # of all parameters, one vector a step
    completions: list[list[list[int]]] = field(default_factory=list)  # of GRPO: what was sampled, by generation
    calls: list[int] = field(default_factory=list)  # how often the loss of each step called this library


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
    size = {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    config = GPT2Config(**size, **no_dropout, **tokens, initializer_range=0.3)
    return GPT2LMHeadModel(config).to(torch.bfloat16).to(dtype)


def text(length: int) -> str:
    return " ".join(f"w{i}" for i in torch.randint(3, VOCAB, (length,)).tolist())


def share_of_even_words(completions, completion_ids, **_) -> list[float]:
    return [sum(token % 2 == 0 for token in ids) / max(1, len(ids)) for ids in completion_ids]


def options(folder: Path) -> dict:
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": SEQUENCES,
        "learning_rate": LEARNING_RATE,
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


def train_grpo(dtype: torch.dtype, folder: Path, replayed: Steps | None) -> Steps:
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
            **options(folder),
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


def train_dpo(dtype: torch.dtype, folder: Path, replayed: Steps | None) -> Steps:
    """Train with DPO, which samples nothing that could be replayed."""
    steps = Steps()
    torch.manual_seed(1)
    pairs = [
        {"prompt": text(PROMPT) + " ", "chosen": text(COMPLETION), "rejected": text(COMPLETION)} for _ in range(16)
    ]
    trainer = _recording(DPOTrainer, steps)(
        model=model(dtype),
        ref_model=model(dtype),
        args=DPOConfig(**{**options(folder), "per_device_train_batch_size": SEQUENCES // 2}, beta=0.1),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer(),
    )
    trainer.train()
    return steps


def _recording(base: type, steps: Steps) -> type:
    """The trainer `base`, which writes into `steps` what it computes."""

    class Recording(base):
        def compute_loss(self, *arguments, **named):
            def counting(public):
                def function(*arguments, **options):
                    steps.calls[-1] += 1
                    return public(*arguments, **options)

                return function

            steps.calls.append(0)
            public = {name: getattr(conventions, name) for name in ("log_probs_from_logits", "log_probs_from_hidden")}
            with patch.multiple(conventions, **{name: counting(function) for name, function in public.items()}):
                return super().compute_loss(*arguments, **named)

        def training_step(self, trained, *arguments, **named):
            loss = super().training_step(trained, *arguments, **named)
            steps.losses.append(loss.item())
            steps.gradients.append(torch.cat([weight.grad.double().flatten() for weight in trained.parameters()]))
            return loss

    return Recording
