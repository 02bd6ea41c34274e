"""Placements: never over the budget, none or enough neurons of a layer, stored and read back, replaced when
they do not fit.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from hf_checkpoints import FOLDER, converted, write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from pyinfer.errors import FormatError, InputError
from pyinfer.gguf_file import open_gguf
from pyinfer.neurons.budget import ModelBytes, model_bytes, scratch_bytes
from pyinfer.neurons.hardware import Hardware
from pyinfer.neurons.placement import ON_CPU, ON_GPU, Placement, fit, often, place, place_on_cpu
from pyinfer.program.program import Cache, Op, Program, Value
from pyinfer.section import Entry
from pyinfer_convert.checkpoint import open_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden"
MACHINE = Hardware("a CPU", "a GPU", 50e9, 1000e9, 20e-6, 24 << 30, ("cpu_bytes_per_second",))


def sizes(n_layers: int = 4, n_neurons: int = 512, neuron: int = 7000) -> ModelBytes:
    """A model whose layers have 1000 bytes of attention, 100 of KV cache and 50 of predictor."""
    return ModelBytes(
        n_neurons=n_neurons,
        n_ctx=10,
        neuron=(neuron,) * n_layers,
        attention=(1000,) * n_layers,
        kv_cache=(100,) * n_layers,
        predictor=(50,) * n_layers,
        output=500,
        scratch=30,
    )


FIXED = 30 + 4 * 1100 + 500 + 4 * 50  # of all but the neurons


def counts_of(n_layers: int = 4, n_neurons: int = 512, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    shares = np.minimum(1, np.arange(1, n_neurons + 1) ** -1.0 * 20)
    return np.stack([random.permutation(random.binomial(1000, shares)) for _ in range(n_layers)])


def fewest(machine: Hardware, n_bytes: int) -> float:
    """C_l of the paper, in its own words: T_sync / (M / BW_CPU - M / BW_GPU)."""
    on_cpu, on_gpu = n_bytes / machine.cpu_bytes_per_second, n_bytes / machine.gpu_bytes_per_second
    return machine.sync_seconds / (on_cpu - on_gpu)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 6),
    st.integers(1, 300),
    st.integers(0, 2_500_000),
    st.sampled_from([1e-6, 1e-5, 1e-4]),
    st.sampled_from(["exact", "greedy"]),
)
def test_any_placement_keeps_budget_and_fewest_neurons(seed, n_neurons, budget, sync, solver):
    model = replace(sizes(3, n_neurons), neuron=(700, 900, 700), predictor=(50, 0, 50))
    machine = replace(MACHINE, sync_seconds=sync)
    counts = counts_of(3, n_neurons, seed)
    placement, notices = place(counts, model, budget, machine, solver)
    parts = dict(model.parts())
    used = sum(sum(parts[name].values()) for name in placement.resident)
    used += sum(int(hot.sum()) * each for hot, each in zip(placement.hot, model.neuron))
    assert used <= budget and used == sum(placement.n_bytes.values())
    for hot, row, n_bytes in zip(placement.hot, counts, model.neuron):
        assert not hot.any() or hot.all() or hot.sum() >= fewest(machine, n_bytes)
        assert not hot.any() or row[hot].min() >= (row[~hot].max() if not hot.all() else 0)
    assert placement.objective == counts[placement.hot].sum() <= placement.bound <= counts.sum()
    assert placement.objective >= placement.greedy_objective
    assert all(notice and "\n" not in notice for notice in notices)


def test_layers_keep_their_own_neurons_also_beyond_ten():
    """PowerInfer sorted layers as texts: 0, 1, 10, 11, 2 ..., so most of them got another one's neurons."""
    n_layers, n_neurons = 80, 256
    counts = np.zeros((n_layers, n_neurons), np.int64)
    for layer in range(n_layers):
        counts[layer, np.arange(64) + layer] = 1000 - np.arange(64)
    placement, _ = place(counts, sizes(n_layers, n_neurons), 1 << 40, MACHINE)
    assert placement.hot.shape == (n_layers, n_neurons)
    loaded = Placement.from_entry(placement.to_entry(), n_layers, n_neurons)
    for layer in range(n_layers):
        assert set(np.arange(64) + layer) <= set(np.flatnonzero(loaded.hot[layer]))
    names = [name for name in placement.resident if name.endswith("attention")]
    assert names == [f"blk.{layer}.attention" for layer in range(n_layers)]


def test_what_is_resident_when_the_budget_shrinks():
    model = sizes()
    everything, used = model.resident(FIXED)
    assert sum(used.values()) == FIXED and len(everything) == 1 + 4 + 1 + 4
    assert used == {"scratch": 30, "attention": 4000, "kv_cache": 400, "output": 500, "predictors": 200}
    # One byte less: the last part is missing. Without room for a layer's attention, smaller parts still fit.
    assert model.resident(FIXED - 1)[0] == everything[:-1]
    assert model.resident(30 + 1100 + 550)[0] == ("scratch", "blk.0.attention", "output", "blk.0.predictors")
    assert model.resident(30)[0] == ("scratch",)
    assert model.resident(29) == ((), {})


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (29, "the budget of 29 B is less than the 30 B that a step works in: nothing is on the GPU"),
        (
            3000,
            "the budget of 2.9 KiB holds the attention and KV cache of 2 of 4 layers, all of which need 4",
        ),
        (30 + 4 * 1100 + 499, "the output head, 500 B, stays with the CPU"),
        (FIXED - 60, "holds the predictors of 2 of 4 layers, all of which need 200 B"),
        (FIXED, "leaves no room for neurons: none is placed"),
    ],
)
def test_a_small_budget_is_said_in_a_sentence(budget, message):
    placement, notices = place(counts_of(), sizes(), budget, MACHINE)
    assert any(message in notice for notice in notices), notices
    assert not placement.hot.any() and placement.objective == 0
    assert Placement.from_entry(placement.to_entry(), 4, 512).resident == placement.resident


def test_a_gpu_that_is_no_faster_gets_no_neurons():
    placement, notices = place(counts_of(), sizes(), 1 << 40, replace(MACHINE, gpu_bytes_per_second=50e9))
    assert not placement.hot.any()
    assert notices == ["the GPU reads its memory no faster than the CPU does: no neuron is placed"]


def test_a_layer_too_small_for_a_meeting_is_whole_on_the_gpu_or_not_at_all():
    slow = replace(MACHINE, sync_seconds=1e-3)
    assert fewest(slow, 7000) > 512
    placement, notices = place(counts_of(), sizes(), FIXED + 7000 * 512 * 3 + 7000 * 500, slow)
    assert sorted(placement.hot_neurons.tolist()) == [0, 512, 512, 512] and notices == []


def test_neurons_that_never_fired_get_no_room():
    counts = np.zeros((4, 512), np.int64)
    counts[2, :64] = 9
    placement, notices = place(counts, sizes(), 1 << 40, None)
    assert placement.hot_neurons.tolist() == [0, 0, 64, 0] and notices == []


@pytest.mark.parametrize(
    "counts",
    [
        counts_of(3),
        counts_of(4, 511),
        counts_of().astype(float),
        -counts_of(),
        np.full((4, 512), 1 << 60),
    ],
    ids=["layers", "neurons", "floats", "negative", "overflow"],
)
def test_counts_of_another_model_are_refused(counts):
    with pytest.raises(InputError, match="counts are"):
        place(counts, sizes(), 1 << 20, MACHINE)


def test_a_budget_below_zero_is_refused():
    with pytest.raises(InputError, match="the budget is -1 bytes"):
        place(counts_of(), sizes(), -1, MACHINE)


def test_without_a_gpu_neurons_that_fire_often_are_hot():
    counts = np.zeros((2, 70), np.int64)
    counts[0, 10:47] = 500  # exactly half of the time: two panels of the 37
    counts[1, :15] = 1000  # less than a panel
    hot = often(counts, 1000)
    assert np.flatnonzero(hot[0]).tolist() == list(range(10, 42)) and not hot[1].any()
    placement = place_on_cpu(counts, 1000, sizes(2, 70))
    assert placement.processor == ON_CPU and placement.objective == 32 * 500 and placement.resident == ()
    assert (Placement.from_entry(placement.to_entry(), 2, 70).hot == hot).all()
    assert not often(counts, 0).any()


def test_an_entry_gives_back_the_placement():
    placement, _ = place(counts_of(4, 500), sizes(4, 500), FIXED + 7000 * 700, MACHINE)
    assert placement.hot.any() and placement.processor == ON_GPU
    entry = placement.to_entry()
    loaded = Placement.from_entry(Entry(json.loads(json.dumps(entry.info)), entry.arrays), 4, 500)
    assert (loaded.hot == placement.hot).all() and loaded.hot.dtype == bool
    assert replace(loaded, hot=placement.hot) != loaded  # compared by identity, so field by field:
    names = [name for name in vars(placement) if name != "hot"]
    assert {name: vars(loaded)[name] for name in names} == {name: vars(placement)[name] for name in names}


BAD_INFO = {
    "neurons": (None, 513, "512"),
    "processor": (None, "tpu", 1),
    "budget_bytes": (None, -1, 1.5, True, 1 << 63, float("nan")),
    "n_ctx": (None, "4096"),
    "objective": (-1, 1 << 62),
    "greedy_objective": (1 << 62,),
    "total": (0,),
    "solver": (None, "x" * 101),
    "resident": (None, "scratch", [1]),
    "bytes": (None, {"weather": 1}, {"scratch": -1}),
    "hardware": ({}, 5, {**MACHINE.to_dict(), "sync_seconds": 0}),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, bad in BAD_INFO.items() for value in bad]
)
def test_a_damaged_entry_is_named(name, value):
    entry = place(counts_of(), sizes(), FIXED + 7000 * 700, MACHINE)[0].to_entry()
    with pytest.raises(FormatError, match=r"^placement: "):
        Placement.from_entry(Entry({**entry.info, name: value}, entry.arrays), 4, 512)
    missing = {key: each for key, each in entry.info.items() if key != name}
    if name != "hardware":
        with pytest.raises(FormatError, match=r"^placement: "):
            Placement.from_entry(Entry(missing, entry.arrays), 4, 512)


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"hot": np.zeros((4, 62), np.uint8)},
        {"hot": np.zeros((5, 63), np.uint8)},
        {"hot": np.zeros((4, 63), np.int8)},
        {"hot": np.full((4, 63), 255, np.uint8)},
    ],
)
def test_damaged_bits_are_named(arrays):
    entry = place(counts_of(4, 500), sizes(4, 500), 1 << 20, MACHINE)[0].to_entry()
    with pytest.raises(FormatError, match=r"^placement: (hot neurons are|bits behind)"):
        Placement.from_entry(Entry(entry.info, arrays), 4, 500)


BUDGET = FIXED + 7000 * 900


@pytest.fixture
def placed():
    return place(counts_of(), sizes(), BUDGET, MACHINE)[0]


def test_a_placement_that_fits_stays(placed):
    assert fit(placed, sizes(), BUDGET) == (placed, None)
    assert placed.needed_bytes(sizes()) == sum(placed.n_bytes.values())


@pytest.mark.parametrize("with_profile", [True, False])
def test_less_memory_or_a_longer_context_gets_a_greedy_placement(placed, with_profile):
    given = (counts_of(), 1000) if with_profile else ()
    longer = replace(sizes(), kv_cache=(500_000,) * 4, n_ctx=5000)
    for model, budget in ((sizes(), BUDGET - 7000 * 300), (longer, BUDGET)):
        found, notice = fit(placed, model, budget, *given)
        assert (
            notice is not None
            and "a greedy one takes its place" in notice
            and "the placement needs" in notice
        )
        assert found.solver == "greedy" and found.needed_bytes(model) <= budget
        assert 0 < found.hot.sum() < placed.hot.sum()
        if not with_profile:
            assert not (found.hot & ~placed.hot).any()


def test_a_placement_of_unknown_parts_is_replaced(placed):
    found, notice = fit(replace(placed, resident=("blk.9.attention",)), sizes(), BUDGET, counts_of(), 1000)
    assert notice is not None and "parts that this model does not have" in notice
    assert found.needed_bytes(sizes()) <= BUDGET


def test_a_machine_without_a_gpu_gets_the_placement_of_a_cpu(placed):
    counts = counts_of()
    found, notice = fit(placed, sizes(), 0, counts, 1000)
    assert notice is not None and "there is none" in notice
    assert found.processor == ON_CPU and (found.hot == often(counts, 1000)).all()
    assert fit(found, sizes(), 0) == (found, None)
    without_profile, notice = fit(placed, sizes(), 0)
    assert not without_profile.hot.any() and notice is not None and "no neuron is hot" in notice
    back, notice = fit(found, sizes(), BUDGET, counts, 1000)
    assert back.processor == ON_GPU and notice is not None and "without a GPU" in notice


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_bytes_of_a_file(name):
    """Against the gguf package's reader, and a sum by hand."""
    reader = gguf.GGUFReader(GOLDEN / f"{name}.gguf")
    tensors = {each.name: int(each.n_bytes) for each in reader.tensors}
    with open_gguf(GOLDEN / f"{name}.gguf") as file:
        found = model_bytes(file, 100)
    for layer in range(found.n_layers):
        of_layer = {key: size for key, size in tensors.items() if key.startswith(f"blk.{layer}.")}
        neurons = [
            size for key, size in of_layer.items() if key.split(".")[2] in ("ffn_gate", "ffn_up", "ffn_down")
        ]
        assert len(neurons) == 3 and found.neuron[layer] * found.n_neurons == sum(neurons)
        assert found.attention[layer] == sum(of_layer.values()) - sum(neurons)
    head = tensors.get("output.weight", tensors["token_embd.weight"])
    assert found.output == head + tensors["output_norm.weight"]

    keys = next(each for each in reader.tensors if each.name == "blk.0.attn_k.weight")
    element_bytes = 4 if keys.tensor_type == gguf.GGMLQuantizationType.F32 else 2
    assert found.kv_cache == (2 * int(keys.shape[1]) * 100 * element_bytes,) * found.n_layers
    assert found.predictor == (0,) * found.n_layers
    with (
        open_gguf(GOLDEN / f"{name}.gguf") as file,
        pytest.raises(InputError, match="the context is 0 tokens"),
    ):
        model_bytes(file, 0)


def test_scratch_is_the_most_that_lives_at_once():
    x, wide, narrow, last, logits = (Value(n, width) for n, width in enumerate((4, 100, 8, 4, 1000)))
    ops = (
        Op("embed", (), x),
        Op("linear", (x,), wide),
        Op("linear", (wide,), narrow),  # 4 + 100 + 8, as x is read once more
        Op("add", (narrow, x), last),
        Op("select", (last,), selected := Value(5, 4)),
        Op("linear", (selected,), logits),  # of one row
    )
    program = Program(ops, Cache(1, 1, 16), 1000)
    assert scratch_bytes(program, 10) == 4 * max(10 * 112, 4 + 1000)
    assert scratch_bytes(program, 2) == 4 * 1004


def test_predictors_have_a_share_of_the_budget(tmp_path):
    """A tiny Bamboo with predictors of another rank in each layer."""
    metadata, tensors = converted(open_checkpoint(FOLDER / "bamboo"))
    width, n_neurons = tensors["blk.0.attn_q.weight"].shape[1], len(tensors["blk.0.ffn_up.weight"])
    n_layers = int(metadata["bamboo.block_count"])
    for layer in range(n_layers):
        tensors[f"blk.{layer}.fc1.weight"] = np.zeros((8 * (layer + 1), width), np.float32)
        tensors[f"blk.{layer}.fc2.weight"] = np.zeros((n_neurons, 8 * (layer + 1)), np.float32)
    write_gguf(tmp_path / "bamboo.gguf", metadata, tensors)
    with open_gguf(tmp_path / "bamboo.gguf") as file:
        found = model_bytes(file, 32)
    assert found.predictor == tuple(4 * 8 * (layer + 1) * (width + n_neurons) for layer in range(n_layers))
    assert found.neuron == (4 * 3 * width,) * n_layers
    names = [name for name, _ in found.parts()]
    assert names[-n_layers:] == [f"blk.{layer}.predictors" for layer in range(n_layers)]
