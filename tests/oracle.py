"""The second oracle: a Llama under roles, by hand, from method.md alone; one sample and one head at a time.

It imports nothing of tokendrop and nothing of transformers. Shape letters: T tokens, R rows, D hidden, L layers.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Sizes(NamedTuple):
    layers: int
    heads: int
    kv_heads: int
    eps: float = 1e-6
    theta: float = 10000.0


def norm(x, weight, eps):
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return weight * y.to(x.dtype)


def rotate(x, rows, theta):
    width = x.shape[-1]
    frequency = 1.0 / theta ** (torch.arange(0, width, 2).float() / width)
    angle = (rows[:, None].float() * frequency).repeat(1, 2)
    turned = torch.cat([-x[:, width // 2 :], x[:, : width // 2]], 1)
    return x * angle.cos().to(x.dtype) + turned * angle.sin().to(x.dtype)


def project(x, image, weights, name, own, part=""):
    """Rows of images use their own weight, where there is one."""
    y, key = x @ weights[f"{name}_proj.weight"].T, part or name.removeprefix("self_attn.")
    return torch.where(image[:, None], x @ own[key].T, y) if key in own else y


def normed(x, image, weights, name, own, eps):
    """The same of a norm."""
    y, key = norm(x, weights[f"{name}.weight"], eps), f"norm.{name}"
    return torch.where(image[:, None], norm(x, own[key], eps), y) if key in own else y


def layer(x, queries, keys, image, weights, own, sizes, attend=False):
    """The rows `queries` of x after a layer in which they see the rows `keys` before and at them.

    With `attend` those of images have no FFN.
    """
    seen = normed(x[keys], image[keys], weights, "input_layernorm", own, sizes.eps)
    asked = seen[torch.isin(keys, queries)]  # one norm for both: it rounds to float32, its gradient too
    q, k, v = (
        project(rows, image[at], weights, f"self_attn.{name}", own).chunk(heads, 1)
        for rows, at, name, heads in (
            (asked, queries, "q", sizes.heads),
            (seen, keys, "k", sizes.kv_heads),
            (seen, keys, "v", sizes.kv_heads),
        )
    )
    outs, later, mine = [], keys[None, :] > queries[:, None], image[queries]
    for head in range(sizes.heads):
        pair = head * sizes.kv_heads // sizes.heads
        a = rotate(q[head], queries, sizes.theta) @ rotate(k[pair], keys, sizes.theta).T / math.sqrt(q[head].shape[1])
        outs.append(a.masked_fill(later, -math.inf).softmax(-1) @ v[pair])
    h = x[queries] + project(torch.cat(outs, 1), mine, weights, "self_attn.o", own)
    n = normed(h, mine, weights, "post_attention_layernorm", own, sizes.eps)
    gate, up = (project(n, mine, weights, f"mlp.{name}", own, f"ffn.{name}_proj") for name in ("gate", "up"))
    f = project(F.silu(gate) * up, mine, weights, "mlp.down", own, "ffn.down_proj")
    return torch.where(mine[:, None], h, h + f) if attend else h + f


def llama(state, sizes, ids, real, image, roles, own=None):
    """Logits (B, T, V), zero on padding.

    roles[b][l] is "active", "context", "bypass" or "attend": what image tokens of sample b do in layer l.
    own[b][l] has the image-only weights of sample b in layer l: "q", "k", "v", "o", "norm.input_layernorm",
    "norm.post_attention_layernorm", "ffn.gate_proj", "ffn.up_proj", "ffn.down_proj".
    """
    logits = []
    for b, tokens in enumerate(ids):
        x = state["model.embed_tokens.weight"][tokens]
        for n in range(sizes.layers):
            start = f"model.layers.{n}."
            weights = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
            role = roles[b][n]
            queries = real[b] if role in ("active", "attend") else real[b] & ~image[b]
            keys = real[b] & ~image[b] if role == "bypass" else real[b]
            queries, keys = queries.nonzero()[:, 0], keys.nonzero()[:, 0]
            if len(queries):
                out = layer(x, queries, keys, image[b], weights, own[b][n] if own else {}, sizes, role == "attend")
                x = x.index_copy(0, queries, out)
        out = norm(x, state["model.norm.weight"], sizes.eps) @ state["lm_head.weight"].T
        logits.append(torch.where(real[b][:, None], out, 0))
    return torch.stack(logits)
