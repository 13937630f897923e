"""Schedules in both directions, against formulas and the counts that random-LTD's own code keeps."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tokendrop as td


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 150))
def test_out_is_what_is_left_of_in(start, steps, step):
    grown, left = td.Schedule(start, steps), td.Schedule(start, steps, direction="out")
    assert left.strength(step) == 1 - grown.strength(step)
    assert left.final == 0
    assert left.strength(start + steps) == 0
    assert start == 0 or left.strength(start - 1) == 1


@given(st.integers(1, 7), st.integers(0, 30), st.sampled_from(["in", "out"]))
def test_every_so_many_steps_one_is_dense(every, step, direction):
    schedule = td.Schedule(3, 10, dense_every=every, direction=direction)
    number = step + 1  # of the step, counted from 1
    plain = td.Schedule(3, 10, direction=direction).strength(step)
    assert schedule.strength(step) == (0 if number in range(every, 99, every) else plain)
    assert schedule.evaluated(step) == plain  # an evaluation is no step


def test_a_drawn_strength_is_of_the_seed_and_the_step_alone():
    schedule = td.Schedule(start=10, steps=100, dense_tail=5, dense_every=7, drawn=True, seed=3)
    plain = td.Schedule(start=10, steps=100, dense_tail=5, dense_every=7)
    seen = [schedule.strength(step, 600) for step in range(600)]
    assert [schedule.strength(step, 600) for step in (599, 200, 11, 300)] == [seen[at] for at in (599, 200, 11, 300)]
    whole = [plain.strength(step, 600) for step in range(600)]
    assert all(0 <= one <= most for one, most in zip(seen, whole, strict=True))
    assert all(one < most for one, most in zip(seen, whole, strict=True) if most)
    draws = [one for one, most in zip(seen, whole, strict=True) if most == 1]
    assert len(set(draws)) == len(draws)
    assert abs(sum(draws) / len(draws) - 0.5) < 0.05  # of 416, whose mean has a deviation of 0.014
    assert min(draws) < 0.02
    assert max(draws) > 0.98
    other = td.Schedule(start=10, steps=100, drawn=True, seed=4)
    assert other.strength(300) != schedule.strength(300, 600)
    assert schedule.evaluated(300, 600) == 1
    assert schedule.final == 0
    assert td.Schedule(drawn=True).final == 1
    # So that a run that goes on with another release draws alike.
    assert td.Schedule(drawn=True, seed=3).strength(300) == 0.12338596034675886


def test_an_evaluation_knows_the_tail_where_it_knows_the_end():
    schedule = td.Schedule(dense_tail=3)
    assert [schedule.evaluated(step, 10) for step in (6, 7, 10)] == [1, 0, 0]
    assert schedule.evaluated(9) == 1


@pytest.mark.parametrize("direction", ["up", None, True, "IN"])
def test_another_direction_is_refused(direction):
    with pytest.raises(td.MethodError, match=r"direction=.*expected 'in' or 'out'"):
        td.Schedule(direction=direction)


# What deepspeedai/DeepSpeed @edaa722, RandomLTDScheduler with schedule_type "fixed_linear", keeps at these steps:
# (min_value, max_value, require_steps, seq_per_step) -> kept.
DEEPSPEED = {
    (144, 576, 100, 16): {0: 144, 25: 240, 50: 352, 75: 464, 100: 576},
    (64, 512, 50, 8): {0: 64, 25: 288, 50: 512, 75: 512, 100: 512},
    (128, 2048, 100, 64): {0: 128, 25: 576, 50: 1088, 75: 1536, 100: 2048},
}


@pytest.mark.parametrize("case", DEEPSPEED, ids=str)
def test_random_ltd_grows_as_its_source_does(case):
    least, most, steps, plateau = case
    method, schedule = td.RandomLTD(":", keep=least), td.Schedule(steps=steps, direction="out")
    for step, theirs in DEEPSPEED[case].items():
        (layer,) = method.route(1, schedule.strength(step))
        ours, exact = layer.select.count(most), least + (most - least) * min(step, steps) / steps
        assert ours == -int(-exact // 1)  # rounded up
        # Theirs is rounded down to its plateau; where that takes nothing away, both are equal.
        assert theirs == exact - exact % plateau
        assert ours == theirs if exact % plateau == 0 else 0 < ours - theirs < plateau
