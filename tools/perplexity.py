"""pyinfer-perplexity: how well a model predicts a text, by llama.cpp's method, so that figures compare."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pyinfer.errors import PyInferError, UnsupportedError
from pyinfer.progress import Progress
from pyinfer_tools.engine import open_session
from pyinfer_tools.scoring import Score, chunk_count, chunks, scored_blocks

if TYPE_CHECKING:
    from pyinfer.runtime.loader import Model
    from pyinfer.runtime.session import Session


def read_text(path: Path) -> str:
    """The file as text without its last line end, as llama.cpp reads it."""
    return path.read_bytes().decode("utf-8", errors="replace").removesuffix("\n")


def measure(
    session: Session,
    tokens: Sequence[int],
    n_chunks: int | None = None,
    bos: int | None = None,
    progress: Callable[[int, int, Score], None] | None = None,
    most_rows: int | None = None,
) -> Score:
    """Perplexity over chunks of the session's whole context; bos replaces the first token of each.

    progress : called with (chunks done, chunks, score so far)
    most_rows : tokens that are scored in one step, for models that skip neurons in short steps only; what
        stands before the scored half always runs in long steps, as a prompt does
    raises InputError for too short a text
    """
    n_ctx = session.n_ctx
    total = chunk_count(tokens, n_ctx, n_chunks)
    score = Score()
    for done, chunk in enumerate(chunks(tokens, n_ctx, total, bos), 1):
        session.truncate(0)
        session.prefill(chunk[: n_ctx // 2])
        for start, stop in scored_blocks(n_ctx, session.n_vocab, most_rows):
            score.add(session.prefill(chunk[start:stop], all_logits=True), chunk[start + 1 : stop + 1])
        if progress:
            progress(done, total, score)
    return score


def _most_rows(model: Model) -> int | None:
    """Most tokens of a step that uses the predictors of a model, None where it has none."""
    from pyinfer.cpu.lowering import MOST_BY_ROWS  # numba comes with it, which --help should not pay
    from pyinfer.program.sparsity import PREDICTED

    return MOST_BY_ROWS if PREDICTED in model.plan.modes else None


@click.command()
@click.option("-m", "--model", required=True, help="A GGUF file or the name of a known model.")
@click.option(
    "-f", "--file", "text", required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False)
)
@click.option("--ctx", type=click.IntRange(4), default=512, show_default=True, help="Tokens per chunk.")
@click.option("--chunks", "n_chunks", type=click.IntRange(1), help="How many chunks.  [all]")
@click.option("--threads", type=click.IntRange(1), help="Threads.  [as pyinfer-generate chooses]")
@click.option(
    "--sparsity",
    default="auto",
    show_default=True,
    help="Which neurons are computed: auto, exact, predicted, cats=SHARE, dense. Predictors are used only in "
    "steps of few tokens, as in generating; a model with them is scored in such steps, which is slower.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(model: str, text: Path, ctx: int, n_chunks: int | None, threads: int | None, **options: Any) -> None:
    """Perplexity of a model on a text file; the second half of each chunk is scored."""
    try:
        with open_session(model, ctx, threads, sparsity=options["sparsity"]) as (loaded, session):
            for notice in loaded.notices:
                click.echo(f"note: {notice}", err=True)
            tokenizer = loaded.tokenizer
            if tokenizer.add_eos:
                raise UnsupportedError(f"{model} puts an end token behind every text, which cannot be scored")
            tokens = tokenizer.encode(read_text(text))
            bos = tokenizer.bos_id if tokenizer.add_bos else None
            with Progress(sys.stderr, "scoring", "chunks") as progress:

                def follow(done: int, total: int, score: Score) -> None:
                    progress.note = f"perplexity {score.perplexity:.4f} +/- {score.error:.4f}"
                    progress(done, total)

                score = measure(session, tokens, n_chunks, bos, follow, _most_rows(loaded))
    except PyInferError as error:
        raise click.ClickException(str(error)) from error
    if options["as_json"]:
        figures = {
            "perplexity": score.perplexity,
            "error": score.error,
            "scored_tokens": score.tokens,
            "chunks": chunk_count(tokens, ctx, n_chunks),
            "ctx": ctx,
        }
        click.echo(json.dumps(figures))
    else:
        click.echo(f"perplexity {score.perplexity:.4f} +/- {score.error:.5f}")


if __name__ == "__main__":
    main()
