"""The instructions that sparse models become."""

from __future__ import annotations

import pytest
from sparse_files import random_predictors, sparse_gguf

from pyinfer import names
from pyinfer.cpu.lowering import MOST_BY_ROWS
from pyinfer.runtime.loader import load_model
from pyinfer.runtime.session import Session


def plan_of(path, rows: int, **options) -> tuple[int, int]:
    """Number of instructions, and bytes of buffers, of the plan for so many rows."""
    with load_model(path, **options) as model:
        session = Session(model, 64, 2)
        session.prefill(range(3, 3 + rows))
        (plan,) = session._executor._plans.values()
        session.close()
        return len(plan.instructions), sum(each.nbytes for each in plan.keep)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    predictors = random_predictors("relu_llama")
    key: dict[str, object] = {names.POWERINFER_SPARSE_THRESHOLD: 0.25}
    folder = tmp_path_factory.mktemp("plans")
    return sparse_gguf(folder / "model.gguf", "relu_llama", "q8_0", predictors, key)


@pytest.mark.parametrize("observe", [None, "stats"])
def test_many_rows_do_not_pay_for_predictors(path, observe):
    """They are as a plan without: nothing of the predictor runs, buffers are given back in time."""
    exact = plan_of(path, 40, sparsity="exact")
    predicted = plan_of(path, 40, sparsity="predicted", observe=observe)
    assert predicted[0] == exact[0]
    assert predicted[1] < 1.2 * exact[1]


def test_an_activation_is_part_of_the_linear_that_it_masks(path):
    """One instruction a layer less than the operations say, and only for few rows."""
    with load_model(path, sparsity="exact") as model:
        layers = model.hparams.block_count
    few, many = plan_of(path, MOST_BY_ROWS, sparsity="exact"), plan_of(path, 40, sparsity="exact")
    # many: the activation, the product with it, and of linear_t slab, quantization and finish
    assert many[0] - few[0] == 4 * layers
