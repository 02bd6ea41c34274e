"""What a sparse model really skipped: how many neurons of each layer fired, or were predicted to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pyinfer import names
from pyinfer.errors import InputError
from pyinfer.program.sparsity import DENSE, PREDICTED
from pyinfer.runtime.session import Session


@dataclass(frozen=True)
class LayerStats:
    """Shares of a layer's neurons, averaged over tokens.

    fired : were not zero, and went on to the output weights
    computed : whose gate was computed, the predicted ones or all
    recall : of those that would have fired, the part that was predicted; 1 without a predictor
    hot : computed always;  skipped : part of the layer's weight bytes that was not read, for one sequence
    (a batch reads what any of its tokens needs)
    """

    layer: int
    mode: str
    fired: float
    computed: float
    recall: float
    hot: float
    skipped: float


def layer_stats(session: Session) -> list[LayerStats]:
    """Of all tokens that the session ran in steps of few rows since it began.

    Raises InputError for a model that was not loaded with observe="stats", or before any such token.
    """
    model, tokens = session.model, session.few_tokens
    if model.plan.observe != "stats":
        raise InputError('nothing was counted; load the model with observe="stats"')
    if not tokens:
        raise InputError("nothing was counted yet; generate some tokens first")
    return [_of_layer(session, layer, tokens) for layer in range(model.hparams.block_count)]


def _of_layer(session: Session, layer: int, tokens: int) -> LayerStats:
    model = session.model
    plan = model.plan.layer(layer)
    if plan.mode == DENSE:
        return LayerStats(layer, DENSE, 1.0, 1.0, 1.0, 0.0, 0.0)
    used = session.observed("used", layer)
    n_always = len(plan.hot)
    fired_always = session.observed("hot", layer).sum() if n_always else 0
    neurons, n_fired = (len(used) + n_always) * tokens, used.sum() + fired_always
    fired, computed, recall, hot = n_fired / neurons, 1.0, 1.0, 0.0
    if plan.mode == PREDICTED:
        computed = (session.observed("computed", layer).sum() + n_always * tokens) / neurons
        truth = session.observed("truth", layer).sum() + fired_always
        recall = float(n_fired / truth) if truth else 1.0
        hot = float(np.isneginf(plan.thresholds).mean())
    sizes = {name: _bytes(model, layer, name) for name in names.FFN_WEIGHTS}
    gated = sizes[names.FFN_GATE] > 0
    first = sizes[names.FFN_GATE] if gated else sizes[names.FFN_UP]
    up = sizes[names.FFN_UP] if gated else 0
    predictor = 0.0
    if plan.mode == PREDICTED:  # which has no rows for neurons that are computed apart
        predictor = sizes[names.FC1] + sizes[names.FC2] * len(used) / (len(used) + n_always)
    whole = first + up + sizes[names.FFN_DOWN_T] + sizes[names.FFN_DOWN]
    read = computed * first + fired * sizes[names.FFN_DOWN_T] + sizes[names.FFN_DOWN] + predictor
    read += (used.sum() + n_always * tokens) / neurons * up  # of those computed apart up is read, too
    return LayerStats(layer, plan.mode, float(fired), float(computed), recall, hot, float(1 - read / whole))


def _bytes(model, layer: int, name: str) -> int:
    tensor = model.file.tensors.get(names.weight(name, layer))
    return tensor.nbytes if tensor is not None else 0
