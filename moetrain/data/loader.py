"""Batches for each data rank: shuffled, mixed, the same for any number of ranks, resumable to the exact row.

All ranks walk through one global sequence of rows. Global batch i is rows `i * dp_size * batch_size` and on, and rank r
takes the r-th run of `batch_size` of them; so the sequence, and with it the position after n rows, does not depend on
the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moetrain.data.packing import Row, RowPlan, collate

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """Form of a batch, and the part of this rank."""

    batch_size: int
    seq_len: int
    pad_id: int
    packing: bool
    document_mask: bool
    dp_rank: int
    dp_size: int

    def __post_init__(self) -> None:
        assert 0 <= self.dp_rank < self.dp_size

    @property
    def global_rows(self) -> int:
        return self.batch_size * self.dp_size

    def mine(self, rows: list[Any]) -> list[Any]:
        """This rank's part of a global batch."""
        return rows[self.dp_rank * self.batch_size : (self.dp_rank + 1) * self.batch_size]

    def batch(self, rows: list[Row]) -> Batch:
        return collate(rows, self.seq_len, self.pad_id, packing=self.packing, document_mask=self.document_mask)


class Stream:
    """The rows of one source, which may lie in several files."""

    def __init__(self, plans: list[RowPlan], weight: float) -> None:
        self.plans = plans
        self.weight = weight
        self.num_rows = sum(plan.num_rows for plan in plans)
        self._ends = np.cumsum([plan.num_rows for plan in plans])

    def row(self, number: int) -> Row:
        plan = int(np.searchsorted(self._ends, number, side="right"))
        first = int(self._ends[plan - 1]) if plan else 0
        return self.plans[plan].documents_of(number - first)


class Mixture:
    """Which source the next row comes from: the one that is furthest behind its share. No randomness, so the shares
    of any stretch are off by less than one row a source."""

    def __init__(self, weights: list[float], taken: list[int] | None = None) -> None:
        total = sum(weights)
        self.shares = [weight / total for weight in weights]
        self.taken = list(taken) if taken else [0] * len(weights)

    def next(self, limits: list[int] | None = None) -> int:
        """Choose a source (one with rows left, under `limits`) and count the row."""
        rows = sum(self.taken) + 1
        behind = [share * rows - taken for share, taken in zip(self.shares, self.taken, strict=True)]
        choices = [i for i, taken in enumerate(self.taken) if limits is None or taken < limits[i]]
        source = max(choices, key=lambda i: behind[i])
        self.taken[source] += 1
        return source


class Loader:
    """Endless batches of this rank: each source is gone through in a new order every epoch."""

    def __init__(self, streams: list[Stream], layout: Layout, seed: int, identity: str) -> None:
        self.layout = layout
        self.streams = streams
        self.seed = seed
        self.identity = identity
        self._mixture = Mixture([stream.weight for stream in streams])
        self._orders: dict[int, tuple[int, NDArray[np.int64]]] = {}  # source -> its epoch and the order of its rows

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        chosen = self.layout.mine([self._next_row() for _ in range(self.layout.global_rows)])
        return self.layout.batch(
            [self.streams[source].row(self._shuffled(source, number)) for source, number in chosen]
        )

    def state_dict(self) -> dict[str, int | str]:
        """The position: rows taken from each source by all ranks together, and what these numbers refer to."""
        taken = {f"rows_of_source_{i}": rows for i, rows in enumerate(self._mixture.taken)}
        return {"identity": self.identity, **taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue behind the last row of the run that made `state`, whatever its number of ranks.

        Raises:
            ValueError: the data, the packing or the seed differ, so that the position means nothing.
        """
        if state.get("identity") != self.identity:
            raise ValueError(
                "the checkpoint's position belongs to other data: files, tokenizer, data options or train.seed have "
                "changed since. Restore them, or start over with checkpoint.resume=never"
            )
        self._mixture.taken = [int(state[f"rows_of_source_{i}"]) for i in range(len(self.streams))]

    @property
    def epochs(self) -> list[float]:
        """How many times each source has been gone through."""
        return [taken / stream.num_rows for taken, stream in zip(self._mixture.taken, self.streams, strict=True)]

    def _next_row(self) -> tuple[int, int]:
        """Source and number of the row within the endless sequence of that source."""
        source = self._mixture.next()
        return source, self._mixture.taken[source] - 1

    def _shuffled(self, source: int, number: int) -> int:
        epoch, at = divmod(number, self.streams[source].num_rows)
        if self._orders.get(source, (-1,))[0] != epoch:
            rng = np.random.default_rng([self.seed % 2**63, source, epoch])
            self._orders[source] = epoch, rng.permutation(self.streams[source].num_rows)
        return int(self._orders[source][1][at])


class Validation:
    """Held-out rows in one fixed order, mixed like training."""

    def __init__(self, streams: list[Stream], layout: Layout) -> None:
        self.streams = streams
        self.layout = layout
        self.num_rows = sum(stream.num_rows for stream in streams)

    def rows(self, num_rows: int) -> Iterator[Batch]:
        """Batches of this rank over the first `num_rows` rows (all of them where there are fewer).

        The rows are the same in every call and for any number of ranks. All ranks get equally many batches; the last
        ones are filled with rows whose labels are all -100.
        """
        chosen = self._first(min(num_rows, self.num_rows))
        for start in range(0, len(chosen), self.layout.global_rows):
            mine = self.layout.mine(chosen[start : start + self.layout.global_rows])
            rows = [self.streams[source].row(number) for source, number in mine]
            yield self.layout.batch(rows + [[]] * (self.layout.batch_size - len(rows)))

    def _first(self, num_rows: int) -> list[tuple[int, int]]:
        """Source and row number; each source is shuffled once, so that few rows already stand for all of it."""
        limits = [stream.num_rows for stream in self.streams]
        orders = [np.random.default_rng(i).permutation(limit) for i, limit in enumerate(limits)]
        mixture = Mixture([stream.weight for stream in self.streams])
        chosen = []
        for _ in range(num_rows):
            source = mixture.next(limits)
            chosen.append((source, int(orders[source][mixture.taken[source] - 1])))
        return chosen
