"""Averaged gradients of two ranks against one process on the union of their batches.

Shape letters: B batch, T tokens.
"""

import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from ranks import RANKS
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import tokendrop as td
from tokendrop.engine.forward import groups as forward

TOKENS, VOCABULARY, SCALE = 12, 20, 10.0


@dataclass(frozen=True)
class Case:
    """What each rank does in a step.

    Args:
        wrap: "ddp", "ddp-unused" with find_unused_parameters, "fsdp", "fsdp1" for the classic one, or "nothing", which
            averages nothing.
        tasks: of the samples of each rank; "u" and "g" have methods, "dense" has none, "text" has no image either,
            "g-only" is "g" with nothing but image tokens.
        separate: image-only projections of both methods.
        parts: what is image-only of "g"; of "u" what it has a use for.
        recompute: with activation checkpointing.
        frozen: with an embedding that is not trained, so that CONTEXT states need no gradient.
        twins: "u" is HMGen as well, so that both tasks add the same shapes.
        scored: the method of "u", if it is another one.
        micro: micro-batches whose gradients add up.
    """

    wrap: str
    tasks: tuple[tuple[str, ...], tuple[str, ...]]
    separate: str = "none"
    parts: str = "qkv"
    recompute: bool = False
    frozen: bool = False
    twins: bool = False
    scored: Any = None
    micro: int = 1

    @property
    def methods(self) -> dict[str, Any]:
        """By task."""
        middle = td.HMGen("1:3", separate=self.separate, parts=self.parts)
        context = self.parts.replace("+o", "").replace("+ffn", "")
        u = middle if self.twins else td.HiMix("1:", separate=self.separate, parts=context)
        return {"u": self.scored or u, "g": middle, "dense": None}


def llama() -> LlamaForCausalLM:
    """The same model on each rank."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).double()
    shake(model)
    return model.train()


def shake(model: nn.Module) -> None:
    """Move all weights away from where they began."""
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))


def make(case: Case) -> tuple[LlamaForCausalLM, td.Handle]:
    """The same dropped model on each rank; its image-only weights differ from the text's."""
    model = llama()
    drop = td.apply(model, case.methods, multiple=4)
    shake(drop)
    if case.frozen:
        model.model.embed_tokens.requires_grad_(False)
    if case.recompute:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model, drop


def sample(task: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, which are images, and labels, of T tokens; how many are images depends on the seed."""
    ids = torch.randint(VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(seed))
    image = torch.zeros(TOKENS, dtype=torch.bool)
    if task == "g-only":
        image[:] = True
    elif task != "text":
        image[1 : 6 + seed % 3] = True
    labels = ids.clone()
    if task == "u":
        labels[:9] = -100
    return ids, image, labels


def batch(tasks: tuple[str, ...], first: int) -> tuple[Tensor, td.TokenLayout]:
    """(B, T) ids and their layout."""
    ids, image, labels = map(torch.stack, zip(*(sample(t, first + i) for i, t in enumerate(tasks)), strict=True))
    names = ["dense" if task == "text" else task.removesuffix("-only") for task in tasks]
    return ids, td.TokenLayout(image, names, labels=labels)


def backward(
    model: nn.Module, drop: td.Handle, tasks: tuple[str, ...], first: int, scale: float, micro: int = 0
) -> None:
    """A micro-batch's gradients; the loss is a sum over rows, so that the union of batches is exact."""
    ids, layout = batch(tasks, first + 50 * micro)
    with drop.layout(layout, (0, micro), first):
        logits = model(ids).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), layout.labels[:, 1:].flatten(), reduction="sum") / scale
        loss.backward()


def alone(case: Case) -> dict[str, Tensor]:
    """The gradients of one process on both batches at once, with the mean over ranks."""
    model, drop = make(case)
    for micro in range(case.micro):
        backward(model, drop, case.tasks[0] + case.tasks[1], 0, SCALE * RANKS, micro)
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def wrapped(case: Case, model: LlamaForCausalLM) -> nn.Module:
    """The model as a user wraps it."""
    if case.wrap == "nothing":
        return model
    if case.wrap.startswith("ddp"):
        return DistributedDataParallel(model, find_unused_parameters=case.wrap == "ddp-unused")
    if case.wrap == "fsdp1":
        policy = ModuleWrapPolicy([LlamaDecoderLayer])
        return FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
        )
    return shard(model, init_device_mesh("cpu", (RANKS,)))


def shard(model: LlamaForCausalLM, mesh: DeviceMesh) -> nn.Module:
    """FSDP2 as its documentation writes it: each layer, then the root."""
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(x: Tensor) -> Tensor:
    """All of a tensor that may be sharded."""
    return x.full_tensor() if isinstance(x, DTensor) else x if x is None else x.clone()


def together(rank: int, case: Case) -> dict[str, Tensor]:
    """This rank's view of the averaged gradients."""
    model, drop = make(case)
    outer = wrapped(case, model)
    for _ in range(2 if case.wrap.startswith("ddp") else 1):  # DDP finds what a step left out only in the next one
        outer.zero_grad()
        for micro in range(case.micro):
            with accumulating(outer, micro < case.micro - 1):
                backward(outer, drop, case.tasks[rank], 0 if rank == 0 else len(case.tasks[0]), SCALE, micro)
    with summoned(outer):
        grads = {name: whole(p.grad) for name, p in model.named_parameters() if p.requires_grad}
    missing: list[Any] = [None] * RANKS
    dist.all_gather_object(missing, [name for name, grad in grads.items() if grad is None])
    if any(missing):
        raise AssertionError(f"no gradient on rank 0 and 1 for {missing}")
    return {name.replace("_fsdp_wrapped_module.", ""): grad for name, grad in grads.items()}


@contextmanager
def accumulating(outer: nn.Module, more: bool) -> Iterator[None]:
    """Communicate no gradients inside, where there are `more` micro-batches to come."""
    if isinstance(outer, FSDPModule):
        outer.set_requires_gradient_sync(not more)
    with outer.no_sync() if more and hasattr(outer, "no_sync") else nullcontext():
        yield


@contextmanager
def summoned(outer: nn.Module) -> Iterator[None]:
    """Whole parameters and gradients inside, where classic FSDP has them in pieces."""
    if not isinstance(outer, FullyShardedDataParallel):
        yield
        return
    with FullyShardedDataParallel.summon_full_params(outer, with_grads=True):
        yield


def difference(rank: int, case: Case) -> float:
    """The largest relative difference of any parameter's gradient."""
    expected, found = alone(case), together(rank, case)
    if expected.keys() != found.keys():
        raise AssertionError(f"parameters {expected.keys() ^ found.keys()}")
    nothing = [name for name, grad in expected.items() if not grad.abs().sum() and "tokendrop" not in name]
    if nothing:
        raise AssertionError(f"a test without gradients for {nothing} shows nothing")
    return max(relative(found[name], grad) for name, grad in expected.items())


def relative(found: Tensor, expected: Tensor) -> float:
    """The distance of two tensors, as a share of the second."""
    # A parameter that the union does not use has no scale; it must be exactly zero.
    return ((found - expected).norm() / (expected.norm() if expected.any() else 1)).item()


def differences(rank: int, cases: list[Case], mutation: str = "") -> list[tuple[float | str, list[str]]]:
    """Each case's difference, or what it raised; and what it warned of."""
    if mutation:  # stop touching the parameters that a rank's own batch does not use
        forward.touch = lambda sets, out: out
    found: list[tuple[float | str, list[str]]] = []
    for case in cases:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                result: float | str = difference(rank, case)
            except Exception:
                result = traceback.format_exc()
        found.append((result, sorted({str(one.message) for one in caught})))
        dist.barrier()
    return found
