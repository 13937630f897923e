"""Whether a dropped model does what its methods' definition says, on somebody's own batch.

Shape letters: B batch, T tokens.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tokendrop.analysis.subject import Subject
from tokendrop.engine.handle import Handle
from tokendrop.engine.inject import apply
from tokendrop.engine.model.attention import seen_kernels
from tokendrop.engine.model.decoder import find_layers
from tokendrop.engine.reference import reference
from tokendrop.engine.support import Methods
from tokendrop.errors import TokenDropError, UnsupportedError
from tokendrop.layout import TokenLayout
from tokendrop.synergy.evaluate import gradients, preserved, shared_parameters

LEAST = 1e-4  # of the largest gradient, what float32 may differ by
ROUNDINGS = 8  # that lower precisions may


@contextmanager
def under(model: nn.Module, methods: Methods | None, options: Mapping[str, Any]) -> Generator[Handle | None]:
    """The model under methods inside, in training also where its layers are in eval mode; and as it was again.

    Args:
        model: an untouched one.
        methods: as `apply` takes them; None leaves it untouched.
        options: of `apply`.
    """
    drop = None if methods is None else apply(model, methods, **options)
    try:
        if drop is not None:
            drop.in_training = True
        yield drop
    finally:
        if drop is not None:
            drop.remove()


def check_equal(
    subject: Subject, batch: Any, layout: TokenLayout, methods: Methods, options: Mapping[str, Any]
) -> float:
    """The largest difference of a batch's gradients to those of `engine.reference`, over the largest gradient.

    Both in eval mode, without dropout, from the same random state, and compared also by their loss. The reference
    takes masks, and runs sdpa where the model runs another kernel.

    Args:
        subject: its model is untouched, and so again afterwards.
        batch: one, on the model's device.
        layout: of its (B, T) tokens.
        methods: as `apply` takes them.
        options: of `apply`.

    Raises:
        UnsupportedError: they are not equal, or the reference cannot run such a model.
        TaskLossError: a loss of which nothing can be said.

    Source: ours.
    """
    model, name = subject.model, ", ".join(sorted({str(task) for task in layout.tasks}))
    with evaluated(model), _watched(model, options.get("layers")) as seen:
        parameters: dict[str, nn.Parameter] = shared_parameters(model)
        with under(model, methods, options) as drop:
            if drop is None:
                return 0.0
            parameters |= {f"tokendrop.layers.{name}": one for name, one in drop.layers.named_parameters()}
            with preserved(model), drop.layout(layout, step=(0, 0)):
                found = _measured(subject, batch, parameters, name)
            given = _by_task(drop, layout)
        try:
            with _by_default_on(subject.device), preserved(model), seen_kernels(model):
                where = layout if subject.device is None else layout.to(subject.device)
                with reference(model, given[0], where, list(drop.layers), given[1], options.get("layers")):
                    wanted = _measured(subject, batch, parameters, name)
        except TokenDropError:
            raise
        except Exception as error:
            raise UnsupportedError(
                f"the reference cannot run {type(model).__name__} on the first batch ({type(error).__name__}: "
                f"{error}), so that nothing says whether the dropped model is right; unchecked=True "
                "(--unchecked) measures it all the same"
            ) from error
    return _compared(model, methods, parameters, found, wanted, _tolerance(seen, subject.device))


def _compared(
    model: nn.Module,
    methods: Methods,
    parameters: Mapping[str, nn.Parameter],
    found: Sequence[Tensor],
    wanted: Sequence[Tensor],
    tolerance: float,
) -> float:
    largest = max(float(one.abs().max()) for one in wanted[1:] if one.numel())
    gaps = {
        name: float((a - b).abs().max()) / largest if largest else float((a - b).abs().max())
        for name, a, b in zip(parameters, found[1:], wanted[1:], strict=True)
        if a.numel()
    }
    at = max(gaps, key=lambda name: gaps[name])
    loss, expected = float(found[0]), float(wanted[0])
    if not (gaps[at] <= tolerance and abs(loss - expected) <= tolerance * max(1.0, abs(expected))):
        raise UnsupportedError(
            f"{methods} on {type(model).__name__} is not equal to the reference on the first batch: its loss is "
            f"{loss:.6g} against {expected:.6g}, and the gradient of {at!r} differs by {gaps[at]:.2g} of the largest, "
            f"where {tolerance:.2g} is allowed. Nothing is reported; tell us of it, with the model's config. "
            "unchecked=True (--unchecked) measures it all the same"
        )
    return gaps[at]


@contextmanager
def evaluated(model: nn.Module) -> Generator[None]:
    """The model in eval mode inside; then each module in its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _measured(subject: Subject, batch: Any, parameters: Mapping[str, nn.Parameter], name: str) -> list[Tensor]:
    # The loss, then the gradients; on the CPU, so that the device holds one set at a time.
    with torch.enable_grad():
        loss = subject.loss_of(batch)
        return [one.detach().double().cpu() for one in (loss, *gradients(loss, parameters, name))]


def _by_task(drop: Handle, layout: TokenLayout) -> tuple[dict[str | None, Any], dict[str | None, str]]:
    # A handle's key None serves whatever task; the reference asks by the batch's own names.
    keys = {task: drop.key_of(task) for task in layout.tasks}
    methods = {task: method for task, key in keys.items() if (method := drop.methods.get(key)) is not None}
    return methods, {task: drop.names[key] for task, key in keys.items() if key in drop.names}


def _by_default_on(device: torch.device | None) -> Any:
    # The reference makes its masks wherever tensors are made by default.
    return nullcontext() if device is None or device.type == "cpu" else device


@contextmanager
def _watched(model: nn.Module, layers: str | None) -> Generator[set[torch.dtype]]:
    # The precisions that a layer really computes in: under autocast its weights do not say.
    seen: set[torch.dtype] = set()

    def see(module: nn.Module, args: Any, out: Any) -> None:
        if isinstance(out, Tensor) and out.is_floating_point():
            seen.add(out.dtype)

    hooks = [module.register_forward_hook(see) for module in find_layers(model, layers)[1][0].modules()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _tolerance(seen: set[torch.dtype], device: torch.device | None) -> float:
    coarsest = max((torch.finfo(dtype).eps for dtype in seen), default=0.0)
    if device is not None and device.type != "cpu":
        coarsest = max(coarsest, 2.0**-10)  # TF32, which no tensor's dtype tells
    return max(LEAST, ROUNDINGS * coarsest)
