"""From logits to one token: the sampling parameters, their chain, and log-probabilities.

The chain and its definitions are those of llama.cpp: logit bias, penalties, top-k, top-p, min-p, temperature,
draw. Top-p and min-p look at the distribution *before* the temperature. A step of a small model takes 2 ms,
so each word here is a few passes over the vocabulary: greedy is one argmax, top-k never sorts more than the
candidates.
Source: llama.cpp, src/llama-sampler.cpp; min-p: Nguyen et al., arXiv 2407.01082; top-p: Holtzman et al.,
arXiv 1904.09751.
"""

from __future__ import annotations

import collections
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import numpy as np

from pyinfer.errors import InputError, UnsupportedError

BLOCK = 64  # logits per maximum, of which top-k takes a bound; takes half the time of partitioning all

UNSUPPORTED = frozenset((
    "suffix", "tools", "tool_choice", "functions", "function_call", "response_format", "grammar", "n",
    "best_of", "logits_processor", "stopping_criteria", "mirostat_mode", "mirostat_tau", "mirostat_eta",
))  # fmt: skip


def _check_real(name: str, value: object, low: float, high: float, expected: str) -> None:
    valid = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if not valid or not low <= value <= high:
        raise InputError(f"{name} is {value!r}, expected {expected}")


def _check_integer(name: str, value: object, low: int, expected: str, high: int | None = None) -> None:
    valid = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not valid or value < low or (high is not None and value > high):
        raise InputError(f"{name} is {value!r}, expected {expected}")


def _checked_bias(bias: object) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise InputError(f"logit_bias is {bias!r}, expected a mapping of token ids to numbers")
    checked = {}
    for token, value in bias.items():
        try:
            checked[int(token)] = float(value)  # token ids come as text out of JSON
        except (TypeError, ValueError):
            raise InputError(f"logit_bias has {token!r}: {value!r}, expected token id: number") from None
        if int(token) < 0 or math.isnan(float(value)) or float(value) == math.inf:
            raise InputError(
                f"logit_bias has {token!r}: {value!r}, expected an id of 0 or more and a number below inf"
            )
    return checked


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn; every value is checked, InputError names field, value and range.

    temperature        0 takes the most probable token, 1 leaves the model's distribution as it is
    top_k              only the k most probable tokens; 0 or -1: all
    top_p              only the smallest set of most probable tokens that holds this probability; 1: all
    min_p              only tokens at least this fraction as probable as the most probable one; 0: all
    repeat_penalty     divides positive and multiplies negative logits of tokens seen lately; 1: off
    frequency_penalty  subtracted from a logit once per occurrence lately; presence_penalty: once in total
    penalty_last_n     how many tokens "lately" means, prompt included; 0: none, -1: all
    logit_bias         token id -> number added to its logit; -inf forbids the token
    seed               None or -1: from the operating system
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    penalty_last_n: int = 64
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self) -> None:
        largest = float(np.finfo(np.float32).max)
        _check_real("temperature", self.temperature, 0, largest, "a number of 0 (greedy) or more")
        _check_integer("top_k", self.top_k, -1, "an integer of 1 or more, or 0 for all tokens")
        _check_real("top_p", self.top_p, 0, 1, "a number from 0 to 1 (off)")
        _check_real("min_p", self.min_p, 0, 1, "a number from 0 (off) to 1")
        smallest = float(np.finfo(np.float32).tiny)
        _check_real("repeat_penalty", self.repeat_penalty, smallest, largest, "a number above 0; 1 is off")
        _check_real(
            "frequency_penalty", self.frequency_penalty, -largest, largest, "a finite number; 0 is off"
        )
        _check_real("presence_penalty", self.presence_penalty, -largest, largest, "a finite number; 0 is off")
        _check_integer(
            "penalty_last_n", self.penalty_last_n, -1, "0 (off), -1 (all tokens) or a number of tokens"
        )
        if self.seed is not None:
            _check_integer("seed", self.seed, -1, "None, -1 (random) or an integer below 2**64", 2**64 - 1)
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))

    @classmethod
    def from_keywords(cls, keywords: Mapping[str, object]) -> SamplingParams:
        """From the keywords of a call, None meaning the default.

        Raises TypeError for unknown keywords, UnsupportedError for those of others; both list the known.
        """
        names = [f.name for f in fields(cls)]
        known = ", ".join(names)
        for name, value in keywords.items():
            if name in UNSUPPORTED and value is not None:
                raise UnsupportedError(f"{name} is not supported; the keywords of sampling are {known}")
            if name not in UNSUPPORTED and name not in names:
                raise TypeError(f"unknown keyword {name!r}; the keywords of sampling are {known}")
        return cls(**{name: keywords[name] for name in names if keywords.get(name) is not None})

    @property
    def has_penalties(self) -> bool:
        """Whether tokens seen lately change any logit."""
        changed = (self.repeat_penalty, self.frequency_penalty, self.presence_penalty) != (1.0, 0.0, 0.0)
        return changed and self.penalty_last_n != 0


class Sampler:
    """Draws tokens by one set of parameters, with its own random generator and memory of the tokens seen
    lately.
    """

    def __init__(self, params: SamplingParams | None = None) -> None:
        self.params = params or SamplingParams()
        seed = self.params.seed
        self._random = np.random.default_rng(None if seed in (None, -1) else seed)
        window = self.params.penalty_last_n
        self._recent: collections.deque[int] = collections.deque(maxlen=None if window < 0 else window)
        self._bias_tokens = np.fromiter(self.params.logit_bias.keys(), np.int64)
        self._bias_values = np.fromiter(self.params.logit_bias.values(), np.float32)

    def accept(self, token: int) -> None:
        """Remember a token of the prompt or of the answer, for the penalties."""
        if self.params.has_penalties:
            self._recent.append(token)

    def sample(self, logits: np.ndarray) -> int:
        """The next token for logits f32 [V]; InputError when their largest is not a finite number."""
        params = self.params
        logits = self._adjusted(logits)
        best = int(logits.argmax())  # a NaN anywhere wins an argmax, so looking at the winner suffices
        if not math.isfinite(logits[best]):
            raise InputError(
                f"the largest of {len(logits)} logits is {float(logits[best])}, expected a finite number; "
                "the model file is damaged or every token is forbidden"
            )
        if params.temperature == 0 or params.top_k == 1:
            return best
        tokens, values = self._candidates(logits)
        with np.errstate(over="ignore", under="ignore"):  # a tiny temperature makes -inf, which is meant
            weights = np.exp((values - values.max()) / params.temperature)
        reached = weights.cumsum()
        drawn = np.searchsorted(reached, self._random.random() * reached[-1], side="right")
        return int(tokens[min(int(drawn), len(tokens) - 1)])

    def _adjusted(self, logits: np.ndarray) -> np.ndarray:
        """Logits with bias and penalties; the caller's array is never written to."""
        if not len(self._bias_tokens) and not self._recent:
            return logits
        logits = logits.copy()
        if len(self._bias_tokens):
            if self._bias_tokens.max() >= len(logits):
                largest = int(self._bias_tokens.max())
                raise InputError(f"logit_bias names token {largest}, the model has {len(logits)} tokens")
            logits[self._bias_tokens] += self._bias_values
        if self._recent:
            params = self.params
            tokens, counts = np.unique(np.fromiter(self._recent, np.int64), return_counts=True)
            seen = logits[tokens]
            seen = np.where(seen > 0, seen / params.repeat_penalty, seen * params.repeat_penalty)
            logits[tokens] = seen - counts * params.frequency_penalty - params.presence_penalty
        return logits

    def _candidates(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens that top-k, top-p and min-p leave, and their logits in float64."""
        params = self.params
        if 0 < params.top_k < len(logits):
            tokens = most_probable(logits, params.top_k)
        elif params.top_p < 1:
            tokens = np.argsort(-logits, kind="stable")
        else:
            tokens = np.arange(len(logits))
        values = logits[tokens].astype(np.float64)
        if params.top_p < 1:
            weights = np.exp(values - values[0])
            reached = weights.cumsum()
            kept = int(np.searchsorted(reached, params.top_p * reached[-1])) + 1
            tokens, values = tokens[:kept], values[:kept]
        if params.min_p > 0:
            kept = values >= values.max() + math.log(params.min_p)
            tokens, values = tokens[kept], values[kept]
        return tokens, values


def most_probable(logits: np.ndarray, count: int) -> np.ndarray:
    """Tokens of the `count` largest logits, largest first; of equal ones the lower token first."""
    columns = len(logits) // BLOCK
    if columns > count:
        # each slice maximum is a logit, so the count-th largest of them cannot exceed the count-th largest of
        # all
        maxima = logits[: columns * BLOCK].reshape(BLOCK, columns).max(axis=0)
        bound = np.partition(maxima, columns - count)[columns - count]
        tokens = np.flatnonzero(logits >= bound)
    else:
        tokens = np.arange(len(logits))
    return tokens[np.argsort(-logits[tokens], kind="stable")[:count]]


class TokenLogprob(NamedTuple):
    """Natural logarithm of a token's probability, and of the most probable ones at the same place
    (largest first).
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def token_logprob(logits: np.ndarray, token: int, count: int) -> TokenLogprob:
    """The log-probability of `token` and the `count` largest, under the model's own distribution (no chain
    applied).

    logits : f32 [V];  count : 0 or more
    """
    largest = float(logits.max())
    total = largest + math.log(float(np.exp(logits - np.float32(largest)).sum(dtype=np.float64)))
    top = most_probable(logits, min(count, len(logits))) if count else ()
    return TokenLogprob(
        token, float(logits[token]) - total, tuple((int(t), float(logits[t]) - total) for t in top)
    )
