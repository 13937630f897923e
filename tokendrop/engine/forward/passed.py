"""What reaches a layer beside hidden states and a cache: other sequences, and what layers hand to one another.

Shape letters: T tokens.
"""

from collections.abc import MutableMapping
from typing import Any

from torch import Tensor

from tokendrop.engine.forward.arguments import runs_all
from tokendrop.engine.forward.calls import Site
from tokendrop.engine.model.decoder import attention_of
from tokendrop.engine.plan.plan import Span
from tokendrop.errors import UnsupportedError

OTHERS = ("encoder_hidden_states", "memory")  # rows of a sequence that is not the layer's
_READS = {"prev_topk_indices": "skip_topk"}  # an argument, and what is False of an attention that does not read it


def check_passed(site: Site, named: dict[str, Any], passed: list[tuple[Tensor, Span]], span: Span) -> None:
    """Refuse arguments whose rows are not those of the layer's hidden states, where it does not run on all of these.

    Args:
        site: the layer.
        named: its arguments for all tokens.
        passed: what layers before it returned beside their hidden states, and in which span.
        span: the layer's.

    Raises:
        UnsupportedError: cross-attention, what layers hand to one another, positions counted from the rows there are.
    """
    for name, value in named.items():
        given = (before for found, before in passed if found is value)
        if any(not _same_rows(before, span) for before in given) and _reads(site, name):
            raise UnsupportedError(
                f"{_said(site)} takes {name!r}, which an earlier layer returned for the rows that computed there; let "
                "both be in one range of layers, of one task, or choose layers of which neither drops"
            )
        if name in OTHERS and value is not None and not _whole(span):
            raise UnsupportedError(
                f"{_said(site)} attends to {name!r}, rows of another sequence, which cannot be told from its own; use "
                "a decoder without cross-attention"
            )
    _check_containers(site, named, span)
    _check_temperature(site, span)


def passed_on(site: Site, named: dict[str, Any], span: Span, rest: tuple[Any, ...] | None) -> list[tuple[Tensor, Span]]:
    """What a layer that has run returned beside its hidden states, with its span.

    Args:
        site: the layer.
        named: its arguments for all tokens.
        span: the layer's.
        rest: of what it returned.

    Raises:
        UnsupportedError: it wrote keys and values, or the like, into an argument, for rows that are not all.
    """
    _check_containers(site, named, span)
    return [(one, span) for one in rest or () if isinstance(one, Tensor)]


def _check_containers(site: Site, named: dict[str, Any], span: Span) -> None:
    # A dict through which layers hand keys and values on.
    for name, value in named.items():
        if isinstance(value, MutableMapping) and not _whole(span) and any(map(_has_tensor, value.values())):
            raise UnsupportedError(
                f"{_said(site)} takes {name!r}, a {type(value).__name__} of tensors, in which layers hand on what they "
                "computed, and other layers have other rows; choose layers that neither write nor read it, or a "
                "decoder whose layers share no keys and values"
            )


def _has_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, tuple | list) and any(map(_has_tensor, value)))


def _check_temperature(site: Site, span: Span) -> None:
    # The queries' scale 1 + c log(floor((position + 1) / floor_scale) + 1), by the number of a row among those there.
    attention: Any = attention_of(site.layer)
    counts = getattr(attention, "attn_temperature_tuning", False) and not getattr(attention, "use_rope", True)
    least = getattr(attention, "floor_scale", 0)
    if counts and site.shape[1] >= least and not _whole(span):
        raise UnsupportedError(
            f"{_said(site)} scales queries by positions from {least} on, which it counts from the rows that compute, "
            f"and there are {site.shape[1]} tokens; set attn_temperature_tuning=False, or leave the layer out"
        )


def _whole(span: Span) -> bool:
    return len(span.groups) == 1 and runs_all(span.groups[0])


def _same_rows(before: Span, span: Span) -> bool:
    # Those of one group are the same in each layer of its span.
    return (before is span and len(span.groups) == 1) or (_whole(before) and _whole(span))


def _reads(site: Site, name: str) -> bool:
    return getattr(attention_of(site.layer), _READS.get(name, ""), True)


def _said(site: Site) -> str:
    return f"layer {site.index} ({type(site.layer).__name__})"
