"""What a user writes, read by mypy and pyright in `make lint`; never run. A comment marks what they must refuse."""

from collections.abc import Mapping
from dataclasses import dataclass

import lightning as L
import torch
from torch import nn

import tokendrop as td
from tokendrop.roles import Route, Separate


@dataclass(frozen=True)
class Mine:
    """A method of the user's own."""

    separate: Separate = "none"

    def route(self, num_layers: int, strength: float = 1.0) -> Route:
        return td.HiMix().route(num_layers, strength)


METHODS: list[td.Method] = [
    td.HiMix(layers="2:"),
    td.HMGen(shallow="8:24:2", separate="shared"),
    td.RandomLTD(),
    td.SkipVision(keep=0.5),
    td.FastV(layer=2, keep=0.5),
    td.PyramidDrop([4, 8], [0.5, 0.25]),
    td.HiDrop(),
    td.VScan(),
    td.DuetVLM(),
    td.SVDPrune(),
    td.DivPrune(),
    td.CDPruner(),
    td.PMoD(),
    td.Sprint(),
    td.DART(),
    td.VisionZip(),
    td.MixtureOfDepths(),
    td.MixtureOfTransformers(separate="per-task"),
    td.Drop("1:", keep=0.5),
    Mine(),
]


def by_task() -> dict[str, td.HiMix | td.HMGen | None]:
    return {"understanding": td.HiMix(), "generation": td.HMGen("1:3"), "text": None}


def plain(model: nn.Module, image: torch.Tensor) -> torch.Tensor:
    methods = by_task()
    drop: td.Handle = td.apply(model, methods)
    with drop.layout(td.TokenLayout(image=image, task="understanding")):
        out: torch.Tensor = model(image)
    with drop.disabled():
        model(image)
    drop.remove()
    return out


def trained(module: L.LightningModule, methods: Mapping[str, td.Method | None]) -> None:
    callbacks: list[L.Callback] = [td.TokenDrop(methods), td.TokenDrop(td.HiMix()), td.SynergyMonitor(("a", "b"))]
    L.Trainer(callbacks=callbacks).fit(module)


def costed(model: nn.Module) -> float:
    for method in METHODS:
        td.apply(model, method)
        td.TokenDrop(method)
        td.flops(model, method, text=64, image=576)
    named = {"understanding": td.FastV(), "generation": td.HMGen("1:3")}
    td.TokenDrop(named, schedule=td.Schedule(start=10, steps=100))
    return td.flops(model, by_task(), text=64, image=576, task="understanding").ratio


def refused(model: nn.Module) -> None:
    td.apply(model, td.Schedule())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    td.TokenDrop({"understanding": "HiMix"})  # type: ignore[dict-item]  # pyright: ignore[reportArgumentType]
