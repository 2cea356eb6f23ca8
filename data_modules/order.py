"""The global order of samples: a function of (seed, epoch) alone, at any position, in no memory."""

import numpy as np

_ROUNDS = 4


def _mix(x: np.ndarray, key: int) -> np.ndarray:
    """A 64-bit hash (the finaliser of splitmix64) of ``x`` under a key."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(key)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def permuted(index: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Where a pseudo-random permutation of range(n) takes ``index``.

    A Feistel network over the smallest even number of bits that holds n; results outside of
    range(n) are permuted again until they are inside.
    """
    half = max(1, -(-(n - 1).bit_length() // 2))
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    start = np.array([(int(seed) * 2654435761 + int(epoch)) % 2**64], dtype=np.uint64)
    keys = [int(_mix(start, 0x9E3779B97F4A7C15 * (i + 1) % 2**64)[0]) for i in range(_ROUNDS)]

    def network(x: np.ndarray) -> np.ndarray:
        left, right = x >> shift, x & mask
        for key in keys:
            left, right = right, left ^ (_mix(right, key) & mask)
        return left << shift | right

    result = network(np.asarray(index, dtype=np.uint64))
    while (outside := result >= n).any():
        result[outside] = network(result[outside])
    return result.astype(np.int64)


def rows_at(positions: np.ndarray, n_row: int, seed: int) -> np.ndarray:
    """The rows that a run sees at global sample ``positions``, each epoch in another order."""
    rows = np.empty(len(positions), dtype=np.int64)
    epochs, index = np.divmod(np.asarray(positions, dtype=np.int64), n_row)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        rows[here] = permuted(index[here], n_row, seed, int(epoch))
    return rows
