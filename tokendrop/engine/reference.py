"""The definition of routing: the same roles executed densely with masks. Slow, and short enough to read.

Shape letters: B batch, T tokens, D hidden, L layers.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tokendrop.engine.forward.attention_rows import caught_attention, probabilities
from tokendrop.engine.model.context import keys_values
from tokendrop.engine.model.decoder import LayerSpec, find_layers, layer_specs, sees_both_sides
from tokendrop.engine.model.ffn import ffn_of
from tokendrop.engine.model.sets import make_sets
from tokendrop.engine.model.swap import restore
from tokendrop.engine.model.vision import Encoder, Seen
from tokendrop.engine.reference_parts import own_hooks
from tokendrop.layout import IGNORED, TokenLayout
from tokendrop.roles import (
    Attention,
    Encoded,
    LayerRoute,
    Merge,
    Method,
    Queries,
    Role,
    Route,
    Scoring,
    Select,
    selections,
)


@contextmanager
def reference(
    model: nn.Module,
    methods: Mapping[str | None, Method],
    layout: TokenLayout,
    sets: Sequence[Any] = (),
    names: Mapping[str | None, str] | None = None,
    layers: str | None = None,
    step: tuple[int, int] = (0, 0),
) -> Generator[None]:
    """Run the forwards of an untouched model inside under the roles of `methods`, densely.

    In each layer every row computes; BYPASS and GONE columns are masked; then rows that are not ACTIVE get their
    input back, which is also the frozen state that CONTEXT keys and values come from in the next layer. ATTEND rows
    compute, and what the FFN gives is zero for them.

    Args:
        model: an untouched model.
        methods: task -> method.
        layout: of the (B, T) tokens that run inside.
        sets: image-only projections and router of each layer, as `handle.layers`; by default the text's, and the
            routers that `apply` would make.
        names: task -> projection set, as `handle.names`.
        layers: dotted path of the decoder's layer list.
        step: the optimiser step and the micro-batch.

    Source: ours.
    """
    found = find_layers(model, layers)[1]
    specs = layer_specs(found)
    names = names or {}
    dense = (LayerRoute(),) * len(found)
    by_task = {task: method.route(len(found)) for task, method in methods.items()}
    routes = [by_task.get(task, dense) for task in layout.tasks]
    sets = sets or list(make_sets(found, specs, methods, {}))
    roles = _Roles(routes, layout, step, sets)
    with ExitStack() as stack:
        if looked := {index for select in selections(routes) for index in select.encoder}:
            roles.encoder = Encoder(model, looked)
            roles.encoder.watch(lambda: roles.seen)
            stack.callback(lambda watched: [restore(one) for one in watched], roles.encoder.watched)
        for index, (layer, spec) in enumerate(zip(found, specs, strict=True)):
            # Before those of the roles: what a role leaves out has no parts of its own.
            own = [
                (i, {part: sets[index][names[task]][part] for part in routes[i][index].separate})
                for i, task in enumerate(layout.tasks)
                if routes[i][index].separate and task in names
            ]
            for hook in own_hooks(layer, spec, layout.image, own) if own else ():
                stack.callback(hook.remove)
            for hook in _hooks(layer, spec, partial(roles.of, index, layer, spec), roles):
                stack.callback(hook.remove)
        yield


class _Roles:
    """The role of each token in each layer of a forward."""

    def __init__(self, routes: list[Route], layout: TokenLayout, step: tuple[int, int], sets: Sequence[Any]) -> None:
        self.routes, self.layout, self.step, self.sets = routes, layout, torch.tensor(step), sets
        self.scale = torch.ones(layout.image.shape)
        self.alive: list[list[int]] = []
        self.kept: list[list[int]] = []
        self.inputs: list[tuple[nn.Module, LayerSpec, Tensor, dict[str, Any]]] = []
        self.encoder: Encoder | None = None
        self.seen: Seen = {}
        self.places: list[list[int]] = []

    def of(self, index: int, layer: nn.Module, spec: LayerSpec, states: Tensor, named: dict[str, Any]) -> Any:
        """(B, T) roles in layer `index`, whose input is `states` (B, T, D) and `named`; and these states, merged."""
        self.inputs[index:] = [(layer, spec, states, named)]
        if index == 0:
            self.alive = [row.nonzero().flatten().tolist() for row in self.layout.image]
            self.kept = [[] for _ in self.routes]
            self.places = [list(range(row.numel())) for row in self.layout.image]
        roles, rows = torch.zeros(self.layout.image.shape, dtype=torch.int64), list(states)
        self.scale = torch.ones(self.layout.image.shape)
        for sample, route in enumerate(self.routes):
            select = route[index].select
            if select is not None and (index == 0 or route[index - 1].select != select):
                self.kept[sample] = []
                for number, tokens in self._packs(sample):
                    rows[sample] = self._select(sample, select, states, number, tokens, rows[sample])
                if route[index].image is Role.GONE:
                    self.alive[sample] = self.kept[sample]
            roles[sample, self.layout.image[sample]] = int(route[index].image)
            if select is not None:
                roles[sample, self.kept[sample]] = int(Role.ACTIVE)
        self.places = [self._places(sample, index, roles[sample].tolist()) for sample in range(len(roles))]
        return roles, torch.stack(rows)

    def _places(self, sample: int, index: int, roles: list[int]) -> list[int]:
        # For each token, the one of its sample whose place it has: itself, or, numbered anew, by its rank.
        padding, places = self.layout.padding, list(range(len(roles)))
        for _, tokens in self._packs(sample) if self.routes[sample][index].renumber else ():
            real = [t for t in tokens if padding is None or padding[sample, t]]
            for t, place in zip([t for t in real if roles[t] == Role.ACTIVE], real, strict=False):
                places[t] = place
        return places

    def turned(self, named: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a layer, rotary tables by the places of the layer that ran last or runs now."""
        at, tokens = torch.tensor(self.places), torch.arange(self.layout.image.shape[1])
        if torch.equal(at, tokens.expand_as(at)):
            return named
        pairs = {name: one for name, one in named.items() if isinstance(one, tuple) and len(one) == 2}
        rows = torch.arange(len(at))[:, None]
        return named | {n: tuple(x.expand(len(at), -1, -1)[rows, at] for x in one) for n, one in pairs.items()}

    def _packs(self, sample: int) -> list[tuple[int, list[int]]]:
        # The number in the batch and the tokens of each packed sample of a row; without packs, of the row.
        layout, (batch, tokens) = self.layout, self.layout.image.shape
        if layout.packs is None:
            return [(sample, list(range(tokens)))]
        real = [[layout.padding is None or bool(layout.padding[b, t]) for t in range(tokens)] for b in range(batch)]
        names = [sorted({int(layout.packs[b, t]) for t in range(tokens) if real[b][t]}) for b in range(batch)]
        of = [t for t in range(tokens) if real[sample][t]]
        first = sum(map(len, names[:sample]))
        return [
            (first + at, [t for t in of if int(layout.packs[sample, t]) == name])
            for at, name in enumerate(names[sample])
        ]

    def _select(
        self, sample: int, select: Select, states: Tensor, number: int, tokens: list[int], row: Tensor
    ) -> Tensor:
        alive = [token for token in self.alive[sample] if token in tokens]
        candidates = torch.zeros_like(self.layout.image[sample])
        candidates[alive] = True
        one, looks = torch.tensor([sample]), self._attention(sample, select.queries, tokens)
        encoded = None
        if select.encoder and self.encoder is not None:
            encoded = self.encoder.encoded(self.seen, select.encoder, self.layout.image).of(one)
            encoded = Encoded(encoded[0][:, :, tokens], encoded[1][:, :, tokens], encoded[2][:, tokens])
        router = self.sets[select.layer]["router"](states[one])[:, tokens] if select.learned else None
        count = select.count(int(self.layout.image[sample, tokens].sum()))
        looks = torch.tensor([count]), looks, encoded, router
        states, candidates = states[one][:, tokens], candidates[None, tokens]
        scoring = Scoring(states, candidates, torch.tensor([number]), select.layer, select.seed, self.step, *looks)
        scores = dict(zip(tokens, select.score(scoring)[0].tolist(), strict=True))
        kept = sorted(sorted(alive, key=lambda token: (-scores[token], token))[:count])
        self.kept[sample] = self.kept[sample] + kept
        places = [tokens.index(token) for token in kept]
        if router is not None:
            at = torch.tensor([sample]), torch.tensor(kept, dtype=torch.int64)
            self.scale = self.scale.to(router.dtype).index_put(at, router[0, places])
        if select.merge is None:
            return row
        chosen = torch.isin(torch.arange(len(tokens)), torch.tensor(places, dtype=torch.int64))[None]
        merged = _merging(select.merge(scoring, chosen)).to(states.dtype) @ states[0]
        return row.index_copy(0, torch.tensor(tokens), merged)

    @torch.no_grad()
    def _attention(self, sample: int, queries: Queries | None, tokens: list[int]) -> Attention | None:
        if queries is None:
            return None
        layer, spec, states, named = self.inputs[queries.layer]
        named = self.turned(named)
        live = ~self.layout.image
        for row, alive in zip(live, self.alive, strict=True):
            row[alive] = True
        both = sees_both_sides(layer)
        mask = _mask(named.get("attention_mask"), live, ~live, states, spec.backend(layer), not both)
        named = named | {"attention_mask": mask, spec.cache or "": None}
        rows = torch.tensor(self._rows(sample, queries.rows, tokens), dtype=torch.int64)
        live = live & torch.isin(torch.arange(live.shape[1]), torch.tensor(tokens))
        caught = caught_attention(lambda: type(layer).forward(layer, states, **named))
        seen, values = probabilities(caught.logits, live), caught.values
        if values is None:
            values = keys_values(layer, type(layer).forward, states, named, spec.cache or "")[1]
        valid = torch.ones(1, len(rows), dtype=torch.bool)
        seen, values = seen[sample : sample + 1, :, rows][..., tokens], values[sample : sample + 1, :, tokens]
        return Attention(seen, valid, values)

    def _rows(self, sample: int, which: str, tokens: list[int]) -> list[int]:
        layout = self.layout
        real = [t for t in tokens if layout.padding is None or layout.padding[sample, t]]
        labelled = {t: layout.labels is not None and int(layout.labels[sample, t]) != IGNORED for t in tokens}
        images = [t for t in tokens if layout.image[sample, t]]
        if which == "answer":
            rows = [t for t, after in pairwise(tokens) if labelled[after] and not labelled[t]]
        else:
            rows = [t for t in real if t > max(images, default=-1) and not labelled[t]]
        return rows or real[-1:]


def _merging(merge: Merge) -> Tensor:
    # (T, T): row t says what becomes of token t.
    each = torch.eye(merge.into.shape[1])
    leaves = merge.into[0] != torch.arange(len(each))
    return each.where(leaves[:, None], each[merge.into[0]].T * merge.weight[0])


def _hooks(layer: nn.Module, spec: LayerSpec, roles_of: Callable[..., Any], state: _Roles) -> Iterator[Any]:
    entered: list[Tensor] = []
    ffn = ffn_of(layer)

    def before(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        states, named = spec.bind(args, kwargs)
        roles, states = roles_of(states, named)
        attend, hidden = roles == Role.ATTEND, (roles == Role.BYPASS) | (roles == Role.GONE)
        active = attend | (roles == Role.ACTIVE)
        entered[:] = [states, active, attend]
        named = state.turned(named)
        mask, causal = named.get("attention_mask"), not sees_both_sides(module)
        named["attention_mask"] = _mask(mask, active, hidden, states, spec.backend(module), causal)
        return (states,), named

    def after(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        before, active, _ = entered
        states = torch.where(active[:, :, None], out[0] if isinstance(out, tuple) else out, before)
        if bool((state.scale != 1).any()):
            states = before + state.scale[:, :, None] * (states - before)
        return (states, *out[1:]) if isinstance(out, tuple) else states

    def skip(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        made = out[0] if isinstance(out, tuple) else out
        made = made.masked_fill(entered[2].view(*made.shape[:-1], 1), 0)
        return (made, *out[1:]) if isinstance(out, tuple) else made

    if ffn is not None:
        yield ffn.register_forward_hook(skip)
    yield layer.register_forward_pre_hook(before, with_kwargs=True)
    yield layer.register_forward_hook(after)


def _mask(mask: Tensor | None, active: Tensor, hidden: Tensor, states: Tensor, backend: str, causal: bool) -> Tensor:
    tokens = states.shape[1]
    if mask is None:
        every = torch.ones(tokens, tokens, dtype=torch.bool)
        mask = (every.tril() if causal else every).expand(len(states), 1, -1, -1)
        if backend == "eager":
            mask = torch.zeros(mask.shape, dtype=states.dtype).masked_fill(~mask, torch.finfo(states.dtype).min)
    # A row whose output is thrown away sees itself, so that its softmax stays finite.
    unused = torch.eye(tokens, dtype=torch.bool) & ~active[:, None, :, None]
    seen = ~hidden[:, None, None, :] | unused
    return (mask & seen) | unused if mask.dtype == torch.bool else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)
