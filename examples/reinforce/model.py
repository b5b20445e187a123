"""A byte-level transformer, as small as it can be and still spell English words.

Shapes: B sequences, T bytes, P bytes already seen, C channels, H heads, V = 256 bytes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCAB = 256
CONTEXT = 72
CHANNELS = 128
HEADS = 4
LAYERS = 3

Cache = list[tuple[Tensor, Tensor]]
"""A pair of keys and values [B, H, P, C / H] for each layer: what need not be computed again for the next byte."""


class Block(nn.Module):
    """Attention, then two linear layers, each added to what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(CHANNELS), nn.LayerNorm(CHANNELS)
        self.query_key_value = nn.Linear(CHANNELS, 3 * CHANNELS, bias=False)
        self.out = nn.Linear(CHANNELS, CHANNELS, bias=False)
        self.up = nn.Linear(CHANNELS, 4 * CHANNELS, bias=False)
        self.down = nn.Linear(4 * CHANNELS, CHANNELS, bias=False)

    def forward(self, x: Tensor, seen: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """[B, T, C], and the keys and values of the P bytes before -> [B, T, C], and those of all P + T."""
        batch, length, _ = x.shape
        parts = self.query_key_value(self.norm1(x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind()
        if seen is not None:
            key, value = torch.cat([seen[0], key], 2), torch.cat([seen[1], value], 2)
        # A single byte may look at all there is; of several, none may look at the next.
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=length > 1)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, CHANNELS))
        x = x + self.down(functional.gelu(self.up(self.norm2(x))))
        return x, (key, value)


class ByteModel(nn.Module):
    """Bytes in, scores of the next byte out."""

    def __init__(self) -> None:
        super().__init__()
        self.byte = nn.Embedding(VOCAB, CHANNELS)
        self.position = nn.Embedding(CONTEXT, CHANNELS)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(CHANNELS)
        self.head = nn.Linear(CHANNELS, VOCAB, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T] bytes -> [B, T, V] logits of the byte after each."""
        return self._run(tokens, None)[0]

    def _run(self, tokens: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        past = 0 if cache is None else cache[0][0].shape[2]
        x = self.byte(tokens) + self.position(torch.arange(past, past + tokens.shape[1]))
        grown: Cache = []
        for layer, block in enumerate(self.blocks):
            x, seen = block(x, None if cache is None else cache[layer])
            grown.append(seen)
        return self.head(self.norm(x)), grown

    @torch.no_grad()
    def complete(self, prompts: Tensor, length: int, generator: torch.Generator) -> Tensor:
        """[B, P] -> [B, P + length]: each next byte drawn from the model's own distribution."""
        tokens, new, cache = prompts, prompts, None
        for _ in range(length):
            logits, cache = self._run(new, cache)
            new = torch.multinomial(logits[:, -1].softmax(-1), 1, generator=generator)
            tokens = torch.cat([tokens, new], 1)
        return tokens
