"""Write the table of published models in models.md, from their configurations and the rules that convert and
run them. Nothing is downloaded.

    python -m pyinfer_tools.models_table [--check]
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import click
import numpy as np

from pyinfer import names
from pyinfer.cpu.attention import element_bytes_of, head_bytes
from pyinfer.cpu.weights import Matrix
from pyinfer.models import opt
from pyinfer.models.checkpoint import family_of
from pyinfer.quants import quant
from pyinfer.quants.panels import PANEL_ROWS, panels_of
from pyinfer_convert.recipe import QUANTS, Recipe
from pyinfer_convert.sources import ACTIVATION, CheckpointSource
from pyinfer_convert.writer import TensorEntry
from pyinfer_tools.published_models import PUBLISHED, SOURCES, Published

FILE = Path("models.md")  # of a checkout, in which the tool is run
BEGIN = "<!-- written by python -m pyinfer_tools.models_table, do not edit -->"
END = "<!-- end of what models_table wrote -->"
SHOWN = ("q4_0", "q8_0", "f16")
N_CTX = 4096
PROGRAM_BYTES = 250_000_000  # Python, NumPy, kernels, buffers of a step: about, whatever the model


@dataclass
class Described:
    """A checkpoint without weights: the tensors that the family's rules ask for."""

    config: Mapping[str, Any]
    path: Path = Path("model")
    _shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for rule in family_of(self.config).tensors(self.config):
            if rule.source and not rule.optional:
                self._shapes[rule.source] = rule.shape

    @property
    def names(self) -> Collection[str]:
        return self._shapes.keys()

    @property
    def parameters(self) -> int:
        return sum(prod(shape) for shape in self._shapes.values())

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> str:
        return "F16"

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        raise AssertionError(f"{name}: this checkpoint has no weights")


def file_entries(config: Mapping[str, Any], quant_name: str) -> list[TensorEntry]:
    """The tensors of the file that a checkpoint with this config.json becomes."""
    tensors = CheckpointSource(Described(config)).tensors()
    recipe = Recipe(QUANTS[quant_name], [each.name for each in tensors])
    choices = [recipe.choose(each.name, each.shape, each.type) for each in tensors]
    return [TensorEntry(each.name, each.shape, choice.type) for each, choice in zip(tensors, choices)]


def weight_bytes(entries: list[TensorEntry]) -> int:
    """Bytes of the matrices of a file in the layouts that the engine runs. Those of which single rows are
    looked up stay in the mapped file.
    """
    looked_up = {names.weight(opt.POSITION_EMBD)}
    if any(entry.name == names.weight(names.OUTPUT) for entry in entries):
        looked_up.add(names.weight(names.TOKEN_EMBD))
    found, by_row = 0, [names.FFN_DOWN_T]
    there = {entry.name for entry in entries}
    if {names.weight(names.FFN_DOWN_T, 0), names.weight(names.FFN_GATE, 0)} <= there:
        by_row.append(names.FFN_UP)  # of neurons that fired
    for entry in entries:
        if len(entry.shape) > 1 and entry.name not in looked_up:
            by_rows = entry.name.endswith(tuple(f".{name}.weight" for name in by_row))
            rows, columns = prod(entry.shape[:-1]), entry.shape[-1]
            found += Matrix(quant(entry.type).LAYOUT, 0, rows, columns, by_rows).n_bytes
    return found


def cache_bytes(config: Mapping[str, Any], entries: list[TensorEntry], n_ctx: int) -> int:
    """Bytes of the KV cache of one sequence of n_ctx tokens beside these weights."""
    metadata = family_of(config).metadata(config)

    def size(template: str) -> int | None:
        return metadata.get(names.key(template, str(metadata[names.ARCHITECTURE])))

    head_size = size(names.KEY_LENGTH) or size(names.EMBEDDING_LENGTH) // size(names.HEAD_COUNT)
    element_bytes = element_bytes_of({each.name: each.type for each in entries if len(each.shape) > 1})
    heads = size(names.BLOCK_COUNT) * size(names.HEAD_COUNT_KV)
    return 2 * heads * head_bytes(head_size, n_ctx, element_bytes)


def sizes(config: Mapping[str, Any], quant_name: str) -> tuple[int, int]:
    """Bytes of the file (its tensors), and of memory to run it."""
    entries = file_entries(config, quant_name)
    position_embd = names.weight(opt.POSITION_EMBD)
    learned = [each.shape[0] - opt.FIRST_POSITION for each in entries if each.name == position_embd]
    n_ctx = min([N_CTX, *learned])  # learned positions are as many as there are; others go on
    vectors = sum(4 * PANEL_ROWS * panels_of(prod(each.shape)) for each in entries if len(each.shape) == 1)
    memory = weight_bytes(entries) + vectors + cache_bytes(config, entries, n_ctx) + PROGRAM_BYTES
    return sum(entry.nbytes for entry in entries), memory


def _activation(config: Mapping[str, Any]) -> str:
    family = family_of(config)
    usual = getattr(family, "USUAL_ACTIVATION", None) or family.DECODER.activation
    return str(family.metadata(config).get(ACTIVATION, usual)).replace(":", " ")


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 999.5e6 else f"{count / 1e6:.0f} M"


def _gigabytes(n_bytes: int) -> str:
    digits = 2 if n_bytes < 10e9 else 1 if n_bytes < 100e9 else 0
    return f"{n_bytes / 1e9:.{digits}f}"


def _row(model: Published) -> str:
    architecture = family_of(model.config).__name__.rpartition(".")[2]
    percent = "" if model.sparsity == "?" else " %"
    sparsity = f"{model.sparsity}{percent} [^{model.source}]" if model.sparsity else "-"
    cells = [model.repository, architecture, _activation(model.config), sparsity]
    cells.append(_billions(Described(model.config).parameters))
    cells += [" / ".join(map(_gigabytes, sizes(model.config, name))) for name in SHOWN]
    cells.append(f"`pyinfer-convert {model.repository} --quant {SHOWN[0]}`")
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """The text between the markers."""
    heads = ["repository", "family", "activation", "sparsity", "parameters", *SHOWN, "command"]
    rows = sorted(PUBLISHED.values(), key=lambda model: family_of(model.config).__name__)
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *map(_row, rows), ""]
    used = {model.source for model in rows}
    lines += [f"[^{name}]: {text}" for name, text in SOURCES.items() if name in used]
    return "\n".join(lines)


def updated(text: str) -> str:
    """models.md with the table as it is now; what is written by hand is left."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise click.ClickException(f"{FILE.name}: has not the two lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; exit code 1 when models.md is out of date.")
def main(check: bool) -> None:
    """Write the table of published models in models.md."""
    text = FILE.read_text(encoding="utf-8")
    new = updated(text)
    if check and new != text:
        click.echo(f"{FILE.name} is out of date: run python -m pyinfer_tools.models_table", err=True)
        sys.exit(1)
    if not check:
        FILE.write_text(new, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
