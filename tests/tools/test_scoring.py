"""Perplexity arithmetic against a slow computation in Python floats that follows the method's description."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pyinfer.errors import InputError
from pyinfer_tools.perplexity import measure
from pyinfer_tools.scoring import Score, chunk_count, chunks, scored_blocks

_VOCAB = 11


def _slow(logits, targets):
    """(perplexity, standard error) with math.fsum, one token at a time."""
    nll = []
    for row, target in zip(logits.tolist(), targets):
        nll.append(math.log(math.fsum(math.exp(value) for value in row)) - row[target])
    mean = math.fsum(nll) / len(nll)
    variance = math.fsum(value * value for value in nll) / len(nll) - mean * mean
    return math.exp(mean), math.exp(mean) * math.sqrt(variance / (len(nll) - 1))


class _Bigram:
    """A session whose logits depend on the last token and the position; remembers what it was asked."""

    n_vocab = _VOCAB

    def __init__(self, n_ctx):
        self.n_ctx = n_ctx
        self._table = np.random.default_rng(5).standard_normal((n_ctx, _VOCAB, _VOCAB)).astype(np.float32)
        self._length = 0
        self.seen = []

    def truncate(self, length, sequence=0):
        assert (length, sequence) == (0, 0)
        self._length = 0
        self.seen.append([])

    def prefill(self, tokens, sequence=0, *, all_logits=False):
        self.seen[-1] += [int(token) for token in tokens]
        positions = np.arange(self._length, self._length + len(tokens))
        self._length += len(tokens)
        assert self._length <= self.n_ctx
        logits = self.row(positions, np.asarray(tokens))
        return logits if all_logits else logits[-1]

    def row(self, position, token):
        return self._table[position, token]


@pytest.mark.parametrize("tokens", [2, 3, 500])
def test_score_equals_the_slow_sum(tokens):
    random = np.random.default_rng(tokens)
    logits = (random.standard_normal((tokens, 300)) * 8).astype(np.float32)
    targets = random.integers(0, 300, tokens)
    score = Score()
    for start in range(0, tokens, 77):
        score.add(logits[start : start + 77], targets[start : start + 77])
    perplexity, error = _slow(logits, targets)
    assert score.tokens == tokens
    assert score.perplexity == pytest.approx(perplexity, rel=1e-12)
    assert score.error == pytest.approx(error, rel=1e-9)


def test_score_of_huge_logits_is_finite():
    score = Score()
    score.add(np.array([[1e30, -1e30, 1e30], [3e38, 0, -3e38]], np.float32), np.array([0, 0]))
    assert score.perplexity == pytest.approx(math.sqrt(2))


def test_score_of_nothing_is_nan():
    score = Score()
    assert math.isnan(score.perplexity) and math.isnan(score.error)


@pytest.mark.parametrize("bos", [None, 10])
@pytest.mark.parametrize("n_ctx", [4, 7, 16])
def test_measure_scores_the_second_half_of_each_chunk(n_ctx, bos):
    tokens = np.random.default_rng(n_ctx).integers(0, _VOCAB, 5 * n_ctx + 3).tolist()
    session = _Bigram(n_ctx)
    done = []
    score = measure(session, tokens, 3, bos, lambda *state: done.append(state[:2]))
    logits, targets, fed = [], [], []
    for chunk in range(3):
        part = tokens[chunk * n_ctx : (chunk + 1) * n_ctx]
        given = part if bos is None else [bos, *part[1:]]
        for position in range(n_ctx // 2, n_ctx - 1):
            logits.append(session.row(position, given[position]))
            targets.append(part[position + 1])
        fed.append(given[: n_ctx - 1])
    perplexity, error = _slow(np.array(logits), targets)
    assert session.seen == fed
    assert score.tokens == len(targets)
    assert score.perplexity == pytest.approx(perplexity, rel=1e-12)
    assert score.error == pytest.approx(error, rel=1e-9)
    assert done == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("n_vocab", [100, 49_152, 262_144, 100_000_000])
@pytest.mark.parametrize("n_ctx", [4, 5, 512, 4096])
def test_blocks_cover_the_scored_positions_once(n_ctx, n_vocab):
    blocks = list(scored_blocks(n_ctx, n_vocab))
    covered = [position for start, stop in blocks for position in range(start, stop)]
    assert covered == list(range(n_ctx // 2, n_ctx - 1))
    assert all((stop - start) * n_vocab * 4 <= 64 << 20 or stop - start == 1 for start, stop in blocks)


def test_chunks_are_limited_by_the_text():
    tokens = list(range(35))
    assert chunk_count(tokens, 10, None) == 3
    assert chunk_count(tokens, 10, 2) == 2
    assert chunk_count(tokens, 10, 99) == 3
    parts = list(chunks(tokens, 10, 2, 77))
    assert [part.tolist() for part in parts] == [[77, *range(1, 10)], [77, *range(11, 20)]]
    assert tokens == list(range(35))


def test_too_short_texts_and_contexts_are_refused():
    with pytest.raises(InputError, match="19 tokens"):
        chunk_count([0] * 19, 10, None)
    with pytest.raises(InputError, match="too short"):
        chunk_count([0] * 19, 3, None)
