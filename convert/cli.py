"""pyinfer-convert: write a model again with other tensor types."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from pyinfer.errors import PyInferError
from pyinfer.progress import Progress
from pyinfer_convert.requantize import TYPES, requantize


@click.command()
@click.argument("source", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), required=True)
@click.option("--quant", type=click.Choice(list(TYPES)), required=True, help="Type of the matrices.")
@click.option(
    "--output-quant", type=click.Choice(list(TYPES)), help="Type of the output head.  [q8_0 beside q4 and q5]"
)
@click.option("--force", is_flag=True, help="Replace an existing file.")
def main(source: Path, output: Path, quant: str, output_quant: str | None, force: bool) -> None:
    """Write the GGUF file SOURCE again with other tensor types."""
    try:
        with Progress(sys.stderr, f"writing {quant}") as progress:
            summary = requantize(
                source,
                output,
                TYPES[quant],
                output_type=TYPES[output_quant] if output_quant else None,
                force=force,
                progress=progress,
            )
    except PyInferError as error:
        raise click.ClickException(str(error)) from error
    types = ", ".join(f"{count} x {name}" for name, count in summary.tensors.items())
    before, after = summary.bytes_before / 1e6, summary.bytes_after / 1e6
    click.echo(f"{output}: {types}; tensors {before:,.1f} MB before, {after:,.1f} MB now", err=True)


if __name__ == "__main__":
    main()
