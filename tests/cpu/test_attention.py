"""Attention and its cache against the reference: windows, shared heads, block borders, several sequences."""

from __future__ import annotations

import numpy as np
import pytest
from small_programs import Both, Ops
from tolerance import OPS, nmse

from pyinfer.jit.team import Team
from pyinfer.program.program import Cache

TABLE_ROWS = 64
N_CTX = 300


@pytest.fixture(scope="module")
def team():
    made = Team(2)
    yield made
    made.close()


def attention(
    team, heads, kv_heads, size=32, window=0, *, n_sequences=1, sharpness=1.0, halves=True, layers=1
):
    """A program that attends with queries, keys and values from tables; `halves`: the last two are halves."""
    random, ops = np.random.default_rng(heads * 100 + kv_heads), Ops()

    def numbers(width):
        made = random.standard_normal((TABLE_ROWS, width)).astype(np.float32)
        return made.astype(np.float16).astype(np.float32) if halves else made

    q = ops.rows("q", numbers(heads * size))
    for layer in range(layers):
        k, v = (
            ops.rows(f"k{layer}", numbers(kv_heads * size)),
            ops.rows(f"v{layer}", numbers(kv_heads * size)),
        )
        ops.emit("store", (k, v), 0, layer=layer, kv_heads=kv_heads)
        shape = {"heads": heads, "kv_heads": kv_heads, "head_size": size}
        scale = sharpness * size**-0.5
        q = ops.emit("attend", (q,), heads * size, layer=layer, **shape, scale=scale, window=window)
    return Both(ops.finish(q, Cache(layers, kv_heads, size)), team, N_CTX, n_sequences, capacity=N_CTX)


def run(both: Both, parts, sequence: int = 0, start: int = 0, bound: float = OPS["attend"]) -> None:
    """Steps of so many rows each, one behind the other."""
    random = np.random.default_rng(sum(parts) + sequence)
    for n in parts:
        found, expected = both.step(
            random.integers(0, TABLE_ROWS, n), np.arange(start, start + n), np.full(n, sequence)
        )
        assert nmse(found, expected) <= bound, f"{n} rows from {start}"
        start += n


@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(1, 1), (2, 2), (2, 1), (3, 1), (9, 3), (4, 1), (8, 2), (8, 1), (16, 1), (5, 1)]
)
def test_heads_that_share_keys(heads, kv_heads, team):
    run(attention(team, heads, kv_heads), (20, 1, 1, 3, 5, 9, 1))


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 31, 32, 33, 127, 128, 129, 255, 256, 257])
def test_lengths_around_panels_and_blocks(n, team):
    run(attention(team, 4, 2), (n, 1, 1, 2))


@pytest.mark.parametrize("window", [1, 2, 7, 15, 16, 17, 100, 127, 128, 129, 200, 1000])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 1), (2, 2)])
def test_windows(window, heads, kv_heads, team):
    run(attention(team, heads, kv_heads, window=window), (1, 9, 120, 1, 1, 130, 1, 8, 1))


@pytest.mark.parametrize("size", [16, 48, 64, 128])
def test_head_sizes(size, team):
    run(attention(team, 3, 1, size, window=20), (33, 1, 4))


def test_keys_and_values_are_rounded_to_halves(team):
    run(attention(team, 4, 2, halves=False), (140, 1, 5), bound=OPS["attend_halves"])


@pytest.mark.parametrize("sharpness", [0.0, 30.0, 1000.0])
def test_flat_and_sharp_weights(sharpness, team):
    """All positions alike, one that wins, and scores of thousands, whose exponentials would overflow."""
    run(attention(team, 4, 2, sharpness=sharpness), (150, 1, 6), bound=OPS["attend"] * max(1.0, sharpness**2))


def test_layers_have_their_own_cache(team):
    run(attention(team, 4, 2, layers=3), (17, 1, 1, 5))


def test_batches_of_sequences(team):
    """One row of each of several sequences, all of other lengths, as sequences come and go."""
    both, lengths = attention(team, 6, 2, window=40, n_sequences=9), [0, 1, 5, 16, 40, 100, 127, 128, 200]
    for sequence, length in enumerate(lengths):
        if length:
            run(both, (length,), sequence)
    random = np.random.default_rng(3)
    for chosen in (range(9), [3], [8, 1], [7, 6, 5, 4], [2, 0, 8, 3, 5], range(8), range(9)):
        positions = [lengths[sequence] for sequence in chosen]
        found, expected = both.step(random.integers(0, TABLE_ROWS, len(positions)), positions, list(chosen))
        assert nmse(found, expected) <= OPS["attend"]
        for sequence in chosen:
            lengths[sequence] += 1


def test_a_sequence_goes_on_behind_what_was_forgotten(team):
    """Positions that are written again: nothing of what stood there or behind is seen."""
    both = attention(team, 4, 2)
    run(both, (140,))
    run(both, (3, 1, 1), start=14)
    run(both, (1,), start=0)
    run(both, (20,), start=1)
