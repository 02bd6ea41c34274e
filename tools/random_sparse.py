"""Write a sparse ReLU model with random weights in a real model's shape: neurons that fire as rarely and as
unevenly as a trained model's, and predictors that know when. To measure speed without a download.

    python -m pyinfer_tools.random_sparse --shape prosparse-7b -o prosparse.gguf

The gate is B A of rank r / 2. Its first 32 columns hold what stands against a neuron's firing: the first 32
elements of the residual are 1 for every token, and no layer writes to them. So a neuron's share of firing is
what the table below (`shares`) says, and plain ReLU is enough. The predictor is PowerInfer's: with
fc1 = [A; -A] and fc2 = [B, -B], fc2 . relu(fc1 . x) is B A x but for the rounding of all three. Layers share
these numbers; each begins at another neuron. Its threshold is chosen, and its quality measured, on tokens of
the made vocabulary; neurons that fire for half of the tokens are computed always. Attention and feed-forward
layers add little to the residual, so that shares are the same in every layer, before the norm and behind it.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist

import click
import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from pyinfer import names
from pyinfer.models.hparams import ACTIVATION
from pyinfer.neurons.placement import OFTEN
from pyinfer.neurons.predictor import NORM, RELU, PredictorQuality, Predictors
from pyinfer.progress import Progress
from pyinfer.section import update_section
from pyinfer_tools.random_model import QUANTS, Pool, Shape, add_metadata, tensor_list, write_model

CONSTANT = 32  # elements of the residual that are 1 for every token: one block of all quants
RECALL = 0.99
HEAD_SHARE = 0.8  # of all activations, that a quarter of the neurons cause (PowerInfer, figure 5: 26 to 43 %)
UP_SHARE = 0.95  # of neurons whose up is above 0, for dReLU: there the gate and its predictor decide
_MOST_SHARE = 0.98  # of tokens, for which the hottest neurons fire
_GAIN = 0.03  # what attention, and what a feed-forward layer, adds to a residual of 1
_SAMPLE_TOKENS = 256  # to choose the threshold, and as many again to measure it


@dataclass(frozen=True)
class SparseShape:
    """dense : sizes;  inactive : share of neurons that are 0 after the activation;  rank : of predictors"""

    dense: Shape
    architecture: str
    inactive: float
    rank: int

    @property
    def dual(self) -> bool:
        """Whether ReLU applies to gate and up alike."""
        return self.architecture == "bamboo"

    @property
    def gate_share(self) -> float:
        """Share of neurons whose gate is above 0."""
        return (1 - self.inactive) / (UP_SHARE if self.dual else 1)


SHAPES = {
    "tiny": SparseShape(Shape(256, 2, 512, 4, 2, 512), "llama", 0.89, 256),
    "prosparse-7b": SparseShape(Shape(4096, 32, 11008, 32, 32, 32000), "llama", 0.89, 1024),
    "bamboo-7b": SparseShape(Shape(4096, 32, 14336, 32, 8, 32000), "bamboo", 0.90, 1024),
}


def shares(neurons: int, mean: float) -> np.ndarray:
    """For what share of tokens each neuron fires, falling: a power of its rank, at most 0.98.

    The exponent is such that the first quarter causes 80 % of all activations, possible up to a mean of 0.3.
    """
    ranks = (np.arange(neurons) + 0.5) / neurons

    def of(exponent: float) -> np.ndarray:
        scale = _bisect(lambda log: np.minimum(np.exp(log) * ranks**-exponent, _MOST_SHARE).mean() < mean)
        return np.minimum(np.exp(scale) * ranks**-exponent, _MOST_SHARE)

    def flat(exponent: float) -> bool:
        found = of(exponent)
        return found[: neurons // 4].sum() < HEAD_SHARE * found.sum()

    return of(_bisect(flat, 0.0, 8.0))


def _bisect(too_low, low: float = -40.0, high: float = 40.0) -> float:
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if too_low(middle) else (low, middle)
    return low


class FeedForward:
    """What all layers share: quantized rows (uint8) of gate [F], fc1 [rank] and fc2 [F], in random order.

    active : float64 [F], the share of tokens that each gate is made for
    hot : bool [F], computed always
    """

    def __init__(self, shape: SparseShape, kind: Type, random: np.random.Generator) -> None:
        width, half = shape.dense.embedding, shape.rank // 2
        self.kind = kind
        self.active = random.permutation(shares(shape.dense.feed_forward, shape.gate_share))
        self.hot = self.active >= OFTEN
        bias = np.array([NormalDist().inv_cdf(share) for share in self.active], np.float32)
        # The first 32 rows of a add up the constant elements, the others see the rest of x.
        a = np.zeros((half, width), np.float32)
        a[:CONSTANT, :CONSTANT] = 1 / CONSTANT
        a[CONSTANT:, CONSTANT:] = _normal(random, half - CONSTANT, width - CONSTANT)
        b = _normal(random, len(bias), half, half - CONSTANT)
        b[:, :CONSTANT] = bias[:, None] / CONSTANT
        self.gate = _quantized_product(b, a, kind)
        self.fc1 = _quantized(np.concatenate([a, -a]), kind)
        self.fc2 = _quantized(np.concatenate([b, -b], axis=1), kind)
        self.mean_square = float(_relu_square(bias.astype(np.float64)).mean())  # of the gate after ReLU

    def gates(self, x: np.ndarray) -> np.ndarray:
        """float32 [T, F] before the activation, for normed rows x [T, D]."""
        return _times(self.gate, self.kind, x)

    def scores(self, x: np.ndarray) -> np.ndarray:
        """float32 [T, F] of the predictor."""
        return _times(self.fc2, self.kind, np.maximum(_times(self.fc1, self.kind, x), 0))


def _normal(random: np.random.Generator, rows: int, columns: int, variance_of: int = 0) -> np.ndarray:
    scale = np.float32((variance_of or columns) ** -0.5)
    return random.standard_normal((rows, columns), np.float32) * scale


def _quantized(values: np.ndarray, kind: Type) -> np.ndarray:
    return gguf.quants.quantize(values, kind).view(np.uint8)


def _quantized_product(b: np.ndarray, a: np.ndarray, kind: Type) -> np.ndarray:
    """b a, a thousand rows at a time: whole, it takes gigabytes on the way."""
    return np.concatenate([_quantized(b[at : at + 1024] @ a, kind) for at in range(0, len(b), 1024)])


def _times(rows: np.ndarray, kind: Type, x: np.ndarray) -> np.ndarray:
    parts = [
        x @ gguf.quants.dequantize(rows[at : at + 1024], kind).T.astype(np.float32)
        for at in range(0, len(rows), 1024)
    ]
    return np.concatenate(parts, axis=1)


def _relu_square(mean: np.ndarray) -> np.ndarray:
    """E relu(z)^2 for z normal with this mean and variance 1."""
    below = np.array([NormalDist().cdf(each) for each in np.ravel(mean)]).reshape(np.shape(mean))
    return (1 + mean**2) * below + mean * np.exp(-(mean**2) / 2) / math.sqrt(2 * math.pi)


class _Tensors:
    """The bytes of every tensor: random blocks, but for what makes the model sparse."""

    def __init__(self, shape: SparseShape, ffn: FeedForward, seed: int) -> None:
        self._shape, self._ffn = shape, ffn
        self._pool, self._random = Pool(seed), np.random.default_rng(seed + 1)
        self.shifts: list[int] = []  # of layers, in order

    def data(self, name: str, rows: int, columns: int, kind: Type) -> np.ndarray:
        if not rows:
            return np.ones(columns, np.float32)
        part = name.split(".")[-2]
        if part == names.FC1:
            return self._ffn.fc1
        if part == names.FFN_GATE:
            self.shifts.append(int(self._random.integers(rows)))
            return np.roll(self._ffn.gate, self.shifts[-1], axis=0)
        if part == names.FC2:
            return np.roll(self._ffn.fc2, self.shifts[-1], axis=0)
        made = self._pool.tensor(kind, rows, columns, self._deviation(part, rows, columns))
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        constant_bytes = CONSTANT // per_block * block_bytes  # of the first elements of a row
        if part == names.TOKEN_EMBD:
            made[:, :constant_bytes] = _quantized(np.ones((1, CONSTANT), np.float32), kind)
        elif part == names.FFN_DOWN_T:
            made[:, :constant_bytes] = 0
        elif part == names.ATTN_OUTPUT:
            made[:CONSTANT] = 0
        elif part == names.FFN_UP and self._shape.dual:
            against = NormalDist().inv_cdf(UP_SHARE) / CONSTANT
            made[:, :constant_bytes] = _quantized(np.full((1, CONSTANT), against, np.float32), kind)
        return made

    def _deviation(self, part: str, rows: int, columns: int) -> float:
        if part == names.TOKEN_EMBD:
            return 1.0
        if part == names.ATTN_OUTPUT:
            return _GAIN * columns**-0.5
        if part == names.FFN_DOWN_T:
            up = float(_relu_square(np.array(NormalDist().inv_cdf(UP_SHARE)))) if self._shape.dual else 1.0
            return _GAIN * (rows * self._ffn.mean_square * up) ** -0.5
        return columns**-0.5


def sparse_tensors(shape: SparseShape, kind: Type) -> list[tuple[str, int, int, Type]]:
    """(name, rows, columns, type) as `tensor_list` has them, down neuron by neuron, with predictors."""
    d, neurons, listed = shape.dense.embedding, shape.dense.feed_forward, []
    for name, rows, columns, type_ in tensor_list(shape.dense, kind):
        if not name.endswith(names.weight(names.FFN_DOWN)):
            listed.append((name, rows, columns, type_))
            continue
        block = int(name.split(".")[1])
        listed += [
            (names.weight(names.FFN_DOWN_T, block), neurons, d, kind),
            (names.weight(names.FC1, block), shape.rank, d, kind),
            (names.weight(names.FC2, block), neurons, shape.rank, kind),
        ]
    return listed


def sample(shape: SparseShape, kind: Type, tensors: _Tensors, random: np.random.Generator) -> np.ndarray:
    """float32 [T, D]: embeddings of random tokens, normed: what feed-forward layers read."""
    vocabulary, width = shape.dense.vocabulary, shape.dense.embedding
    rows = tensors.data(names.weight(names.TOKEN_EMBD), vocabulary, width, kind)
    chosen = random.choice(vocabulary, min(2 * _SAMPLE_TOKENS, vocabulary), replace=False)
    x = gguf.quants.dequantize(rows[chosen], kind).astype(np.float32)
    return x / np.sqrt((x**2).mean(1, keepdims=True))


def quality(shape: SparseShape, ffn: FeedForward, x: np.ndarray) -> PredictorQuality:
    """The threshold that finds 99 % on the first half of x, and how good it is on the second."""
    first, second = x[: len(x) // 2], x[len(x) // 2 :]
    scores, fired = ffn.scores(first), ffn.gates(first) > 0
    scores[:, ffn.hot] = np.inf
    threshold = float(np.quantile(scores[fired], 1 - RECALL))
    predicted, fired = (ffn.scores(second) >= threshold) | ffn.hot, ffn.gates(second) > 0
    both = (predicted & fired).sum()
    return PredictorQuality(
        rank=shape.rank,
        form=RELU,
        input=NORM,
        threshold=threshold,
        recall=float(both / fired.sum()),
        precision=float(both / predicted.sum()),
        predicted=float(predicted.mean()),
        fired=float(fired.mean()),
        tokens=len(second),
    )


def write_random_sparse(
    path: Path, shape: SparseShape, quant: str, seed: int = 0, progress=None
) -> PredictorQuality:
    """Write the file with its section; the quality of its predictors, alike in every layer.

    progress(bytes done, bytes in all)
    """
    kind, random = Type[quant.upper()], np.random.default_rng(seed)
    ffn = FeedForward(shape, kind, random)
    found = quality(shape, ffn, sample(shape, kind, _Tensors(shape, ffn, seed), random))

    def describe(writer: gguf.GGUFWriter) -> None:
        add_metadata(writer, shape.dense, quant)
        if not shape.dual:  # Bamboo's needs no saying
            writer.add_string(ACTIVATION, "relu")
        writer.add_float32(names.POWERINFER_SPARSE_THRESHOLD, found.threshold)

    tensors = _Tensors(shape, ffn, seed)
    write_model(path, shape.architecture, describe, sparse_tensors(shape, kind), tensors.data, progress)
    row = np.where(ffn.hot, -np.inf, found.threshold).astype(np.float32)
    thresholds = np.stack([np.roll(row, shift) for shift in tensors.shifts])
    update_section(path, predictors=Predictors((found,) * len(thresholds), thresholds).to_entry())
    return found


@click.command()
@click.option("--shape", "name", type=click.Choice(list(SHAPES)), default="prosparse-7b", show_default=True)
@click.option("--quant", type=click.Choice(QUANTS), default="q4_0", show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), required=True)
@click.option("--inactive", type=click.FloatRange(0.75, 0.99), help="Share of neurons at 0.  [the shape's]")
@click.option("--rank", type=click.IntRange(128), help="Of predictors, a multiple of 64.  [the shape's]")
@click.option("--layers", type=click.IntRange(1), help="Fewer or more layers than the shape has.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--force", is_flag=True, help="Replace an existing file.")
def main(name: str, quant: str, output: Path, seed: int, force: bool, **given) -> None:
    """Write a GGUF with random weights whose neurons fire rarely, with predictors."""
    if output.exists() and not force:
        raise click.ClickException(f"{output} exists already; give another name or --force")
    shape = SHAPES[name]
    if (given["rank"] or 0) % 64:
        raise click.UsageError(f"--rank is {given['rank']}, expected a multiple of 64: twice a whole block")
    shape = replace(
        shape,
        dense=replace(shape.dense, layers=given["layers"] or shape.dense.layers),
        inactive=given["inactive"] or shape.inactive,
        rank=given["rank"] or shape.rank,
    )
    with Progress(sys.stderr, "writing") as progress:
        found = write_random_sparse(output, shape, quant, seed, progress)
    text = ", ".join(f"{key} {getattr(found, key):.3f}" for key in ("fired", "predicted", "recall"))
    click.echo(f"{output}: {output.stat().st_size:,} bytes; {text}", err=True)


if __name__ == "__main__":
    main()
