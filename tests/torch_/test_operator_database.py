"""PyTorch's own databases of operators and modules: gradients of a small loss in float16, and the table in
docs/torch-operators.md."""

import warnings

import pytest

pytest.importorskip("expecttest", reason="PyTorch's databases need expecttest, which is not installed")

from tools.torch_operators import (  # noqa: E402
    DOCUMENT,
    document,
    examine,
    examine_all,
    module_entries,
    operator_entries,
)

REPRESENTATIVE = {
    "matmul",
    "nn.functional.conv2d",
    "nn.functional.conv_transpose2d",
    "nn.functional.layer_norm",
    "nn.functional.batch_norm",
    "nn.functional.group_norm",
    "nn.functional.scaled_dot_product_attention",
    "nn.functional.embedding",
    "nn.functional.cross_entropy",
    "nn.functional.gelu",
    "nn.functional.max_pool2d",
    "nn.functional.interpolate.bilinear",
    "nn.functional.pad.circular",
    "as_strided",
    "index_put",
    "scatter_reduce.amax",
    "masked.logaddexp",
    "unsqueeze",
    "cumprod",
    "std",
    "nn.TransformerEncoderLayer",
    "nn.GRUCell",
    "nn.PReLU",
}
TABLE = DOCUMENT.read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def entries():
    both = dict(operator_entries()) | dict(module_entries())
    return {name: calls for name, calls in both.items() if name in REPRESENTATIVE}


def test_the_representative_entries_exist():
    assert entries().keys() == REPRESENTATIVE


@pytest.mark.parametrize("name", sorted(REPRESENTATIVE))
def test_gradients_of_a_small_loss(name):
    finding = examine(name, entries()[name])
    assert finding.samples and finding.good, finding


@pytest.mark.parametrize("name", sorted(REPRESENTATIVE))
def test_the_table_has_what_an_entry_uses(name):
    used = examine(name, entries()[name]).used
    assert all(f"| `{operator}` | {kind} |" in TABLE for operator, kind in used.items())


@pytest.mark.slow
def test_all_entries_and_the_whole_table():
    assert document(examine_all()) == TABLE
