"""Attention and its cache against the reference: windows, shared heads, block borders, several sequences.

Every test runs with a cache of halves, whose keys and values are halves already, and with one of float32,
which must keep all their bits.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from block_samples import float_tensor
from small_programs import Both, Ops
from tolerance import OPS, nmse

from pyinfer import names
from pyinfer.cpu.attention import element_bytes_of
from pyinfer.jit.team import Team
from pyinfer.names import GGMLType
from pyinfer.program.program import Cache

TABLE_ROWS = 64
N_CTX = 300


@pytest.fixture(scope="module")
def team():
    made = Team(2)
    yield made
    made.close()


def program(kind, heads, kv_heads, size=32, window=0, *, sharpness=1.0, halves=True, layers=1):
    """A program that attends with queries, keys and values from tables, and a cache of "f16" or "f32".

    halves: keys and values are halves, as the cache of that kind needs to be exact
    """
    random, ops = np.random.default_rng(heads * 100 + kv_heads), Ops()

    def numbers(width):
        made = random.standard_normal((TABLE_ROWS, width)).astype(np.float32)
        return made.astype(np.float16).astype(np.float32) if halves and kind == "f16" else made

    q = ops.rows("q", numbers(heads * size))
    for layer in range(layers):
        k, v = (
            ops.rows(f"k{layer}", numbers(kv_heads * size)),
            ops.rows(f"v{layer}", numbers(kv_heads * size)),
        )
        if kind == "f32":  # an F32 matrix of attention makes the cache float32
            same = float_tensor(names.weight(names.ATTN_K, layer), np.eye(k.width))
            k = ops.emit("linear", (k,), k.width, same)
        ops.emit("store", (k, v), 0, layer=layer, kv_heads=kv_heads)
        shape = {"heads": heads, "kv_heads": kv_heads, "head_size": size}
        scale = sharpness * size**-0.5
        q = ops.emit("attend", (q,), heads * size, layer=layer, **shape, scale=scale, window=window)
    return ops.finish(q, Cache(layers, kv_heads, size))


def both_of(team, kind, *shape, n_sequences=1, **given) -> Both:
    return Both(program(kind, *shape, **given), team, N_CTX, n_sequences, capacity=N_CTX)


@pytest.fixture(params=["f16", "f32"])
def attention(request, team):
    """attention(heads, kv_heads, ...) -> Both, with a cache of each kind."""
    return partial(both_of, team, request.param)


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
def test_heads_that_share_keys(heads, kv_heads, attention):
    run(attention(heads, kv_heads), (20, 1, 1, 3, 5, 9, 1))


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 31, 32, 33, 127, 128, 129, 255, 256, 257])
def test_lengths_around_panels_and_blocks(n, attention):
    run(attention(4, 2), (n, 1, 1, 2))


@pytest.mark.parametrize("window", [1, 2, 7, 15, 16, 17, 100, 127, 128, 129, 200, 1000])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 1), (2, 2)])
def test_windows(window, heads, kv_heads, attention):
    run(attention(heads, kv_heads, window=window), (1, 9, 120, 1, 1, 130, 1, 8, 1))


@pytest.mark.parametrize("size", [16, 48, 64, 128])
def test_head_sizes(size, attention):
    run(attention(3, 1, size, window=20), (33, 1, 4))


def test_keys_and_values_are_rounded_to_halves(team):
    run(both_of(team, "f16", 4, 2, halves=False), (140, 1, 5), bound=OPS["attend_halves"])


def test_only_f32_matrices_of_attention_make_the_cache_float32(team):
    sizes = {kind: both_of(team, kind, 4, 2, n_sequences=3).cpu.cache_bytes for kind in ("f16", "f32")}
    assert sizes == {"f16": 3 * 2 * 2 * 384 * 32 * 2, "f32": 3 * 2 * 2 * 384 * 32 * 4}
    f32, q8_0 = GGMLType.F32, GGMLType.Q8_0
    q, k, up = "blk.0.attn_q.weight", "blk.1.attn_k.weight", "blk.0.ffn_up.weight"
    assert element_bytes_of({q: f32, k: f32, up: q8_0}) == 4
    assert element_bytes_of({q: q8_0, k: f32, up: f32}) == element_bytes_of({q: q8_0, up: f32}) == 2
    assert element_bytes_of(dict.fromkeys([q, k, up], GGMLType.F16)) == element_bytes_of({up: f32}) == 2


@pytest.mark.parametrize("sharpness", [0.0, 30.0, 1000.0])
def test_flat_and_sharp_weights(sharpness, attention):
    """All positions alike, one that wins, and scores of thousands, whose exponentials would overflow."""
    run(attention(4, 2, sharpness=sharpness), (150, 1, 6), bound=OPS["attend"] * max(1.0, sharpness**2))


def test_layers_have_their_own_cache(attention):
    run(attention(4, 2, layers=3), (17, 1, 1, 5))


def test_batches_of_sequences(attention):
    """One row of each of several sequences, all of other lengths, as sequences come and go."""
    both, lengths = attention(6, 2, window=40, n_sequences=9), [0, 1, 5, 16, 40, 100, 127, 128, 200]
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


def test_a_sequence_goes_on_behind_what_was_forgotten(attention):
    """Positions that are written again: nothing of what stood there or behind is seen."""
    both = attention(4, 2)
    run(both, (140,))
    run(both, (3, 1, 1), start=14)
    run(both, (1,), start=0)
    run(both, (20,), start=1)
