"""The roles, selections and merges of the dense reference, token by token.

Shape letters: B batch, T tokens, D hidden.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tokendrop.engine.forward.attention_rows import caught_attention, probabilities
from tokendrop.engine.model.context import keys_values
from tokendrop.engine.model.decoder import LayerSpec, sees_both_sides
from tokendrop.engine.model.vision import Encoder, Seen
from tokendrop.layout import IGNORED, TokenLayout
from tokendrop.roles import Attention, Encoded, Merge, Queries, Role, Route, Scoring, Select


class Roles:
    """The role of each token in each layer of a forward."""

    def __init__(self, routes: list[Route], layout: TokenLayout, step: tuple[int, int], sets: Sequence[Any]) -> None:
        self.routes, self.layout, self.step, self.sets = routes, layout, torch.tensor(step), sets
        self.scale, self.weight = torch.ones(layout.image.shape), torch.ones(layout.image.shape)
        self.alive: list[list[int]] = []
        self.kept: list[list[int]] = []
        self.inputs: list[tuple[nn.Module, LayerSpec, Tensor, dict[str, Any]]] = []
        self.encoder: Encoder | None = None
        self.seen: Seen = {}
        self.places: list[list[int]] = []
        self.merged: dict[int, tuple[Tensor, Tensor, list[int]]] = {}
        self.shallow: dict[int, Tensor] = {}

    def of(self, index: int, layer: nn.Module, spec: LayerSpec, states: Tensor, named: dict[str, Any]) -> Any:
        """(B, T) roles in layer `index`, whose input is `states` (B, T, D) and `named`; and these states, merged."""
        self.inputs[index:] = [(layer, spec, states, named)]
        if index == 0:
            self.alive = [row.nonzero().flatten().tolist() for row in self.layout.image]
            self.kept = [[] for _ in self.routes]
            self.places = [list(range(row.numel())) for row in self.layout.image]
        roles, rows = torch.zeros(self.layout.image.shape, dtype=torch.int64), list(states)
        self.scale, self.weight = (torch.ones(self.layout.image.shape) for _ in range(2))
        for sample, route in enumerate(self.routes):
            select = route[index].select
            if select is not None and (index == 0 or route[index - 1].select != select):
                self.kept[sample], before, into = [], rows[sample], list(range(len(states[sample])))
                for number, tokens in self._packs(sample):
                    rows[sample] = self._select(sample, select, states, number, tokens, rows[sample], into)
                if select.fuse:
                    self.shallow[sample] = states[sample]
                if select.restore:
                    self.merged[sample] = before, rows[sample], into
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

    def restored(self, index: int, states: Tensor) -> Tensor:
        """The states behind layer `index`; where a range of merged tokens ends, each has the update of its target.

        Where one ends that fuses, each image token has r + W [y; x] + b: r is the state it has, x that at the entry,
        and y is r for a token that was kept and the mask token for another.
        """
        rows = list(states)
        for sample, route in enumerate(self.routes):
            last = index + 1 == len(route) or route[index + 1].select != route[index].select
            if (select := route[index].select) is not None and select.fuse and last:
                rows[sample] = self._fused(sample, self.sets[select.layer]["fusion"], rows[sample])
            if sample not in self.merged or not last:
                continue
            before, after, into = self.merged.pop(sample)
            for t, target in enumerate(into):
                if target != t or into.count(t) > 1:
                    rows[sample] = rows[sample].index_copy(
                        0, torch.tensor([t]), (before[t] + states[sample, target] - after[target])[None]
                    )
        return torch.stack(rows)

    def _fused(self, sample: int, fusion: Any, states: Tensor) -> Tensor:
        rows, weight = list(states), fusion.linear.weight.to(states.dtype)
        for t in self.alive[sample]:
            y = states[t] if t in self.kept[sample] else fusion.mask.to(states.dtype)
            rows[t] = states[t] + weight @ torch.cat([y, self.shallow[sample][t]]) + fusion.linear.bias.to(states.dtype)
        return torch.stack(rows)

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
        self, sample: int, select: Select, states: Tensor, number: int, tokens: list[int], row: Tensor, into: list[int]
    ) -> Tensor:
        alive = [token for token in self.alive[sample] if token in tokens]
        budgets = self._budgets(sample, select, tokens)
        scoring = self._scoring(sample, select, states, number, tokens, sum(count for _, count in budgets))
        scores = dict(zip(tokens, select.score(scoring)[0].tolist(), strict=True))
        best = sorted(alive, key=lambda token: (-scores[token], token))
        kept = sorted(t for part, count in budgets for t in [one for one in best if one in part][:count])
        self.kept[sample] = self.kept[sample] + kept
        places = [tokens.index(token) for token in kept]
        if scoring.router is not None:
            self._weigh(sample, select, dict(zip(tokens, scoring.router[0], strict=True)), alive, kept)
        if select.merge is None:
            return row
        chosen = torch.isin(torch.arange(len(tokens)), torch.tensor(places, dtype=torch.int64))[None]
        merge = select.merge(scoring, chosen)
        for token, target in zip(tokens, merge.into[0].tolist(), strict=True):
            into[token] = tokens[target]
        merged = _merging(merge).to(states.dtype) @ scoring.states[0]
        return row.index_copy(0, torch.tensor(tokens), merged)

    def _scoring(
        self, sample: int, select: Select, states: Tensor, number: int, tokens: list[int], count: int
    ) -> Scoring:
        one, candidates = torch.tensor([sample]), torch.zeros_like(self.layout.image[sample])
        candidates[self.alive[sample]] = True
        encoded = None
        if select.encoder and self.encoder is not None:
            encoded = self.encoder.encoded(self.seen, select.encoder, self.layout.image).of(one)
            encoded = Encoded(encoded[0][:, :, tokens], encoded[1][:, :, tokens], encoded[2][:, tokens])
        images, frames = self._frames(sample, tokens) if select.frames else (None, None)
        return Scoring(
            states=states[one][:, tokens],
            image=candidates[None, tokens],
            samples=torch.tensor([number]),
            layer=select.layer,
            seed=select.seed,
            step=self.step,
            counts=torch.tensor([count]),
            attention=self._attention(sample, select.queries, tokens),
            encoded=encoded,
            router=self.sets[select.layer]["router"](states[one])[:, tokens] if select.learned else None,
            text=torch.tensor([[t in self._text(sample, tokens) for t in tokens]]),
            images=images,
            frames=frames,
            most=count,
        )

    def _weigh(self, sample: int, select: Select, router: dict[int, Tensor], alive: list[int], kept: list[int]) -> None:
        # What a router gives each token, as a weight on its state or as a scale of its update.
        for t in alive if select.gate else kept:
            at = torch.tensor(sample), torch.tensor(t)
            if select.gate:
                self.weight = self.weight.to(router[t].dtype).index_put(at, 1 + select.gate * router[t].tanh())
            else:
                self.scale = self.scale.to(router[t].dtype).index_put(at, router[t])

    def _named(self, sample: int, tokens: list[int]) -> dict[int, tuple[int, int]]:
        # Of each image token the image, by the layout or by runs, and the frame.
        layout, run, named = self.layout, 0, {}
        for at, t in enumerate(tokens):
            run += not (at and tokens[at - 1] == t - 1 and layout.image[sample, t - 1])
            if layout.image[sample, t]:
                image = run if layout.images is None else int(layout.images[sample, t])
                named[t] = image, 0 if layout.frames is None else int(layout.frames[sample, t])
        return named

    def _frames(self, sample: int, tokens: list[int]) -> tuple[Tensor, Tensor]:
        named = self._named(sample, tokens)
        numbers = sorted({image for image, _ in named.values()})
        images = [numbers.index(named[t][0]) if t in named else -1 for t in tokens]
        return torch.tensor([images]), torch.tensor([[named.get(t, (0, 0))[1] for t in tokens]])

    def _budgets(self, sample: int, select: Select, tokens: list[int]) -> list[tuple[list[int], int]]:
        # The image tokens that share a budget, and how many of them stay.
        parts: dict[object, list[int]] = {}
        for t, (image, frame) in self._named(sample, tokens).items():
            name = {"sample": None, "image": image, "frame": (image, frame)}[select.per]
            parts.setdefault(name, []).append(t)
        left = set(self.alive[sample])
        return [(part, min(select.count(len(part)), len(left.intersection(part)))) for part in parts.values()]

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
        mask = masked(named.get("attention_mask"), live, ~live, states, spec.backend(layer), not both)
        named = named | {"attention_mask": mask, spec.cache or "": None}
        rows = torch.tensor(self._rows(sample, queries.rows, tokens), dtype=torch.int64)
        live = live & torch.isin(torch.arange(live.shape[1]), torch.tensor(tokens))
        caught = caught_attention(lambda: type(layer).forward(layer, states, **named))
        seen, values = probabilities(caught.logits, live), caught.values
        keys, given = keys_values(layer, type(layer).forward, states, named, spec.cache or "")
        if values is None:
            values = given
        valid = torch.ones(1, len(rows), dtype=torch.bool)
        seen, values = seen[sample : sample + 1, :, rows][..., tokens], values[sample : sample + 1, :, tokens]
        return Attention(seen, valid, values, keys[sample : sample + 1, :, tokens])

    def _text(self, sample: int, tokens: list[int]) -> list[int]:
        layout = self.layout
        real = [t for t in tokens if layout.padding is None or layout.padding[sample, t]]
        text = [t for t in real if not layout.image[sample, t]]
        return [t for t in text if layout.labels is None or int(layout.labels[sample, t]) == IGNORED]

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


def masked(mask: Tensor | None, active: Tensor, hidden: Tensor, states: Tensor, backend: str, causal: bool) -> Tensor:
    """A layer's mask in which `hidden` columns (B, T) are seen by nobody; rows that are not `active` see themselves."""
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
