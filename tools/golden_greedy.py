"""Make tests/golden/smollm2_greedy.json: greedy tokens of llama.cpp, with the gap at each step.

    python -m pyinfer_tools.golden_greedy -m SmolLM2-135M-Instruct.Q4_1.gguf

A gap is the distance of the two best logits. Where it is tiny, another order of additions may rightly choose
the other token. A test feeds `ids` step by step and compares every choice whose gap is large enough; so a
near-tie does not hide what follows it. Needs the extra `[peers]`.

llama.cpp rounds activations to 8 bits, which moves its logits by about 0.13; its own batched and single steps
differ by as much. With --exact on F32 tensors (`pyinfer-convert --quant f32`, which keeps the values)
nothing is rounded, so that the truth is known, too: smollm2_greedy_exact.json.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from pyinfer.errors import PyInferError
from pyinfer_tools import llama_cpp

_FOLDER = Path("tests/golden")  # of a checkout, in which the tool is run


def _chat(*turns: str) -> str:
    roles = ("user", "assistant")
    spoken = [f"<|im_start|>{roles[at % 2]}\n{turn}<|im_end|>\n" for at, turn in enumerate(turns)]
    return "".join(spoken) + "<|im_start|>assistant\n"


PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived",
    "Photosynthesis is the process by which",
    "The three most important things to know about money are:\n1.",
    "1, 1, 2, 3, 5, 8, 13,",
    "12 + 30 = 42\n7 + 8 = 15\n20 + 22 =",
    "def fibonacci(n):\n    ",
    "#include <stdio.h>\n\nint main(void) {\n",
    "SELECT name, age FROM people WHERE",
    '{"name": "Alice", "age": 30, "city":',
    "| Country | Capital |\n|---|---|\n| Spain | Madrid |\n| Italy |",
    "La capitale de la France est",
    "Der schnelle braune Fuchs springt über",
    "El perro y el gato son",
    "吾輩は猫である。",
    "Привет, меня зовут",
    "Subject: Meeting tomorrow\n\nDear Dr. O'Neill,\n\n",
    _chat("What is gravity?"),
    _chat("Write a short poem about the moon."),
    _chat("Name three fruits.", "Apples, pears and plums.", "Which of them is the reddest?"),
]


@click.command()
@click.option("-m", "--model", required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("-o", "--output", type=click.Path(path_type=Path), default=_FOLDER / "smollm2_greedy.json")
@click.option("-n", "n_tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option("--exact", is_flag=True, help="F32 cache and plain attention; for a file of F32 tensors.")
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
def main(model: Path, output: Path, n_tokens: int, exact: bool, threads: int) -> None:
    """Write greedy continuations by llama.cpp."""
    cases = []
    try:
        with llama_cpp.Peer(model, n_ctx=512, n_threads=threads, exact=exact) as peer:
            for prompt in PROMPTS:
                tokens = peer.tokenize(prompt, special=True)
                greedy = peer.greedy(tokens, n_tokens)
                text = b"".join(map(peer.piece, greedy.ids)).decode(errors="replace")
                gaps = [round(gap, 4) for gap in greedy.gaps]
                cases.append(
                    {"prompt": prompt, "tokens": tokens, "ids": greedy.ids, "gaps": gaps, "text": text}
                )
                click.echo(f"{len(cases)} of {len(PROMPTS)}: {prompt!r} -> {text!r}", err=True)
    except PyInferError as error:
        raise click.ClickException(str(error)) from error
    made = {
        "model": model.name,
        "exact": exact,
        "by": f"llama-cpp-python {llama_cpp.version()}",
        "cases": cases,
    }
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in made.pop("cases"))
    head = json.dumps(made, ensure_ascii=False)[:-1]
    output.write_text(f'{head}, "cases": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
