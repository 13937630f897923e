"""What a step that trains is likely not to do as its user thinks, said once.

Shape letters: B batch, T tokens.
"""

from collections.abc import Callable, Iterator, Sequence

from torch import nn

from tokendrop.engine.model.linears import base_linear
from tokendrop.errors import LayoutWarning, NoEffectWarning
from tokendrop.layout import TokenLayout
from tokendrop.roles import Role, Route, selections


def doubts(
    layout: TokenLayout, routes: Callable[[], Sequence[Route]], layers: nn.ModuleList, added: nn.ModuleList
) -> Iterator[tuple[str, str, type[Warning]]]:
    """Kind, message and category of each doubt about a step that trains.

    Args:
        layout: of the batch.
        routes: gives those of its samples; they take a while, and most steps raise no doubt that needs them.
        layers: the decoder's.
        added: what `apply` added to each of them.
    """
    if layout.labels is None and (unknown := _unknown_without_labels(routes())):
        yield "labels", unknown, LayoutWarning
    if frozen := _frozen(layers, added):
        yield "frozen", frozen, NoEffectWarning


def _unknown_without_labels(routes: Sequence[Route]) -> str:
    unknown = []
    if any(route[-1].image in (Role.CONTEXT, Role.GONE) for route in routes):
        unknown.append("whether image rows are trained that end CONTEXT or GONE, with a stale state")
    if any(select.queries is not None for select in selections(routes)):
        unknown.append("where answers begin, so that the attention of the last row scores instead")
    if not unknown:
        return ""
    return (
        f"the layout has no labels, and the model is in training: nobody knows {'; nor '.join(unknown)}. Give "
        "TokenLayout labels=, (B, T) and unshifted, -100 where nothing is trained"
    )


def _frozen(layers: nn.ModuleList, added: nn.ModuleList) -> str:
    # Freezing all by hand is a choice; `get_peft_model` does it to whatever is no adapter, and says nothing.
    if any(p.requires_grad for p in added.parameters()):
        return ""
    names = [name for name, _ in added.named_parameters()]
    if not names or all(base_linear(module) is module for module in layers.modules()):
        return ""
    return (
        f"all {len(names)} parameters that apply added, such as tokendrop.layers.{names[0]}, are frozen, as "
        "get_peft_model leaves what is no adapter: image tokens use them and nothing trains them. Call get_peft_model "
        "before apply, or name them in modules_to_save (docs/saving.md), or use a method that adds none"
    )
