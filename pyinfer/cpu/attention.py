"""Attention over a KV cache, block by block with a running softmax: no score matrix is ever whole.

The cache holds halves, or float32 (see `element_bytes_of`). That of a layer is [sequence][kv head], and per
head: keys in panels of 16 positions, [position / 16][C][16], so that a load is one element of 16 keys; values
[position][C]. A work item is one kv head and a few rows; its *entries* are rows x the query heads that share
the kv head, taken `tile` at once so that each loaded key or value serves all of them. Per entry and position:
2 C / 16 fused multiply-adds on two pipes.

Source: Milakov & Gimelshein 2018 (online softmax), Dao et al. 2022 (FlashAttention).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from numpy import float32

from pyinfer.cpu.math import exp
from pyinfer.cpu.step import ATTEND_ROWS, POSITIONS, ROWS, SEQUENCES
from pyinfer.jit.kernel import Kernel, inline, kernel
from pyinfer.jit.memory import f32_at, float_to_half, i32_at, i64_at, u16_at
from pyinfer.jit.simd import load_f16x16, load_f32x16
from pyinfer.jit.tiles import tile_add_product, tile_load, tile_scale_rows, tile_store, tile_zero
from pyinfer.names import ATTN_K, ATTN_OUTPUT, ATTN_Q, ATTN_QKV, ATTN_V, GGMLType

# Operands, int64. Q, K and V as (address, row stride, private stride); caches are those of the layer.
(Q, Q_STRIDE, Q_PRIVATE, K, K_STRIDE, K_PRIVATE, V, V_STRIDE, V_PRIVATE, OUT, OUT_STRIDE, KEYS, VALUES,
 HEAD_BYTES, HEADS, KV_HEADS, HEAD_SIZE, WINDOW, SCRATCH, SCRATCH_BYTES, SCALE) = range(21)  # fmt: skip
OPERANDS = 21

BLOCK = 128  # positions between two corrections of the running softmax

MATRICES = {ATTN_Q, ATTN_K, ATTN_V, ATTN_QKV, ATTN_OUTPUT}


def element_bytes_of(types: Mapping[str, GGMLType]) -> int:
    """Bytes of one number of the KV cache, from the types of a model's weights by tensor name: float32 when
    its attention matrices are F32 (whoever keeps those wants all their bits), else a half.
    """
    found = {kind for name, kind in types.items() if MATRICES.intersection(name.split("."))}
    return 4 if found == {GGMLType.F32} else 2


def head_bytes(head_size: int, positions: int, element_bytes: int) -> int:
    """Bytes of the keys (or of the values) of one sequence and kv head."""
    return -(-positions // BLOCK) * BLOCK * head_size * element_bytes


def scratch_bytes(head_size: int) -> int:
    """Bytes of one thread's scratch: queries, outputs, scores of 8 entries, and four numbers per entry."""
    return 4 * 8 * (2 * head_size + BLOCK + 4)


@cache
def store(element_bytes: int) -> Kernel:
    """Writes this step's keys and values to the cache, rounded to its elements. Items are (row, kv head)."""

    @kernel
    def store_rows(operands, step, first, last, thread):
        given, words = i64_at(operands), i64_at(step)
        positions, sequences = i32_at(words[POSITIONS]), i32_at(words[SEQUENCES])
        size, kv_heads = given[HEAD_SIZE], given[KV_HEADS]
        for item in range(first, last):
            row, head = item // kv_heads, item % kv_heads
            at = (sequences[row] * kv_heads + head) * given[HEAD_BYTES]
            position = positions[row]
            k = f32_at(given[K] + row * given[K_STRIDE] + thread * given[K_PRIVATE] + 4 * head * size)
            v = f32_at(given[V] + row * given[V_STRIDE] + thread * given[V_PRIVATE] + 4 * head * size)
            keys = given[KEYS] + at + 16 * element_bytes * (position // 16 * size)
            keys += element_bytes * (position % 16)
            values = given[VALUES] + at + element_bytes * position * size
            if element_bytes == 4:
                to_keys, to_values = f32_at(keys), f32_at(values)
            else:
                to_keys, to_values = u16_at(keys), u16_at(values)
            for i in range(size):
                to_keys[16 * i] = k[i] if element_bytes == 4 else float_to_half(k[i])
            for i in range(size):
                to_values[i] = v[i] if element_bytes == 4 else float_to_half(v[i])

    return store_rows


@cache
def attend(tile: int, element_bytes: int) -> Kernel:
    """The kernel for so many entries (at most 8) at once and a cache of such elements.

    Items are (kv head, block of ATTEND_ROWS rows of one sequence).
    """
    return _attend_kernel(tile, element_bytes)


def attend_items(kv_heads: int, rows: int, attend_rows: int) -> int:
    return kv_heads * -(-rows // attend_rows)


def _attend_kernel(tile: int, element_bytes: int) -> Kernel:
    @kernel
    def attend_entries(operands, step, first, last, thread):
        given, words = i64_at(operands), i64_at(step)
        positions, sequences = i32_at(words[POSITIONS]), i32_at(words[SEQUENCES])
        size, kv_heads, group = given[HEAD_SIZE], given[KV_HEADS], given[HEADS] // given[KV_HEADS]
        rows, together = words[ROWS], words[ATTEND_ROWS]
        blocks = (rows + together - 1) // together
        query = given[SCRATCH] + thread * given[SCRATCH_BYTES]
        out = query + 4 * tile * size
        scores = out + 4 * tile * size
        state = scores + 4 * tile * BLOCK  # per entry: largest score, sum, correction, position
        for item in range(first, last):
            # the last rows see most positions: they go first, so that the team ends together
            head, row0 = item % kv_heads, (blocks - 1 - item // kv_heads) * together
            entries = min(together, rows - row0) * group
            cache = (sequences[row0] * kv_heads + head) * given[HEAD_BYTES]
            for entry in range(0, entries, tile):
                count = min(tile, entries - entry)
                low = positions[row0 + entry // group]
                high = positions[row0 + (entry + count - 1) // group] + 1
                start = max(0, low - given[WINDOW] + 1) if given[WINDOW] > 0 else 0
                _load_queries(given, query, row0, head, entry, count, tile, thread)
                f, limits = f32_at(state), i32_at(state + 12 * tile)
                for e in range(tile):
                    f[e], f[tile + e] = float32(-1e30), float32(0)
                    limits[e] = positions[row0 + (entry + min(e, count - 1)) // group]
                o = f32_at(out)
                for i in range(tile * size):
                    o[i] = float32(0)
                for p in range(start // BLOCK * BLOCK, high, BLOCK):
                    end = min(p + BLOCK, (high + 15) // 16 * 16)
                    for panel in range(p, end, 16):
                        total = tile_zero(tile)
                        keys = given[KEYS] + cache + element_bytes * panel * size
                        for c in range(size):
                            if element_bytes == 4:
                                key = load_f32x16(keys + 64 * c)
                            else:
                                key = load_f16x16(keys + 32 * c)
                            total = tile_add_product(total, key, query + 4 * c, 4 * size)
                        tile_store(total, scores + 4 * (panel - p), 4 * BLOCK)
                    _softmax(scores, state, tile, p, end, given[WINDOW])
                    values = given[VALUES] + cache + element_bytes * p * size
                    for c in range(0, size, 16):
                        total = tile_scale_rows(tile_load(tile, out + 4 * c, 4 * size), state + 8 * tile)
                        for i in range(min(end, high) - p):
                            if element_bytes == 4:
                                value = load_f32x16(values + 4 * (i * size + c))
                            else:
                                value = load_f16x16(values + 2 * (i * size + c))
                            total = tile_add_product(total, value, scores + 4 * i, 4 * BLOCK)
                        tile_store(total, out + 4 * c, 4 * size)
                _store_outputs(given, out, state, row0, head, entry, count, tile)

    return attend_entries


@inline
def _load_queries(given, query, row0, head, entry, count, tile, thread):
    """Queries of the entries, scaled; unused entries repeat the last one."""
    size, group = given[HEAD_SIZE], given[HEADS] // given[KV_HEADS]
    scale = f32_at(given[SCALE])[0]
    for e in range(tile):
        which = entry + min(e, count - 1)
        row, member = row0 + which // group, which % group
        source = (
            given[Q] + row * given[Q_STRIDE] + thread * given[Q_PRIVATE] + 4 * (head * group + member) * size
        )
        x, q = f32_at(source), f32_at(query + 4 * e * size)
        for i in range(size):
            q[i] = x[i] * scale


@inline
def _softmax(scores, state, tile, start, end, window):
    """Scores of positions [start, end) to weights, in place; updates largest, sum and correction of each
    entry.
    """
    f, limits = f32_at(state), i32_at(state + 12 * tile)
    for e in range(tile):
        s = f32_at(scores + 4 * e * BLOCK)
        position = limits[e]
        first = max(0, position - window + 1 - start) if window > 0 else 0
        last = min(position + 1, end) - start
        n = end - start
        largest = f[e]
        for i in range(first, last):
            largest = max(largest, s[i])
        for i in range(min(first, n)):
            s[i] = float32(-1e30)
        for i in range(max(last, 0), n):
            s[i] = float32(-1e30)
        total = float32(0)
        for i in range(n):
            weight = exp(s[i] - largest) if s[i] > float32(-1e29) else float32(0)
            s[i] = weight
            total += weight
        correction = exp(f[e] - largest)
        f[e], f[tile + e], f[2 * tile + e] = largest, f[tile + e] * correction + total, correction


@inline
def _store_outputs(given, out, state, row0, head, entry, count, tile):
    size, group = given[HEAD_SIZE], given[HEADS] // given[KV_HEADS]
    f = f32_at(state)
    for e in range(count):
        row, member = row0 + (entry + e) // group, (entry + e) % group
        target = f32_at(given[OUT] + row * given[OUT_STRIDE] + 4 * (head * group + member) * size)
        source = f32_at(out + 4 * e * size)
        factor = float32(1) / f[tile + e]
        for i in range(size):
            target[i] = source[i] * factor
