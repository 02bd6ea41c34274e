"""The pictures of a model's neurons: what is drawn is what the file says, and what it lacks is said."""

from __future__ import annotations

import importlib.util
import io
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from pyinfer.gguf_file import open_gguf
from pyinfer.neurons.budget import model_bytes
from pyinfer.neurons.placement import place, place_on_cpu
from pyinfer.neurons.predictor import PredictorQuality, Predictors
from pyinfer.neurons.profile import Profile
from pyinfer.section import update_section
from pyinfer_tools.plot_neurons import ACTIVATIONS, PLACEMENT, PREDICTORS, main, neuron_figure, read_neurons
from pyinfer_tools.plot_panels import causing, cumulative, magnitudes

GOLDEN = Path(__file__).parents[1] / "golden" / "llama.gguf"
SHAPE = LAYERS, NEURONS = 2, 96
TOKENS = 1000
COUNTS = np.random.default_rng(0).integers(0, TOKENS, SHAPE)
QUALITY = PredictorQuality(32, "linear", "norm", -1.5, 0.992, 0.4, 0.45, 0.18, 640)
needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)


@pytest.fixture
def model(tmp_path):
    """A model with a profile, some hot neurons of both layers in a GPU, and predictors."""
    path = tmp_path / "model.gguf"
    shutil.copy(GOLDEN, path)
    with open_gguf(path) as file:
        placement, _ = place(COUNTS, model_bytes(file, 64), 450 << 10, None)
    assert 0 < placement.hot.sum() < placement.hot.size
    layers = QUALITY, replace(QUALITY, rank=64, recall=0.981, fired=0.1)
    predictors = Predictors(layers, np.zeros(SHAPE, np.float32))
    profile = Profile(COUNTS, TOKENS, [], None, "relu")
    made = {"profile": profile, "placement": placement, "predictors": predictors}
    update_section(path, **{name: each.to_entry() for name, each in made.items()})
    return path


def histogram_profile(values: np.ndarray) -> Profile:
    """values : float32 [L, tokens, F] of act(gate)"""
    bins = np.abs(values).astype(np.float32).view(np.uint32) >> 19
    rows = np.stack([np.bincount(each.ravel(), minlength=4096) for each in bins])
    return Profile(np.zeros(SHAPE, np.int64), values.shape[1], [], rows, "silu")


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(main, [str(each) for each in arguments])
    assert not done.stdout
    return done.exit_code, done.stderr


def texts(figure) -> str:
    from matplotlib.text import Text

    return "\n".join(each.get_text() for each in figure.findobj(Text))


@pytest.mark.parametrize("neurons", [1, 3, 1000, 1001, 5000])
def test_the_curve_counts_as_a_loop_does(neurons):
    counts = np.random.default_rng(neurons).integers(0, 9, neurons) + 1
    falling = sorted(counts.tolist(), reverse=True)
    part, caused = cumulative(counts)
    assert (part[0], caused[0], part[-1], caused[-1]) == (0, 0, 100, 100) and len(part) <= 1001
    for x, y in zip(part, caused):
        first = round(x * neurons / 100)
        assert x == pytest.approx(100 * first / neurons)
        assert y == pytest.approx(100 * sum(falling[:first]) / sum(falling))
    for share in (0.1, 0.8, 1.0):
        enough = next(n for n in range(1, neurons + 1) if sum(falling[:n]) >= share * sum(falling))
        assert causing(counts, share) == enough / neurons


def test_the_curve_of_magnitudes_counts_values():
    values = np.random.default_rng(1).standard_normal((1, 50, NEURONS)).astype(np.float32) ** 3
    values[0, :5] = 0
    edges, smaller = magnitudes(np.asarray(histogram_profile(values).histogram)[0])
    sizes = np.abs(values).ravel()
    for edge, percent in list(zip(edges, smaller))[::20]:
        assert percent == pytest.approx(100 * np.mean(sizes < edge) if edge > 0 else 0)
    assert np.all(np.diff(edges) >= 0) and np.isfinite(edges).all() and smaller[-1] == 100


@needs_matplotlib
def test_activations_of_one_layer_and_of_all(model):
    figure = neuron_figure(read_neurons(model), [ACTIVATIONS], 1)
    one, whole = figure.subfigs[0].axes
    for axes, counts in ((one, COUNTS[1]), (whole, COUNTS)):
        bold = next(line for line in axes.lines if line.get_linewidth() == 2)
        assert np.allclose(bold.get_data(), cumulative(counts))
        marked = next(line for line in axes.lines if line.get_marker() == "o")
        assert np.allclose(marked.get_data(), [[100 * causing(counts, 0.8)], [80]])
    assert "Layer 1 (" in texts(one) and "All 2 layers" in texts(whole)
    assert f"{100 * causing(COUNTS, 0.8):.0f} % of the neurons\ncause 80 %" in texts(whole)


@needs_matplotlib
def test_a_layer_that_never_fires_is_drawn_too(model):
    update_section(model, profile=Profile(COUNTS * [[0], [1]], TOKENS, [], None, "relu").to_entry())
    neurons = read_neurons(model)
    figure = neuron_figure(neurons, [ACTIVATIONS, PLACEMENT], 0)
    assert "no neuron fired" in texts(figure.subfigs[0])
    figure.savefig(io.BytesIO(), format="png")


@needs_matplotlib
def test_magnitudes_of_a_model_without_zeros(model):
    values = np.random.default_rng(2).standard_normal((LAYERS, 64, NEURONS)).astype(np.float32)
    values[1] *= 100
    update_section(model, profile=histogram_profile(values).to_entry(), placement=None, predictors=None)
    figure = neuron_figure(read_neurons(model), [ACTIVATIONS], 1)
    for axes, shown in zip(figure.subfigs[0].axes, (values[1], values)):
        marked = next(line for line in axes.lines if line.get_marker() == "o")
        ((x,), (y,)) = marked.get_data()
        assert x == pytest.approx(np.median(np.abs(shown)), rel=0.06) and y == 50
        assert f"50 % are smaller\nthan {x:.2g}" in texts(axes)
    code, said = run(model, "-o", model.with_suffix(".png"))
    assert code == 0 and said.count("note: ") == 2 and "for models with ReLU" in said


@needs_matplotlib
def test_the_map_of_hot_neurons(model):
    neurons = read_neurons(model)
    scattered = np.random.default_rng(3).random(SHAPE) < 0.4  # as after another profile
    neurons = replace(neurons, placement=replace(neurons.placement, hot=scattered))
    figure = neuron_figure(neurons, [PLACEMENT], 0)
    above, _, _, middle, below, memory = figure.subfigs[0].axes
    colors = np.asarray(above.images[0].get_array())  # one band for each of so few neurons
    assert colors.shape[:2] == (NEURONS, LAYERS)
    for layer in range(LAYERS):
        order = np.argsort(-COUNTS[layer], kind="stable")
        assert ((colors[:, layer, 0] > colors[:, layer, 2]) == scattered[layer, order]).all()  # red, not blue
    caused = [100 * COUNTS[n][scattered[n]].sum() / COUNTS[n].sum() for n in range(LAYERS)]
    assert np.allclose([bar.get_height() for bar in middle.patches], caused)
    n_bytes = [scattered[n].sum() * neurons.sizes.neuron[n] / 1024 for n in range(LAYERS)]
    assert np.allclose([bar.get_height() for bar in below.patches], n_bytes) and below.get_ylabel() == "KiB"
    assert sum(bar.get_width() for bar in memory.patches) == pytest.approx(450)
    assert "450.0 KiB of GPU memory, 64 tokens of context" in texts(figure)


@needs_matplotlib
def test_the_map_of_a_machine_without_a_gpu(model):
    neurons = read_neurons(model)
    placement = place_on_cpu(COUNTS, TOKENS, neurons.sizes)
    figure = neuron_figure(replace(neurons, placement=placement), [PLACEMENT], 0)
    assert len(figure.subfigs[0].axes) == 5 and "the CPU always computes hot neurons" in texts(figure)
    assert f"{100 * placement.hot.mean():.0f} % of the neurons are hot" in texts(figure)
    nothing = replace(neurons.placement, hot=np.zeros(SHAPE, bool), n_bytes={"neurons": 0}, budget_bytes=0)
    figure = neuron_figure(replace(neurons, placement=nothing), [PLACEMENT], 0)
    figure.savefig(io.BytesIO(), format="png")
    assert "0 % of the neurons are hot and cause 0 % of the activations" in texts(figure)


@needs_matplotlib
def test_predictors_of_each_layer(model):
    neurons = read_neurons(model)
    neurons = replace(neurons, sizes=replace(neurons.sizes, predictor=(1024, 2048)))
    figure = neuron_figure(neurons, [PREDICTORS], 0)
    recall, precision, shares, rank = figure.subfigs[0].axes
    assert recall.lines[0].get_ydata() == pytest.approx([99.2, 98.1]) and recall.get_ylim() == (98, 100)
    for axes, wanted in ((precision, [40, 40]), (shares, [45, 45, 18, 10]), (rank, [32, 64])):
        assert [bar.get_height() for bar in axes.patches] == pytest.approx(wanted)
    part = 3072 / (sum(neurons.sizes.neuron) * NEURONS)
    assert f"Rank (3.0 KiB, {100 * part:.1f} %" in texts(rank)
    assert "Predictors ask for 45 % of the neurons, 14 % fire" in texts(figure) and "640 tokens" in texts(
        figure
    )


@pytest.mark.parametrize(("ending", "begin"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("PDF", b"%PDF")])
@needs_matplotlib
def test_one_command_draws_everything(model, ending, begin):
    odd = model.with_name("50$ $_a^ 模型\n.gguf") if sys.platform != "win32" else model
    model.rename(odd)
    output = odd.with_name(f"all.{ending}")
    code, said = run(odd, "-o", output)
    assert (code, said) == (0, f"{output}: drawn\n")
    assert output.read_bytes().startswith(begin)
    assert sorted(odd.parent.iterdir()) == sorted([odd, output])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("-o", "x.xyz"), "x.xyz: pictures end with .png, .svg, .pdf"),
        (("--layer", "2"), "--layer is 2, but the layers of model.gguf are 0 to 1"),
        (("-o", "no/such/folder.png"), "cannot be written (No such file or directory)"),
    ],
)
@needs_matplotlib
def test_what_cannot_be_drawn_is_one_sentence(model, arguments, sentence, monkeypatch):
    monkeypatch.chdir(model.parent)
    before = model.read_bytes()
    code, said = run(model, *arguments)
    assert code == 1 and sentence in said and said.count("\n") == 1
    assert list(model.parent.iterdir()) == [model] and model.read_bytes() == before


@needs_matplotlib
def test_a_folder_in_the_way_is_left_alone(model):
    output = model.with_name("x.png")
    output.mkdir()
    code, said = run(model, "-o", output)
    assert (
        code == 1 and "x.png: cannot be written" in said and sorted(model.parent.iterdir()) == [model, output]
    )


@pytest.mark.parametrize(
    ("removed", "what", "sentence"),
    [
        (
            "profile",
            ACTIVATIONS,
            "has no profile; make one with pyinfer-convert profile model.gguf --text FILE",
        ),
        ("profile", PLACEMENT, "has no profile; make one with pyinfer-convert profile"),
        ("placement", PLACEMENT, "has no placement; make one with pyinfer-convert place model.gguf --vram"),
        ("predictors", PREDICTORS, "has no predictors; pyinfer-convert predict model.gguf --text FILE makes"),
    ],
)
@needs_matplotlib
def test_what_a_model_lacks(model, removed, what, sentence, monkeypatch):
    monkeypatch.chdir(model.parent)
    update_section(model, **{removed: None})
    code, said = run(model, "--what", what)
    assert code == 1 and f"Error: model.gguf: {sentence}" in said and said.count("\n") == 1
    code, said = run(model)
    assert code == 0 and said.count("note: ") == 1 and Path("model-neurons.png").exists()


@needs_matplotlib
def test_a_model_without_a_section_and_a_profile_of_nothing(model):
    update_section(model, profile=None, placement=None, predictors=None)
    code, said = run(model)
    assert code == 1 and said.count("\n") == 1 and "has no profile; make one with" in said
    update_section(model, profile=Profile.empty(*SHAPE, "relu", histogram=False).to_entry())
    code, said = run(model)
    assert code == 1 and "of 0 tokens, counts no neuron that fired" in said
    assert "how good its predictors are" in replace(read_neurons(model), predicts=True).missing(PREDICTORS)


@needs_matplotlib
def test_entries_that_do_not_fit_and_a_damaged_section(model):
    update_section(model, profile=Profile(COUNTS[:1], TOKENS, [], None, "relu").to_entry())
    code, said = run(model)
    assert code == 1 and "Error: model.gguf: the profile's counts" in said
    data = bytearray(model.read_bytes())
    data[-40] ^= 1
    model.write_bytes(data)
    code, said = run(model)
    assert code == 1 and "Error: model.gguf: its placement section" in said


def test_without_matplotlib_a_sentence_says_what_to_install(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    assert run(model) == (1, "Error: drawing needs matplotlib: pip install 'pyinfer[plot]'\n")
