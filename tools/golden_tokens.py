"""Make tests/golden/smollm2_tokens.json: token ids of llama.cpp for texts of every kind.

    python -m pyinfer_tools.golden_tokens -m SmolLM2-135M-Instruct.Q4_1.gguf

The texts are prose, code, numbers, runs of white space, scripts of the world, emoji, texts that look like
control tokens, and random mixtures of all of them (fixed seed). Control tokens are not parsed. Needs the
extra `[peers]`.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import click

from pyinfer.errors import PyInferError
from pyinfer_tools import llama_cpp

_FILE = Path("tests/golden/smollm2_tokens.json")  # of a checkout, in which the tool is run
_N_MIXTURES = 120

TEXTS = [
    "",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\n\n\n\n",
    "\t",
    "\r\n",
    " \n ",
    "   leading and trailing   ",
    "a\tb\t\tc\n\td",
    "line one\r\nline two\r\n\r\nline four",
    "Hello, world!",
    "The quick brown fox jumps over the lazy dog. THE QUICK BROWN FOX!",
    "I'll say it's what we've done; they'd agree. IT'S WHAT WE'VE DONE; 'tis so.",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "0 1 12 123 1234 12345 1234567890 3.14159 -2e10 1,000,000.00 0x1F 50%",
    "2024-02-29T23:59:59Z, 10:30 am, +49 30 123456",
    "def f(x: int) -> int:\n    return x ** 2  # square\n\n\nprint(f(3))\n",
    "for (int i = 0; i < n; ++i) {\n\tsum += a[i] * b[i];\n}\n",
    '{"key": ["value", 1, null, true], "nested": {"a": -0.5}}',
    "<html><body class='x'>&nbsp;&lt;b&gt;</body></html>",
    "SELECT * FROM t WHERE a <> 'b' AND c >= 10;",
    "https://example.org/path?query=1&other=two#part someone@example.org C:\\Users\\x",
    "!!! ??? ... --- ___ *** ### $$$ %%% ^^^ &&& (((([[[[{{{{",
    "Falsches Üben von Xylophonmusik quält jeden größeren Zwerg.",
    "Voix ambiguë d'un cœur qui au zéphyr préfère les jattes de kiwis.",
    "Příliš žluťoučký kůň úpěl ďábelské ódy.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "דג סקרן שט בים מאוכזב ולפתע מצא חברה",
    "نص حكيم له سر قاطع وذو شأن عظيم",
    "ऋषियों को सताने वाले दुष्ट राक्षसों",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า",
    "いろはにほへと ちりぬるを ｱｲｳｴｵ 漢字、カタカナ。",
    "天地玄黃，宇宙洪荒。日月盈昃，辰宿列張。",
    "키스의 고유조건은 입술끼리 만나야 한다",
    "😀 👍🏽 👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 ❤️ ☺︎",
    "e\u0301 \u00e9 n\u0303 \u1ea1\u0306 Z\u0351\u036b\u0343",
    "\u00a0\u2003\u3000\u200b\ufeff\u2028\u2029\u00ad",
    "½ ² Ⅷ ٣ 四 ௧ 𝟘𝟙 ①",
    "ǅ ﬁ ſ İ ı ß ẞ K Å",
    "\x00\x01\x1f\x7f\x80\x9f",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>",
    "<|im_start <|im_end|| |im_start|> <repo_name> <file_sep>",
    "▁ Ġ Ċ ĉ",
    "\U0010fffd \U000e0001 \uffff",
    "a" * 200,
    " " * 200,
    "ab " * 60,
    "." * 70 + "\n" * 70,
]


def mixtures(count: int) -> list[str]:
    """Random pieces of TEXTS, glued together without regard for their borders."""
    chance = random.Random(2024)
    pool = [text for text in TEXTS if text.strip()]

    def piece() -> str:
        text = chance.choice(pool)
        start = chance.randrange(len(text))
        return text[start : start + chance.randint(1, 12)]

    return ["".join(piece() for _ in range(chance.randint(2, 6))) for _ in range(count)]


@click.command()
@click.option("-m", "--model", required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("-o", "--output", type=click.Path(path_type=Path), default=_FILE)
def main(model: Path, output: Path) -> None:
    """Write the token ids that llama.cpp finds in the texts."""
    try:
        with llama_cpp.Peer(model, n_ctx=64, n_threads=1) as peer:
            found = [[text, peer.tokenize(text, bos=False)] for text in TEXTS + mixtures(_N_MIXTURES)]
    except PyInferError as error:
        raise click.ClickException(str(error)) from None
    lines = ",\n".join(json.dumps(pair, separators=(",", ":")) for pair in found)
    output.write_text(
        f'{{"source": {json.dumps(llama_cpp.version())}, "texts": [\n{lines}\n]}}\n', encoding="ascii"
    )
    click.echo(f"{output}: {len(found)} texts")


if __name__ == "__main__":
    main()
