"""Train predictors with torch (extra `[train]`), starting from the closed form; on a GPU where there is one.

The weights are rounded to the file's type in every step, so training knows what the file can hold. A bias per
neuron is trained along and dropped: thresholds per neuron, which are chosen afterwards, have its part.

Source: DejaVu, arXiv 2310.17157, sparse_predictor (loss: binary cross entropy in which a neuron that did not
fire weighs as much as the share that fires; AdamW, batches of 1024, the best of its epochs by recall).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pyinfer.errors import MissingExtraError
from pyinfer.names import GGMLType
from pyinfer.neurons.low_rank import Chunks, Fit, calibrate, level_at_recall
from pyinfer.neurons.predictor import RELU

try:
    import torch
    from torch import Tensor, nn
except ImportError as error:
    raise MissingExtraError(
        "--train needs torch, which is not installed; run: pip install 'pyinfer[train]', or leave it out"
    ) from error

BATCH, EPOCHS = 1024, 12
LEARNING_RATE, WEIGHT_DECAY = 2e-3, 0.01  # of a schedule that warms up and falls to 0
WARM_UP = 0.1
CHECKED = 16  # one row of so many is kept to choose the best epoch
ROUNDED = {GGMLType.Q4_0: 8.0, GGMLType.Q8_0: 127.0}  # steps on one side of 0

Progress = Callable[[int, int], None]


class _Rows:
    """All rows of a layer: x float16 [n, D], fired bool [n, F], on one device."""

    def __init__(self, chunks: Chunks, device: torch.device) -> None:
        parts = [(torch.from_numpy(x).half(), torch.from_numpy(fired)) for x, fired in chunks()]
        self.x = torch.cat([x for x, _ in parts]).to(device)
        self.fired = torch.cat([fired for _, fired in parts]).to(device)

    def split(self) -> tuple[Tensor, Tensor]:
        """Places of rows to learn from, and of rows to check with."""
        place = torch.arange(len(self.x), device=self.x.device)
        check = place % CHECKED == CHECKED - 1
        return place[~check], place[check]


def rounded(weight: Tensor, type_: GGMLType) -> Tensor:
    """Weights [rows, columns] as blocks of 32 hold them; the gradient passes as if they were exact."""
    if type_ not in ROUNDED or weight.shape[1] % 32:
        return weight
    blocks, steps = weight.detach().reshape(len(weight), -1, 32), ROUNDED[type_]
    place = blocks.abs().argmax(2, keepdim=True)
    largest = blocks.gather(2, place)
    scale = largest / -steps if type_ == GGMLType.Q4_0 else largest.abs() / steps
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    codes = torch.round(blocks / safe).clamp(-steps, steps - 1 if type_ == GGMLType.Q4_0 else steps)
    return weight + ((codes * scale).reshape(weight.shape) - weight.detach())


class Predictor(nn.Module):
    """fc2 . act(fc1 . x) + bias"""

    def __init__(
        self, fc1: np.ndarray, fc2: np.ndarray, bias: np.ndarray, form: str, type_: GGMLType
    ) -> None:
        super().__init__()
        given = (np.ascontiguousarray(each, np.float32) for each in (fc1, fc2, bias))
        self.fc1, self.fc2, self.bias = (nn.Parameter(torch.from_numpy(each)) for each in given)
        self.form, self.type = form, type_

    def forward(self, x: Tensor) -> Tensor:
        small = x @ rounded(self.fc1, self.type).T
        if self.form == RELU:
            small = torch.relu(small)
        return small @ rounded(self.fc2, self.type).T + self.bias


def _begin(found: Fit, rank: int, chunks: Chunks, form: str, type_: GGMLType) -> Predictor:
    """The closed form as log-odds. Linear becomes relu by pairs: a = relu(a) - relu(-a), at half the rank."""
    if form == RELU:
        fc1 = found.first(rank // 2)
        fc2 = found.second(fc1)
        fc1, fc2 = np.concatenate([fc1, -fc1]), np.concatenate([fc2, -fc2], 1)
        noise = np.random.default_rng(0)  # pairs would stay pairs
        fc1 = fc1 + 0.05 * fc1.std() * noise.standard_normal(fc1.shape)
    else:
        fc1 = found.first(rank)
        fc2 = found.second(fc1)
    x, fired = next(iter(chunks()))
    small = x @ fc1.T.astype(np.float32)
    score = (np.maximum(small, 0) if form == RELU else small) @ fc2.T
    calibration = calibrate(score, fired)
    return Predictor(fc1, fc2 * calibration.slope[:, None], calibration.offset, form, type_)


def train(
    found: Fit,
    rank: int,
    chunks: Chunks,
    *,
    form: str,
    type_: GGMLType,
    recall: float = 0.99,
    epochs: int = EPOCHS,
    progress: Progress | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """fc1 float32 [r, D] and fc2 [F, r]: of all epochs' the ones that predict the fewest neurons at `recall`.

    The closed form is one of them, so the result is no worse on the rows that choose.
    """
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = _Rows(chunks, device)
    model = _begin(found, rank, chunks, form, type_).to(device)
    learned, checked = rows.split()
    steps = epochs * -(-len(learned) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps + 1, pct_start=WARM_UP
    )
    quiet = float(rows.fired[learned].float().mean()) + 0.005
    best, kept, done = _predicted(model, rows, checked, recall), _weights(model), 0
    for _ in range(epochs):
        for places in learned[torch.randperm(len(learned), device=device)].split(BATCH):
            fired = rows.fired[places].float()
            loss = nn.functional.binary_cross_entropy_with_logits(
                model(rows.x[places].float()), fired, weight=fired * (1 - quiet) + quiet
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            done += 1
            if progress is not None:
                progress(done, steps)
        share = _predicted(model, rows, checked, recall)
        if share < best:
            best, kept = share, _weights(model)
    return kept


def _predicted(model: Predictor, rows: _Rows, places: Tensor, recall: float) -> float:
    """Share of neurons that reach the level which this share of firings reaches."""
    with torch.no_grad():
        odds = torch.cat([model(rows.x[part].float()) for part in places.split(BATCH)]).cpu().numpy()
    fired = rows.fired[places].cpu().numpy()
    return float((odds >= level_at_recall(odds, fired, recall)).mean())


def _weights(model: Predictor) -> tuple[np.ndarray, np.ndarray]:
    fc1, fc2 = (each.detach().cpu().numpy().copy() for each in (model.fc1, model.fc2))
    return fc1, fc2
