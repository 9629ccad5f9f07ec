"""Which request gets which slot. Plain Python, a function of the requests and of the rows' lengths alone: every host of
a pod runs it on the same numbers and decides the same."""

from collections import deque
from typing import NamedTuple

import numpy as np

from reft_jax.types import Prompt


class Group(NamedTuple):
    """One prompt, and the requests for completions of it: indices into the list of requests."""

    tokens: np.ndarray
    requests: list[int]


class Seat(NamedTuple):
    """A request that waits for a slot of its shard. Row `row` of prefill number `prefill` there holds its prompt."""

    prefill: int
    row: int
    request: int


def group_prompts(prompts: list[Prompt], requests: list[int]) -> list[Group]:
    """Group the requests with the same tokens, which share a prefill. Long prompts first: similar ones are together."""
    groups: dict[bytes, Group] = {}
    for request in requests:
        tokens = np.asarray(prompts[request].tokens, np.int32)
        groups.setdefault(tokens.tobytes(), Group(tokens, [])).requests.append(request)
    return sorted(groups.values(), key=lambda group: -len(group.tokens))


class Schedule:
    """Slots of `shards` row shards, `slots` each; a prefill takes `rows` prompts per shard.

    `owner` int[D,slots]: the request in each slot, or -1.
    """

    def __init__(self, groups: list[Group], *, shards: int, slots: int, rows: int):
        self.shards, self.rows = shards, rows
        self.waiting = deque(groups)
        self.ready: list[deque[Seat]] = [deque() for _ in range(shards)]
        self.prefills = 0
        self.owner = np.full((shards, slots), -1)

    @property
    def queued(self) -> bool:
        """Whether a request has no slot yet."""
        return bool(self.waiting) or any(self.ready)

    def needs_prefill(self) -> bool:
        """Whether a shard has a free slot and no prefilled request, while prompts are waiting."""
        idle = any((owner < 0).any() and not ready for owner, ready in zip(self.owner, self.ready, strict=True))
        return idle and bool(self.waiting)

    def next_prefill(self) -> tuple[int, list[list[Group]]]:
        """Return the number of the next prefill and its prompts, at most `rows` per shard.

        The shards take prompts in turn. A shard with enough ready requests takes none: it would keep prefills alive.
        """
        shares: list[list[Group]] = [[] for _ in range(self.shards)]
        in_need = [shard for shard, ready in enumerate(self.ready) if len(ready) < 2 * self.rows]
        for _ in range(self.rows):
            for shard in in_need:
                if self.waiting:
                    group = self.waiting.popleft()
                    self.ready[shard] += [Seat(self.prefills, len(shares[shard]), r) for r in group.requests]
                    shares[shard].append(group)
        self.prefills += 1
        return self.prefills - 1, shares

    def next_seats(self, limit: int) -> tuple[int, list[list[tuple[int, Seat]]]] | None:
        """Seat requests of one prefill: its number, and at most `limit` pairs (slot, seat) per shard.

        None if no prefilled request can be seated.
        """
        free = [deque(np.flatnonzero(owner < 0)) for owner in self.owner]
        able = [ready[0].prefill for ready, slots in zip(self.ready, free, strict=True) if ready and slots]
        if not able:
            return None
        prefill, taken = min(able), []
        for shard, (ready, slots) in enumerate(zip(self.ready, free, strict=True)):
            pairs = []
            while ready and slots and len(pairs) < limit and ready[0].prefill == prefill:
                slot, seat = int(slots.popleft()), ready.popleft()
                self.owner[shard, slot] = seat.request
                pairs.append((slot, seat))
            taken.append(pairs)
        return prefill, taken

    def is_exhausted(self, prefill: int) -> bool:
        """Whether no request waits for that prefill's prompts any more."""
        return all(seat.prefill != prefill for ready in self.ready for seat in ready)

    def leave(self, active: np.ndarray) -> list[tuple[int, int]]:
        """Free the slots of rows that have ended, by `active` bool[D·slots]. Returns their (row, request)."""
        ended = (self.owner >= 0) & ~active.reshape(self.owner.shape)
        left = [(int(row), int(self.owner.reshape(-1)[row])) for row in np.flatnonzero(ended)]
        self.owner[ended] = -1
        return left

    def most_taken(self) -> int:
        """Slots taken in the fullest shard."""
        return int((self.owner >= 0).sum(1).max())

    def shrink(self, slots: int) -> np.ndarray:
        """Renumber the taken slots: those of each shard, int32[D,slots], filled up with slots that do not exist."""
        beyond = self.owner.shape[1]
        kept = np.full((self.shards, slots), beyond, np.int32)
        owner = np.full((self.shards, slots), -1)
        for shard, row in enumerate(self.owner):
            taken = np.flatnonzero(row >= 0)
            kept[shard, : len(taken)], owner[shard, : len(taken)] = taken, row[taken]
        self.owner = owner
        return kept
