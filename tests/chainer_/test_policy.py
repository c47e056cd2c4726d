"""When measurements are taken, and which of them a step's shifts follow from."""

import copy
import pickle
import sys

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest

from ada_loss.arrays.on_numpy import NumPy
from ada_loss.chainer import AdaLossScaled, backward_state
from ada_loss.chainer.gradient import ScaledGradient
from ada_loss.chainer.policy import ChainerPolicy
from ada_loss.core import policy
from ada_loss.core.config import METHODS, TIMINGS, AdaLossConfig
from helpers import assert_same_as_float32, assert_same_bits, dtype, plain_gradients
from toy import batch, prepared, training


class Stack(chainer.ChainList):
    """Three layers, the last of which is used twice."""

    def __init__(self):
        super().__init__(*(L.Linear(6, 6) for _ in range(3)))

    def forward(self, x):
        first, second, last = self
        return last(F.tanh(last(F.tanh(second(F.tanh(first(x)))))))


class Twice(Stack):
    """The layers, and a way around each of them."""

    def forward(self, x):
        for layer in self:
            x = x + F.tanh(layer(x))
        return x


def scaled_stack(method="auto", **settings):
    with dtype("mixed16"):
        return AdaLossScaled(Stack(), method, scale_upper_bound=None, accum_upper_bound=None, **settings)


def step(model, x, factor=1.0):
    """A step without an optimizer; the shifts by site."""
    model.cleargrads()
    (F.sum(model(chainer.Variable(x)) ** 2) * factor).backward()
    return {decision.site: decision.shift for decision in model.ada_loss.decisions}


def noting_summaries(monkeypatch):
    """The arrays that are summarized from now on."""
    summarize, seen = NumPy.summarize, []

    def noted(self, array, **flags):
        seen.append(array)
        return summarize(self, array, **flags)

    monkeypatch.setattr(NumPy, "summarize", noted)
    return seen


@pytest.fixture
def x(rng):
    return rng.standard_normal((4, 6)).astype(np.float16)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "fixed"])
def test_delayed_shifts_are_those_of_the_step_before(method, x):
    current, delayed = scaled_stack(method), scaled_stack(method, timing="delayed")
    delayed.copyparams(current)
    factors = [2.0**k for k in (-22, -22, -26)]
    shifts = [step(current, x, factor) for factor in factors]
    late = [step(delayed, x, factor) for factor in factors]
    assert late[0] == shifts[0]
    assert late[1] == shifts[1]
    entries = [site for site in shifts[0] if site.path == "(entry)"]
    assert entries
    for site in entries:
        assert late[2][site] == shifts[1][site] != shifts[2][site]


@pytest.mark.parametrize("method", METHODS)
def test_delayed_gradients_in_float32_are_chainers_bit_for_bit(method, rng):
    link = Stack()
    scaled = AdaLossScaled(link.copy("copy"), method, timing="delayed")
    for _ in range(3):
        x = rng.standard_normal((4, 6)).astype(np.float32)
        expected = plain_gradients(link, lambda model, x=x: F.sum(model(x) ** 2))
        step(scaled, x)
        assert_same_bits(scaled.true_gradients(), expected)


def test_delayed_gradients_in_float16_are_as_good_as_current_ones(rng):
    delayed = scaled_stack(timing="delayed")
    wide = Stack()
    wide.copyparams(delayed)
    for _ in range(4):
        x = rng.standard_normal((4, 6)).astype(np.float16)
        step(delayed, x, 2.0**-20)
        expected = plain_gradients(wide, lambda model, x=x: F.sum(model(x.astype(np.float32)) ** 2))
        found = {path: np.ldexp(gradient, 20) for path, gradient in delayed.true_gradients().items()}
        assert_same_as_float32(found, expected, db=45)


def test_a_delayed_backward_finishes_no_measurement_after_the_first_step(x, monkeypatch):
    model = scaled_stack(timing="delayed")
    step(model, x)
    fetch, fetched = policy.fetch, []

    def fetch_outside(begun):
        assert not backward_state.running()
        fetched.append(len(begun))
        return fetch(begun)

    monkeypatch.setattr(policy, "fetch", fetch_outside)
    sites = len(step(model, x))
    step(model, x)
    assert sites == 5 and len(fetched) == 2 and fetched[1] >= sites


def test_a_measurement_that_is_not_finite_changes_no_delayed_shift(x):
    model = scaled_stack(timing="delayed")
    for _ in range(2):
        before = step(model, x)
    step(model, x, np.inf)
    assert step(model, x) == before


@pytest.mark.parametrize("factors", [(2.0**-12, 2.0**-6), (2.0**-6, 2.0**-12)])
def test_after_several_backward_passes_over_a_graph_a_delayed_step_decides_by_what_arrives(factors, x):
    model, current = scaled_stack(timing="delayed"), scaled_stack()
    current.copyparams(model)
    step(model, x)
    model.cleargrads()
    loss = F.sum(model(chainer.Variable(x)) ** 2)
    for factor in factors:
        (loss * factor).backward()
    assert step(model, x, 2.0**-15) == step(current, x, 2.0**-15)


def last_shifts(model, x, factors):
    """Those of the last of some steps, with an update after each that changes nothing."""
    optimizer = prepared(model, chainer.optimizers.SGD(0.0))
    for factor in factors:
        shifts = step(model, x, factor)
        optimizer.update()
    return shifts


def last_amaxes(settings, magnitudes):
    """What is taken for the sizes of two gradients that meet in the last of some steps."""
    chosen = ChainerPolicy(AdaLossConfig(**settings))
    for magnitude in magnitudes:
        gradients = [ScaledGradient(np.full(4, magnitude, np.float16), exponent) for exponent in (0, 2)]
        amaxes = chosen.accumulation().amaxes(gradients)
        chosen.end_step(finite=True)
    return amaxes


BETWEEN = pytest.mark.parametrize("settings", [{"timing": "delayed"}, {"update_per_n_iteration": 2}])
AFTERWARDS = pytest.mark.parametrize(
    ("settings", "later"), [({"timing": "delayed"}, 2), ({"update_per_n_iteration": 9}, 1)]
)


@BETWEEN
def test_a_step_without_gradients_makes_nothing_be_forgotten(settings, x):
    model, steady = scaled_stack(**settings), scaled_stack(**settings)
    steady.copyparams(model)
    assert last_shifts(model, x, (1.0, 1.0, 0.0, 1.0)) == last_shifts(steady, x, (1.0, 1.0, 1.0, 1.0))


@AFTERWARDS
def test_what_was_zero_when_it_was_measured_is_measured_again(settings, later, x):
    model, steady = scaled_stack(**settings), scaled_stack()
    steady.copyparams(model)
    ones = [1.0] * later
    assert last_shifts(model, x, (0.0, *ones)) == last_shifts(steady, x, (1.0, *ones))


@AFTERWARDS
def test_sizes_of_gradients_that_were_zero_when_they_met_are_looked_at_again(settings, later):
    assert last_amaxes(settings, (0.0, *[5.0] * later)) == [5.0, 5.0]


@BETWEEN
def test_sizes_of_gradients_that_meet_are_remembered_over_a_step_without_any(settings):
    assert last_amaxes(settings, (3.0, 3.0, 0.0, 5.0)) == [3.0, 3.0]


def test_between_measurements_a_shift_follows_the_exponent_that_arrives(x):
    # What the entry has scaled up, a rule that aims at a place in the format must not scale up again.
    model = scaled_stack(update_per_n_iteration=100)
    optimizer = prepared(model, chainer.optimizers.SGD(0.0))
    before = step(model, x)
    optimizer.update()
    entry = next(site for site in before if site.path == "(entry)")
    # Only the entry is measured again.
    del model.ada_loss.policy.decisions[entry]
    after = step(model, x, 2.0**-6)
    assert after[entry] == before[entry] + 6
    (last, *_) = (decision for decision in model.ada_loss.decisions if decision.site.path == "/2")
    assert last.shift == before[last.site] - 6


@pytest.mark.parametrize("settings", [{"timing": "delayed"}, {"update_per_n_iteration": 3}])
def test_gradients_that_meet_are_not_looked_at_where_nothing_is_to_be_decided(settings, x, monkeypatch):
    class Fan(chainer.Chain):
        def __init__(self):
            super().__init__(stack=Stack(), other=L.Linear(6, 6))

        def forward(self, x):
            h = self.stack(x)
            return self.other(h) + F.concat([h, self.stack(h)])[:, :6]

    with dtype("mixed16"):
        model = AdaLossScaled(Fan(), "approx_range", **settings)
    step(model, x)
    expected = model.true_gradients()
    model.ada_loss.policy.iteration = 1
    for name in ("gradient", "policy", "backward", "parameter_gradients"):
        module = sys.modules[f"ada_loss.chainer.{name}"]
        for look in ("amax_of", "amaxes_of", "all_finite"):
            if hasattr(module, look):
                monkeypatch.setattr(module, look, lambda *_: pytest.fail("it looked"))
    for _ in range(2):
        step(model, x)
        assert_same_bits(model.true_gradients(), expected)


@pytest.mark.parametrize("timing", TIMINGS)
def test_of_gradients_that_meet_only_the_largest_elements_are_looked_for(timing, x, monkeypatch):
    with dtype("mixed16"):
        model = AdaLossScaled(Twice(), timing=timing)
    step(model, x)
    summarized = noting_summaries(monkeypatch)
    step(model, x)
    # A gradient at every decision point, and every layer's weights.
    assert len(summarized) == len(model.ada_loss.decisions) + len(model)


def test_delayed_alignment_leaves_room_for_gradients_that_grow(rng):
    with dtype("mixed16"):
        model = AdaLossScaled(Twice(), "auto", timing="delayed")
    wide = Twice()
    wide.copyparams(model)
    for factor in (1.0, 8.0, 1.0):
        x = rng.standard_normal((4, 6)).astype(np.float16)
        step(model, x, factor)
        expected = plain_gradients(wide, lambda m, x=x, f=factor: F.sum(m(x.astype(np.float32)) ** 2) * f)
        assert_same_as_float32(model.true_gradients(), expected, db=45)


@pytest.mark.parametrize("timing", ["current", "delayed"])
def test_weights_are_summarized_once_in_a_step(timing, x, monkeypatch):
    model = scaled_stack(timing=timing)
    step(model, x)
    seen = noting_summaries(monkeypatch)
    step(model, x)
    for layer in model:
        assert sum(array is layer.W.array for array in seen) == 1


def test_weights_are_summarized_again_after_an_update(x):
    model = scaled_stack()
    optimizer = prepared(model, chainer.optimizers.SGD(0.0))
    step(model, x)
    before = {decision.site: decision.range.max_weight_shift for decision in model.ada_loss.decisions}
    optimizer.update()
    for layer in model:
        layer.W.array *= 8
    step(model, x)
    for decision in model.ada_loss.decisions:
        fewer = 0 if decision.site.path == "(entry)" else 3
        assert decision.range.max_weight_shift == before[decision.site] - fewer


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_delayed_training_continues_as_the_uninterrupted_one(method, rng, tmp_path):
    def advance(target, optimizer, batches):
        for x, t in batches:
            target.cleargrads()
            target(x, t).backward()
            optimizer.update()

    with dtype("mixed16"):
        batches = [batch(rng, magnitude=2.0**-k) for k in range(6)]
    target = training(method=method, timing="delayed")
    optimizer = prepared(target)
    advance(target, optimizer, batches[:3])
    chainer.serializers.save_npz(tmp_path / "model.npz", target)
    chainer.serializers.save_npz(tmp_path / "optimizer.npz", optimizer)
    resumed = training(method=method, timing="delayed", seed=1)
    other = prepared(resumed)
    chainer.serializers.load_npz(tmp_path / "model.npz", resumed)
    chainer.serializers.load_npz(tmp_path / "optimizer.npz", other)
    advance(target, optimizer, batches[3:])
    advance(resumed, other, batches[3:])
    assert resumed.model.ada_loss.policy.to_json() == target.model.ada_loss.policy.to_json()
    for (path, mine), (_, theirs) in zip(target.namedparams(), resumed.namedparams(), strict=True):
        np.testing.assert_array_equal(mine.array, theirs.array, err_msg=path)


def test_a_copy_in_the_middle_of_a_step_takes_no_arrays_along(rng):
    with dtype("mixed16"):
        model = AdaLossScaled(L.Linear(300, 300), timing="delayed")
    for _ in range(2):
        step(model, rng.standard_normal((4, 300)).astype(np.float16))
    assert len(pickle.dumps(model.ada_loss.policy)) < 10_000
    assert copy.deepcopy(model.ada_loss.policy).to_json() == model.ada_loss.policy.to_json()


class Gaining(chainer.Chain):
    """Gradients meet, and are then multiplied by a constant that no layer takes part in."""

    def __init__(self, gain):
        super().__init__(branch=L.Linear(6, 6), first=L.Linear(6, 6))
        self.gain = gain

    def forward(self, x):
        h = self.first(x) * self.gain
        return h * 2.0**-10 + self.branch(h * 2.0**-10)


def test_an_overflow_behind_a_place_where_gradients_meet_makes_room_there(x):
    with dtype("mixed16"):
        model = AdaLossScaled(Gaining(1000.0))
    optimizer = prepared(model, chainer.optimizers.SGD(0.0))
    for _ in range(12):
        step(model, x)
        optimizer.update()
    assert model.ada_loss.policy.entry.skipped <= 6


class Reusing(chainer.Chain):
    """A weight that is used twice, and branches that are far smaller than what they are added to."""

    def __init__(self):
        super().__init__(
            shared=L.Linear(16, 16, nobias=True, initialW=chainer.initializers.Normal(0.25)),
            small=L.Linear(16, 16, nobias=True, initialW=chainer.initializers.Normal(1e-5)),
        )

    def forward(self, x):
        h = x
        for _ in range(3):
            h = (h + self.small(h)) * 0.5
        return self.shared(self.shared(h))


def test_delayed_meetings_have_the_same_numbers_in_every_step(rng):
    with dtype("mixed16"):
        model = AdaLossScaled(Reusing(), timing="delayed")
    optimizer = prepared(model, chainer.optimizers.SGD(0.0))
    numbers = set()
    for _ in range(12):
        x = (4 * rng.standard_normal((8, 16))).astype(np.float16)
        weights = rng.standard_normal((8, 16)).astype(np.float32) * rng.uniform(0.7, 1.4)
        model.cleargrads()
        F.sum(model(chainer.Variable(x)) * weights).backward()
        numbers.add(model.ada_loss.policy.next_call(policy.ACCUMULATION))
        optimizer.update()
    assert len(numbers) == 1
    assert model.ada_loss.policy.entry.skipped == 0


@pytest.mark.parametrize("method", ["abs_range", "element_wise_range", "fixed"])
@pytest.mark.parametrize("settings", [{"timing": "delayed"}, {"update_per_n_iteration": 5}])
def test_a_resumed_training_with_another_method_measures_anew(method, settings, x):
    before = scaled_stack("auto", **settings)
    step(before, x)
    before.ada_loss.policy.iteration = 1
    after, fresh = (scaled_stack(method, **settings) for _ in range(2))
    for model in (after, fresh):
        model.copyparams(before)
    after.ada_loss.policy.load_json(before.ada_loss.policy.to_json())
    assert step(after, x) == step(fresh, x)


def test_scales_of_another_version_are_refused_and_nothing_is_changed(x):
    model = scaled_stack()
    step(model, x)
    state = model.ada_loss.policy.to_json()
    with pytest.raises(ValueError, match="another version of ada_loss"):
        model.ada_loss.policy.load_json('{"iteration": 3, "entry": {"initial": 0}, "shifts": []}')
    assert model.ada_loss.policy.to_json() == state
