"""What a forward keeps for its backward.

Shape letters: none.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def saved_bytes(forward: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Bytes that a forward keeps for its backward, `parameters` not counted, each storage once.

    Args:
        forward: returns the loss.
        parameters: whose storage is there anyway.

    Example:
        >>> x = torch.ones(8, requires_grad=True)
        >>> saved_bytes(lambda: (2 * x).exp().sum(), [x])
        32

    Source: ours.
    """
    own = {one.untyped_storage().data_ptr() for one in parameters}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # itself, it would hold the node that holds it, and nothing would ever be freed

    # The loss keeps every saved tensor alive until the sum is taken, so that no address is used twice.
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    total = sum(saved.values())
    del loss
    return total
