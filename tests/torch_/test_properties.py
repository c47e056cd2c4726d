"""In float32 powers of two are exact: whatever the shifts, gradients equal PyTorch's own bit for bit."""

import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ada_loss.torch
from torch_.asserts import assert_same_bits
from torch_.forced_shifts import forced_shifts
from torch_.graphs import BINARY, COLUMNS, ROWS, UNARY, WEIGHTED, Graph, graphs

ONE_STEP = [
    Graph(((kind, name, 0, 0, 0),) + (("weighted", "linear", 1, 0, 1),), 2)
    for kind, names in (("unary", UNARY), ("binary", BINARY), ("weighted", WEIGHTED))
    for name in names
]


def assert_gradients_equal(graph, seed, passes=1):
    """Both ways give the same bits, also when several passes add up."""
    torch.manual_seed(seed)
    x = torch.randn(ROWS, COLUMNS).requires_grad_()
    parameters = [torch.randn(COLUMNS, COLUMNS).mul(0.3).requires_grad_() for _ in range(graph.parameters)]
    leaves = dict(enumerate([x, *parameters]))

    def gradients(backward):
        for leaf in leaves.values():
            leaf.grad = None
        for _ in range(passes):
            backward(graph(x, parameters))
        return {name: leaf.grad for name, leaf in leaves.items()}

    def scaled(loss):
        with ada_loss.torch.backward(shifts=forced_shifts(seed)) as mode:
            loss.backward()
        assert mode.entered

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "ada_loss has no rule")
        assert_same_bits(gradients(scaled), gradients(torch.Tensor.backward))


@pytest.mark.parametrize("graph", ONE_STEP, ids=lambda graph: "-".join(graph.steps[0][:2]))
def test_every_operation_keeps_the_bits(graph):
    assert_gradients_equal(graph, 0)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(graphs, st.integers(0, 2**32 - 1), st.integers(1, 2))
def test_random_graphs_keep_the_bits(graph, seed, passes):
    assert_gradients_equal(graph, seed, passes)
