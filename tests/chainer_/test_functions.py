"""Functions of raw parameters and of two activations as decision points, with names and settings."""

import inspect

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest

from ada_loss.chainer import AdaLossScaled, functions
from ada_loss.core.config import AdaLossConfig
from twins import assert_exact, weighted_sum

FIXED = AdaLossConfig(loss_scale_method="fixed")
NAMED = sorted(set(functions.__all__) - {"branch", "named"})

RAW = {
    "linear": [(3, 6), (4, 6), (4,)],
    "convolution_1d": [(2, 3, 7), (4, 3, 3), (4,)],
    "convolution_2d": [(2, 3, 6, 5), (4, 3, 3, 3), (4,)],
    "convolution_3d": [(1, 2, 4, 4, 4), (3, 2, 2, 2, 2), (3,)],
    "convolution_nd": [(2, 3, 6, 5), (4, 3, 3, 3), (4,)],
    "deconvolution_1d": [(2, 3, 5), (3, 4, 3), (4,)],
    "deconvolution_2d": [(2, 3, 4, 4), (3, 4, 3, 3), (4,)],
    "deconvolution_3d": [(1, 2, 3, 3, 3), (2, 3, 2, 2, 2), (3,)],
    "deconvolution_nd": [(2, 3, 4, 4), (3, 4, 3, 3), (4,)],
    "depthwise_convolution_2d": [(2, 3, 5, 5), (2, 3, 3, 3), (6,)],
    "dilated_convolution_2d": [(2, 3, 7, 7), (4, 3, 3, 3), (4,)],
    "local_convolution_2d": [(2, 3, 5, 5), (4, 3, 3, 3, 3, 3), (4, 3, 3)],
}
PAIRS = {
    "matmul": [(2, 3, 5), (2, 5, 4)],
    "batch_matmul": [(2, 3, 5), (2, 5, 4)],
    "tensordot": [(2, 3, 5), (3, 5, 4)],
}


class Raw(chainer.Link):
    """Parameters of its own, given to a function."""

    def __init__(self, function, shapes):
        super().__init__()
        self.function = function
        with self.init_scope():
            for index, shape in enumerate(shapes):
                setattr(self, f"p{index}", chainer.Parameter(chainer.initializers.Normal(0.5), shape))

    def forward(self, *xs):
        return self.function(*xs, *(getattr(self, name) for name in sorted(self._params)))


def draw(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("module", [F, functions])
@pytest.mark.parametrize("name", RAW)
def test_a_function_of_raw_parameters_is_a_decision_point(name, module, rng):
    shape, *parameters = RAW[name]
    scaled = assert_exact(Raw(getattr(module, name), parameters), [draw(rng, *shape)], decisions=1)
    (decision,) = scaled.ada_loss.decisions
    assert decision.site == ("/", 0, 0)
    assert decision.shift != 0


@pytest.mark.parametrize("module", [F, functions])
@pytest.mark.parametrize("name", PAIRS)
def test_a_product_of_two_activations_decides_for_both(name, module, rng):
    link = Raw(getattr(module, name), [])
    # Chainer has batch_matmul in float32 only.
    settings = {"mixed16": None} if name == "batch_matmul" else {}
    scaled = assert_exact(link, [draw(rng, *shape) for shape in PAIRS[name]], decisions=2, **settings)
    assert [decision.site.operand for decision in scaled.ada_loss.decisions] == [0, 1]
    assert all(decision.shift for decision in scaled.ada_loss.decisions)


def test_an_einsum_of_two_activations_decides_for_both(rng):
    link = Raw(lambda a, b: functions.einsum("bij,bjk->bik", a, b), [])
    assert_exact(link, [draw(rng, 2, 3, 5), draw(rng, 2, 5, 4)], decisions=2)


def test_a_variable_times_itself_adds_two_gradients_of_different_exponents(rng):
    link = Raw(lambda x: F.matmul(x, x), [])
    assert_exact(link, [draw(rng, 4, 4)], decisions=2)


def test_attention_has_plain_chainers_gradients(rng):
    class Attention(chainer.Chain):
        def __init__(self):
            super().__init__(q=L.Linear(6, 6), k=L.Linear(6, 6), v=L.Linear(6, 6), out=L.Linear(6, 6))

        def forward(self, x):
            q, k, v = (layer(x, n_batch_axes=2) for layer in (self.q, self.k, self.v))
            weights = F.softmax(functions.matmul(q, k, transb=True, name="scores") / 6**0.5, axis=2)
            return x + self.out(functions.matmul(weights, v, name="values"), n_batch_axes=2)

    scaled = assert_exact(Attention(), [draw(rng, 2, 5, 6)], decisions=8)
    operands = {(decision.site.path, decision.site.operand) for decision in scaled.ada_loss.decisions}
    assert operands >= {("scores", 0), ("scores", 1), ("values", 0), ("values", 1)}


@pytest.mark.parametrize("name", NAMED)
def test_a_named_function_has_chainers_signature_and_two_keywords(name):
    ours, plain = inspect.signature(getattr(functions, name)), inspect.signature(getattr(F, name))
    extra = {key: parameter for key, parameter in ours.parameters.items() if key not in plain.parameters}
    assert extra.keys() == {"name", "config"}
    assert all(p.kind is p.KEYWORD_ONLY and p.default is None for p in extra.values())
    assert [p for p in ours.parameters.values() if p.name not in extra] == [*plain.parameters.values()]


@pytest.mark.parametrize("name", NAMED)
def test_a_named_function_is_chainers_outside_a_scope(name, rng):
    cases = RAW | PAIRS | {"cast": [(3, 4)], "einsum": [(3, 4), (4, 5)]}
    arrays = [draw(rng, *shape) for shape in cases[name]]
    before = {"einsum": ["ij,jk->ik"]}.get(name, [])
    after = {"cast": [np.float64]}.get(name, [])
    y = getattr(functions, name)(*before, *arrays, *after, name="mine", config=FIXED)
    np.testing.assert_array_equal(y.array, getattr(F, name)(*before, *arrays, *after).array)


def test_a_name_and_settings_go_with_the_function(rng):
    def run(x, a, b):
        h = functions.linear(x, a, name="first", config=FIXED)
        return functions.linear(h, b, name="second") + functions.linear(h, b, name="second")

    scaled = assert_exact(Raw(run, [(4, 6), (3, 4)]), [draw(rng, 2, 6)], decisions=3)
    shifts = {
        (decision.site.path, decision.site.call): decision.shift for decision in scaled.ada_loss.decisions
    }
    assert shifts.keys() == {("first", 0), ("second", 0), ("second", 1)}
    assert shifts["first", 0] == 0 != shifts["second", 0]


def test_a_name_holds_for_everything_within_it_and_ends_with_it(rng):
    def run(x, a, b):
        with functions.named("block", FIXED):
            h = F.linear(F.linear(x, a), b)
        return F.linear(h, a)

    scaled = assert_exact(Raw(run, [(6, 6), (6, 6)]), [draw(rng, 2, 6)], decisions=3)
    assert {decision.site.path: decision.shift != 0 for decision in scaled.ada_loss.decisions} == {
        "block": False,
        "/": True,
    }


def test_a_name_ends_with_an_error_as_well(rng):
    def run(x, W):
        with pytest.raises(chainer.utils.type_check.InvalidType):
            functions.linear(x, W[:, :2], name="wrong")
        return F.linear(x, W)

    scaled = assert_exact(Raw(run, [(4, 6)]), [draw(rng, 2, 6)])
    assert {decision.site.path for decision in scaled.ada_loss.decisions} == {"/"}


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_branch_adds_the_gradients_of_its_outputs(n, rng):
    def run(x, W):
        return [F.linear(F.sin(y * (i + 1)), W) for i, y in enumerate(functions.branch(F.relu(x), n))]

    scaled = assert_exact(Raw(run, [(4, 6)]), [draw(rng, 3, 6)]) if n < 3 else None
    scaled = scaled or AdaLossScaled(Raw(run, [(4, 6)]), init_scale=4.0)
    weighted_sum(scaled(chainer.Variable(draw(rng, 3, 6)))).backward()
    assert [branch.uses for branch in scaled.ada_loss.fan_outs if branch.function == "Branch"] == [n]


def test_a_branch_that_nobody_uses_has_no_gradient(rng):
    def run(x, W):
        functions.branch(F.linear(x, W), 3)
        first, _ = functions.branch(x, 2)
        return F.linear(first, W)

    assert_exact(Raw(run, [(4, 6)]), [draw(rng, 3, 6)], decisions=1)
