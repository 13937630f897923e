"""A plain loop under FSDP2; each rank has batches of its own.

    torchrun --nproc-per-node 2 examples/fsdp2.py [weights.pt]

`apply` comes before `fully_shard`. Where parameters are added (`separate`), the module that was given to `apply` is the
root of `fully_shard`.
"""

import sys

import torch
from tiny import Samples, collate, vlm
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

import tokendrop as td

METHODS = {"understanding": td.HiMix(separate="shared"), "generation": td.HMGen("1:3", separate="shared")}


def train(steps: int = 5) -> dict[str, torch.Tensor]:
    """The trained weights, whole, on rank zero."""
    model = vlm()
    drop = td.apply(model, METHODS, layout="auto")

    for layer in drop.decoder_layers:
        fully_shard(layer)
    fully_shard(model)
    data = Samples(4 * steps)
    loader = DataLoader(data, 2, sampler=DistributedSampler(data, shuffle=False), collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for batch in loader:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"loss {loss.item():.4f}", flush=True)
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


if __name__ == "__main__":
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    weights = train()
    if len(sys.argv) > 1 and dist.get_rank() == 0:
        torch.save(weights, sys.argv[1])
    dist.destroy_process_group()
