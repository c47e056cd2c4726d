"""Results of any kind: float16 in them comes out as float32, and what nothing concerns stays what it is."""

import collections
import dataclasses
import itertools
from typing import Any

import chainer
import chainer.distributions as D
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest

import ada_loss.chainer as ada
from ada_loss.chainer.nested import map_variables
from helpers import dtype, signal_to_noise
from twins import Two, draw, weighted_sum

# Losses count so little here that float16 cannot hold true gradients, as those of inputs are.
pytestmark = pytest.mark.filterwarnings("ignore:The gradient of an input underflows")


@dataclasses.dataclass(frozen=True)
class Frozen:
    y: Any
    other: Any = 3


@dataclasses.dataclass(slots=True)
class Slots:
    y: Any
    _hidden: Any = None


class Plain:
    """An object that refers to itself."""

    def __init__(self, y):
        self.y, self.me, self.__private = y, self, y

    @property
    def private(self):
        return self.__private


class Private:
    """An object with a private slot."""

    __slots__ = ("__y",)

    def __init__(self, y):
        self.__y = y

    @property
    def y(self):
        return self.__y


class Rows(list):
    """A list with an attribute."""

    note = "a note"


class Pair(tuple):
    """A tuple that is made of two things."""

    def __new__(cls, first, second):
        return super().__new__(cls, (first, second))


KINDS = {
    "frozen dataclass": (Frozen, lambda r: r.y),
    "dataclass with slots": (Slots, lambda r: r.y),
    "object": (Plain, lambda r: r.y),
    "private attribute": (Plain, lambda r: r.private),
    "private slot": (Private, lambda r: r.y),
    "subclass of list": (lambda y: Rows([y]), lambda r: r[0]),
    "subclass of tuple": (lambda y: Pair(1, y), lambda r: r[1]),
    "deque": (lambda y: collections.deque([y], 3), lambda r: r[0]),
    "user dictionary": (lambda y: collections.UserDict(y=y), lambda r: r["y"]),
    "objects in containers in objects": (lambda y: Plain([{"y": Slots((y,))}]), lambda r: r.y[0]["y"].y[0]),
}


@pytest.fixture
def rng():
    return np.random.default_rng(65)


def scaled(compute):
    with dtype("mixed16"):
        return ada.AdaLossScaled(Two(compute))


def inputs(rng):
    return draw(rng).astype(np.float16)


@pytest.mark.parametrize(("make", "select"), KINDS.values(), ids=KINDS)
def test_objects_that_hold_variables_are_copied(make, select, rng):
    held = {}

    def compute(m, x):
        held["result"] = make(m.b(m.a(x)))
        return held["result"]

    model = scaled(compute)
    result = model(inputs(rng))
    assert type(result) is type(held["result"])
    assert select(result).dtype == np.float32 and select(held["result"]).dtype == np.float16
    model.cleargrads()
    (weighted_sum(select(result)) * 2.0**-26).backward()
    assert all(gradient.any() for gradient in model.true_gradients().values())


@pytest.mark.parametrize("make", [make for make, _ in KINDS.values()], ids=KINDS)
def test_objects_in_which_nothing_changes_are_the_very_objects(make):
    value = make(chainer.Variable(np.zeros(2, np.float32)))
    assert map_variables(lambda variable: variable, value) is value


def test_a_result_that_is_there_twice_is_there_twice_afterwards(rng):
    def compute(m, x):
        y = m.a(x)
        return [y, {"y": y}]

    first, second = scaled(compute)(inputs(rng))
    assert first is second["y"]


@pytest.mark.parametrize("value", [chainer.Chain(a=L.Linear(2, 2)), np, Two, print, {1, 2}, "text"])
def test_what_holds_no_results_is_not_looked_into(value):
    assert map_variables(lambda variable: None, value) is value


class TestDistributions:
    MAKE = {
        "normal": lambda y, z: D.Normal(loc=y, log_scale=z),
        "normal with an array": lambda y, z: D.Normal(loc=y, scale=np.ones_like(z.array)),
        "laplace": lambda y, z: D.Laplace(loc=y, scale=F.exp(z)),
        "independent": lambda y, z: D.Independent(D.Normal(loc=y, scale=F.exp(z))),
    }

    @pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
    def test_have_float32_parameters_and_scaled_gradients(self, make, rng):
        def compute(m, x):
            made = make(m.a(x), m.b(x))
            # What a distribution computes, it keeps.
            assert made.mean.dtype == np.float16
            return made

        model, x = scaled(compute), inputs(rng)
        wide = Two(compute)
        wide.copyparams(model)
        target = draw(rng)
        run = lambda q: -F.sum(q.log_prob(target))  # noqa: E731
        wide.cleargrads()
        with chainer.using_config("enable_backprop", True):
            run(make(wide.a(x.astype(np.float32)), wide.b(x.astype(np.float32)))).backward()
        model.cleargrads()
        (run(model(x)) * 2.0**-26).backward()
        for path, parameter in wide.namedparams():
            if parameter.grad is not None:
                found = model.true_gradients()[path] * 2.0**26
                assert signal_to_noise(found, parameter.grad) > 30, path

    def test_are_decoded_by_another_model(self, rng):
        encoder = scaled(lambda m, x: D.Normal(loc=m.a(x), log_scale=m.b(x)))
        decoder = scaled(lambda m, z: D.Bernoulli(logit=m.b(F.tanh(m.a(z)))))
        q = encoder(inputs(rng))
        p = decoder(q.sample())
        prior = D.Normal(loc=np.zeros((3, 4), np.float32), scale=np.ones((3, 4), np.float32))
        bound = F.sum(p.log_prob(np.ones((3, 4), np.float32))) - F.sum(chainer.kl_divergence(q, prior))
        for model in (encoder, decoder):
            model.cleargrads()
        (bound * np.float32(2.0**-26)).backward()
        for model in (encoder, decoder):
            assert all(gradient.any() for gradient in model.true_gradients().values())


class TestResultsOneByOne:
    def test_are_computed_in_the_model_as_they_are_asked_for(self, rng):
        def steps(m, x):
            for _ in range(3):
                x = F.tanh(m.a(x))
                yield m.b(x), None

        model = scaled(steps)
        results = [y for y, _ in model(inputs(rng))]
        assert [y.dtype for y in results] == [np.float32] * 3
        model.cleargrads()
        (sum(map(weighted_sum, results)) * 2.0**-26).backward()
        assert {(d.site.path, d.site.call) for d in model.ada_loss.decisions} == {
            *itertools.product(["/b", "(entry)"], range(3)),
            ("/a", 1),
            ("/a", 2),
        }
        assert all(gradient.any() for gradient in model.true_gradients().values())

    def test_are_what_a_generator_makes_of_what_it_is_sent(self, rng):
        closed = []

        def conversation(m, x):
            try:
                x = yield m.a(x)
                x = yield m.b(x)
                return "the end"
            except ValueError as error:
                yield str(error)
            finally:
                closed.append(True)

        x = inputs(rng)
        results = scaled(conversation)(x)
        assert next(results).dtype == np.float32
        assert results.send(x).dtype == np.float32
        with pytest.raises(StopIteration, match="the end"):
            results.send(x)
        results = scaled(conversation)(x)
        next(results)
        assert results.throw(ValueError("thrown")) == "thrown"
        results.close()
        results = scaled(conversation)(x)
        next(results)
        results.close()
        assert closed == [True] * 3

    @pytest.mark.parametrize(
        "lazy", [map, lambda f, xs: (f(x) for x in xs), lambda f, xs: filter(None, map(f, xs))]
    )
    def test_may_be_lazy_in_other_ways(self, lazy, rng):
        model = scaled(lambda m, xs: lazy(lambda x: [m.b(m.a(x))], xs))
        results = list(model([inputs(rng), inputs(rng)]))
        assert [y.dtype for (y,) in results] == [np.float32] * 2

    def test_may_be_asked_for_while_another_model_computes(self, rng):
        def steps(m, x):
            for _ in range(2):
                yield m.b(F.tanh(m.a(x)))

        one, other = scaled(steps), scaled(steps)
        x = inputs(rng)
        pairs = list(zip(one(x), other(x), strict=True))
        for model in (one, other):
            model.cleargrads()
        (sum(weighted_sum(y * z) for y, z in pairs) * 2.0**-26).backward()
        for model in (one, other):
            assert {d.site.path for d in model.ada_loss.decisions} == {"/b", "(entry)"}
            assert all(gradient.any() for gradient in model.true_gradients().values())


def test_results_are_given_to_the_next_model_as_a_plain_one_would_be(rng):
    seen = []

    def look(m, x, rest=()):
        seen.append([x.dtype, *(y.dtype for y in rest)])
        return m.a(x)

    first, second = scaled(lambda m, x: (m.a(x), [m.b(x)])), scaled(look)
    for mode in (chainer.force_backprop_mode, chainer.no_backprop_mode):
        with mode():
            y, rest = first(inputs(rng))
            assert y.dtype == rest[0].dtype == np.float32
            second(y, rest=rest)
            second(F.sin(y))
    assert seen == [[np.float16, np.float16], [np.float16]] * 2


def test_recurrent_encoder_and_decoder_work_as_they_are(rng):
    with dtype("mixed16"):
        encoder, decoder = (ada.AdaLossScaled(L.NStepLSTM(1, 4, 5, 0.0)) for _ in range(2))
    xs = [inputs(rng)[:length] for length in (3, 2)]
    h, c, _ = encoder(None, None, xs)
    _, _, ys = decoder(h, c, xs)
    for model in (encoder, decoder):
        model.cleargrads()
    (sum(map(weighted_sum, ys)) * 2.0**-26).backward()
    for model in (encoder, decoder):
        assert all(gradient.any() for path, gradient in model.true_gradients().items() if "/w" in path)


class TestFloat32ResultsAndFloat16:
    """Results are float32 for a script that computes on, and float16 where they meet float16 again."""

    MEETINGS = {
        "an input": lambda y, m, x: y + x,
        "an array": lambda y, m, x: F.hstack([y, x.array]),
        "something computed from a result": lambda y, m, x: F.concat([F.sin(y) * 2, F.tanh(x)]),
        "weights": lambda y, m, x: F.linear(F.relu(y), m.b.W, m.b.b),
        "recurrent weights": lambda y, m, x: F.n_step_gru(1, 0.0, y[None, :2], *gru(m), [x[:2], x[1:2]])[0],
    }

    @pytest.mark.parametrize("meet", MEETINGS.values(), ids=MEETINGS)
    @pytest.mark.parametrize("mode", [chainer.force_backprop_mode, chainer.no_backprop_mode])
    def test_meet_as_in_a_plain_script(self, meet, mode, rng):
        model, x = scaled(lambda m, x: m.a(x)), chainer.Variable(inputs(rng))
        plain = Two(model.compute)
        for ours, theirs in zip(plain.params(), model.params(), strict=True):
            ours.array = theirs.array
        with mode():
            found, expected = meet(model(x), model, x), meet(plain(x), plain, x)
        assert found.dtype == expected.dtype == np.float16
        np.testing.assert_array_equal(found.array, expected.array)

    def test_gradients_of_what_meets_are_scaled(self, rng):
        model, x = scaled(lambda m, x: m.a(x)), chainer.Variable(inputs(rng))
        model.cleargrads()
        (weighted_sum(F.tanh(model(x) + x) * x) * 2.0**-26).backward()
        assert model.a.W.grad.any()

    STAYING = {
        "alone": lambda y: F.sum(F.exp(y)),
        "with numbers": lambda y: 2 * y + 1,
        "with each other": lambda y: y * F.sigmoid(y),
        "with labels": lambda y: F.softmax_cross_entropy(y, np.zeros(3, np.int32)),
        "with float32": lambda y: y * np.ones((3, 4), np.float32),
    }

    @pytest.mark.parametrize("compute", STAYING.values(), ids=STAYING)
    def test_stay_float32_otherwise(self, compute, rng):
        assert compute(scaled(lambda m, x: m.a(x))(inputs(rng))).dtype == np.float32

    def test_that_have_met_float32_are_chainers_float32(self, rng):
        hard = scaled(lambda m, x: m.a(x))(inputs(rng)) * np.ones((3, 4), np.float32)
        with pytest.raises(chainer.utils.type_check.InvalidType):
            hard + chainer.Variable(inputs(rng))


def gru(m):
    """Weights and biases of one layer."""
    return [[m.a.W] * 6], [[m.a.b] * 6]
