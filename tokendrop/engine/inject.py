"""Apply methods to a model: all checks first, then a class swap.

Shape letters: T tokens, L layers.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tokendrop.engine.auto import Layouts, check_layouts, enter_own
from tokendrop.engine.forward import head
from tokendrop.engine.forward.binding import Binding
from tokendrop.engine.forward.groups import run
from tokendrop.engine.forward.span import WORK, call
from tokendrop.engine.forward.state import frames
from tokendrop.engine.handle import Handle
from tokendrop.engine.model import projections, sets
from tokendrop.engine.model.decoder import (
    LayerSpec,
    check_module,
    deepstack_layers,
    find_layers,
    is_sharded,
    layer_spec,
    uncompiled,
)
from tokendrop.engine.model.saved import notice_saving, take_saved
from tokendrop.engine.model.swap import Swapped, check_forward, reach, reached, swap
from tokendrop.engine.model.vision import Encoder, Seen
from tokendrop.engine.model.weights import check_one_device
from tokendrop.errors import AppliedError, MethodError, UnsupportedError, check_flag, check_integer
from tokendrop.roles import Method, Role, selections

Methods = Method | Mapping[str, Method | None]


class _RoutedLayer(Swapped):
    """Mixin of a decoder layer whose tokens are routed."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return call(self, self._proceed, args, kwargs)

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
    check_layouts(layout)
    if any(isinstance(module, Handle) for module in model.modules()):
        raise AppliedError(f"{type(model).__name__} is dropped already; call remove() on its handle first")
    check_integer("multiple", multiple, 1)
    if isinstance(model, nn.ModuleList | nn.Sequential):
        raise UnsupportedError(
            f"{type(model).__name__} is a container whose every child counts as a part of it; apply to the module that "
            "holds it, or run its layers with DropLayers"
        )
    path, found = find_layers(model, layers)
    _check_free(model, path, found)
    spec = layer_spec(found[0], type(found[0]))
    given = {task: method for task, method in checked.items() if method is not None}
    check_support(model, found, spec, given)
    check_one_device(found, path)
    for index, layer in enumerate(found):
        check_forward(layer, f"layer {index} of {path!r}")
    projections.check(found, spec)
    headed = head.find_head(model) if labelled_logits else None
    selects = selections(method.route(len(found)) for method in given.values())
    looked = {index for select in selects for index in select.encoder}
    encoder = Encoder(model, looked) if looked else None
    added = sets.make_sets(found, spec, given, sets.set_names(given))
    take_saved(model, added)
    handle = Handle(model, path, spec, checked, multiple, added, labelled_logits, encoder)
    if encoder is not None:
        encoder.watch(partial(_seen, handle.key))
    for index, layer in enumerate(found):
        layer.__dict__["_tokendrop"] = Binding(handle, index, spec)
        swap(layer, _RoutedLayer)
    if handle.splits:
        projections.settle(found, spec)
    if headed is not None:
        head.inject(*headed, handle.key)
    model.tokendrop = handle
    if layout is not None:
        enter_own(model, handle, layout)
    return handle


def _check_free(model: nn.Module, path: str, found: nn.ModuleList) -> None:
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
    if hasattr(model, "tokendrop"):
        raise AppliedError(f"{type(model).__name__} has an attribute 'tokendrop' of its own; rename it")


def _seen(key: str) -> Seen | None:
    frame = (frames(key) or [None])[-1]
    return None if frame is None else frame.seen


def check_methods(methods: Methods) -> dict[str | None, Method | None]:
    """Methods by task name; the key None serves whatever task.

    Raises:
        MethodError: no methods, or something that is none.
    """
    if isinstance(methods, Method) and not isinstance(methods, type):
        if methods.separate == "per-task":
            raise MethodError(f"{methods} has separate='per-task' and no task; give a mapping of task name to method")
        return {None: methods}
    if not isinstance(methods, Mapping) or not methods:
        raise MethodError(f"methods: expected a method, or a mapping of task name to method; found {methods!r}")
    for task, method in methods.items():
        if not isinstance(task, str) or not task or "." in task:
            raise MethodError(f"methods: expected task names without dots; found {task!r}")
        if method is not None and (not isinstance(method, Method) or isinstance(method, type)):
            raise MethodError(f"methods[{task!r}]: expected a method such as HiMix(), or None; found {method!r}")
    return dict(methods)


def check_support(
    model: nn.Module, layers: nn.ModuleList, spec: LayerSpec, methods: Mapping[str | None, Method]
) -> None:
    """Refuse roles and projections that such layers cannot have.

    Raises:
        UnsupportedError: with the reason, and what to use instead.
    """
    deepstack = deepstack_layers(model)
    for method in methods.values():
        route = method.route(len(layers))
        context = any(layer.image is Role.CONTEXT for layer in route)
        if context and (refusal := spec.context_refusal(layers[0])):
            raise UnsupportedError(f"{method} makes image tokens CONTEXT, but {refusal}; or use HMGen")
        looks = any(layer.select is not None and layer.select.queries is not None for layer in route)
        if looks and (refusal := spec.context_refusal(layers[0])):
            raise UnsupportedError(
                f"{method} scores by attention, but {refusal}; or use a score that needs none, such as Drop with 'norm'"
            )
        if method.separate != "none" and (refusal := spec.separate_refusal()):
            raise UnsupportedError(f"{method} needs image-only projections, but {refusal}; use separate='none'")
        learned = any(layer.select is not None and layer.select.learned for layer in route)
        adds = learned or method.separate != "none"
        if adds and any(isinstance(module, DistributedDataParallel) for module in model.modules()):
            raise UnsupportedError(
                f"{method} adds parameters, whose gradients DistributedDataParallel would not average, since it is "
                "there already; apply it to the module inside, before DistributedDataParallel is made"
            )
        if adds and is_sharded(model):
            raise UnsupportedError(
                f"{method} adds parameters, and {type(model).__name__} is sharded already; apply it before fully_shard"
            )
        for index in range(min(deepstack, len(layers) - 1)):
            if route[index].image is not Role.ACTIVE and route[index + 1].image is not Role.ACTIVE:
                raise UnsupportedError(
                    f"{method} would be compact across layers {index} and {index + 1}, between which "
                    f"{type(model).__name__} adds visual features at full length (deepstack); start at layer "
                    f"{deepstack}: layers='{deepstack}:'"
                )
