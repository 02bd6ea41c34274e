"""From sources to files: what is written, and what is left when something goes wrong."""

from __future__ import annotations

import errno
import json
import shutil
import struct
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import gguf
import numpy as np
import pytest

from pyinfer import names
from pyinfer.errors import CapacityError, FormatError, InputError
from pyinfer.gguf_file import open_gguf
from pyinfer.names import GGMLType
from pyinfer_convert import output, pipeline
from pyinfer_convert.pipeline import plan, write
from pyinfer_convert.recipe import QUANTS
from pyinfer_convert.sources import PLAIN, CheckpointSource, SourceTensor, open_source

HF = Path(__file__).parents[1] / "golden" / "hf"
METADATA = {"general.architecture": "llama", "test.list": [1, -2], "test.words": ["a", "ü"], "test.real": 0.5}


class Fake:
    """A source of arrays: float32, float16, or uint16 for the bits of bfloat16."""

    label, name = "fake", "fake"

    def __init__(self, **arrays):
        self.files, self.notices = [], []
        self.arrays = {name.replace("__", "."): array for name, array in arrays.items()}
        self.loaded, self.closed = [], False

    def metadata(self):
        return dict(METADATA)

    def tensors(self):
        kinds = {"float32": GGMLType.F32, "float16": GGMLType.F16, "uint16": GGMLType.BF16}

        def show(name, array):
            def load(rows):
                self.loaded.append((name, rows))
                return array.reshape(-1, array.shape[-1])[rows]

            return SourceTensor(name, array.shape, kinds[array.dtype.name], load)

        return [show(name, array) for name, array in self.arrays.items()]

    def close(self):
        self.closed = True


def model(rows=96):
    random = np.random.default_rng(2)
    return Fake(
        token_embd__weight=random.standard_normal((40, 64)).astype(np.float16),
        blk__0__attn_norm__weight=random.standard_normal(64).astype(np.float32),
        blk__0__attn_q__weight=random.standard_normal((rows, 64)).astype(np.float32),
        blk__0__odd__weight=random.standard_normal((5, 40)).astype(np.float32),
        blk__0__bits__weight=(
            random.standard_normal((7, 64)).astype(np.float32).view(np.uint32) >> 16
        ).astype(np.uint16),
        output__weight=random.standard_normal((40, 64)).astype(np.float32),
    )


def made(source, path, quant="q4_0", **options):
    return write(plan(source, QUANTS[quant]), path, n_threads=2, **options)


def test_the_file_is_what_gguf_would_write(tmp_path):
    source = model()
    summary = made(source, tmp_path / "out.gguf")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_0
    assert reader.fields["general.quantization_version"].contents() == gguf.GGML_QUANT_VERSION
    assert [reader.fields[key].contents() for key in METADATA] == list(METADATA.values())
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert list(found) == list(source.arrays)
    kinds = {"blk.0.attn_norm.weight": "F32", "blk.0.odd.weight": "F16", "output.weight": "Q8_0"}
    for name, array in source.arrays.items():
        kind = gguf.GGMLQuantizationType[kinds.get(name, "Q4_0")]
        if array.dtype == np.uint16:
            array = (array.astype(np.uint32) << 16).view(np.float32)
        assert found[name].tensor_type == kind
        assert found[name].data.tobytes() == gguf.quants.quantize(array.astype(np.float32), kind).tobytes()
    assert summary.file_bytes == (tmp_path / "out.gguf").stat().st_size
    assert summary.tensors == {"Q4_0": 3, "F32": 1, "F16": 1, "Q8_0": 1}
    with open_gguf(tmp_path / "out.gguf") as file:
        assert file.tensors["blk.0.attn_q.weight"].shape == (64, 96)


def test_parts_join_to_the_whole(tmp_path, monkeypatch):
    made(model(), tmp_path / "whole.gguf")
    monkeypatch.setattr(pipeline, "PART_BYTES", 1000)
    monkeypatch.setattr(output, "SYNC_BYTES", 500)
    source, seen = model(), []
    made(source, tmp_path / "parts.gguf", progress=lambda *at: seen.append(at))
    assert len([name for name, _ in source.loaded if name == "blk.0.attn_q.weight"]) == 32
    assert (tmp_path / "parts.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] == plan(source, QUANTS["q4_0"]).bytes_before


def test_weights_that_are_not_finite_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "PART_BYTES", 1000)
    source = model()
    source.arrays["blk.0.attn_q.weight"][70, 33] = np.nan
    with pytest.raises(
        FormatError, match=r"fake: blk\.0\.attn_q\.weight: element \[70, 33\] is nan, expected a finite"
    ):
        made(source, tmp_path / "out.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_seen_before_and_during(tmp_path, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 1000))
    with pytest.raises(CapacityError, match=r"the file will have .*KiB, but the disk has 1000 B left"):
        made(model(), tmp_path / "out.gguf")
    monkeypatch.undo()

    def full(file, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(output, "_write_all", full)
    with pytest.raises(CapacityError, match="writing failed: No space left on device"):
        made(model(), tmp_path / "out.gguf")
    assert list(tmp_path.iterdir()) == []


def test_the_target_is_respected(tmp_path):
    target = tmp_path / "out.gguf"
    for bad, message in (
        (tmp_path / "no" / "out.gguf", "the folder .* does not exist"),
        (tmp_path, "this is a folder"),
    ):
        with pytest.raises(InputError, match=message):
            made(model(), bad)
    target.write_bytes(b"mine")
    with pytest.raises(InputError, match="exists already"):
        made(model(), target)
    assert target.read_bytes() == b"mine"
    made(model(), target, force=True)
    assert target.read_bytes()[:4] == b"GGUF"
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


def test_a_file_that_appears_meanwhile_is_kept(tmp_path):
    target = tmp_path / "out.gguf"
    with pytest.raises(InputError, match="appeared while"):
        made(model(), target, progress=lambda *at: target.write_bytes(b"mine"))
    assert target.read_bytes() == b"mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


def test_an_interrupt_leaves_nothing(tmp_path):
    def interrupted(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(model(), tmp_path / "out.gguf", progress=interrupted)
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_dies_leaves_no_file_of_that_name(tmp_path):
    program = """if True:
        import os, sys
        from pyinfer_convert.pipeline import plan, write
        from pyinfer_convert.recipe import QUANTS
        from pyinfer_convert.sources import open_source
        made = plan(open_source(sys.argv[1]), QUANTS["f32"])
        write(made, sys.argv[2], n_threads=1, progress=lambda done, total: done == total and os._exit(9))
    """
    command = [sys.executable, "-c", program, str(HF / "llama"), str(tmp_path / "out.gguf")]
    assert subprocess.run(command, timeout=120).returncode == 9
    left = [path.name for path in tmp_path.iterdir()]
    assert len(left) == 1 and left[0].startswith("out.gguf.") and left[0].endswith(".part")
    made(model(), tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


def test_a_model_without_tensors_is_refused():
    with pytest.raises(FormatError, match="there is no tensor in it"):
        plan(Fake(), QUANTS["q4_0"])


# Checkpoints


@pytest.fixture
def checkpoint(tmp_path):
    """checkpoint(name): a copy of a tiny checkpoint that a test may damage."""

    def copy(name):
        return Path(shutil.copytree(HF / name, tmp_path / name))

    return copy


def with_tensors(folder, change):
    """Rewrite model.safetensors with other tensors: change(dict of name -> (dtype, array))."""
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    kinds = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
    tensors = {}
    for name, entry in json.loads(raw[8 : 8 + size]).items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            data = np.frombuffer(raw[8 + size + first : 8 + size + last], kinds[entry["dtype"]])
            tensors[name] = (entry["dtype"], data.reshape(entry["shape"]).copy())
    change(tensors)
    head, data = {}, b""
    for name, (dtype, array) in tensors.items():
        head[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + array.nbytes],
        }
        data += array.tobytes()
    text = json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize("name", ["llama", "relu_llama"])
def test_a_checkpoint_keeps_its_numbers(name, checkpoint, tmp_path, monkeypatch):
    """F32 of the file equals the checkpoint's; sparse models have their ffn_down neuron by neuron."""
    folder, held = checkpoint(name), {}
    with_tensors(folder, held.update)
    monkeypatch.setattr(pipeline, "PART_BYTES", 2000)
    source = open_source(folder)
    made(source, tmp_path / "out.gguf", "f32")
    source.close()
    with open_gguf(tmp_path / "out.gguf") as file:
        found = {each: tensor.data.view(np.float32).copy() for each, tensor in file.tensors.items()}
        assert file.architecture == "llama" and file.get(names.NAME) == name
        assert len(file.require(names.TOKENS)) == file.tensors["token_embd.weight"].rows
    down = held["model.layers.1.mlp.down_proj.weight"][1]
    if name == "relu_llama":
        np.testing.assert_array_equal(found["blk.1.ffn_down_t.weight"], down.T.astype(np.float32).reshape(-1))
        assert "blk.1.ffn_down.weight" not in found
    else:
        np.testing.assert_array_equal(found["blk.1.ffn_down.weight"], down.astype(np.float32).reshape(-1))
    up = held["model.layers.0.mlp.up_proj.weight"][1]
    np.testing.assert_array_equal(found["blk.0.ffn_up.weight"], up.astype(np.float32).reshape(-1))
    q = held["model.layers.0.self_attn.q_proj.weight"][1].astype(np.float32)
    assert not np.array_equal(found["blk.0.attn_q.weight"], q.reshape(-1))  # rotated pairs become neighbours
    np.testing.assert_array_equal(np.sort(found["blk.0.attn_q.weight"]), np.sort(q.reshape(-1)))


def test_plain_keeps_ffn_down(checkpoint):
    source = open_source(checkpoint("relu_llama"), layout=PLAIN)
    assert isinstance(source, CheckpointSource)
    found = [tensor.name for tensor in source.tensors()]
    assert "blk.0.ffn_down.weight" in found and not any("down_t" in name for name in found)
    source.close()


def test_types_of_a_checkpoint_are_read_as_stored(checkpoint, tmp_path):
    folder = checkpoint("llama")

    def change(tensors):
        name = "model.layers.0.mlp.up_proj.weight"
        bits = (tensors[name][1].astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        tensors[name] = ("BF16", bits)

    with_tensors(folder, change)
    source = open_source(folder)
    stored = {tensor.name: tensor.type for tensor in source.tensors()}
    assert stored["blk.0.ffn_up.weight"] == GGMLType.BF16
    made(source, tmp_path / "out.gguf", "bf16")
    source.close()
    held = {}
    with_tensors(folder, held.update)
    with open_gguf(tmp_path / "out.gguf") as file:
        bits = held["model.layers.0.mlp.up_proj.weight"][1]
        np.testing.assert_array_equal(
            file.tensors["blk.0.ffn_up.weight"].data.view(np.uint16), bits.reshape(-1)
        )


def test_a_missing_tensor_and_one_too_many_are_named(checkpoint):
    folder = checkpoint("llama")
    with_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    source = open_source(folder)
    with pytest.raises(FormatError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        source.tensors()
    source.close()


def test_damaged_weights_of_a_checkpoint_are_named(checkpoint, tmp_path):
    folder = checkpoint("llama")

    def change(tensors):
        tensors["model.layers.1.mlp.gate_proj.weight"][1][3, 5] = np.inf

    with_tensors(folder, change)
    source = open_source(folder)
    with pytest.raises(FormatError, match=r"llama: blk\.1\.ffn_gate\.weight: element \[3, 5\] is inf"):
        made(source, tmp_path / "out.gguf")
    source.close()
    assert not (tmp_path / "out.gguf").exists()
