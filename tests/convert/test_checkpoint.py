"""Folders of Hugging Face checkpoints: whole ones, and those that lack something, with what to do about "
"it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import safetensors, torch_file, write_folder

from pyinfer.errors import FormatError, ModelNotFoundError, PyInferError, UnsupportedError
from pyinfer_convert.checkpoint import open_checkpoint
from pyinfer_convert.weight_files import find_weights

CONFIG = {"architectures": ["LlamaForCausalLM"], "vocab_size": 4}
ONE = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "bits": np.arange(4, dtype=np.uint16)}
TWO = {"b": np.arange(8, dtype=np.float16).reshape(4, 2)}
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SHARDS = {FIRST: safetensors(ONE), SECOND: safetensors(TWO)}
INDEX = {
    "metadata": {"total_size": 48},
    "weight_map": {"a": FIRST, "bits": FIRST, "b": SECOND},
}
INDEX_NAME = "model.safetensors.index.json"
SHARDED = {"config.json": CONFIG, INDEX_NAME: INDEX, **SHARDS}


def without(files: dict, *names: str) -> dict:
    return {name: content for name, content in files.items() if name not in names}


def check(folder: Path, *, bits: bool = True) -> None:
    with open_checkpoint(folder) as checkpoint:
        expected = {**ONE, **TWO} if bits else {"a": ONE["a"], **TWO}
        assert set(checkpoint.names) == set(expected)
        assert checkpoint.nbytes == sum(array.nbytes for array in expected.values())
        for name, array in expected.items():
            assert np.array_equal(checkpoint.read(name), array) and checkpoint.shape(name) == array.shape
        assert checkpoint.read("b", slice(1, 3)).tolist() == [[2, 3], [4, 5]]
        assert checkpoint.dtype("b") == "F16" and (not bits or checkpoint.dtype("bits") == "BF16")


def test_shards_stand_under_one_roof(tmp_path: Path) -> None:
    check(write_folder(tmp_path, SHARDED))


def test_shards_are_found_without_their_index(tmp_path: Path) -> None:
    check(write_folder(tmp_path, without(SHARDED, INDEX_NAME)))


def test_a_single_file_is_read(tmp_path: Path) -> None:
    check(write_folder(tmp_path, {"config.json": CONFIG, "model.safetensors": safetensors({**ONE, **TWO})}))


def test_torch_files_are_read_where_there_is_no_safetensors(tmp_path: Path) -> None:
    first, second = {"a": ONE["a"]}, TWO
    files = {
        "config.json": CONFIG,
        "pytorch_model-00001-of-00002.bin": torch_file(first),
        "pytorch_model-00002-of-00002.bin": torch_file(second),
        "pytorch_model.bin.index.json": {
            "weight_map": {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
        },
    }
    check(write_folder(tmp_path / "sharded", files), bits=False)
    whole = {"config.json": CONFIG, "pytorch_model.bin": torch_file({**first, **second})}
    check(write_folder(tmp_path / "whole", whole), bits=False)
    both = {**whole, "pytorch_model.bin": b"never opened", **without(SHARDED, "config.json")}
    check(write_folder(tmp_path / "both", both))


def test_tensors_that_the_index_leaves_out_are_left_out(tmp_path: Path) -> None:
    index = {"weight_map": {"b": SECOND}}
    with open_checkpoint(write_folder(tmp_path, {**SHARDED, INDEX_NAME: index})) as checkpoint:
        assert list(checkpoint.names) == ["b"]


def test_configurations_are_read(tmp_path: Path) -> None:
    config = {"model_type": "gemma3", "vocab_size": 1, "text_config": {"vocab_size": 4, "hidden_size": None}}
    files = {
        **SHARDED,
        "config.json": {**config, "hidden_size": 3},
        "generation_config.json": {"eos_token_id": [1]},
    }
    with open_checkpoint(write_folder(tmp_path, files)) as checkpoint:
        assert checkpoint.config["vocab_size"] == 4 and checkpoint.config["hidden_size"] == 3
        assert checkpoint.config["model_type"] == "gemma3"
        assert checkpoint.generation_config == {"eos_token_id": [1]}
        assert checkpoint.json("absent.json") is None and checkpoint.bytes("absent.txt") is None
    with open_checkpoint(write_folder(tmp_path / "plain", SHARDED)) as checkpoint:
        assert checkpoint.generation_config == {}


def test_an_unknown_tensor_is_named(tmp_path: Path) -> None:
    with open_checkpoint(write_folder(tmp_path, SHARDED)) as checkpoint:
        for ask in (checkpoint.read, checkpoint.shape, checkpoint.dtype):
            with pytest.raises(FormatError, match=r"the checkpoint has no tensor model\.norm\.weight"):
                ask("model.norm.weight")


WHOLE = {"config.json": CONFIG, "model.safetensors": safetensors(ONE)}
ADAPTER = {"base_model_name_or_path": "meta-llama/Llama-2-7b-hf"}
REFUSED = {
    "a missing shard": (
        without(SHARDED, SECOND),
        ModelNotFoundError,
        r"1 of 2 weight files are missing \(model-00002-of-00002\.safetensors\); fetch them again",
    ),
    "a missing shard without an index": (
        without(SHARDED, FIRST, INDEX_NAME),
        ModelNotFoundError,
        r"1 of 2 weight files are missing \(model-00001-of-00002\.safetensors\)",
    ),
    "all shards missing": (
        {"config.json": CONFIG, INDEX_NAME: INDEX},
        ModelNotFoundError,
        r"2 of 2 weight files are missing",
    ),
    "a shard of another model": (
        {**SHARDED, SECOND: safetensors(ONE)},
        FormatError,
        r"model-00002-of-00002\.safetensors: tensor b is missing, expected it as the index file says",
    ),
    "a tensor twice": (
        {**without(SHARDED, INDEX_NAME), SECOND: safetensors(ONE)},
        FormatError,
        r"model-00002-of-00002\.safetensors: tensor a is in model-00001-of-00002\.safetensors too",
    ),
    "an index that leads elsewhere": (
        {**SHARDED, INDEX_NAME: {"weight_map": {"a": "../other/model.safetensors"}}},
        FormatError,
        r"tensor a is said to be in \.\./other/model\.safetensors, expected the name of a",
    ),
    "an index of other files": (
        {**SHARDED, INDEX_NAME: {"weight_map": {"a": "pytorch_model.bin"}}},
        FormatError,
        r"tensor a is said to be in pytorch_model\.bin",
    ),
    "an index of numbers": (
        {**SHARDED, INDEX_NAME: {"weight_map": {"a": 1}}},
        FormatError,
        r"weight_map is not",
    ),
    "an index without a map": ({**SHARDED, INDEX_NAME: {}}, FormatError, r"weight_map is not an object"),
    "no config": (without(WHOLE, "config.json"), FormatError, r"the folder has no config\.json"),
    "config is no JSON": ({**WHOLE, "config.json": b"{"}, FormatError, r"config\.json: the file is no JSON"),
    "config is deep": ({**WHOLE, "config.json": b"[" * 200_000}, FormatError, r"the file is no JSON"),
    "config is a list": ({**WHOLE, "config.json": []}, FormatError, r"holds a list, expected a JSON object"),
    "config is a pointer": (
        {**WHOLE, "config.json": b"version https://git-lfs.github.com/spec/v1\n"},
        FormatError,
        r"config\.json: this is a Git LFS pointer",
    ),
    "quantized": (
        {**WHOLE, "config.json": {**CONFIG, "quantization_config": {"quant_method": "gptq"}}},
        UnsupportedError,
        r"the weights are quantized already \(gptq\).*convert from the original model",
    ),
    "a LoRA adapter": (
        {"adapter_config.json": ADAPTER, "adapter_model.safetensors": safetensors(ONE)},
        UnsupportedError,
        r"this is a LoRA adapter of meta-llama/Llama-2-7b-hf, not a model; merge it into that model first",
    ),
    "a LoRA adapter without its configuration": (
        {"adapter_model.safetensors": safetensors(ONE)},
        UnsupportedError,
        r"this is a LoRA adapter of another model, not a model",
    ),
    "GGUF files": (
        {"model.gguf": b"GGUF", "config.json": CONFIG},
        FormatError,
        r"give the file itself: .*model\.gguf",
    ),
    "TensorFlow": (
        {"tf_model.h5": b"", "config.json": CONFIG},
        UnsupportedError,
        r"holds tf_model\.h5.*save_pretrained",
    ),
    "original Llama": ({"consolidated.00.pth": b"PK"}, UnsupportedError, r"holds consolidated\.00\.pth"),
    "no weights": (
        {"config.json": CONFIG},
        FormatError,
        r"the folder holds no weights, expected model\.safetensors",
    ),
    "an empty folder": ({}, FormatError, r"the folder holds no weights"),
    "a broken shard": (
        {**SHARDED, SECOND: SHARDS[SECOND][:-1]},
        FormatError,
        r"model-00002-of-00002\.safetensors: tensor b ends at byte",
    ),
}


@pytest.mark.parametrize("files, error, message", REFUSED.values(), ids=REFUSED)
def test_what_is_no_checkpoint_is_refused_in_one_sentence(tmp_path: Path, files, error, message) -> None:
    folder = write_folder(tmp_path / "model", files)
    with pytest.raises(error, match=message) as raised:
        open_checkpoint(folder)
    assert "\n" not in str(raised.value) and isinstance(raised.value, PyInferError)


def test_an_adapter_beside_the_weights_is_noticed(tmp_path: Path) -> None:
    with open_checkpoint(write_folder(tmp_path / "plain", WHOLE)) as checkpoint:
        assert checkpoint.notices == []
    for name in ("adapter_config.json", "adapter_model.bin", "adapter_model.safetensors"):
        folder = write_folder(tmp_path / name, {**WHOLE, name: b"never opened"})
        with open_checkpoint(folder) as checkpoint:
            (notice,) = checkpoint.notices
            assert f"({name}) is not merged" in notice and "\n" not in notice


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, WHOLE)
    with pytest.raises(FormatError, match=r"this is a file, expected the folder .*; give .*"):
        open_checkpoint(tmp_path / "model.safetensors")
    with pytest.raises(
        ModelNotFoundError, match="no such folder, expected a checkpoint's folder or organisation/name"
    ):
        open_checkpoint(tmp_path / "absent")


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_reading_many_shards_needs_the_memory_of_one_tensor(tmp_path: Path) -> None:
    """The last tensor of each shard is not kept when the next shard is read."""
    count, rows = 6, 1 << 13
    write_folder(tmp_path, {"config.json": CONFIG})
    for number in range(count):
        entry = {f"{number}": {"dtype": "F32", "shape": [rows, 1024], "data_offsets": [0, rows << 12]}}
        path = tmp_path / f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        path.write_bytes(safetensors({}, entry))
        with open(path, "r+b") as handle:
            handle.truncate(path.stat().st_size + (rows << 12))

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    with open_checkpoint(tmp_path) as checkpoint:
        before = resident_bytes()
        for name in checkpoint.names:
            assert checkpoint.read(name).max() == 0
            assert resident_bytes() - before < 2 * (rows << 12)


def test_a_file_of_absurd_size_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyinfer_convert.checkpoint.MAX_JSON_BYTES", 20)
    with pytest.raises(FormatError, match=r"config\.json: the file has more than 20 bytes"):
        open_checkpoint(write_folder(tmp_path, WHOLE))


def test_weights_are_found_as_transformers_finds_them() -> None:
    assert find_weights(["model.safetensors", INDEX_NAME, "pytorch_model.bin"]).files == ["model.safetensors"]
    assert find_weights(["pytorch_model.bin", "training_args.bin", "adapter_model.bin"]).files == [
        "pytorch_model.bin"
    ]
    assert find_weights(["optimizer.bin", "vocab.json"]).files == []
    shards = ["pytorch_model-00002-of-00002.bin", "pytorch_model-00001-of-00002.bin"]
    found = find_weights([*shards, "pytorch_model.bin.index.json"])
    assert found.files == sorted(shards) and found.index == "pytorch_model.bin.index.json"


def test_the_stored_checkpoints_are_complete() -> None:
    folders = sorted((Path(__file__).parent.parent / "golden" / "hf").iterdir())
    assert folders
    for folder in folders:
        with open_checkpoint(folder) as checkpoint:
            assert checkpoint.names and checkpoint.config == json.loads(
                (folder / "config.json").read_text()
            ) | (checkpoint.config if "text_config" in checkpoint.config else {})
