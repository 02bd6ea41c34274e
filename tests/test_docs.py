"""What the documents say is what there is."""

import re
from pathlib import Path

import pytest

from pyinfer import models, quants
from pyinfer.model_store import MODELS
from pyinfer_tools import models_table

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("architecture", models.names())
def test_every_family_is_in_models_md(architecture):
    assert f"| `{architecture}` |" in (ROOT / "models.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("model", MODELS.values(), ids=lambda model: model.name)
def test_every_named_model_is_in_models_md(model):
    rows = [
        line
        for line in (ROOT / "models.md").read_text(encoding="utf-8").splitlines()
        if line.startswith(f"| `{model.name}`")
    ]
    assert len(rows) == 1 and model.license in rows[0]


def test_every_type_is_in_models_md():
    line = re.search(r"^Types: (.*)\.$", (ROOT / "models.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(name.lower() for name in line[1].split(", ")) == quants.names()


def test_the_table_of_checkpoints_is_up_to_date():
    text = (ROOT / "models.md").read_text(encoding="utf-8")
    assert models_table.updated(text) == text, "run python -m pyinfer_tools.models_table"


def test_files_named_in_the_readme_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    steps = text[text.index("## How a token is made") : text.index("## The tree")]
    paths = [path for path in re.findall(r"`([a-z_]+/[a-z0-9_]+\.py|[a-z_]+\.py)`", steps)]
    assert len(paths) > 10
    for path in paths:
        assert (ROOT / "pyinfer" / path).exists(), path
