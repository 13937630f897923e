"""Apply methods to a model: all checks first, then a class swap.

Shape letters: T tokens, L layers.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from tokendrop.engine.auto import Layouts, check_layouts, enter_own
from tokendrop.engine.forward import deepstack, head, routers
from tokendrop.engine.forward.binding import Binding
from tokendrop.engine.forward.groups import run
from tokendrop.engine.forward.order import ordered
from tokendrop.engine.forward.span import WORK, call
from tokendrop.engine.forward.state import frames
from tokendrop.engine.handle import Handle
from tokendrop.engine.model import ffn, own, projections, sets
from tokendrop.engine.model.attention import follows, settle, unseen
from tokendrop.engine.model.decoder import (
    LayerSpec,
    attention_of,
    check_module,
    find_layers,
    layer_specs,
    uncompiled,
)
from tokendrop.engine.model.saved import notice_saving, take_saved
from tokendrop.engine.model.swap import Swapped, reach, reached, swap
from tokendrop.engine.model.vision import Encoder, Seen
from tokendrop.engine.model.weights import check_one_device
from tokendrop.engine.support import Methods, attending, check_methods, check_shared, check_support, weighing
from tokendrop.errors import AppliedError, UnsupportedError, check_flag, check_integer
from tokendrop.roles import Method, selections
from tokendrop.routes import route_of


class _RoutedLayer(Swapped):
    """Mixin of a decoder layer whose tokens are routed."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return call(self, self._proceed, *ordered(self, args, kwargs))

    def _proceed(self, *args: Any, **kwargs: Any) -> Any:
        if "forward" in self.__dict__ and WORK in kwargs:
            return reach(self, super().__call__, args, kwargs)
        return super().__call__(*args, **kwargs)

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        self._tell()
        return super().named_modules(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._tell()
        return super().state_dict(*args, **kwargs)

    def _tell(self) -> None:
        binding = self.__dict__["_tokendrop"]
        if binding.index == 0:
            notice_saving(binding.handle, binding.handle.layers)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        reached(self)
        forward, work = self._tokendrop_base.forward, kwargs.pop(WORK, None)
        if work is None:
            return forward(self, *args, **kwargs)
        return run(self, forward, args, kwargs, work)


def apply(
    model: nn.Module,
    methods: Methods,
    layers: str | None = None,
    multiple: int = 64,
    labelled_logits: bool = False,
    layout: Layouts | None = None,
) -> Handle:
    """Make the image tokens of a model skip work; call it before `fully_shard`, `torch.compile` or DDP.

    Image-only projections are copies of the text's. Where `from_pretrained` loaded the model from a folder into which a
    dropped model was saved, they and routers are those of the folder.

    Args:
        model: any module with one decoder.
        methods: a method for whatever task, or task name -> method; None runs a task dense.
        layers: dotted path of the decoder's layer list, where inspection finds several.
        multiple: row counts are rounded up to it (or to T / 16 where that is less), so that shapes stay few.
        labelled_logits: run the output head and the loss of a Hugging Face model on the N rows with a label only; the
            logits of a forward with labels are then (1, N, V).
        layout: where no layout is entered, "auto" makes one from the arguments of each outermost forward or `generate`
            of the model, as `tokendrop.callbacks.batch.batch_layout` does of a batch; a function makes it from
            (args, kwargs), None runs dense. The model takes `task`, `image_mask` and `segments` beside its own then.

    Returns:
        The handle, which is also `model.tokendrop`.

    Raises:
        AppliedError: the model, or a part of it, is dropped already.
        DecoderError: no decoder, or several.
        LayerRangeError: a method's range does not fit the decoder, or the vision encoder that it looks at.
        MethodError: no methods, or something that is no method; a layout that is none of these.
        UnsupportedError: a role or projections that such layers cannot have; no vision encoder, and a method needs one.

    Example:
        >>> import tokendrop as td
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
        ...                      num_attention_heads=2)
        >>> drop = td.apply(LlamaForCausalLM(config), td.HiMix())
        >>> drop.path
        'model.layers'

    Source: ours.
    """
    checked = check_methods(methods)
    check_module(model)
    model = uncompiled(model)
    check_flag("labelled_logits", labelled_logits)
    check_integer("multiple", multiple, 1)
    check_layouts(layout)
    path, found = _undropped_layers(model, layers)
    specs = layer_specs(found)
    given = {task: method for task, method in checked.items() if method is not None}
    headed = head.find_head(model) if labelled_logits else None
    attends, encoder, added = prepared(model, path, found, specs, given)
    take_saved(model, added)
    handle = Handle(model, path, specs, checked, multiple, added, labelled_logits, encoder)
    try:
        _swap(handle, found, headed, attends)
        if layout is not None:
            enter_own(model, handle, layout)
    except BaseException:
        handle.undo()  # somebody else's class may refuse to be derived from, or its instances to change
        raise
    return handle


def prepared(
    model: nn.Module,
    path: str,
    layers: nn.ModuleList,
    specs: Sequence[LayerSpec],
    methods: Mapping[str | None, Method],
) -> tuple[set[int], Encoder | None, nn.ModuleList]:
    """What methods need of a model, which stays as it is: all checks of `apply` that ask what a method does.

    Args:
        model: any module with one decoder.
        path: dotted path of its layers.
        layers: the decoder's L layers.
        specs: how they are made.
        methods: by task.

    Returns:
        The layers whose FFN is swapped, the vision encoder where it is looked at, and copies of what is added.

    Raises:
        LayerRangeError: a range that does not fit the decoder, or the vision encoder that is looked at.
        UnsupportedError: a role or parts that such layers cannot have; no vision encoder, and a method needs one.
    """
    check_support(model, layers, specs, methods)
    check_one_device(layers, path)
    projections.check(layers, specs, own.splits(methods.values(), len(layers)))
    kinds = attending, weighing
    attends = {index for method in methods.values() for kind in kinds for index in kind(method, len(layers))}
    for index in attends:
        ffn.check(layers[index], f"decoder layer {index}")
    selects = selections(route_of(method, len(layers)) for method in methods.values())
    looked = {index for select in selects for index in select.encoder}
    encoder = Encoder(model, looked) if looked else None
    added = sets.make_sets(layers, specs, methods, sets.set_names(methods))
    own.check(layers, specs, added)
    return attends, encoder, added


def _undropped_layers(model: nn.Module, path: str | None) -> tuple[str, nn.ModuleList]:
    if any(isinstance(module, Handle) for module in model.modules()):
        raise AppliedError(f"{type(model).__name__} is dropped already; call remove() on its handle first")
    if isinstance(model, nn.ModuleList | nn.Sequential):
        raise UnsupportedError(
            f"{type(model).__name__} is a container whose every child counts as a part of it; apply to the module that "
            "holds it, or run its layers with DropLayers"
        )
    path, found = find_layers(model, path)
    if any(uncompiled(layer) is not layer for layer in found):
        raise UnsupportedError(
            f"the layers of {path!r} are compiled one by one; call apply before torch.compile(layer), or compile them "
            "in place by layer.compile()"
        )
    if any("_tokendrop" in layer.__dict__ for layer in found):
        raise AppliedError(
            f"the layers of {path!r} are dropped already, through another module; remove that first, by "
            "tokendrop.handle(model).remove()"
        )
    check_shared(found, path)
    if hasattr(model, "tokendrop"):
        raise AppliedError(f"{type(model).__name__} has an attribute 'tokendrop' of its own; rename it")
    return path, found


def _swap(handle: Handle, layers: nn.ModuleList, headed: tuple[nn.Module, nn.Module] | None, attends: set[int]) -> None:
    if handle.encoder is not None:
        handle.encoder.watch(partial(_seen, handle.key))
    for index, (layer, spec) in enumerate(zip(layers, handle.specs, strict=True)):
        swap(layer, _RoutedLayer)
        layer.__dict__["_tokendrop"] = Binding(handle, index, spec)
        attention = attention_of(layer)
        if attention is not None and unseen(attention) and follows(attention):
            settle(attention)
    if handle.splits:
        own.settle_all(layers, handle.layers)
    for index in attends:
        ffn.inject(layers[index])
    if headed is not None:
        head.inject(*headed, handle.key)
    routers.inject(handle.owner, handle.path, handle.key)
    deepstack.inject(handle.owner, handle.path, handle.key)
    handle.owner.tokendrop = handle


def _seen(key: str) -> Seen | None:
    frame = (frames(key) or [None])[-1]
    return None if frame is None else frame.seen


def handle(model: nn.Module) -> Handle:
    """The handle of a dropped model, also after `copy.deepcopy` or unpickling.

    Args:
        model: the module that was given to `apply`, one around it, or a part of it that holds its decoder.

    Raises:
        AppliedError: the model is not dropped.
    """
    check_module(model)
    for module in model.modules():
        if isinstance(module, Handle):
            return module
        # A part of a dropped model, also loaded by itself, holds layers that know their handle.
        binding = vars(module).get("_tokendrop")
        if isinstance(binding, Binding) and isinstance(binding.handle, Handle):
            return binding.handle
    raise AppliedError(f"{type(model).__name__} is not dropped; call tokendrop.apply on it first")
