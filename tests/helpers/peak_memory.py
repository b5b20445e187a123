"""Measure how much memory a backend takes beyond the logits: a program, which prints JSON.

Linux only: the kernel's own high-water mark of resident memory (VmHWM), which sees every allocation, and which a write
to /proc/self/clear_refs resets.
"""

import ctypes
import gc
import json
import sys

import torch

import compiled_logprobs as clp

SEQUENCES, POSITIONS, VOCAB = 8, 129, 32003


def status(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def extra_bytes(function) -> int:
    """Peak while `function` runs, over what was there before."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = status("VmRSS:")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    kept = function()
    peak = status("VmHWM:")
    del kept
    return peak - before


def main(backend: str, dtype: torch.dtype) -> None:
    padded = torch.randn(SEQUENCES, POSITIONS, VOCAB).to(dtype)
    labels = torch.randint(VOCAB, (SEQUENCES, POSITIONS))
    model = torch.zeros((), requires_grad=True)

    def logits():
        return Computed.apply(model, padded.clone())

    def forward(x, y=labels, **options):
        return clp.log_probs_from_logits(x, y, backend=backend, **options)

    def both(x, **options):
        return torch.autograd.grad(forward(x, **options).sum(), x)

    for x in (logits(), logits()[:, :-1]):  # compile first
        forward(x, labels[:, : x.shape[1]])
        both(x) if x.shape[1] == POSITIONS else None
    both(logits(), inplace_backward=True)

    size = padded.numel() * padded.element_size()
    x, slice_ = logits(), padded[:, :-1]
    figures = {
        "forward": extra_bytes(lambda: forward(padded)) / size,
        "forward of a slice": extra_bytes(lambda: forward(slice_, labels[:, :-1])) / size,
        "forward and backward": extra_bytes(lambda: both(x)) / size,
        "in place": extra_bytes(lambda: both(x, inplace_backward=True)) / size,
    }
    print(json.dumps(figures))


class Computed(torch.autograd.Function):
    """Logits as a model gives them: not a leaf, and nothing else keeps them."""

    @staticmethod
    def forward(ctx, model, values):
        return values

    @staticmethod
    def backward(ctx, gradient):
        return None, None


if __name__ == "__main__":
    main(sys.argv[1], getattr(torch, sys.argv[2]))
