"""ZeRO's stages by DeepSpeed's own engine on two CPU ranks; needs `pip install --no-build-isolation deepspeed`.

Gradients are those of float32; what it sums in double precision is none of ours.
"""

import pytest
from gradients import Case
from ranks import on_ranks

import tokendrop as td

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
from zero import Zero, differences

pytestmark = pytest.mark.slow
MIXED = (("u", "g"), ("g", "u", "dense"))
NO_IMAGE = (("u", "u"), ("text", "text"))


def case(tasks=MIXED, scored=None, separate="none", **more):
    return Case("zero", tasks, separate, scored=scored, **more)


FASTV, GONE = td.FastV(2, 0.5), td.Drop("1:", keep=0.5, score="leverage", then="gone")
CONTEXT = td.Drop("1:3", keep=0.5, score="norm", then="context")
CASES = [
    *(Zero(case(separate=separate), 1) for separate in ("none", "shared", "per-task")),
    *(Zero(case(scored=method), 1) for method in (FASTV, td.MixtureOfDepths("1:3", keep=0.4))),
    Zero(case(NO_IMAGE, FASTV), 1),
    *(Zero(case(separate=separate), 2) for separate in ("none", "shared", "per-task")),
    *(
        Zero(case(scored=method), 2)
        for method in (FASTV, CONTEXT, td.HMGen("1:3"), td.MixtureOfDepths("1:3", keep=0.4))
    ),
    Zero(case(NO_IMAGE), 2),
    Zero(case(recompute=True), 2),
    *(Zero(case(NO_IMAGE, FASTV), stage, overlap=True) for stage in (1, 2)),
    *(Zero(case(separate="shared"), stage, overlap=True) for stage in (1, 2)),
    Zero(case(), 3),
    Zero(case(NO_IMAGE), 3),
    Zero(case(NO_IMAGE, GONE), 3),
    *(Zero(case(scored=method), 3) for method in (CONTEXT, GONE, td.RandomLTD("1:3", keep=0.4, seed=1))),
    Zero(case(scored=td.SVDPrune(keep=3, rank=2)), 3),
    Zero(case(recompute=True), 3, overlap=True),
    Zero(case(), 3, late=True),
]


@pytest.fixture(scope="module")
def ranks():
    return on_ranks(differences, CASES, seconds=600)


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda at: f"stage {CASES[at].stage}, {at}")
def test_averaged_gradients_equal_those_of_the_union(ranks, index):
    for found in ranks:
        assert isinstance(found[index], float), found[index]
        assert found[index] < 1e-5
