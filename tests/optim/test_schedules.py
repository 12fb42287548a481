"""Schedules at their corners, and the laws that hold at every step."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fathom.errors import RecipeError
from fathom.optim.schedules import Schedule

SCHEDULE = Schedule(steps=100, batch_tokens=800, first_batch_tokens=80, batch_ramp_steps=10, lengths=(16, 64),
                    length_starts=(0, 50), warmup_steps=10, decay_steps=20, peak_rate=1.0, final_rate=0.1)


def test_rate_warms_up_linearly_holds_and_decays_along_a_cosine():
    rates = [SCHEDULE.rate_at(step) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10:80] == [1.0] * 70
    assert rates[80:] == sorted(rates[80:], reverse=True) and rates[80] < 1.0
    assert rates[89] == pytest.approx(0.55)  # half way
    assert rates[99] == pytest.approx(0.1)
    assert SCHEDULE.rate_at(150) == pytest.approx(0.1)


def test_without_decay_the_peak_is_kept_to_the_end():
    schedule = dataclasses.replace(SCHEDULE, decay_steps=0)
    assert schedule.rate_at(99) == 1.0 and schedule.mtp_weight_at(99) == 0.3


def test_mtp_weight_drops_when_the_decay_starts():
    assert [SCHEDULE.mtp_weight_at(step) for step in (0, 79, 80, 99)] == [0.3, 0.3, 0.1, 0.1]


def test_bias_moves_at_the_reports_speed_until_its_rest():
    assert {SCHEDULE.bias_speed_at(step) for step in range(100)} == {0.001}
    schedule = dataclasses.replace(SCHEDULE, bias_rest_steps=5)
    assert [schedule.bias_speed_at(step) for step in (0, 94, 95, 99)] == [0.001, 0.001, 0.0, 0.0]


def test_batch_grows_linearly_in_whole_sequences():
    assert [SCHEDULE.batch_rows_at(step) for step in (0, 5, 10, 49)] == [5, 27, 50, 50]


def test_longer_sequences_keep_the_token_count():
    assert [SCHEDULE.length_at(step) for step in (0, 49, 50, 99)] == [16, 16, 64, 64]
    assert SCHEDULE.batch_rows_at(50) == 800 // 64


def test_a_batch_has_at_least_one_sequence():
    assert Schedule(steps=10, batch_tokens=1, warmup_steps=0, lengths=(4096,)).batch_rows_at(0) == 1


@given(st.integers(0, 60), st.integers(0, 300), st.integers(1, 40))
def test_first_row_counts_the_rows_of_all_earlier_steps_of_this_length(ramp, first_tokens, second_start):
    schedule = Schedule(steps=70, batch_tokens=300, first_batch_tokens=first_tokens, batch_ramp_steps=ramp,
                        lengths=(8, 32), length_starts=(0, second_start), warmup_steps=0)
    taken = 0
    for step in range(70):
        taken = 0 if step == second_start else taken
        assert schedule.first_row_at(step) == taken
        taken += schedule.batch_rows_at(step)


@given(st.integers(0, 90), st.integers(0, 300), st.integers(1, 40), st.integers(0, 30), st.integers(0, 30))
def test_the_tokens_of_the_segments_are_those_of_all_steps(ramp, first_tokens, second_start, dense, warmup):
    schedule = Schedule(steps=70, batch_tokens=300, first_batch_tokens=first_tokens, batch_ramp_steps=ramp, lengths=(8, 32),
                        length_starts=(0, second_start), warmup_steps=0, dense_steps=dense + 1, indexer_warmup_steps=warmup)
    assert schedule.tokens == sum(schedule.batch_rows_at(step) * schedule.length_at(step) for step in range(70))
    segments = schedule.segments()
    assert [first for first, _ in segments[1:]] == [end for _, end in segments[:-1]]
    assert segments[0][0] == 0 and segments[-1][1] == 70
    for first, end in segments:
        steps = range(first, end)
        assert len({(schedule.length_at(step), schedule.attention_at(step)) for step in steps}) == 1
        assert schedule.tokens_in(first, end) == sum(schedule.batch_rows_at(step) * schedule.length_at(step) for step in steps)


def test_attention_is_dense_then_the_indexer_learns_alone_then_it_selects():
    schedule = dataclasses.replace(SCHEDULE, dense_steps=30, indexer_warmup_steps=5, indexer_warmup_rate=0.02)
    assert [schedule.attention_at(step) for step in (0, 29, 30, 34, 35, 99)] == [
        "dense", "dense", "warmup", "warmup", "sparse", "sparse"]
    assert [schedule.rate_at(step) for step in (29, 30, 34, 35)] == [1.0, 0.02, 0.02, 1.0]
    assert [schedule.bias_speed_at(step) for step in (29, 30, 34, 35)] == [0.001, 0.0, 0.0, 0.001]
    assert SCHEDULE.attention_at(0) == "sparse"


def test_the_decay_can_be_linear():
    schedule = dataclasses.replace(SCHEDULE, decay_shape="linear")
    assert [schedule.rate_at(step) for step in (79, 84, 89, 99)] == pytest.approx([1.0, 0.775, 0.55, 0.1])


def test_scaled_to_other_steps_everything_keeps_its_share():
    schedule = dataclasses.replace(SCHEDULE, dense_steps=40, indexer_warmup_steps=10, quantise_from=90).scaled_to(50)
    assert (schedule.steps, schedule.dense_steps, schedule.indexer_warmup_steps, schedule.length_starts, schedule.quantise_from,
            schedule.warmup_steps, schedule.decay_steps, schedule.batch_ramp_steps) == (50, 20, 5, (0, 25), 45, 5, 10, 5)


@pytest.mark.parametrize("change, name", [
    (dict(dense_steps=-1), "dense_steps"), (dict(indexer_warmup_steps=5), "indexer_warmup_steps"),
    (dict(dense_steps=5, indexer_warmup_steps=-1), "indexer_warmup_steps"), (dict(indexer_warmup_rate=0.0), "indexer_warmup_rate"),
    (dict(steps=0), "steps"), (dict(batch_tokens=0), "batch_tokens"),
    (dict(first_batch_tokens=801), "first_batch_tokens"), (dict(batch_ramp_steps=-1), "batch_ramp_steps"),
    (dict(lengths=()), "lengths"), (dict(lengths=(64, 16)), "lengths"),
    (dict(lengths=(0, 16)), "lengths"), (dict(length_starts=(0,)), "length_starts"),
    (dict(length_starts=(1, 50)), "length_starts"), (dict(length_starts=(0, 0)), "length_starts"),
    (dict(warmup_steps=-1), "warmup_steps"), (dict(warmup_steps=90), "decay_steps"),
    (dict(decay_steps=91), "decay_steps"),
    (dict(final_rate=2.0), "final_rate"), (dict(final_rate=-0.1), "final_rate"), (dict(mtp_weight=-1.0), "mtp_weight"),
    (dict(mtp_weight_decayed=-1.0), "mtp_weight_decayed"), (dict(bias_speed=-1.0), "bias_speed"),
    (dict(bias_rest_steps=101), "bias_rest_steps"), (dict(peak_rate=float("nan")), "final_rate"),
])
def test_impossible_schedules_are_refused_by_name(change, name):
    with pytest.raises(RecipeError, match=f"^{name} is .*; allowed: "):
        dataclasses.replace(SCHEDULE, **change)
