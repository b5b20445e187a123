"""The text, which ships with Python, and the reward, which anyone can check by reading.

Shapes: B sequences, T bytes.
"""

import re
from collections import Counter
from pydoc_data.topics import topics

import torch
from torch import Tensor

WORD = re.compile(r"[a-z]+")
SHORTEST = 3
OFTEN_ENOUGH = 3
"""How many times a word stands in the text before the reward counts it as one."""


def read_documentation() -> str:
    """Read the language reference behind Python's `help()`, without indentation: some 400,000 characters of English."""
    return re.sub(r"\s+", " ", " ".join(topics.values())).encode("ascii", "ignore").decode()


def to_bytes(text: str) -> Tensor:
    """[T] int64."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def find_words(text: str) -> frozenset[str]:
    """Find the words that the reward counts."""
    counts = Counter(WORD.findall(text.lower()))
    return frozenset(word for word, count in counts.items() if len(word) >= SHORTEST and count >= OFTEN_ENOUGH)


def reward(completion: str, words: frozenset[str]) -> float:
    """Share of a completion that is words of the text, each with the space after it, and none counted twice: 0 to 1."""
    said = {word for word in completion.split(" ")[:-1] if word in words}  # the last may be cut off in the middle
    return sum(len(word) + 1 for word in said) / len(completion)


def windows(data: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """[count, length] bytes from random places of the text."""
    starts = torch.randint(len(data) - length, (count, 1), generator=generator)
    return data[starts + torch.arange(length)]


def prompts(data: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """[count, length] bytes that end with a space, so that a completion begins with a word."""
    ends = (data[length:] == ord(" ")).nonzero()[:, 0]
    chosen = ends[torch.randint(len(ends), (count, 1), generator=generator)]
    return data[chosen + 1 + torch.arange(length)]
