"""What `pyinfer-generate` says of sparsity: the table behind --stats, and the price of cats=SHARE."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pyinfer.errors import FormatError

if TYPE_CHECKING:
    from pyinfer.llama import Llama
    from pyinfer.runtime.stats import LayerStats

HEADINGS = ("fired", "predicted", "recall", "hot", "bytes skipped")
_SHARES = ("fired", "computed", "recall", "hot", "skipped")  # fields of LayerStats under the headings
_NOTHING = "nothing was counted: no token of the answer went through the model"


def stats_lines(llm: Llama) -> list[str]:
    """The table of a model that was loaded with observe="stats", over the tokens since the last reset.

    predicted are the neurons whose gate was computed at all: every one without a predictor. recall is their
    part of those that exact computation would have used. The last line is the mean of the layers.
    """
    tokens = llm.session.few_tokens
    if not tokens:
        return [_NOTHING]
    layers = llm.sparsity_stats()
    heading = "".join(f"{each:>{len(each) + 3}}" for each in HEADINGS)
    lines = [f"layer  {'mode':<9}{heading}   over {tokens} tokens"]
    lines += [_line(str(each.layer), each.mode, dataclasses.asdict(each)) for each in layers]
    return [*lines, _line("all", "", _mean(layers))]


def stats_object(llm: Llama) -> dict[str, Any]:
    """The same for JSON: tokens, layers, and under "all" their mean (None before anything was counted)."""
    tokens = llm.session.few_tokens
    layers = llm.sparsity_stats() if tokens else []
    return {
        "tokens": tokens,
        "layers": [dataclasses.asdict(each) for each in layers],
        "all": _mean(layers) if layers else None,
    }


def _mean(layers: Sequence[LayerStats]) -> dict[str, float]:
    return {name: float(sum(getattr(each, name) for each in layers) / len(layers)) for name in _SHARES}


def _line(name: str, mode: str, shares: dict[str, Any]) -> str:
    cells = "".join(f"{shares[key]:>{len(each) + 3}.1%}" for key, each in zip(_SHARES, HEADINGS))
    return f"{name:>5}  {mode:<9}{cells}"


def loss_line(llm: Llama, sparsity: str, share: float) -> str:
    """What is known of the price of this share of skipped activations."""
    from pyinfer.neurons.cats import expected_loss
    from pyinfer.section import read_section

    try:
        loss = expected_loss(read_section(llm.model.file), share)
    except FormatError as error:
        return f"{sparsity}: the loss is not known, {error}"
    if loss is None:
        return f"{sparsity}: the loss was not measured; pyinfer-convert profile measures it"
    direction = "lower" if loss < 0 else "higher"
    return (
        f"{sparsity}: perplexity {abs(loss) * 100:.1f} % {direction} on the profile's held-out text "
        "(measured at profiling)"
    )
