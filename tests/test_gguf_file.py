"""The GGUF reader against the gguf package's own, and what it promises to its callers."""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path

import gguf
import gguf_samples as samples
import numpy as np
import pytest
from gguf_samples import raw_gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from pyinfer import names
from pyinfer.errors import FormatError, ModelNotFoundError
from pyinfer.gguf_file import GGUFFile, open_gguf
from pyinfer.names import BLOCK, GGMLType, ValueType


def assert_same_values(ours: object, theirs: object) -> None:
    if isinstance(ours, np.ndarray):
        assert ours.tolist() == list(theirs)
    elif isinstance(ours, list) and ours and not isinstance(ours[0], str):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs):
            assert_same_values(one, other)
    else:
        assert ours == theirs and type(ours) is type(theirs)


def assert_same_tensors(file: GGUFFile, reader_tensors: list) -> None:
    assert list(file.tensors) == [each.name for each in reader_tensors]
    for theirs in reader_tensors:
        ours = file.tensors[theirs.name]
        assert ours.shape == tuple(theirs.shape.tolist()) and ours.type == theirs.tensor_type
        assert ours.nbytes == theirs.n_bytes and ours.columns * ours.rows == theirs.n_elements
        assert ours.data.dtype == np.uint8 and ours.data.ndim == 1 and ours.data.flags.c_contiguous
        assert ours.data.tobytes() == theirs.data.tobytes()


def fields_of(reader: gguf.GGUFReader) -> dict[str, object]:
    return {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}


@pytest.mark.parametrize("alignment", [None, 8, 256])
def test_a_file_reads_as_the_gguf_package_reads_it(tmp_path: Path, alignment: int | None) -> None:
    path = samples.write_sample(tmp_path / "m.gguf", alignment)
    reader = gguf.GGUFReader(path)
    with open_gguf(path) as file:
        assert (file.path, file.version, file.file_bytes) == (path, 3, path.stat().st_size)
        assert file.architecture == "llama"
        fields = fields_of(reader)
        assert list(file.metadata) == list(fields)
        for name, field in fields.items():
            if name != "test.nested":  # their contents() loses the inner arrays' bounds
                assert_same_values(file.metadata[name], field.contents())
        assert [each.tolist() for each in file.metadata["test.nested"]] == [[1, 2], [3]]
        assert file.metadata["tokenizer.ggml.tokens"] == samples.TOKENS
        assert file.metadata["tokenizer.ggml.scores"].dtype == np.float32
        assert file.metadata["test.bools"].dtype == np.bool_
        assert_same_tensors(file, reader.tensors)


@pytest.mark.parametrize("given_part", [0, 1, 2])
def test_any_part_opens_the_whole_split_model(tmp_path: Path, given_part: int) -> None:
    paths = samples.write_split(tmp_path)
    readers = [gguf.GGUFReader(path) for path in paths]
    assert len(paths) == 3
    with open_gguf(paths[given_part]) as file:
        assert file.path == paths[0]
        assert file.file_bytes == sum(path.stat().st_size for path in paths)
        assert list(file.metadata) == list(fields_of(readers[0]))
        assert_same_tensors(file, [each for reader in readers for each in reader.tensors])


def test_version_2_reads_like_version_3(tmp_path: Path) -> None:
    made = samples.write_tiny(tmp_path / "three.gguf").read_bytes()
    older = tmp_path / "two.gguf"
    older.write_bytes(made[:4] + struct.pack("<I", 2) + made[8:])
    with open_gguf(older) as two, open_gguf(tmp_path / "three.gguf") as three:
        assert (two.version, three.version) == (2, 3)
        assert list(two.metadata) == list(three.metadata)
        for name, one in two.tensors.items():
            np.testing.assert_array_equal(one.data, three.tensors[name].data)


def test_type_ids_and_block_sizes_are_those_of_ggml() -> None:
    theirs = {kind.name: int(kind) for kind in gguf.GGMLQuantizationType}
    assert theirs == {kind.name: int(kind) for kind in GGMLType if kind.name in theirs}
    sizes = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert sizes == {int(kind): size for kind, size in BLOCK.items() if int(kind) in sizes}
    assert {kind.name: int(kind) for kind in gguf.GGUFValueType} == {
        each.name: int(each) for each in ValueType
    }


def test_key_and_tensor_names_are_those_of_gguf() -> None:
    keys = set()
    for group in vars(gguf.Keys).values():
        keys |= {value for value in getattr(group, "__dict__", {}).values() if isinstance(value, str)}
    ours = {
        value
        for value in vars(names).values()
        if isinstance(value, str) and ("{arch}." in value or ".ggml." in value)
    }
    assert ours - keys == {names.ROPE_SCALE_LINEAR}  # only in older files
    tensors = {name.replace("blk.{bid}.", "") for name in gguf.TENSOR_NAMES.values()}
    for name in ("TOKEN_EMBD", "OUTPUT_NORM", "OUTPUT", "ROPE_FREQS", "ATTN_Q", "ATTN_OUTPUT", "ATTN_Q_NORM"):
        assert getattr(names, name) in tensors
    for name in ("POST_ATTENTION_NORM", "FFN_NORM", "FFN_GATE", "FFN_UP", "FFN_DOWN", "POST_FFW_NORM"):
        assert getattr(names, name) in tensors
    assert (
        names.weight(names.ATTN_Q, 3) == "blk.3.attn_q.weight" and names.bias(names.OUTPUT) == "output.bias"
    )
    assert names.key(names.HEAD_COUNT_KV, "qwen2") == "qwen2.attention.head_count_kv"


SCALARS = st.one_of(
    st.tuples(st.just("add_uint64"), st.integers(0, 2**64 - 1)),
    st.tuples(st.just("add_int64"), st.integers(-(2**63), 2**63 - 1)),
    st.tuples(st.just("add_float64"), st.floats(allow_nan=False)),
    st.tuples(st.just("add_string"), st.text(min_size=1)),
    st.tuples(st.just("add_bool"), st.booleans()),
    st.tuples(st.just("add_array"), st.lists(st.text(), min_size=1, max_size=5)),
    st.tuples(st.just("add_array"), st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=5)),
)


@given(st.dictionaries(st.text(min_size=1, max_size=20), SCALARS, max_size=6))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_metadata_that_is_written_is_read_back(tmp_path_factory, pairs: dict) -> None:
    path = tmp_path_factory.mktemp("any") / "m.gguf"
    pairs = {key: value for key, value in pairs.items() if key != names.ARCHITECTURE}
    made = gguf.GGUFWriter(path, "llama")
    for key, (method, value) in pairs.items():
        getattr(made, method)(key, value)
    made.write_header_to_file()
    made.write_kv_data_to_file()
    made.close()
    with open_gguf(path) as file:
        assert list(file.metadata) == [names.ARCHITECTURE, *pairs]
        for key, (_, value) in pairs.items():
            found = file.metadata[key]
            assert (found.tolist() if isinstance(found, np.ndarray) else found) == value


def test_get_and_require_check_key_and_type(tmp_path: Path) -> None:
    with open_gguf(samples.write_sample(tmp_path / "m.gguf")) as file:
        assert file.require(names.BLOCK_COUNT, int) == file.get("llama.block_count") == 2
        assert file.get(names.CONTEXT_LENGTH) is None and file.get(names.CONTEXT_LENGTH, 512, int) == 512
        assert file.get(names.BLOCK_COUNT, kind=float) == 2.0
        assert file.require(names.ADD_BOS_TOKEN, bool) is True
        assert len(file.require(names.TOKENS, list)) == len(samples.TOKENS)
        with pytest.raises(FormatError, match=r"m\.gguf: metadata key llama\.context_length is missing"):
            file.require(names.CONTEXT_LENGTH)
        with pytest.raises(FormatError, match=r"add_bos_token holds a value of type bool, expected int"):
            file.require(names.ADD_BOS_TOKEN, int)
        with pytest.raises(FormatError, match=r"general\.name .* type str, expected int or float"):
            file.get(names.NAME, kind=(int, float))
    (tmp_path / "bare.gguf").write_bytes(raw_gguf())
    with (
        open_gguf(tmp_path / "bare.gguf") as file,
        pytest.raises(FormatError, match=r"general\.architecture"),
    ):
        file.require(names.BLOCK_COUNT)


def test_drop_pages_leaves_every_value_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    made = gguf.GGUFWriter(path, "llama")
    values = np.random.default_rng(1).integers(0, 256, 3 * 65536 + 100, np.int64).astype(np.int8)
    made.add_tensor("small", values[:33])
    made.add_tensor("large", values)
    samples.finish(made)
    with open_gguf(path) as file:
        for each in file.tensors.values():
            file.drop_pages(each)
        assert file.tensors["large"].data.tobytes() == values.tobytes()
        assert file.tensors["small"].data.tobytes() == values[:33].tobytes()
        large = file.tensors["large"]
        del each
    file.drop_pages(large)  # of a closed file: nothing to do


def test_closing_unmaps_the_file_and_spares_arrays_in_use(tmp_path: Path) -> None:
    path = samples.write_sample(tmp_path / "m.gguf")
    file = open_gguf(path)
    (file_map,) = file._maps
    file.close()
    assert file_map.closed and file.tensors == {}
    file.close()
    file = open_gguf(path)
    (file_map,) = file._maps
    held = file.tensors["output_norm.weight"].data
    before = held.tobytes()
    file.close()
    assert held.tobytes() == before and not file_map.closed
    with pytest.raises(ValueError, match="read-only"):
        held[0] = 1


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists the maps of a process")
def test_a_refused_file_leaves_no_map_behind(tmp_path: Path) -> None:
    first, second, third = samples.write_split(tmp_path)
    third.write_bytes(third.read_bytes()[:-64])
    refused = []
    for path in (first, second, third):
        with pytest.raises(FormatError) as caught:
            open_gguf(path)
        refused.append(caught)  # the traceback of an error must not hold maps either
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_bad_split_models_are_refused(tmp_path: Path) -> None:
    first, second, third = samples.write_split(tmp_path)
    content = second.read_bytes()
    second.unlink()
    with pytest.raises(ModelNotFoundError, match=r"model-00002-of-00003\.gguf: no such file"):
        open_gguf(third)
    shutil.copy(third, second)
    with pytest.raises(FormatError, match=r"model-00002-of-00003\.gguf: holds part 3 of 3 of a model"):
        open_gguf(first)
    number = struct.pack("<H", 2)
    at = content.index(names.SPLIT_NO.encode()) + len(names.SPLIT_NO) + 4
    again = third.read_bytes()
    place = again.index(names.SPLIT_NO.encode()) + len(names.SPLIT_NO) + 4
    assert again[place : place + 2] == number
    second.write_bytes(again[:place] + content[at : at + 2] + again[place + 2 :])
    with pytest.raises(FormatError, match=r"tensor \S+ is in model-00002-of-00003\.gguf too"):
        open_gguf(first)
    second.write_bytes(content)
    head = first.read_bytes()
    at = head.index(names.SPLIT_TENSORS_COUNT.encode()) + len(names.SPLIT_TENSORS_COUNT) + 4
    first.write_bytes(head[:at] + struct.pack("<i", 7) + head[at + 4 :])
    with pytest.raises(FormatError, match=r"split\.tensors\.count is 7, expected 8"):
        open_gguf(second)


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no such file"):
        open_gguf(tmp_path / "absent.gguf")
    with pytest.raises(FormatError, match="is a folder, expected a GGUF file"):
        open_gguf(tmp_path)
    with pytest.raises(ModelNotFoundError, match="cannot be opened"):
        open_gguf("a\0b.gguf")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(FormatError, match="not a regular file"):
            open_gguf(tmp_path / "pipe")
