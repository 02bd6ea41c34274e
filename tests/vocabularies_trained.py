"""Vocabularies trained on the spot by other libraries, which then are the oracles."""

from __future__ import annotations

import io
import json

import numpy as np

CORPUS = """
Once upon a time there was a small engine that wanted to read every book in the world. It read slowly.
The engine didn't know what the words meant, but it counted them: one, two, three, 10, 100, 12345, 3.14159.
"What is that?" asked the fox. "It's a tokenizer," said the engine. "We've seen it; they'll see it, I'd say."
def read(path: str) -> list[str]:
    with open(path) as file:
        return [line.strip() for line in file if line.strip() != ""]

for (int i = 0; i < 10; ++i) {
\t\tsum += values[i] * 2;   // doubled
}
Der Fuchs läuft über die Straße und grüßt den Bären. Où est la bibliothèque? ¿Dónde está la niña?
Привет, мир! Как дела? Всё хорошо. Γειά σου Κόσμε. שלום עולם. مرحبا بالعالم.
日本語のテキスト。 中文文本,很好。 한국어 텍스트.
Emoji: 😀😃😄👍🏽👨‍👩‍👧 and more 😀👍. Spaces:    four,        eight.


Three empty lines above. THE END. The End? the end! The engine was happy: it had read the whole book.
"""

TEXTS = [
    "",
    " ",
    "  ",
    "   x",
    "x   ",
    "\n",
    "\n\n\n",
    "\r\n a\r\n\r\n",
    "\t\ttab\t",
    " \n \n  z",
    "Hello, world! It's 12345 o'clock; THEY'LL'VE 'tis I'D",
    "the engine that wanted the book",
    "def f(x):\n    return x + 1\n",
    "Straße läuft über 日本語 мир 😀👍🏽 é e\u0301 \u00a0\u3000\u200b ½²Ⅷ٣",
    "\x00\x01\x7f",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "1234567890 1 12 123 1,234.56",
    "!!!???...---___",
    *CORPUS.splitlines(),
    CORPUS,
]


def byte_level(words, pre: str, size: int = 700) -> tuple[dict, object]:
    """(metadata of a gpt2 vocabulary, the `tokenizers` tokenizer); words: its pre-tokenizer before bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    oracle = Tokenizer(models.BPE())
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    oracle.pre_tokenizer = pre_tokenizers.Sequence([*words, bytes_only])
    oracle.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    oracle.train_from_iterator([CORPUS] * 2, trainer)
    model = json.loads(oracle.to_str())["model"]
    tokens = [text for text, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.ones(len(tokens), np.int32),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
    }
    return metadata, oracle


def add_tokens(metadata: dict, tokens: list[str], kind: int) -> dict:
    """The same vocabulary with more tokens of a kind at its end."""
    kinds = metadata["tokenizer.ggml.token_type"]
    longer = dict(metadata)
    longer["tokenizer.ggml.tokens"] = metadata["tokenizer.ggml.tokens"] + tokens
    longer["tokenizer.ggml.token_type"] = np.concatenate([kinds, np.full(len(tokens), kind, np.int32)])
    if "tokenizer.ggml.scores" in metadata:
        scores = metadata["tokenizer.ggml.scores"]
        longer["tokenizer.ggml.scores"] = np.concatenate([scores, np.zeros(len(tokens), np.float32)])
    return longer


def sentencepiece(**options) -> tuple[dict, object]:
    """(metadata of a llama vocabulary, the sentencepiece processor); options: of sentencepiece's trainer."""
    import sentencepiece

    model = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "vocab_size": 600,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "character_coverage": 0.99,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines() * 2), model_writer=model, **{**settings, **options}
    )
    oracle = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    numbers = range(oracle.vocab_size())
    user = set(options.get("user_defined_symbols", ()))

    def kind(number: int) -> int:
        if oracle.is_unknown(number):
            return 2
        if oracle.is_control(number):
            return 3
        return 6 if oracle.is_byte(number) else 4 if oracle.id_to_piece(number) in user else 1

    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [oracle.id_to_piece(number) for number in numbers],
        "tokenizer.ggml.scores": np.array([oracle.get_score(number) for number in numbers], np.float32),
        "tokenizer.ggml.token_type": np.array([kind(number) for number in numbers], np.int32),
        "tokenizer.ggml.bos_token_id": oracle.bos_id(),
        "tokenizer.ggml.eos_token_id": oracle.eos_id(),
        "tokenizer.ggml.unknown_token_id": oracle.unk_id(),
        "tokenizer.ggml.add_space_prefix": options.get("add_dummy_prefix", True),
    }
    return metadata, oracle
