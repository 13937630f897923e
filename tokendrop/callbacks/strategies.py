"""What a method asks of a trainer's strategy, so that ranks with other batches stay together.

Shape letters: L layers.
"""

from collections.abc import Iterable
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from packaging.version import Version
from torch import nn

from tokendrop.errors import UnsupportedError
from tokendrop.roles import Method, selections
from tokendrop.routes import route_of

HOOKS = "0.16.6"  # the first DeepSpeed whose hooks stand on the parameters


def check_strategy(
    strategy: Any, methods: Iterable[Method | None], num_layers: int, layers: Iterable[nn.Module] = ()
) -> None:
    """Refuse a strategy under which ranks would communicate in different orders, or choose different tokens.

    ZeRO stage 3 gathers a linear's weights at each of its calls, or, if DeepSpeed was told so, those of a whole layer
    at the one call that each rank makes.

    Args:
        strategy: of the trainer.
        methods: of all tasks.
        num_layers: L.
        layers: the L layers of the decoder; none where they are not known to be gathered whole.

    Raises:
        UnsupportedError: with the strategy, and what to use instead.
    """
    name = type(strategy).__name__
    if isinstance(strategy, ModelParallelStrategy) and (mesh := strategy.device_mesh) is not None:
        sizes: dict[str, int] = dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=False))
        if sizes.get("tensor_parallel", 1) > 1:
            raise UnsupportedError(
                f"{name} with tensor_parallel_size={sizes['tensor_parallel']}: ranks that share a batch hold different "
                "heads and would choose other tokens; set tensor_parallel_size=1"
            )
    config = getattr(strategy, "config", None)
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    if not isinstance(zero, dict):
        return
    if zero.get("stage") == 3:
        _check_gathering(name, methods, layers, num_layers)
    elif zero.get("stage") == 2 or zero.get("overlap_comm"):
        _check_hooks(name)


def _check_hooks(name: str) -> None:
    # From this version on its hooks can be seen, so that the engine lets gradients arrive in one order.
    found = version("deepspeed") if find_spec("deepspeed") else HOOKS
    if Version(found) < Version(HOOKS):
        raise UnsupportedError(
            f"{name} with ZeRO stage 2 or overlap_comm of DeepSpeed {found}: it sums gradients in the order in which "
            f"they arrive, which depends on a rank's batch; install DeepSpeed {HOOKS} or later, or use ZeRO stage 1"
        )


def _check_gathering(name: str, methods: Iterable[Method | None], layers: Iterable[nn.Module], num_layers: int) -> None:
    # What `deepspeed.utils.set_z3_leaf_modules` leaves on a module.
    whole = [getattr(layer, "_z3_leaf", False) for layer in layers]
    if not whole or not all(whole):
        raise UnsupportedError(
            f"{name} with ZeRO stage 3 gathers weights at each call of a linear, and ranks with other batches make "
            "other calls; let it gather a decoder layer as one, by deepspeed.utils.set_z3_leaf_modules(model, "
            "[the class of the layers]) where the model is made, or use FSDP2 by ModelParallelStrategy, or ZeRO stage 1"
        )
    for method in methods:
        if method is None:
            continue
        route = route_of(method, num_layers)
        if any(layer.adds for layer in route) or any(
            one.queries is not None or one.encoder for one in selections([route])
        ):
            raise UnsupportedError(
                f"{name} with ZeRO stage 3 gathers weights where they are used, and {method} uses some outside the "
                "decoder layers, on a rank whose batch asks for it; use FSDP2 by ModelParallelStrategy, or ZeRO stage 1"
            )
