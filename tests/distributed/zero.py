"""Averaged gradients of two ranks under DeepSpeed's own engine, on the CPU, against one process on their union.

Shape letters: none.
"""

import os

os.environ["DS_ACCELERATOR"] = "cpu"  # before deepspeed is imported

import traceback
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from gradients import SCALE, Case, alone, batch, llama, make, relative
from ranks import RANKS
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import tokendrop as td


def config(stage: int, overlap: bool) -> dict[str, Any]:
    """A configuration with buckets small enough that there are several, and nothing that stays whole."""
    zero = {"stage": stage, "overlap_comm": overlap, "reduce_bucket_size": 1000, "allgather_bucket_size": 1000}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 500}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


@dataclass(frozen=True)
class Zero:
    """How two ranks train.

    Args:
        case: tasks and methods.
        stage: of ZeRO.
        overlap: `overlap_comm`.
        late: methods are applied where the weights are in pieces already.
        whole: a decoder layer is gathered as one, in stage 3.
    """

    case: Case
    stage: int
    overlap: bool = False
    late: bool = False
    whole: bool = True


def together(rank: int, how: Zero) -> dict[str, Tensor]:
    """The averaged gradients, whole, as DeepSpeed says them."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad, set_z3_leaf_modules

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo alone; it would be compiled here
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}  # as its launcher sets them
    model, drop = (llama(), None) if how.late else make(how.case)
    if how.stage == 3 and how.whole:
        set_z3_leaf_modules(model, [LlamaDecoderLayer])
    trained = [p for p in model.parameters() if p.requires_grad]
    given = {"model": model, "optimizer": torch.optim.SGD(trained, lr=0.0), "config": config(how.stage, how.overlap)}
    engine = deepspeed.initialize(**given, dist_init_required=False)[0]
    drop = drop or td.apply(model, how.case.methods, multiple=4)
    for _ in range(2):  # what a stage traces in its first step, it relies on in the next
        ids, layout = batch(how.case.tasks[rank], 0 if rank == 0 else len(how.case.tasks[0]))
        with drop.layout(layout, (0, 0), 0 if rank == 0 else len(how.case.tasks[0])):
            logits = engine(ids).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), layout.labels[:, 1:].flatten(), reduction="sum") / SCALE
        engine.backward(loss)
        found = {name: safe_get_full_grad(p).clone() for name, p in model.named_parameters() if p.requires_grad}
        engine.step()
    return found


def differences(rank: int, cases: list[Zero]) -> list[float | str]:
    """Each case's largest relative difference, or what it raised."""
    found: list[float | str] = []
    for how in cases:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # DeepSpeed's own
            try:
                expected, ours = alone(how.case), together(rank, how)
                found.append(max(relative(ours[name].double(), grad) for name, grad in expected.items()))
            except Exception:
                found.append(traceback.format_exc())
        dist.barrier()
    return found
