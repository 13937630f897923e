"""Tiny Llamas, batches written as text, and one step of the engine, the reference and the oracle.

A sample is written as text: "t" is a text token, "i" an image token. Shape letters: B batch, T tokens.
"""

import copy
from dataclasses import dataclass, replace

import oracle
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import tokendrop as td
from tokendrop.engine.reference import reference
from tokendrop.roles import Scoring

VOCABULARY, LAYERS = 50, 4
SIZES = oracle.Sizes(LAYERS, heads=4, kv_heads=2)


def config(attn="sdpa", layers=LAYERS, **more):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"vocab_size": VOCABULARY, "pad_token_id": 0, "num_hidden_layers": layers} | more
    return LlamaConfig(attn_implementation=attn, **sizes)


def llama(attn="sdpa", dtype=torch.float32, seed=0, spread=0.3, **more):
    """A Llama whose weights are large enough for a wrong row to be seen; larger ones also enlarge rounding."""
    model = LlamaForCausalLM(config(attn, **more))
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        shift = torch.empty(p.shape).normal_(0, spread, generator=generator)
        p.data = shift if p.dim() > 1 else p.data + shift
    return model.to(dtype).eval()


@dataclass
class Batch:
    ids: torch.Tensor
    real: torch.Tensor
    image: torch.Tensor
    tasks: tuple
    labels: torch.Tensor

    @property
    def mask(self):
        return None if self.real.all() else self.real.long()

    def layout(self, **changes):
        made = {"image": self.image, "task": self.tasks, "padding": self.real, "labels": self.labels}
        made["frames"] = self.image.cumsum(1) // 3  # for scores that compare frames
        return td.TokenLayout(**made | changes)


class Spy:
    """A score that remembers what it was given."""

    def __init__(self) -> None:
        self.given: list[Scoring] = []

    def __call__(self, scoring: Scoring) -> torch.Tensor:
        self.given.append(scoring)
        return torch.zeros_like(scoring.image, dtype=torch.float32)


def batch(samples, tasks, side="right", seed=0):
    """Samples written as text, padded to the longest; "u" trains no image row, the others train every row."""
    total = max(map(len, samples))
    pads = [" " * (total - len(sample)) for sample in samples]
    rows = [s + pad if side == "right" else pad + s for s, pad in zip(samples, pads, strict=True)]
    ids = torch.randint(1, VOCABULARY, (len(rows), total), generator=torch.Generator().manual_seed(seed))
    image = torch.tensor([[c == "i" for c in row] for row in rows])
    real = torch.tensor([[c != " " for c in row] for row in rows])
    labels = ids.masked_fill(~real, -100)
    for b, task in enumerate(tasks):
        labels[b, int(real[b].int().argmax())] = -100
        if task == "u":
            labels[b, 1:][image[b, :-1]] = -100
    return Batch(ids.masked_fill(~real, 0), real, image, tuple(tasks), labels)


MIXED = (["ttiiittitt", "tiitttiiitt", "iittiitit", "ttttttt", "tttiiiiii"], "uguug")


def perturbed(drop):
    """Image-only projections that differ from the text's and from each other."""
    generator = torch.Generator().manual_seed(7)
    for p in drop.layers.parameters():
        p.data += torch.empty(p.shape).normal_(0, 0.3, generator=generator).to(p.dtype)
    return drop


def dropped(model, methods, **kwargs):
    """A copy of `model` with the methods on it, and its handle."""
    model = copy.deepcopy(model)
    return model, perturbed(td.apply(model, methods, **kwargs))


def loss_of(logits, labels):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


def step(model, made):
    """Logits, and gradients by parameter name, of a forward and backward."""
    logits = model(input_ids=made.ids, attention_mask=made.mask, use_cache=False).logits
    loss_of(logits, made.labels).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return logits.detach(), grads


def engine_step(model, drop, made, layout=None):
    with drop.layout(layout or made.layout()):
        return step(model, made)


def reference_step(model, methods, drop, made):
    """The same by the package's dense reference; image-only gradients under the engine's names."""
    model, sets = copy.deepcopy(model), copy.deepcopy(drop.layers)
    with reference(model, {k: m for k, m in methods.items() if m}, made.layout(), sets, drop.names):
        logits, grads = step(model, made)
    return logits, grads | {f"tokendrop.layers.{name}": p.grad for name, p in sets.named_parameters()}


def chosen(layers, count=LAYERS):
    """Layers of a range, by Python's own slices."""
    if isinstance(layers, str):
        return list(range(count))[slice(*(int(part) if part else None for part in layers.split(":")))]
    return [index % count for index in layers]


def parts(method):
    """What is image tokens' own, one by one."""
    named = method.parts.split("+") if getattr(method, "separate", "none") != "none" else []
    return {one for part in named for one in ([part] if part in ("o", "norm", "ffn") else part)}


def role_plan(method, count=LAYERS):
    """Roles and image-only parts per layer, from method.md."""
    nothing = set()
    if method is None:
        return ["active"] * count, [nothing] * count
    if isinstance(method, td.HiMix):
        on, role, inside, outside = chosen(method.layers, count), "context", parts(method) - {"q"}, nothing
    elif isinstance(method, td.Drop):
        assert (method.then, method.keep) == ("attend", 0)
        on, role, inside, outside = chosen(method.layers, count), "attend", nothing, nothing
    elif isinstance(method, td.MixtureOfTransformers):
        on, role, inside, outside = chosen(method.layers, count), "active", parts(method), nothing
    else:
        on, role, inside, outside = chosen(method.shallow, count), "bypass", nothing, parts(method)
    roles = [role if n in on else "active" for n in range(count)]
    return roles, [inside if n in on else outside for n in range(count)]


def own_weights(extra, start, wanted):
    """The weights below `start`, of the wanted parts, by name."""
    found = {key.removeprefix(start): value for key, value in extra.items() if key.startswith(start)}
    return {key.removesuffix(".weight"): value for key, value in found.items() if key.split(".")[0] in wanted}


def oracle_step(model, methods, drop, made, sizes=SIZES):
    """The same by the hand-written Llama."""
    state = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    extra = {f"tokendrop.layers.{n}": p.detach().clone().requires_grad_() for n, p in drop.layers.named_parameters()}
    roles, own = [], []
    for task in made.tasks:
        method = methods.get(task)
        plan, letters = role_plan(method, sizes.layers)
        name = "image" if method is not None and method.separate == "shared" else f"image-{task}"
        roles.append(plan)
        own.append([own_weights(extra, f"tokendrop.layers.{n}.{name}.", letters[n]) for n in range(sizes.layers)])
    logits = oracle.llama(state, sizes, made.ids, made.real, made.image, roles, own)
    loss_of(logits, made.labels).backward()
    return logits.detach(), {name: p.grad for name, p in (state | extra).items()}


def close(ours, theirs, real, tolerance):
    """Whether logits on real rows and all gradients agree, relative to the largest; None is a gradient of zero.

    Where the tolerance is one of float32, gradients get ten times that: they round more often than logits do.
    """
    a, b = ours[0][real], theirs[0][real]
    if not (a - b).abs().max() <= tolerance * b.abs().max():
        return False
    pairs = [(ours[1][name], grad) for name, grad in theirs[1].items()]
    pairs = [(x if x is not None else 0, y if y is not None else 0) for x, y in pairs if x is not y]
    scale = max(grad.abs().max() for grad in theirs[1].values() if grad is not None)
    limit = scale * (tolerance if tolerance < 1e-7 else 10 * tolerance)
    return all((x - y).abs().max() <= limit for x, y in pairs)


def same(ours, theirs):
    """Whether logits and all gradients of a model without additions are bit-identical."""
    return torch.equal(ours[0], theirs[0]) and all(torch.equal(ours[1][name], g) for name, g in theirs[1].items())


def without_labels(made):
    return replace(made, labels=made.labels.new_full(made.labels.shape, -100))


def checkpointed(model, reentrant=False):
    """The model in train mode with activation checkpointing, by the name that this transformers gives it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    model.train()
    name = "activation_checkpointing_kwargs" if "activation" in enable.__name__ else "gradient_checkpointing_kwargs"
    enable(**{name: {"use_reentrant": reentrant}})
    return model


def snapshot(model):
    """Class, identity and everything in the `__dict__` of every module, to compare before and after."""

    def freeze(value):
        if isinstance(value, dict):
            return [(key, freeze(item)) for key, item in value.items()]
        if isinstance(value, str | int | float | bool | None):
            return value
        return type(value), id(value)

    return [(name, type(module), id(module), freeze(vars(module))) for name, module in model.named_modules()]


@torch.no_grad()
def descend(model, rate):
    """A step of plain gradient descent, which leaves no gradients."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter -= rate * parameter.grad
            parameter.grad = None


def earlier(scoring):
    """A score that keeps the first image tokens."""
    return -torch.arange(scoring.image.shape[1]).expand_as(scoring.image).double()


def routed(base, methods, made, multiple=2, change=lambda model, drop: None):
    """A step of the engine on a copy, after a change of it, and its handle."""
    model, drop = dropped(base, methods, multiple=multiple)
    change(model, drop)
    return engine_step(model, drop, made), drop
