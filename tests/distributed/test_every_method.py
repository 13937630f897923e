"""Every method on two gloo ranks, accumulated, recomputed, and with a rank that has no image, against one process."""

import pytest
from gradients import Case, differences
from ranks import on_ranks

import tokendrop as td

METHODS = [
    td.HiMix("1:"),
    td.HMGen("1:3"),
    td.RandomLTD("1:3", keep=0.4, seed=1),
    td.FastV(2, 0.5),
    td.PyramidDrop((1, 3), (0.6, 0.3)),
    td.PyramidDrop((1, 2), (0.6, 0.3), positions="renumber"),
    td.HiDrop(entry=1, layers=(2,), keep=(0.5,), exit=3),
    td.DuetVLM(text_layers=(1, 3), text_keep=(0.5, 0)),
    td.Drop("1:3", keep=3, score="random", seed=2),
    td.Drop("1:", keep=0.5, score="attention", then="gone"),
    td.Drop("1:3", keep=0.5, score="value_norm"),
    td.Drop("1:3", keep=0.5, score="leverage"),
    td.Drop("1:3", keep=0.5, score="norm", then="context"),
    td.Drop("1:3", keep=0.5, score="norm", then="merge"),
    td.SkipVision("1:3", keep=2, score="norm"),
    td.SVDPrune(keep=3, rank=2),
    td.CDPruner(keep=3),
    td.DivPrune(keep=3),
    td.PMoD(0.2),
    td.Sprint("1:3", keep=0.4),
    td.DART(2, keep=0.5, image_pivots=1, text_pivots=2),
    td.MixtureOfDepths("1:3", keep=0.4),
    td.MixtureOfTransformers("1:3"),
]
MIXED = (("u", "g"), ("g", "u", "dense"))
NO_IMAGE = (("u", "u"), ("text", "text"))
CASES = [
    Case(wrap, tasks, scored=method, micro=micro, recompute=recompute)
    for method in METHODS
    for wrap in ("ddp", "fsdp")
    for tasks, micro, recompute in ((MIXED, 2, False), (NO_IMAGE, 1, True))
]
CASES += [
    Case(wrap, tasks, separate, micro=2, recompute=recompute)
    for wrap in ("ddp", "ddp-unused", "fsdp", "fsdp1")
    for separate in ("none", "shared", "per-task")
    for tasks, recompute in ((MIXED, True), (NO_IMAGE, False))
]


def name(case):
    method = type(case.scored).__name__ + getattr(case.scored, "score", "") if case.scored else case.separate
    return f"{case.wrap}-{method}-{'mixed' if case.tasks is MIXED else 'no image'}"


def test_every_method_is_here():
    found = {value for value in vars(td).values() if isinstance(value, type) and hasattr(value, "route")}
    # VScan and VisionZip need a vision encoder; their selection and merge are those of the others.
    assert {type(method) for method in METHODS} == found - {td.VScan, td.VisionZip, td.Method}


@pytest.fixture(scope="module")
def ranks():
    return on_ranks(differences, CASES)


@pytest.mark.parametrize("index", range(len(CASES)), ids=map(name, CASES))
def test_averaged_gradients_equal_those_of_the_union(ranks, index):
    for found in ranks:
        worst, warned = found[index]
        assert isinstance(worst, float), worst
        assert worst < 1e-9
        assert warned == []
