"""Class Llama over the real engine and a tiny random model: what closing and forgetting give back."""

import gc
import threading
import weakref

import pytest

from pyinfer import Llama
from pyinfer_tools.random_model import SHAPES, write_random_model


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    write_random_model(path, SHAPES["tiny"], "q4_0")
    return path


def workers():
    return {thread for thread in threading.enumerate() if thread.name.startswith("pyinfer-")}


@pytest.fixture
def opened(path):
    """An instance whose threads run, its own threads, and weak references to what takes memory."""
    before = workers()
    llm = Llama(path, n_ctx=64, n_threads=3)
    llm([1, 2, 3], max_tokens=2)
    parts = [llm.model, llm.session, llm.model.weights, llm.session._executor, llm.tokenizer, llm.model.file]
    held = [llm]  # the fixture must not keep it alive
    del llm
    return held, workers() - before, [weakref.ref(part) for part in parts]


def test_close_frees_all_without_the_garbage_collector(opened):
    held, threads, parts = opened
    assert len(threads) == 2 and all(part() is not None for part in parts)
    gc.disable()
    try:
        held[0].close()
        assert [part() for part in parts] == [None] * len(parts)
    finally:
        gc.enable()
    assert not any(thread.is_alive() for thread in threads)
    assert held[0].n_tokens == 0


def test_close_frees_all_although_a_stream_was_begun(opened):
    held, threads, parts = opened
    stream = held[0]([1, 2, 3], max_tokens=20, stream=True)
    next(stream)
    held[0].close()
    gc.collect()
    assert [part() for part in parts[:4]] == [None] * 4
    assert not any(thread.is_alive() for thread in threads)
    stream.close()


@pytest.mark.parametrize("cycle", [False, True])
def test_a_forgotten_instance_ends_its_threads(opened, cycle):
    held, threads, parts = opened
    if cycle:
        held[0].itself = held[0]
    held.clear()
    if cycle:
        gc.collect()
    assert not any(thread.is_alive() for thread in threads)
    assert [part() for part in parts] == [None] * len(parts)


def test_a_stream_keeps_its_model(path):
    expected = [c["choices"][0]["text"] for c in Llama(path, n_ctx=64)([1, 2], seed=1, stream=True)]
    stream = Llama(path, n_ctx=64)([1, 2], seed=1, stream=True)
    gc.collect()
    assert [chunk["choices"][0]["text"] for chunk in stream] == expected
