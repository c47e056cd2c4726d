"""Corners in which gradients were once wrong, lost or refused without need."""

import collections
import importlib
import zipfile

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest

from ada_loss.chainer import AdaLossScaled, prepare
from ada_loss.chainer.gradient import ScaledGradient, add
from ada_loss.chainer.tagging import LinkPaths
from ada_loss.core.config import TIMINGS, AdaLossConfig
from ada_loss.core.decision import Site
from helpers import assert_same_as_float32, assert_same_bits, dtype, plain_gradients, scoped_gradients
from twins import wrapped_copy


def one_weight(**settings):
    with dtype("float16"):
        return AdaLossScaled(L.Linear(1, 1, nobias=True, initialW=1), **settings)


def test_a_pass_from_outside_keeps_what_is_in_flight():
    wrapped, other = one_weight(init_scale=1024), one_weight()
    x = np.full((1, 1), 2.0**-4, np.float16)
    wrapped.cleargrads()
    (F.sum(wrapped(x)) * np.float32(2.0**-21)).backward()
    outside = F.cast(F.sum(wrapped.W**2), np.float32) * np.float32(0)
    (F.sum(other(x)) + outside).backward()
    assert wrapped.true_gradients()["/W"].item() == 2.0**-25


@pytest.mark.parametrize("method", ["fixed", "approx_range", "auto"])
def test_a_step_whose_true_gradient_is_infinite_is_skipped(method):
    layers = L.Linear(2, 2, initialW=1e-3), L.Linear(2, 2, initialW=100)
    model = AdaLossScaled(chainer.Sequential(*layers), method)
    optimizer = prepare(chainer.optimizers.SGD(1e-3).setup(model))
    with np.errstate(over="ignore", invalid="ignore"):
        optimizer.update(lambda: F.sum(model(np.ones((1, 2), np.float32)) * np.float32(1e37)))
    assert (optimizer.entry_scale.skipped, optimizer.t) == (1, 0)
    assert all(np.isfinite(parameter.array).all() for parameter in model.params())


def test_an_overflow_lowers_the_scale_with_which_gradients_entered_another_optimizers_scope():
    with dtype("float16"):
        generator = AdaLossScaled(L.Linear(2, 2, initialW=1), "fixed", output_dtype=None)
        critic = AdaLossScaled(L.Linear(2, 1, initialW=1), "fixed", init_scale=2.0**15)
    optimizer = prepare(chainer.optimizers.SGD(0.0).setup(generator))
    x = np.ones((1, 2), np.float16)
    for _ in range(12):
        optimizer.update(lambda: F.sum(critic(generator(x))) * np.float32(64))
    assert 0 < optimizer.entry_scale.skipped < 12
    assert critic.ada_loss.policy.entry.exponent < 15


def test_a_small_branch_survives_next_to_a_large_one():
    large, small = np.float16([60000, 2.0**-6]), np.float16([1, 0])
    total = add([ScaledGradient(large, 20), ScaledGradient(small, 0)])
    np.testing.assert_allclose(
        np.ldexp(total.array.astype(np.float64), -total.exponent), [1 + 60000 * 2.0**-20, 2.0**-26], rtol=1e-3
    )


def test_exponents_of_any_distance_can_be_added():
    total = add([ScaledGradient(np.float16([1]), 1100), ScaledGradient(np.float16([1]), 0)])
    assert total.array.item() == 2.0**total.exponent > 1


@pytest.mark.parametrize("magnitude", [2.0**-120, 2.0**100])
def test_float32_gradients_near_the_ends_of_their_range_stay_finite(magnitude):
    plain = L.Linear(3, 2, initialW=1.5)
    gradients = []
    for link in (plain, AdaLossScaled(plain, "auto")):
        x = chainer.Variable(np.ones((1, 3), np.float32))
        y = link(x)
        y.grad = np.full((1, 2), magnitude, np.float32)
        y.backward()
        gradients.append(x.grad)
    np.testing.assert_array_equal(*gradients)


@pytest.mark.parametrize("subscripts, shape", [("ii,i->i", (3, 3)), ("iij,j->i", (3, 3, 3))])
def test_einsum_with_a_repeated_index_is_a_decision_point_like_any_other(subscripts, shape):
    class Einsum(chainer.Link):
        def forward(self, a, b):
            return F.einsum(subscripts, a, b)

    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(s).astype(np.float32) for s in (shape, (3,))]
    found = []
    for link in (Einsum(), AdaLossScaled(Einsum())):
        variables = [chainer.Variable(array) for array in arrays]
        F.sum(link(*variables)).backward()
        found.append([variable.grad for variable in variables])
    for plain, scoped in zip(*found, strict=True):
        np.testing.assert_array_equal(plain, scoped)


def test_what_is_remembered_of_layers_does_not_grow_without_an_optimizer():
    parent = chainer.Sequential(AdaLossScaled(chainer.Sequential(L.Linear(2, 2), L.Linear(2, 2))))
    x = np.ones((1, 2), np.float32)
    for _ in range(5):
        parent.cleargrads()
        F.sum(parent(x)).backward()
    assert len(parent[0].ada_loss.decisions) == 1


def test_sites_that_do_not_come_up_any_more_are_forgotten():
    model = AdaLossScaled(L.Linear(2, 2), update_per_n_iteration=100)
    optimizer = prepare(chainer.optimizers.SGD(0.1).setup(model))
    x = chainer.Variable(np.ones((1, 2), np.float32))
    for calls in range(4):
        optimizer.update(lambda: F.sum(model(x)))
        for _ in range(calls):
            model(x)
    assert len(model.ada_loss.decisions) == 1


def test_results_may_come_in_any_dictionary():
    class Link(chainer.Link):
        def forward(self, x):
            results = collections.defaultdict(list)
            results["y"].append(x)
            return results

    y = AdaLossScaled(Link())(chainer.Variable(np.ones(2, np.float16)))
    assert y["y"][0].dtype == np.float32
    assert y["missing"] == []


def test_gradients_too_small_for_their_squares_are_left_as_they_are():
    model = AdaLossScaled(L.Linear(2, 2, initialW=np.eye(2)))
    model.W.array = model.W.array.astype(np.float64)
    model.b.array = model.b.array.astype(np.float64)
    x = chainer.Variable(np.ones((1, 2)))
    y = model(x)
    y.grad = np.full((1, 2), 1e-200)
    y.backward()
    np.testing.assert_array_equal(x.grad, np.full((1, 2), 1e-200))


class Fragile(chainer.Chain):
    """Applies one layer after another has raised and the error was caught."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.good, self.bad = L.Linear(2, 2), L.Linear(3, 2)

    def forward(self, x):
        try:
            h = self.bad(x)
        except chainer.utils.type_check.InvalidType:
            h = F.matmul(x, self.good.W)
        return F.matmul(self.good(h), self.good.W)


@pytest.mark.filterwarnings("error")
def test_functions_after_a_layer_that_raised_are_not_taken_for_that_layers(rng):
    model = AdaLossScaled(Fragile())
    model.bad.with_config(AdaLossConfig(loss_scale_method="auto"))
    x = chainer.Variable(rng.standard_normal((4, 2)).astype(np.float32))
    F.sum(model(x)).backward()
    assert {decision.site.path for decision in model.ada_loss.decisions} == {"/", "/good"}


def test_links_that_are_not_registered_are_looked_for_once_a_pass(rng, monkeypatch):
    outside = L.Linear(2, 2)

    class Repeating(chainer.Chain):
        def __init__(self):
            super().__init__()
            with self.init_scope():
                self.inside = L.Linear(2, 2)

        def forward(self, x):
            for _ in range(5):
                x = outside(x)
            return self.inside(x)

    searches, model = [], AdaLossScaled(Repeating())
    search = LinkPaths._search
    monkeypatch.setattr(LinkPaths, "_search", lambda *args: searches.append(args) or search(*args))
    x = rng.standard_normal((1, 2)).astype(np.float32)
    for _ in range(3):
        model(x)
    assert len(searches) <= 1 + 3


@pytest.mark.parametrize("mode", ["share", "copy", "init"])
@pytest.mark.parametrize("around", [lambda model: model, chainer.Sequential])
def test_copies_of_a_model_choose_scales_of_their_own(rng, mode, around):
    parent = around(AdaLossScaled(L.Linear(2, 2), "approx_range", init_scale=4))
    other = parent.copy(mode)
    mine, copied = (link if isinstance(link, AdaLossScaled) else link[0] for link in (parent, other))
    before = mine.ada_loss.policy.to_json()
    x = chainer.Variable(rng.standard_normal((3, 2)).astype(np.float32))
    other.cleargrads()
    F.sum(other(x) * np.float32(1e-9)).backward()
    copied.ada_loss.policy.end_step(finite=False)
    assert mine.ada_loss.policy.to_json() == before and not mine.ada_loss.decisions
    assert copied.ada_loss.decisions and copied.ada_loss.policy.entry.exponent == 1


@pytest.mark.parametrize("mode", ["share", "copy", "init"])
def test_copies_go_on_from_the_scales_of_the_original_unless_they_start_anew(mode):
    model = AdaLossScaled(L.Linear(2, 2))
    start = model.ada_loss.policy.to_json()
    model.ada_loss.policy.end_step(finite=False)
    assert model.copy(mode).ada_loss.policy.to_json() == (
        start if mode == "init" else model.ada_loss.policy.to_json()
    )


class Clearing(chainer.FunctionHook):
    """Clears gradients once, before the backward of a function."""

    def __init__(self, link, label):
        self.link, self.label = link, label

    def backward_preprocess(self, function, in_data, out_grad):
        if function.label == self.label:
            self.link.cleargrads()
            self.label = "cleared"


@pytest.mark.parametrize("label", ["sin", "Tanh"])
def test_gradients_that_a_hook_clears_while_backward_runs_are_cleared_as_in_chainer(rng, label):
    plain = chainer.Sequential(L.Linear(3, 3), F.tanh, L.Linear(3, 3), F.sin)
    x = rng.standard_normal((2, 3)).astype(np.float32)
    found = []
    for model in (wrapped_copy(plain, update_per_n_iteration=2), plain):
        model.cleargrads()
        F.sum(model(x)).backward()
        with Clearing(model, label) as hook:
            F.sum(model(2 * x)).backward()
        assert hook.label == "cleared"
        found.append({path: parameter.grad for path, parameter in model.namedparams()})
    assert_same_bits(*found)


def test_clearing_gradients_while_backward_runs_ends_no_step(rng):
    model = AdaLossScaled(
        chainer.Sequential(L.Linear(3, 3), F.tanh, L.Linear(3, 3)), update_per_n_iteration=9
    )
    optimizer = prepare(chainer.optimizers.SGD(0.1).setup(model))
    x = rng.standard_normal((2, 3)).astype(np.float32)
    with Clearing(model, "Tanh") as hook:
        optimizer.update(lambda: F.sum(model(chainer.Variable(x))))
    assert hook.label == "cleared"
    assert [decision.site for decision in model.ada_loss.decisions] == [Site("/1", 0), Site("/0", 0)]


def test_an_entry_of_a_file_that_is_damaged_is_not_taken_for_missing(tmp_path):
    model = AdaLossScaled(L.Linear(2, 2))
    chainer.serializers.save_npz(tmp_path / "good.npz", model)
    with zipfile.ZipFile(tmp_path / "good.npz") as good, zipfile.ZipFile(tmp_path / "bad.npz", "w") as bad:
        for name in good.namelist():
            data = good.read(name)
            bad.writestr(name, data.replace(b"descr", b"?????") if "state" in name else data)
    with pytest.raises(ValueError, match="Header"):
        chainer.serializers.load_npz(tmp_path / "bad.npz", model)


def test_the_engine_may_be_reloaded(rng):
    from ada_loss.chainer import backward

    link, x = L.Linear(3, 2), rng.standard_normal((4, 3)).astype(np.float32)
    expected = plain_gradients(link, lambda model: F.sum(model(x) ** 2))
    for _ in range(2):
        importlib.reload(backward).install()
    assert_same_bits(plain_gradients(link, lambda model: F.sum(model(x) ** 2)), expected)
    assert_same_bits(scoped_gradients(AdaLossScaled(link), lambda model: F.sum(model(x) ** 2)), expected)


@pytest.mark.parametrize("timing", TIMINGS)
def test_gradients_of_a_weight_that_is_used_at_every_step_of_time_do_not_overflow_as_they_are_added(
    rng, timing
):
    with dtype("mixed16"):
        model = AdaLossScaled(chainer.Chain(layer=L.LSTM(4, 4)), timing=timing)
    optimizer = prepare(chainer.optimizers.Adam().setup(model))

    def loss():
        model.layer.reset_state()
        return sum(F.sum(F.cast(y, np.float32) ** 2) for y in model(rng.standard_normal((20, 3, 4))))

    model.forward = lambda xs: [model.layer(x.astype(np.float16)) for x in xs]
    for _ in range(8):
        optimizer.update(loss)
    assert optimizer.entry_scale.skipped == 0


class Alternating(chainer.Chain):
    """Every other call another graph, in which gradients of other sizes meet."""

    calls = 0

    def __init__(self):
        super().__init__(a=L.Linear(8, 8), b=L.Linear(8, 8), c=L.Linear(8, 8))

    def forward(self, x):
        self.calls += 1
        h = F.tanh(self.a(x))
        if self.calls % 2:
            return self.c(h + 1e-3 * F.tanh(self.b(h))) + h
        return 1e-3 * self.c(F.tanh(self.b(h) + self.b(h * h)) + 1e-4 * h + self.a(h)) + x


@pytest.mark.parametrize("timing", TIMINGS)
def test_a_graph_that_changes_between_steps_costs_at_most_steps(rng, timing):
    with dtype("mixed16"):
        model = AdaLossScaled(Alternating(), timing=timing)
    wide = Alternating()
    wide.copyparams(model)
    optimizer = prepare(chainer.optimizers.SGD(0.0).setup(model))
    steps = 10
    for _ in range(steps):
        x = rng.standard_normal((16, 8)).astype(np.float16)
        skipped = optimizer.entry_scale.skipped
        optimizer.update(lambda x=x: F.sum(model(x) ** 2) * np.float32(2.0**-20))
        expected = plain_gradients(wide, lambda link, x=x: F.sum(link(x.astype(np.float32)) ** 2))
        if optimizer.entry_scale.skipped == skipped:
            found = {path: np.ldexp(gradient, 20) for path, gradient in model.true_gradients().items()}
            assert_same_as_float32(found, expected, db=40)
    assert optimizer.entry_scale.skipped <= (steps // 2 if timing == "delayed" else 0)
