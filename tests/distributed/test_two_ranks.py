"""DDP and FSDP2 on two gloo ranks: averaged gradients equal those of one process on the union of the batches.

Starting two processes takes longer than all they do, so one pair serves every test here, and one pair the mutations.
"""

import pytest
from gradients import Case, backward, differences, make
from lightning_ranks import everything
from ranks import RankError, on_ranks

import tokendrop as td

SAME = (("u", "u"), ("u",))
DIFFERENT = (("u", "u"), ("g",))
MIXED = (("u", "g"), ("g", "u", "dense"))
GROUPS = (("u", "g", "text"), ("u",))
NO_IMAGE = (("u", "g"), ("text", "text"))
EXACT = 1e-9

CASES = [
    Case(wrap, tasks, separate)
    for wrap in ("ddp", "fsdp")
    for separate in ("none", "shared", "per-task")
    for tasks in (SAME, DIFFERENT, MIXED, GROUPS, NO_IMAGE)
]
CASES += [
    Case(wrap, tasks, "per-task", recompute=True, frozen=frozen)
    for wrap, tasks, frozen in (
        ("ddp", DIFFERENT, False),
        ("fsdp", DIFFERENT, False),
        ("fsdp", DIFFERENT, True),
        ("fsdp", GROUPS, False),
        ("fsdp", NO_IMAGE, False),
    )
]
CASES += [
    Case(wrap, tasks, "per-task", "qkv+o+norm+ffn", recompute=wrap == "fsdp")
    for wrap in ("ddp", "fsdp", "fsdp1")
    for tasks in (DIFFERENT, NO_IMAGE)
]
# Scored by attention, which runs layers outside their calls; on one rank only where the tasks differ.
CASES += [
    Case("fsdp", tasks, recompute=recompute, scored=method)
    for method in (td.FastV(2, 0.5), td.PyramidDrop((1, 3), (0.6, 0.3)))
    for tasks, recompute in ((SAME, False), (DIFFERENT, False), (DIFFERENT, True), (MIXED, False), (NO_IMAGE, False))
]
# Each rank alone, without any averaging: the test must see that.
APART = Case("nothing", DIFFERENT, "per-task")
TRAINED = [Case("ddp", ((), ()), "per-task"), Case("fsdp", ((), ()), "none"), Case("fsdp", ((), ()), "per-task")]
REFUSED = Case("fsdp", ((), ()), "per-task")
NAMES = [f"tokendrop/{kind}/{task}" for kind in ("flops_ratio", "kept_ratio") for task in ("dense", "g", "u")]
FROM_LIGHTNING = ("`isinstance(treespec, LeafSpec)`", "It is recommended to use `self.log(")


def name(case):
    switches = [switch for switch in ("recompute", "frozen") if getattr(case, switch)]
    tasks = "-".join("+".join(of_rank) for of_rank in case.tasks)
    switches += [type(case.scored).__name__] if case.scored else []
    switches += [case.parts] if case.parts != "qkv" else []
    return "/".join([case.wrap, tasks, case.separate, *switches])


@pytest.fixture(scope="module")
def ranks():
    return on_ranks(everything, [*CASES, APART], TRAINED, REFUSED)


@pytest.mark.parametrize("index", range(len(CASES)), ids=map(name, CASES))
def test_averaged_gradients_equal_those_of_the_union(ranks, index):
    for gradients, _, _ in ranks:
        assert gradients[index][0] < EXACT


def test_ranks_that_do_not_average_are_seen(ranks):
    assert all(gradients[-1][0] > 0.1 or "no gradient" in gradients[-1][0] for gradients, _, _ in ranks)


def test_nothing_warns(ranks):
    assert {text for gradients, _, _ in ranks for _, caught in gradients for text in caught} == set()


@pytest.mark.parametrize("index", range(len(TRAINED)), ids=map(name, TRAINED))
def test_a_lightning_trainer_equals_the_written_out_loop(ranks, index):
    trained = [trained[index] for _, trained, _ in ranks]
    assert all(worst < EXACT for worst, _, _ in trained)
    assert trained[0][1] == [one for one in NAMES if "dense" not in one]  # rank 0 has no dense sample
    assert trained[1][1] == NAMES


@pytest.mark.parametrize("index", range(len(TRAINED)), ids=map(name, TRAINED))
def test_a_lightning_trainer_warns_of_its_own_matters_only(ranks, index):
    warned = {text for _, trained, _ in ranks for text in trained[index][2]}
    assert [text for text in warned if not text.startswith(FROM_LIGHTNING)] == []


def test_projections_outside_the_root_of_fully_shard_are_refused(ranks):
    for _, _, refusal in ranks:
        assert "without the image-only projections" in refusal
        assert "tokendrop.apply" in refusal


def test_without_the_touch_other_tasks_on_each_rank_turn_the_test_red():
    # Twins add equal shapes: unequal ones abort the process in gloo, which is red as well, but says less.
    cases = [Case(wrap, DIFFERENT, "per-task", twins=True) for wrap in ("ddp", "fsdp")]
    for found in on_ranks(differences, cases, "touch"):
        for result, _ in found:
            assert "receive grad" in result or "no gradient on rank" in result


@pytest.mark.parametrize("tasks", [("u",), ("g",), ("u", "g", "dense"), ("text",), ("g-only",), ("g-only", "u")])
@pytest.mark.parametrize("separate", ["none", "shared", "per-task"])
def test_every_parameter_is_in_the_graph_of_every_batch(tasks, separate):
    # What DDP and FSDP2 need of each rank; one process shows it sooner, and cannot hang.
    model, drop = make(Case("nothing", (tasks, ()), separate))
    backward(model, drop, tasks, 0, 1.0)
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_an_error_of_a_rank_is_raised_here():
    with pytest.raises(RankError, match="ZeroDivisionError"):
        on_ranks(divmod, 0)
