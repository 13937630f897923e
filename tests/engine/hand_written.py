"""A decoder that nobody can find by inspection, and a loop over samples as the oracle of its routing.

Shape letters: B batch, T tokens, K rows of one sample that take part, D hidden, H heads, d head width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, LAYERS = 16, 2, 4


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on (B, H, T, d), by cos and sin of (1 or B, T, d)."""
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


def rotary(tokens: int, width: int = WIDTH // HEADS) -> tuple[Tensor, Tensor]:
    """Cos and sin of (1, T, d)."""
    angles = torch.arange(tokens)[:, None] / 100 ** (torch.arange(0, width, 2) / width)
    angles = torch.cat([angles, angles], -1)[None]
    return angles.cos(), angles.sin()


class Mixer(nn.Module):
    """Causal attention, of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: Any = None) -> Tensor:
        B, T, D = x.shape
        q, k, v = (one(x).view(B, T, HEADS, -1).transpose(1, 2) for one in (self.q, self.k, self.v))
        q, k = turned(q, cos, sin), turned(k, cos, sin)
        if cache is not None:
            k, v = cache.update(k, v, 0)
        mixed = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        return self.out(mixed.transpose(1, 2).reshape(B, T, D))


class Block(nn.Module):
    """A layer without a cache, its mask None or (1 or B, 1, T, T)."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after, self.mixer = nn.RMSNorm(WIDTH), nn.LayerNorm(WIDTH), Mixer()
        self.ffn = nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.mixer(self.before(x), cos, sin, mask)
        return x + self.ffn(self.after(x))


class CachedBlock(Block):
    """A layer that takes a cache, as Hugging Face's do."""

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None
    ) -> Tensor:
        x = x + self.mixer(self.before(x), cos, sin, attention_mask, past_key_values)
        return x + self.ffn(self.after(x))


class Frozen:
    """The oracle's cache for CONTEXT: keys and values of every row, whatever the query."""

    def __init__(self, layer: Block, states: Tensor, cos: Tensor, sin: Tensor, image: Tensor) -> None:
        x = layer.before(states)
        split = (1, x.shape[1], HEADS, -1)
        self.keys = turned(layer.mixer.k(x).view(split).transpose(1, 2), cos, sin)
        self.values = layer.mixer.v(x).view(split).transpose(1, 2)
        self.image = image

    def update(self, keys: Tensor, values: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        """All keys, in token order."""
        at = (~self.image).nonzero()[:, 0]
        return self.keys.index_copy(2, at, keys), self.values.index_copy(2, at, values)


def alone(layer: nn.Module, x: Tensor, tokens: Tensor, **more: Any) -> Tensor:
    """One layer on the tokens (K,) of one sample (1, T, D), as if there were no others; causal."""
    rows = x[:, tokens]
    if isinstance(layer, nn.TransformerEncoderLayer):
        causal = nn.Transformer.generate_square_subsequent_mask(len(tokens))
        out = layer(rows, src_mask=causal, is_causal=True)
    else:
        cos, sin = rotary(x.shape[1])
        out = layer(rows, cos[:, tokens], sin[:, tokens], **more)
    return x.index_copy(1, tokens, out)


def oracle(layers: list[nn.Module], hidden: Tensor, takes_part: list[Tensor]) -> Tensor:
    """BYPASS and GONE: in layer n the tokens of `takes_part[n]` (B, T) compute and are seen; the others wait."""
    samples = []
    for b in range(len(hidden)):
        x = hidden[b : b + 1]
        for layer, part in zip(layers, takes_part, strict=True):
            tokens = part[b].nonzero()[:, 0]
            x = alone(layer, x, tokens) if len(tokens) else x
        samples.append(x)
    return torch.cat(samples)


def context_oracle(layers: list[CachedBlock], hidden: Tensor, image: Tensor) -> Tensor:
    """CONTEXT in every layer: text sees the keys and values of images, made of their states at the entry."""
    samples, T = [], hidden.shape[1]
    cos, sin = rotary(T)
    for b in range(len(hidden)):
        x, text = hidden[b : b + 1], (~image[b]).nonzero()[:, 0]
        for layer in layers:
            cache = Frozen(layer, x, cos, sin, image[b])
            mask = torch.arange(T)[None] <= text[:, None]
            x = alone(layer, x, text, attention_mask=mask[None, None], past_key_values=cache)
        samples.append(x)
    return torch.cat(samples)
