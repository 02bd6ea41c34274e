"""Make tests/golden/smollm2_perplexity.json: what llama.cpp's perplexity of a text is, chunk by chunk.

    python -m pyinfer_tools.golden_perplexity -m SmolLM2-135M-Instruct.Q4_1.gguf

The text is tests/golden/perplexity.txt. Its tokens are stored too, so that a tokenizer's fault cannot look
like one of the model. Needs the extra `[peers]`.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import click

from pyinfer.errors import PyInferError
from pyinfer_tools import llama_cpp
from pyinfer_tools.perplexity import read_text
from pyinfer_tools.scoring import chunk_count

_FOLDER = Path("tests/golden")  # of a checkout, in which the tool is run


@click.command()
@click.option("-m", "--model", required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("-f", "--text", type=click.Path(path_type=Path), default=_FOLDER / "perplexity.txt")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=_FOLDER / "smollm2_perplexity.json")
@click.option("--ctx", type=click.IntRange(4), default=128, show_default=True, help="Tokens per chunk.")
@click.option("--chunks", "n_chunks", type=click.IntRange(1), help="How many chunks.  [all]")
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
def main(model: Path, text: Path, output: Path, ctx: int, n_chunks: int | None, threads: int) -> None:
    """Write the negative log-likelihood of each chunk by llama.cpp."""
    try:
        with llama_cpp.Peer(model, n_ctx=ctx, n_threads=threads) as peer:
            tokens = peer.tokenize(read_text(text))
            tokens = tokens[: chunk_count(tokens, ctx, n_chunks) * ctx]
            sums = [0.0]
            score = peer.perplexity(tokens, ctx, n_chunks, lambda done, total, score: sums.append(score.nll))
            made = {
                "model": model.name,
                "by": f"llama-cpp-python {llama_cpp.version()}",
                "ctx": ctx,
                "bos": peer.bos_id if peer.add_bos else None,
                "perplexity": round(score.perplexity, 6),
                "nll_of_chunks": [round(after - before, 5) for before, after in pairwise(sums)],
                "tokens": tokens,
            }
    except PyInferError as error:
        raise click.ClickException(str(error)) from error
    output.write_text(json.dumps(made) + "\n", encoding="utf-8")
    click.echo(f"perplexity {made['perplexity']}, chunks {made['nll_of_chunks']}", err=True)


if __name__ == "__main__":
    main()
