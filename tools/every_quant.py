"""A checkpoint in every quant: size, perplexity on a text, and whether the greedy text stays that of f32.

python -m pyinfer_tools.every_quant stories15M -f stories.txt --ctx 256 --chunks 6
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from pyinfer.errors import PyInferError
from pyinfer_convert.pipeline import plan, write
from pyinfer_convert.recipe import QUANTS
from pyinfer_convert.sources import open_source
from pyinfer_tools.engine import open_session
from pyinfer_tools.perplexity import measure, read_text

FIRST = "f32"
GREEDY_TOKENS = 60


def figures(
    path: Path, text: str, ctx: int, n_chunks: int | None, prompt: str
) -> tuple[float, float, list[int]]:
    """Perplexity, its error, and the greedy tokens behind the prompt."""
    with open_session(str(path), ctx, None) as (loaded, session):
        tokenizer = loaded.tokenizer
        bos = tokenizer.bos_id if tokenizer.add_bos else None
        score = measure(session, tokenizer.encode(text), n_chunks, bos)
        session.truncate(0)
        logits, greedy = session.prefill(tokenizer.encode(prompt)), []
        for _ in range(min(GREEDY_TOKENS, ctx - session.length())):
            greedy.append(int(logits.argmax()))
            logits = session.step(greedy[-1:], [0])[0]
    return score.perplexity, score.error, greedy


@click.command()
@click.argument("source")
@click.option(
    "-f", "--file", "text", required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False)
)
@click.option("--ctx", type=click.IntRange(4), default=256, show_default=True, help="Tokens per chunk.")
@click.option("--chunks", "n_chunks", type=click.IntRange(1), help="How many chunks.  [all]")
@click.option("-p", "--prompt", default="Once upon a time", show_default=True)
def main(source: str, text: Path, ctx: int, n_chunks: int | None, prompt: str) -> None:
    """Convert SOURCE to every quant in a temporary folder and print a table of them."""
    click.echo("| quant | bytes | perplexity | greedy tokens as f32 |\n|---|---|---|---|")
    expected: list[int] = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name in (FIRST, *(name for name in QUANTS if name != FIRST)):
                path = Path(folder) / f"{name}.gguf"
                opened = open_source(source)
                try:
                    write(plan(opened, QUANTS[name]), path)
                finally:
                    opened.close()
                perplexity, error, greedy = figures(path, read_text(text), ctx, n_chunks, prompt)
                expected = expected or greedy
                same = next((n for n, (a, b) in enumerate(zip(greedy, expected)) if a != b), len(expected))
                size = path.stat().st_size
                click.echo(
                    f"| {name} | {size} | {perplexity:.4f} +/- {error:.4f} | {same} of {len(expected)} |"
                )
                path.unlink()
    except PyInferError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
