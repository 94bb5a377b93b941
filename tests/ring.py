"""The cost of a sum over a ring of ranks, by a formula and by a simulation that sends every message."""

from collections.abc import Sequence
from typing import NamedTuple


def cost(size: float, ranks: int, latency: float, bandwidth: float) -> float:
    """Seconds of a sum of so many bytes: 2(W − 1) messages of size/W one after another."""
    return 2 * (ranks - 1) * (latency + size / ranks / bandwidth)


class Simulated(NamedTuple):
    """Results of a simulation, for each rank.

    Attributes:
        sums: the vector that it ends with.
        ends: when it ends.
        sent: how many numbers it has sent.
    """

    sums: list[list[int]]
    ends: list[float]
    sent: list[int]


def simulate(
    vectors: Sequence[Sequence[int]],
    latency: float,
    bandwidth: float,
    starts: Sequence[float] | None = None,
) -> Simulated:
    """Sum vectors of whole numbers over a ring.

    Each vector is cut into W chunks. In W − 1 rounds every rank adds a chunk to its own and passes it on,
    after which each has one chunk of the sum; in W − 1 more the chunks go around. A rank is done with a
    round when its own message is sent and that of the rank before has arrived.

    Args:
        bandwidth: numbers a second.
        starts: when each rank is ready; None: all at 0.
    """
    ranks, size = len(vectors), len(vectors[0])
    sums, sent = [list(vector) for vector in vectors], [0] * ranks
    times = list(starts or [0.0] * ranks)
    chunks = [range(k * size // ranks, (k + 1) * size // ranks) for k in range(ranks)]
    for turn in range(2 * (ranks - 1)):
        is_adding = turn < ranks - 1
        going = [chunks[(rank - turn + (not is_adding) * ranks) % ranks] for rank in range(ranks)]
        messages = [[sums[rank][i] for i in going[rank]] for rank in range(ranks)]
        arrivals = [times[rank] + latency + len(going[rank]) / bandwidth for rank in range(ranks)]
        for rank in range(ranks):
            before = (rank - 1) % ranks
            sent[rank] += len(going[rank])
            for i, number in zip(going[before], messages[before], strict=True):
                sums[rank][i] = sums[rank][i] + number if is_adding else number
        times = [max(arrivals[rank], arrivals[rank - 1]) for rank in range(ranks)]
    return Simulated(sums, times, sent)
