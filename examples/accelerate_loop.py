"""A loop with accelerate.

python examples/accelerate_loop.py
"""

import torch
from accelerate import Accelerator
from tiny import Samples, collate, vlm
from torch import nn
from torch.utils.data import DataLoader

import tokendrop as td

METHODS = {"understanding": td.HiMix(separate="shared"), "generation": td.HMGen("1:3", separate="shared")}


def train(methods: td.Method | dict[str, td.Method] = METHODS, steps: int = 5, **more: object) -> nn.Module:
    """The trained model.

    Args:
        methods: as `td.apply` takes them.
        steps: optimiser steps.
        more: arguments of Accelerator.
    """
    model = vlm()
    td.apply(model, methods, layout="auto")

    accelerator = Accelerator(cpu=True, **more)
    loader = DataLoader(Samples(2 * steps), batch_size=2, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.print(f"loss {loss.item():.4f}")
    return accelerator.unwrap_model(model)


if __name__ == "__main__":
    train()
