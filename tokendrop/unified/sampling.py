"""Images drawn by a model.

Shape letters: B batch, T tokens, V vocabulary, K codes, M image tokens.
"""

import torch
from torch import Tensor

from tokendrop.layout import IGNORED
from tokendrop.unified.data import Batch


@torch.no_grad()
def sample_codes(model: torch.nn.Module, batch: Batch, codes: int, seed: int) -> Tensor:
    """Let a model draw its images: codes sampled one by one, each from a full recompute.

    c_t ~ softmax(logits[b, t - 1, :K])    for each t with labels[b, t] != -100

    The length is that of the true sequence from the start, so the layout of the batch stays valid; what stands behind
    position t cannot be seen from it, and is blank.

    Args:
        model: (input_ids, attention_mask) -> an output with logits (B, T, V).
        batch: of generation, true sequences; only their prompts and lengths are used.
        codes: K; ids below it are image codes.
        seed: of the samples.

    Returns:
        (B, M) int64, the codes at the M labelled positions of each row.
    """
    ids, wanted = batch["input_ids"].clone(), batch["labels"] != IGNORED
    ids[wanted] = 0
    generator = torch.Generator(ids.device).manual_seed(seed)
    for t in wanted.any(0).nonzero().flatten().tolist():
        logits = model(input_ids=ids, attention_mask=batch["attention_mask"], use_cache=False).logits[:, t - 1, :codes]
        drawn = torch.multinomial(logits.float().softmax(-1), 1, generator=generator).squeeze(1)
        ids[:, t] = torch.where(wanted[:, t], drawn, ids[:, t])
    return ids[wanted].view(len(ids), -1)
