"""Random graphs: exact in float32 whatever they are, and in float16 as good as rounding allows.

A graph is a list of steps, each of which applies a function to earlier values of shape (3, 4) and adds its
results to them. Values and layers may be used any number of times, or never.
"""

import copy
import os

import chainer
import chainer.functions as F
import hypothesis
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from ada_loss.chainer import AdaLossScaled, functions, prepare
from helpers import assert_same_bits
from twins import assert_exact, gradients
from user_code import AgainInOldStyle, ByHand, add_a_new_array, add_by_method, add_in_place, again, changing

ROWS, SIZE = 3, 4
EXAMPLES = int(os.environ.get("ADA_LOSS_EXAMPLES", "100"))

STEPS = {
    "linear": lambda m, a, b, c: F.linear(a, m.W0, m.b0),
    "another linear": lambda m, a, b, c: F.linear(a, m.W1),
    "convolution": lambda m, a, b, c: _flat(F.convolution_2d(_image(a), m.K, pad=1)),
    "deconvolution": lambda m, a, b, c: _flat(F.deconvolution_2d(_image(a), m.K, pad=1)),
    "relu": lambda m, a, b, c: F.relu(a),
    "sum": lambda m, a, b, c: a + b,
    "sum of three": lambda m, a, b, c: F.add(a, b, c),
    "doubled": lambda m, a, b, c: 0.5 * (a + a),
    "gate": lambda m, a, b, c: a * F.sigmoid(b),
    "scaled": lambda m, a, b, c: F.scale(a, m.b0, axis=1),
    "concatenated": lambda m, a, b, c: F.linear(F.concat([a, b]), m.V),
    "split": lambda m, a, b, c: F.split_axis(F.linear(a, m.U), 2, axis=1),
    "attention": lambda m, a, b, c: F.matmul(0.25 * F.matmul(a, b, transb=True), c),
    "rolled": lambda m, a, b, c: F.transpose(F.reshape(a, (SIZE, ROWS))),
    "mean": lambda m, a, b, c: F.broadcast_to(F.mean(a, axis=0, keepdims=True), (ROWS, SIZE)),
    "branch": lambda m, a, b, c: functions.branch(a, 2),
    "forgotten": lambda m, a, b, c: F.forget(lambda x, y: F.linear(F.linear(x, m.F0), m.F1) + y, a, b),
    "forgotten pair": lambda m, a, b, c: F.forget(lambda x, y: (F.linear(x, m.F0) + y, 0.5 * x), a, b),
    "einsum": lambda m, a, b, c: F.einsum("ij,jk->ik", a, m.W0),
    "tensordot": lambda m, a, b, c: F.tensordot(a, m.W1, axes=1),
    "computed weight": lambda m, a, b, c: F.linear(a, F.linear(m.W0, m.W1)),
    "input as weight": lambda m, a, b, c: F.linear(F.matmul(a, b, transa=True), m.W0)[:ROWS],
    "convolution nd": lambda m, a, b, c: _flat(F.convolution_nd(_image(a), m.K, pad=1)),
    "deconvolution nd": lambda m, a, b, c: _flat(F.deconvolution_nd(_image(a), m.K, pad=1)),
    "dilated": lambda m, a, b, c: _flat(F.convolution_2d(_image(a), m.K, pad=2, dilate=2)),
    "grouped": lambda m, a, b, c: F.reshape(F.convolution_2d(_channels(a), m.D, groups=2), (ROWS, SIZE)),
    "depthwise": lambda m, a, b, c: _flat(F.depthwise_convolution_2d(_image(a), m.K, pad=1)),
    "local": lambda m, a, b, c: _flat(F.local_convolution_2d(_image(a), m.M)),
    "averaged": lambda m, a, b, c: _flat(F.average_pooling_2d(_image(a), 3, stride=1, pad=1)),
    "separated": lambda m, a, b, c: F.separate(F.stack([a, b, 0.5 * c], axis=1), axis=1),
    "embedded": lambda m, a, b, c: a + F.embed_id(np.arange(ROWS) % 2, m.W0),
    "mixed": lambda m, a, b, c: F.cast(0.5 * F.cast(a, np.float32), a.dtype),
    "reversed": lambda m, a, b, c: F.flip(F.hstack([a[:, 2:], b[:, :2]]), axis=0),
    "picked": lambda m, a, b, c: F.linear(F.get_item(a, [0, 0, 2]), m.W1, m.b0),
    "broadcast": lambda m, a, b, c: a + F.broadcast_to(m.b0, (ROWS, SIZE)),
    "rows backwards": lambda m, a, b, c: F.matmul(a[::-1], m.W0),
    "weights backwards": lambda m, a, b, c: F.linear(a, m.W0[::-1]),
    "every other weight": lambda m, a, b, c: F.linear(a, m.U[::2]),
    "every other column": lambda m, a, b, c: F.tensordot(a, m.V[:, ::-2], axes=1),
    "one column": lambda m, a, b, c: F.matmul(a[:, 1:2], m.V[2:3, ::2]),
    "repeated rows": lambda m, a, b, c: F.linear(F.broadcast_to(a[1:2], (ROWS, SIZE)), m.W1),
    "views of both": lambda m, a, b, c: F.matmul(a[::-1, ::2], b[:2, ::-1]),
    "a column backwards": lambda m, a, b, c: F.matmul(F.flip(a, 0)[:, 3:], m.W1[::-3][1:]),
    "computed again": lambda m, a, b, c: again(lambda x, y: F.linear(F.linear(x, m.F0), m.F1) + y, a, b),
    "computed again in old style": lambda m, a, b, c: AgainInOldStyle(lambda x: F.linear(x, m.F1))(a),
    "by hand": lambda m, a, b, c: ByHand(m.H, add_a_new_array).apply((a,))[0],
}
"""What is done with values and parameters; derivatives in terms of magnitudes bound the true ones."""

EXACT_ONLY = {
    "soft attention": lambda m, a, b, c: F.matmul(F.softmax(F.matmul(a, b, transb=True)), c),
    # Its derivative is a difference of nearly equal float16 numbers where it saturates.
    "tanh": lambda m, a, b, c: F.tanh(a),
    "dropout": lambda m, a, b, c: F.dropout(a, 0.3),
    "maximum": lambda m, a, b, c: F.maximum(a, b),
    "softmax": lambda m, a, b, c: F.softmax(a),
    "normalized": lambda m, a, b, c: F.layer_normalization(a, m.b0, m.b0),
    "where": lambda m, a, b, c: F.where(a.array > 0, b, c),
    "sine": lambda m, a, b, c: F.sin(a),
    "product": lambda m, a, b, c: F.sin(a) * (2 + F.sin(b)),
    "pooled": lambda m, a, b, c: _flat(F.max_pooling_2d(_image(a), 2, stride=1, pad=1)[:, :, :2, :2]),
    "detached": lambda m, a, b, c: a + chainer.Variable(b.array),
    "kept": lambda m, a, b, c: m.keep(a),
    "lstm": lambda m, a, b, c: F.lstm(a, F.linear(b, m.G)),
    "batch normalized": lambda m, a, b, c: F.batch_normalization(a, m.b0, m.b0),
    "normalized as before": lambda m, a, b, c: F.fixed_batch_normalization(a, m.b0, m.b0, m.b0, m.b0**2 + 1),
    "dropconnect": lambda m, a, b, c: F.simplified_dropconnect(a, m.W0, m.b0),
    "sorted": lambda m, a, b, c: F.get_item(a, np.argsort(a.array[:, 0])),
    "bilinear": lambda m, a, b, c: F.bilinear(a, b, m.T),
    "gradient reversed": lambda m, a, b, c: changing(lambda gy: -gy, a),
    "gradient clipped": lambda m, a, b, c: changing(lambda gy: np.clip(gy, -0.1, 0.1), a),
    "gradient normalized": lambda m, a, b, c: changing(lambda gy: gy / (1 + abs(gy).max(initial=0)), a),
    "straight through": lambda m, a, b, c: changing(lambda gy: gy, F.sign(a)) + a,
    "by hand in place": lambda m, a, b, c: ByHand(m.H, add_in_place).apply((a,))[0],
    "by hand with a method": lambda m, a, b, c: ByHand(m.H, add_by_method).apply((a,))[0],
    "without gradient": lambda m, a, b, c: a + F.sign(b) * F.floor(c),
}


def _image(a):
    return F.reshape(a, (ROWS, 1, 2, 2))


def _channels(a):
    return F.reshape(a, (ROWS, 4, 1, 1))


def _flat(a):
    return F.reshape(a, (ROWS, SIZE))


class Program(chainer.Link):
    """A graph: steps (name, indexes of three values) and the indexes of its results.

    hold: called with every value that a step makes, gives the value that is used in its place.
    """

    def __init__(self, steps, results):
        super().__init__()
        self.steps, self.results = steps, results
        self.hold = lambda value: value
        normal = chainer.initializers.Normal(0.5)
        with self.init_scope():
            self.W0 = chainer.Parameter(normal, (SIZE, SIZE))
            self.W1 = chainer.Parameter(normal, (SIZE, SIZE))
            # Plain Chainer loses gradients of parameters that are used in F.forget and elsewhere.
            self.F0 = chainer.Parameter(normal, (SIZE, SIZE))
            self.F1 = chainer.Parameter(normal, (SIZE, SIZE))
            # So it does with those that a backward writes to.
            self.H = chainer.Parameter(normal, (SIZE, SIZE))
            self.V = chainer.Parameter(normal, (SIZE, 2 * SIZE))
            self.U = chainer.Parameter(normal, (2 * SIZE, SIZE))
            self.K = chainer.Parameter(normal, (1, 1, 3, 3))
            self.b0 = chainer.Parameter(normal, (SIZE,))
            self.D = chainer.Parameter(normal, (4, 2, 1, 1))
            self.M = chainer.Parameter(normal, (1, 2, 2, 1, 1, 1))
            self.G = chainer.Parameter(normal, (4 * SIZE, SIZE))
            self.T = chainer.Parameter(normal, (SIZE, SIZE, SIZE))

    def forward(self, *inputs):
        values = list(inputs)
        for name, *places in self.steps:
            made = (STEPS | EXACT_ONLY)[name](self, *(values[place % len(values)] for place in places))
            values += [self.hold(value) for value in (made if isinstance(made, tuple) else (made,))]
        return [values[place % len(values)] for place in (-1, *self.results)]

    def compute(self, *inputs):
        return self.forward(*inputs)

    def one_by_one(self, *inputs):
        yield from self.forward(*inputs)

    def keep(self, value):
        self.kept = value
        return F.tanh(value)


WAYS = {
    "a call": lambda program, *xs: program(*xs),
    "forward": lambda program, *xs: program.forward(*xs),
    "a method": lambda program, *xs: program.compute(*xs),
    "a generator": lambda program, *xs: list(program.one_by_one(*xs)),
}


class Row(chainer.Chain):
    """Programs, each of which takes the first result of the one before and the second input.

    ways: how each of them is computed.
    """

    def __init__(self, programs, ways):
        super().__init__(**{f"program{place}": program for place, program in enumerate(programs)})
        self.ways = ways[: len(programs)]

    @property
    def programs(self):
        return [self[f"program{place}"] for place in range(len(self.ways))]

    @property
    def steps(self):
        return [step for program in self.programs for step in program.steps]

    def hold(self, change):
        for program in self.programs:
            program.hold = change

    def forward(self, *inputs):
        results = inputs
        for program, way in zip(self.programs, self.ways, strict=True):
            results = WAYS[way](program, results[0], inputs[1])
        return results


def programs(names, longest=14):
    place = st.integers(0, 30)
    steps = st.lists(
        st.tuples(st.sampled_from(sorted(names)), place, place, place), min_size=1, max_size=longest
    )
    return st.builds(Program, steps, st.lists(place, max_size=3))


def rows(names, longest):
    """One model or two in a row, computed by their calls or in other ways."""
    ways = st.lists(st.sampled_from(sorted(WAYS)), min_size=2, max_size=2)
    return st.builds(Row, st.lists(programs(names, longest), min_size=1, max_size=2), ways)


def with_examples(share, **given_arguments):
    """A property that is checked on a few random examples, always the same ones."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    configured = settings(
        max_examples=EXAMPLES // share,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=checks,
    )
    return lambda test: configured(hypothesis.given(**given_arguments)(test))


def weights(count):
    """The derivative of the loss by each of `count` results."""
    return np.linspace(-1, 1.5, count * ROWS * SIZE, dtype=np.float32).reshape(count, ROWS, SIZE)


def weighted(results):
    """A loss that is linear in the results, as float32 or wider."""
    wide = [y if y.dtype != np.float16 else F.cast(y, np.float32) for y in results]
    pairs = zip(wide, weights(len(wide)), strict=True)
    return sum(F.sum(y * factor.astype(y.dtype)) for y, factor in pairs)


def drawn(seed):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((ROWS, SIZE)).astype(np.float32) for _ in range(2)]


@with_examples(
    1,
    program=programs(STEPS | EXACT_ONLY),
    seed=st.integers(0, 99),
    order=st.permutations(range(4)),
    calls=st.integers(1, 2),
    passes=st.lists(st.sampled_from([-3.0, -0.3, 0.0, 1e-3, 2.7]), max_size=2),
)
def test_any_graph_has_plain_chainers_gradients_in_float32(program, seed, order, calls, passes):
    def run(model, *xs):
        for factor in passes:
            (weighted(model(*xs[::-1])) * np.float32(factor)).backward()
        results = xs
        for _ in range(calls):
            # The first result and an input go into the next call.
            results = model(results[0], xs[1])
        # Results are used in any order, as far as there are as many, and a kept value as well.
        results = [results[place] for place in order if place < len(results)]
        return weighted(results + ([model.kept] if hasattr(model, "kept") else []))

    scaled = assert_exact(program, drawn(seed), run, decisions=ANY, mixed16=None)
    assert all(abs(decision.exponent) < 100 for decision in scaled.ada_loss.decisions)


@pytest.mark.parametrize("timing", ["current", "delayed"])
@with_examples(2, row=rows(STEPS | EXACT_ONLY, 8), seed=st.integers(0, 99), passes=st.integers(1, 2))
def test_so_have_models_in_a_row_and_other_methods_than_forward(timing, row, seed, passes):
    def run(model, *xs):
        for _ in range(passes - 1):
            weighted(model(*xs[::-1])).backward()
        return weighted(model(*xs))

    scaled = copy.deepcopy(row)
    for program, exponent in zip(scaled.programs, (-7, 5), strict=False):
        AdaLossScaled(program, timing=timing, init_scale=2.0**exponent)
    for _ in range(2):
        expected, found = (gradients(model, run, drawn(seed))[1] for model in (row, scaled))
        assert_same_bits(found, expected)


class _Any:
    """Equal to every number."""

    def __eq__(self, other):
        return True


ANY = _Any()


# Without a scale, and by the paper's rule, which lets a share underflow, small losses have worse gradients.
@pytest.mark.parametrize(
    ("method", "timing", "smallest"),
    [
        ("auto", "current", -24),
        ("auto", "delayed", -24),
        ("approx_range", "current", -6),
        ("approx_range", "delayed", -6),
        ("fixed", "current", -6),
    ],
)
@with_examples(2, program=programs(STEPS), seed=st.integers(0, 99), power=st.integers(0, 28))
def test_in_float16_gradients_are_as_good_as_rounding_allows(method, timing, smallest, program, seed, power):
    power = max(smallest, 2 - power)
    inputs = [x.astype(np.float16) for x in drawn(seed)]
    for parameter in program.params():
        parameter.array = parameter.array.astype(np.float16)
    held = []
    program.hold = lambda value: held.append(value.array) or value
    unbounded = {"scale_upper_bound": None, "accum_upper_bound": None}
    scaled = AdaLossScaled(program, method, timing=timing, **unbounded)
    found = []
    for growth in (0, 2):
        held.clear()
        scaled.cleargrads()
        loss = weighted(scaled(*map(chainer.Variable, inputs))) * 2.0 ** (power + growth)
        loss.backward()
        found += [(path, np.ldexp(g.astype(np.float64), -power - growth)) for path, g in given(scaled)]

    exact = reference(program, inputs, held, lambda array: array)
    # The same with every factor's magnitude: what relative errors of the factors can add up to.
    most = reference(program, inputs, held, np.abs)
    for path, gradient in found:
        error = np.linalg.norm(gradient - exact[path])
        bound = (len(program.steps) + 2) * 2.0**-11 * np.linalg.norm(most[path])
        assert error <= bound, (path, error / bound)


@pytest.mark.parametrize("settings", [{"timing": "delayed"}, {"update_per_n_iteration": 3}, {}])
@with_examples(
    4,
    program=programs(STEPS),
    seed=st.integers(0, 99),
    steps=st.lists(st.lists(st.integers(-24, 2), min_size=1, max_size=3), min_size=2, max_size=4),
)
def test_in_float16_they_are_so_whatever_passes_a_step_adds_up(settings, program, seed, steps):
    inputs = [x.astype(np.float16) for x in drawn(seed)]
    for parameter in program.params():
        parameter.array = parameter.array.astype(np.float16)
    held = []
    program.hold = lambda value: held.append(value.array) or value
    scaled = AdaLossScaled(program, **settings)
    optimizer = prepare(chainer.optimizers.SGD(0.0).setup(scaled))
    # What comes first may differ from what came last only where several passes were seen to come.
    for powers in [[2, -24], *steps]:
        scaled.cleargrads()
        for power in powers:
            held.clear()
            (weighted(scaled(*map(chainer.Variable, inputs))) * 2.0**power).backward()
        found = given(scaled)
        optimizer.update()
    exact = reference(program, inputs, held, lambda array: array)
    most = reference(program, inputs, held, np.abs)
    factor = sum(2.0**power for power in powers)
    for path, gradient in found:
        error = np.linalg.norm(gradient / factor - exact[path])
        bound = (len(program.steps) + 2) * 2.0**-11 * np.linalg.norm(most[path])
        assert error <= bound, (path, error / bound)


@pytest.mark.parametrize("timing", ["current", "delayed"])
@with_examples(2, row=rows(STEPS, 6), seed=st.integers(0, 99), power=st.integers(-24, 2))
def test_in_float16_models_in_a_row_and_other_methods_are_as_good(timing, row, seed, power):
    inputs = [x.astype(np.float16) for x in drawn(seed)]
    for parameter in row.params():
        parameter.array = parameter.array.astype(np.float16)
    held = []
    row.hold(lambda value: held.append(value.array) or value)
    for program in row.programs:
        AdaLossScaled(program, timing=timing)
    for _ in range(2):
        held.clear()
        row.cleargrads()
        (weighted(row(*map(chainer.Variable, inputs))) * 2.0**power).backward()
    exact = reference(row, inputs, held, lambda array: array)
    most = reference(row, inputs, held, np.abs)
    for place, program in enumerate(row.programs):
        for path, gradient in given(program):
            path = f"/program{place}{path}"
            error = np.linalg.norm(np.ldexp(gradient.astype(np.float64), -power) - exact[path])
            bound = (len(row.steps) + 2) * 2.0**-11 * np.linalg.norm(most[path])
            assert error <= bound, (path, error / bound)


def given(scaled):
    return [(path, g) for path, g in scaled.true_gradients().items() if g is not None]


def reference(program, inputs, held, change):
    """Gradients in float64 of a program or a row whose values are held at given ones, all of them changed."""
    twin = plain_twin(program)
    for path, parameter in twin.namedparams():
        parameter.array = change(dict(program.namedparams())[path].array.astype(np.float64))
    values = iter(held)
    hold = lambda value: Held(change(next(values).astype(np.float64))).apply((value,))[0]  # noqa: E731
    if isinstance(twin, Row):
        twin.hold(hold)
    else:
        twin.hold = hold
    twin.cleargrads()
    results = twin(*(chainer.Variable(change(x.astype(np.float64))) for x in inputs))
    factors = change(weights(len(results)).astype(np.float64))
    sum(F.sum(y * factor) for y, factor in zip(results, factors, strict=True)).backward()
    return {path: np.zeros(p.shape) if p.grad is None else p.grad for path, p in twin.namedparams()}


def plain_twin(model):
    if isinstance(model, Row):
        return Row([plain_twin(program) for program in model.programs], model.ways)
    return Program(model.steps, model.results)


class Held(chainer.FunctionNode):
    """Another value in a variable's place; its gradient is the variable's."""

    def __init__(self, value):
        self.value = value

    def forward(self, inputs):
        return (self.value,)

    def backward(self, targets, gys):
        return gys
