"""The picture of a placement."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from pyinfer.errors import MissingExtraError
from pyinfer.gguf_file import open_gguf
from pyinfer.neurons.budget import model_bytes
from pyinfer.neurons.placement import place
from pyinfer.neurons.profile import Profile
from pyinfer.section import update_section
from pyinfer_tools.plot_placement import main, placement_figure

GOLDEN = Path(__file__).parents[1] / "golden" / "llama.gguf"
COUNTS = np.random.default_rng(0).integers(0, 1000, (2, 96))
needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)


@pytest.fixture
def model(tmp_path):
    """A model with a profile, and a placement of its first layer's hottest neurons."""
    path = tmp_path / "model.gguf"
    shutil.copy(GOLDEN, path)
    with open_gguf(path) as file:
        sizes = model_bytes(file, 64)
    placement, _ = place(COUNTS, sizes, 450 << 10, None)
    assert 0 < placement.hot.sum() < placement.hot.size
    profile = Profile(COUNTS, 1000, [], None, "relu")
    update_section(path, profile=profile.to_entry(), placement=placement.to_entry())
    return path, placement


@needs_matplotlib
def test_a_picture_shows_hot_neurons_and_what_they_cover(model, tmp_path):
    path, placement = model
    figure = placement_figure(placement, COUNTS / 1000, "title")
    above, below = figure.axes[:2]
    assert np.allclose(above.patches[0].get_data().values, 100 * placement.hot.mean(1))
    covered = [bar.get_height() for bar in below.patches]
    assert np.allclose(covered, 100 * (COUNTS * placement.hot).sum(1) / COUNTS.sum(1))
    drawn = tmp_path / "placement.png"
    done = CliRunner().invoke(main, [str(path), "-o", str(drawn)])
    assert done.exit_code == 0, done.output
    assert drawn.read_bytes().startswith(b"\x89PNG")
    refused = CliRunner().invoke(main, [str(path), "-o", str(tmp_path / "placement.xyz")])
    assert refused.exit_code == 1 and "cannot be written" in refused.output


def test_without_matplotlib_a_sentence_says_what_to_install(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    with pytest.raises(MissingExtraError, match=r"pip install 'pyinfer\[plot\]'"):
        placement_figure(model[1], COUNTS / 1000, "title")


@pytest.mark.parametrize("name", ["profile", "placement"])
def test_a_model_without_one_of_both(model, name):
    update_section(model[0], **{name: None})
    done = CliRunner().invoke(main, [str(model[0])])
    assert done.exit_code == 1 and f"has no {name}; make one with pyinfer-convert" in done.output
