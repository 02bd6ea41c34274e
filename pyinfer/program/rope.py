"""Rotary position embedding: its parameters, and the table of cosines and sines that executors read.

Source: RoFormer (Su et al. 2021); YaRN (Peng et al. 2023) with ggml's parameters; factors per frequency
(rope_freqs) of Llama 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Rope:
    """What a family says about rotation. `dimension_count` elements of a head are rotated.

    neox: element i is paired with i + dimension_count / 2 (as in GPT-NeoX); otherwise neighbours are pairs.
    scaling_type: none, linear or yarn, stretching the context by `scaling_factor`; factors: divisors per
    frequency, or ().
    """

    dimension_count: int
    freq_base: float
    neox: bool = False
    scaling_type: str = "none"
    scaling_factor: float = 1.0
    original_context_length: int = 0
    attn_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    factors: tuple[float, ...] = ()

    def table(self, positions: np.ndarray) -> np.ndarray:
        """float64 [positions, dimension_count / 2, 2]: cosine and sine of every angle."""
        half = self.dimension_count // 2
        frequencies = self.freq_base ** (-2.0 * np.arange(half) / self.dimension_count)
        if self.factors:
            frequencies = frequencies / np.array(self.factors)
        magnitude = self.attn_factor
        if self.scaling_type == "linear":
            frequencies = frequencies / self.scaling_factor
        elif self.scaling_type == "yarn":
            ramp = self._yarn_ramp(half)
            frequencies = frequencies * (ramp + (1 - ramp) / self.scaling_factor)
            magnitude *= 1.0 + 0.1 * math.log(self.scaling_factor)
        angles = np.asarray(positions)[:, None] * frequencies
        return np.stack([np.cos(angles), np.sin(angles)], 2) * magnitude

    def _yarn_ramp(self, half: int) -> np.ndarray:
        """1 for frequencies that turn often within the original context (kept), 0 for slow ones
        (interpolated).
        """

        def dimension_of(turns: float) -> float:
            wavelength = self.original_context_length / (turns * 2 * math.pi)
            return self.dimension_count * math.log(wavelength) / (2 * math.log(self.freq_base))

        low = max(0, math.floor(dimension_of(self.beta_fast)))
        high = min(self.dimension_count - 1, math.ceil(dimension_of(self.beta_slow)))
        return 1 - np.clip((np.arange(half) - low) / max(0.001, high - low), 0, 1)
