"""Which request gets which slot: none twice, none forgotten, and every host takes the same decisions."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from reft_jax.engine.schedule import Schedule, group_prompts
from reft_jax.types import Prompt


def prompts_of(samples, seed: int = 0) -> list[Prompt]:
    """One prompt per number of samples, shuffled."""
    rng = np.random.default_rng(seed)
    asked = []
    for item, count in enumerate(samples):
        tokens = np.concatenate([[item], rng.integers(0, 9, rng.integers(0, 12))]).astype(np.int32)
        asked += [Prompt(f"toy_{item}", sample, tokens) for sample in range(count)]
    return [asked[i] for i in rng.permutation(len(asked))]


def test_requests_with_the_same_tokens_are_one_group():
    a, b, c = (np.array(tokens, np.int32) for tokens in ([1, 2], [1, 2, 3], [2]))
    prompts = [Prompt(f"toy_{i}", 0, tokens) for i, tokens in enumerate([a, b, a.copy(), c, b, list(a)])]
    groups = group_prompts(prompts, [0, 2, 3, 4, 5])  # request 1 is not wanted
    assert [(group.tokens.tolist(), group.requests) for group in groups] == [
        ([1, 2, 3], [4]),  # long prompts first
        ([1, 2], [0, 2, 5]),
        ([2], [3]),
    ]


def groups_of(samples, seed: int = 0):
    prompts = prompts_of(samples, seed)
    return prompts, group_prompts(prompts, list(range(len(prompts))))


def simulate(samples, *, shards: int, slots: int, rows: int, limit: int = 3, seed: int = 0) -> SimpleNamespace:
    """Serves every request, as the engine does: seats whom it can, then a random part of the taken slots end.

    Everything that must hold at each moment is asserted on the way. Returns what happened.
    """
    rng, (prompts, groups) = np.random.default_rng(seed), groups_of(samples, seed)
    schedule = Schedule(groups, shards=shards, slots=slots, rows=rows)
    prefilled, kept, served, seated, log = {}, {}, [], {}, []
    while schedule.queued or schedule.most_taken():
        while True:
            before = schedule.owner.copy()
            if found := schedule.next_seats(limit):
                number, taken = found
                assert number in kept  # its cache is there still
                assert len(taken) == shards and 0 < sum(map(len, taken)) and max(map(len, taken)) <= limit
                for shard, pairs in enumerate(taken):
                    for slot, seat in pairs:
                        assert before[shard, slot] == -1 and schedule.owner[shard, slot] == seat.request
                        assert seat.prefill == number and seat.request not in seated
                        tokens = kept[number][shard][seat.row].tokens
                        np.testing.assert_array_equal(tokens, prompts[seat.request].tokens)  # its own prompt
                        seated[seat.request] = shard
                        before[shard, slot] = seat.request
                np.testing.assert_array_equal(before, schedule.owner)  # nobody else moved
                waiting = {
                    request for share in kept[number] for group in share for request in group.requests
                } - seated.keys()
                assert schedule.is_exhausted(number) == (not waiting)
                if not waiting:
                    del kept[number]
            elif schedule.needs_prefill():
                in_need = [len(ready) < 2 * rows for ready in schedule.ready]
                number, shares = schedule.next_prefill()
                assert number == len(prefilled) and len(shares) == shards
                assert 0 < max(map(len, shares)) <= rows
                dealt = [len(share) for share, needs in zip(shares, in_need, strict=True) if needs]
                assert max(dealt) - min(dealt) <= 1 and sum(dealt) == sum(map(len, shares))  # in turn, to no other
                prefilled[number] = kept[number] = shares
            else:
                break
            log.append(found or ("prefill", number))
        owners = schedule.owner[schedule.owner >= 0].tolist()
        assert owners and len(set(owners)) == len(owners)  # no request in two slots, and there is something to do
        assert schedule.most_taken() == max((row >= 0).sum() for row in schedule.owner)
        if schedule.waiting:  # nothing stands idle while there are prompts
            assert (schedule.owner >= 0).all()
        free = schedule.owner.reshape(-1) < 0
        active = ~free & (rng.random(free.size) < 0.6)
        expected = [(int(i), int(schedule.owner.reshape(-1)[i])) for i in np.flatnonzero(~free & ~active)]
        left = schedule.leave(active)
        assert left == expected
        for row, request in left:
            assert row // slots == seated[request]  # it never changed its shard
            assert schedule.owner.reshape(-1)[row] == -1
        served += [request for _, request in left]
        log.append((left, schedule.owner.tolist()))
    assert not kept  # what has been prefilled is let go
    return SimpleNamespace(prompts=prompts, prefilled=prefilled, served=served, seated=seated, log=log)


SHARDS = pytest.mark.parametrize("shards", [1, 4])
SIZES = pytest.mark.parametrize(("slots", "rows", "limit"), [(6, 2, 3), (1, 1, 1), (16, 8, 2), (3, 5, 8)])


@SHARDS
@SIZES
def test_every_request_is_served_once_however_rows_end(shards, slots, rows, limit):
    for seed in range(10):
        samples = np.random.default_rng(seed).integers(1, 9, 25)
        done = simulate(samples, shards=shards, slots=slots, rows=rows, limit=limit, seed=seed)
        assert sorted(done.served) == list(range(samples.sum()))


@SHARDS
def test_a_prompt_is_prefilled_once_for_all_its_samples(shards):
    done = simulate([7, 1, 4, 30, 2, 2, 9], shards=shards, slots=4, rows=2)
    groups = [group for shares in done.prefilled.values() for share in shares for group in share]
    count = Counter(group.tokens.tobytes() for group in groups)
    assert len(count) == 7 and set(count.values()) == {1}
    assert sorted(len(group.requests) for group in groups) == [1, 2, 2, 4, 7, 9, 30]
    for group in groups:  # and its samples stay where its prompt is
        assert len({done.seated[request] for request in group.requests}) == 1


def test_a_prefill_is_kept_until_its_last_sample_is_seated():
    """Three samples of one prompt and one slot: the prefill waits for all of them, the next prompt's too."""
    _, groups = groups_of([3, 1])
    schedule = Schedule(sorted(groups, key=lambda group: -len(group.requests)), shards=1, slots=1, rows=1)
    assert schedule.queued and schedule.needs_prefill() and schedule.next_seats(1) is None
    assert schedule.next_prefill()[0] == 0
    for left in (2, 1, 0):
        assert not schedule.needs_prefill()  # somebody is there to take the slot
        number, ((pair,),) = schedule.next_seats(1)
        assert (number, pair[0]) == (0, 0)
        assert schedule.is_exhausted(0) == (left == 0)
        assert schedule.next_seats(1) is None  # no slot
        assert schedule.leave(np.array([True])) == [] and schedule.leave(np.array([False])) == [(0, pair[1].request)]
    assert schedule.queued and schedule.needs_prefill()
    assert schedule.next_prefill()[0] == 1
    assert schedule.is_exhausted(0) and not schedule.is_exhausted(1)
    assert schedule.next_seats(1)[0] == 1
    assert schedule.is_exhausted(1) and not schedule.queued and schedule.most_taken() == 1


def test_a_prefill_is_kept_for_the_shard_that_is_slow():
    """Both shards hold a prompt of prefill 0; one has no slot for its second sample, the other goes to prefill 1."""
    _, groups = groups_of([2, 1, 1, 1])
    schedule = Schedule(sorted(groups, key=lambda group: -len(group.requests)), shards=2, slots=1, rows=1)
    assert schedule.next_prefill()[0] == 0
    assert [len(pairs) for pairs in schedule.next_seats(4)[1]] == [1, 1]
    schedule.leave(np.array([True, False]))  # only the second shard's row has ended
    assert schedule.needs_prefill() and schedule.next_prefill()[0] == 1
    number, taken = schedule.next_seats(4)
    assert number == 1 and [len(pairs) for pairs in taken] == [0, 1]
    assert not schedule.is_exhausted(0)
    schedule.leave(np.array([False, True]))
    assert schedule.next_seats(4)[0] == 0 and schedule.is_exhausted(0) and not schedule.is_exhausted(1)


@SHARDS
def test_hosts_that_see_the_same_rows_end_decide_alike(shards):
    samples = np.random.default_rng(1).integers(1, 9, 25)
    first, second = (simulate(samples, shards=shards, slots=5, rows=3, seed=4) for _ in range(2))
    assert repr(first.log) == repr(second.log) and first.served == second.served
    other = simulate(samples, shards=shards, slots=5, rows=3, seed=5)
    assert repr(first.log) != repr(other.log)


@SHARDS
def test_shrinking_keeps_everybody_in_order_and_shard(shards):
    rng = np.random.default_rng(shards)
    for _ in range(50):
        _, groups = groups_of([8 * shards])
        schedule = Schedule(groups, shards=shards, slots=8, rows=1)
        schedule.owner = np.where(rng.random((shards, 8)) < 0.4, np.arange(8 * shards).reshape(shards, 8), -1)
        before, smaller = schedule.owner, schedule.most_taken()
        if not smaller:
            continue
        kept = schedule.shrink(smaller)
        assert kept.shape == schedule.owner.shape == (shards, smaller) and kept.dtype == np.int32
        for old, new, places in zip(before, schedule.owner, kept, strict=True):
            owners = old[old >= 0]
            np.testing.assert_array_equal(new[: len(owners)], owners)
            assert (new[len(owners) :] == -1).all()
            np.testing.assert_array_equal(old[places[: len(owners)]], owners)
            assert (places[len(owners) :] == 8).all()  # slots that do not exist
        assert schedule.most_taken() == smaller
        ended = schedule.leave(np.zeros(shards * smaller, bool))
        assert sorted(request for _, request in ended) == sorted(before[before >= 0])


def test_slots_are_filled_by_hand():
    """Two prompts of two samples over three slots: the fourth request waits for the slot that falls free."""
    prompts = [Prompt("toy_0", sample, np.array([1, 2], np.int32)) for sample in range(2)]
    prompts += [Prompt("toy_1", sample, np.array([3], np.int32)) for sample in range(2)]
    schedule = Schedule(group_prompts(prompts, [0, 1, 2, 3]), shards=1, slots=3, rows=8)
    number, ((first, second),) = schedule.next_prefill()
    assert (number, first.requests, second.requests) == (0, [0, 1], [2, 3])
    assert schedule.next_seats(2) == (0, [[(0, (0, 0, 0)), (1, (0, 0, 1))]])
    assert schedule.next_seats(2) == (0, [[(2, (0, 1, 2))]])
    assert schedule.next_seats(2) is None and not schedule.needs_prefill() and schedule.queued
    np.testing.assert_array_equal(schedule.owner, [[0, 1, 2]])
    assert schedule.leave(np.array([True, False, True])) == [(1, 1)]
    assert schedule.next_seats(2) == (0, [[(1, (0, 1, 3))]])
    assert not schedule.queued and schedule.is_exhausted(0)
    assert schedule.leave(np.array([False, True, False])) == [(0, 0), (2, 2)]
    np.testing.assert_array_equal(schedule.shrink(1), [[1]])
    np.testing.assert_array_equal(schedule.owner, [[3]])
    assert schedule.leave(np.array([False])) == [(0, 3)] and schedule.most_taken() == 0
