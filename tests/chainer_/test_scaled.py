"""`AdaLossScaled` as a link: its settings, attributes, files, copies, and what it shows."""

import copy
import io
import pickle

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import serializers

from ada_loss.chainer import AdaLossScaled
from ada_loss.core.config import AdaLossConfig
from helpers import assert_same_bits, dtype
from twins import weighted_sum


class Net(chainer.Chain):
    """A model with methods, settings and running statistics."""

    def __init__(self):
        super().__init__()
        self.threshold = 0.5
        with self.init_scope():
            self.a = L.Linear(4, 5)
            self.norm = L.BatchNormalization(5)
            self.b = L.Linear(5, 3)

    def forward(self, x):
        h = F.relu(self.norm(self.a(x)))
        return self.b(h + F.sin(h))

    @property
    def width(self):
        return self.b.W.shape[1]

    def predict(self, x):
        with chainer.no_backprop_mode(), chainer.using_config("train", False):
            return self(x).array > self.threshold


@pytest.fixture
def rng():
    return np.random.default_rng(61)


def draw(rng, *shape):
    return rng.standard_normal(shape or (6, 4)).astype(np.float32)


def scaled_net(**settings):
    return AdaLossScaled(Net(), **{"loss_scale_method": "auto", "init_scale": 2.0**-7} | settings)


def step(model, x):
    model.cleargrads()
    weighted_sum(model(x)).backward()
    return model.true_gradients()


class TestSettings:
    def test_are_those_of_the_configuration(self):
        model = AdaLossScaled(Net(), "fixed", init_scale=128, update_per_n_iteration=10)
        assert model.ada_loss.config == AdaLossConfig(
            loss_scale_method="fixed", init_scale=128, update_per_n_iteration=10
        )

    @pytest.mark.parametrize(
        "settings",
        [{"loss_scale_method": "none"}, {"init_scale": 3}, {"dynamic_interval": 0}, {"n_uf": 1}],
    )
    def test_that_are_wrong_are_an_error_before_anything_changes(self, settings):
        net = Net()
        with pytest.raises(ValueError, match=next(iter(settings))):
            AdaLossScaled(net, **settings)
        assert type(net.a) is L.Linear

    def test_that_do_not_exist_are_an_error(self):
        with pytest.raises(TypeError, match="scale_everything"):
            AdaLossScaled(Net(), scale_everything=True)

    @pytest.mark.parametrize("link", [None, 3, F.relu, Net])
    def test_only_links_can_be_wrapped(self, link):
        with pytest.raises(TypeError, match="wraps a chainer.Link"):
            AdaLossScaled(link)


class TestAttributes:
    def test_and_methods_of_the_link_are_reachable(self, rng):
        net = Net()
        plain, x = copy.deepcopy(net), draw(rng)
        model = AdaLossScaled(net)
        assert model.width == 5
        assert model.a is net.a
        np.testing.assert_array_equal(model.predict(x), plain.predict(x))

    def test_of_the_link_can_be_set(self):
        model = scaled_net()
        model.threshold = 0.9
        model.note = "mine"
        assert (model.threshold, model.note) == (0.9, "mine")

    def test_that_nobody_has_are_an_error(self):
        with pytest.raises(AttributeError, match="nothing_like_this"):
            scaled_net().nothing_like_this  # noqa: B018

    def test_of_an_uninitialized_wrapper_are_an_error(self):
        with pytest.raises(AttributeError, match="ada_loss"):
            type(scaled_net()).__new__(type(scaled_net())).ada_loss  # noqa: B018


class TestParameters:
    def test_have_the_paths_of_the_plain_link(self):
        assert [path for path, _ in scaled_net().namedparams()] == [path for path, _ in Net().namedparams()]
        holder = chainer.Chain(model=scaled_net())
        assert [path for path, _ in holder.namedparams()] == [
            f"/model{path}" for path, _ in Net().namedparams()
        ]

    def test_true_gradients_are_new_float32_arrays_or_none(self, rng):
        with dtype("mixed16"):
            model = scaled_net()
        model.cleargrads()
        assert all(gradient is None for gradient in model.true_gradients().values())
        found = step(model, draw(rng).astype(np.float16))
        assert {gradient.dtype for gradient in found.values()} == {np.dtype(np.float32)}
        for gradient in model.true_gradients().values():
            gradient[...] = np.nan
        assert_same_bits(model.true_gradients(), found)

    def test_an_update_by_hand_with_true_gradients_lowers_the_loss(self, rng):
        model, x = scaled_net(), draw(rng)
        losses = []
        for _ in range(5):
            losses.append(float(weighted_sum(model(x)).array))
            for path, gradient in step(model, x).items():
                dict(model.namedparams())[path].array[...] -= 0.005 * gradient
        assert losses == sorted(losses, reverse=True)


class TestCalls:
    def test_are_counted_within_a_step(self, rng):
        model, x = scaled_net(), draw(rng)
        for _ in range(2):
            model.cleargrads()
            (weighted_sum(model(x)) + weighted_sum(model(F.sin(x)))).backward()
            calls = [
                decision.site.call for decision in model.ada_loss.decisions if decision.site.path == "/b"
            ]
            assert sorted(calls) == [0, 1]


class TestPrinting:
    def test_shows_variants_and_after_the_first_call_fan_outs(self, rng):
        model = scaled_net()
        assert "(a): AdaLossLinear(in_size=4, out_size=5, nobias=False)" in str(model)
        assert "used" not in str(model)
        assert model.ada_loss.fan_outs == ()
        model(draw(rng))
        (branch,) = model.ada_loss.fan_outs
        assert (branch.path, branch.function, branch.layer, branch.uses) == ("/", "ReLU", "/a", 2)
        assert "\n    / ReLU after /a, used 2 times\n" in str(model)
        assert str(model).count("(") == str(model).count(")")

    def test_shows_inputs_that_fan_out(self, rng):
        model = AdaLossScaled(chainer.Sequential(lambda x: x + F.relu(x) * x))
        model(chainer.Variable(draw(rng)))
        assert str(model.ada_loss.fan_outs[0]) == "(input), used 3 times"

    def test_shared_parameters_are_no_fan_outs(self, rng):
        layer = L.Linear(4, 4)
        model = AdaLossScaled(chainer.Sequential(layer, F.relu, layer))
        model(draw(rng))
        assert model.ada_loss.fan_outs == ()

    def test_calls_without_backprop_show_nothing(self, rng):
        model = scaled_net()
        with chainer.no_backprop_mode():
            model(draw(rng))
        assert model.ada_loss.fan_outs == ()


class TestFiles:
    def saved(self, link):
        file = io.BytesIO()
        serializers.save_npz(file, link)
        file.seek(0)
        return file

    def test_of_the_plain_link_load_into_the_wrapped_one_and_back(self, rng):
        net, model, again = Net(), scaled_net(), Net()
        net(draw(rng))
        serializers.load_npz(self.saved(net), model)
        serializers.load_npz(self.saved(model), again)
        for holder in (model, again):
            for (path, one), (_, other) in zip(holder.namedparams(), net.namedparams(), strict=True):
                np.testing.assert_array_equal(one.array, other.array, err_msg=path)
            np.testing.assert_array_equal(holder.norm.avg_mean, net.norm.avg_mean)

    def test_have_the_plain_links_entries_and_ours_beside_them(self):
        plain, ours = (set(np.load(self.saved(link)).files) for link in (Net(), scaled_net()))
        assert ours - plain == {"ada_loss/state"}
        assert plain <= ours

    def test_of_the_plain_link_mean_a_fresh_state(self, rng):
        model, fresh = scaled_net(update_per_n_iteration=3), scaled_net(update_per_n_iteration=3)
        step(model, draw(rng))
        model.ada_loss.policy.end_step(finite=False)
        serializers.load_npz(self.saved(Net()), model)
        assert model.ada_loss.policy.to_json() == fresh.ada_loss.policy.to_json()

    def test_initialize_lazy_parameters(self, rng):
        lazy = AdaLossScaled(chainer.Sequential(L.Linear(None, 3)))
        other = chainer.Sequential(L.Linear(4, 3))
        serializers.load_npz(self.saved(other), lazy)
        np.testing.assert_array_equal(lazy[0].W.array, other[0].W.array)


class TestCopies:
    COPIES = {
        "deepcopy": copy.deepcopy,
        "pickle": lambda model: pickle.loads(pickle.dumps(model)),
        "link copy": lambda model: model.copy("copy"),
        "shared": lambda model: model.copy("share"),
    }

    @pytest.mark.parametrize("how", COPIES)
    def test_compute_the_same_gradients(self, how, rng):
        model, x = scaled_net(), draw(rng)
        found = step(model, x)
        twin = self.COPIES[how](model)
        assert_same_bits(step(twin, x), found)
        assert twin is not model
        assert type(twin) is type(model)
        assert {decision.site.path for decision in twin.ada_loss.decisions} == {"/b"}
        assert str(twin.ada_loss.config) == str(model.ada_loss.config)

    @pytest.mark.parametrize("how", ["deepcopy", "pickle", "link copy"])
    def test_share_no_parameter(self, how, rng):
        model = scaled_net()
        model.cleargrads()
        twin = self.COPIES[how](model)
        twin.a.W.array[...] = 0
        assert model.a.W.array.any()
        step(twin, draw(rng))
        assert model.a.W.grad is None

    def test_may_be_initialized_anew(self):
        model = scaled_net()
        twin = model.copy("init")
        assert not np.array_equal(twin.a.W.array, model.a.W.array)
        assert [path for path, _ in twin.namedparams()] == [path for path, _ in model.namedparams()]

    def test_take_over_parameters_and_gradients(self, rng):
        model, twin, x = scaled_net(), scaled_net(), draw(rng)
        twin.copyparams(model)
        first, second = step(model, x), step(twin, x)
        assert_same_bits(second, first)
        model.addgrads(twin)
        for path, gradient in model.true_gradients().items():
            np.testing.assert_array_equal(gradient, 2 * first[path], err_msg=path)


def test_a_layer_alone_can_be_wrapped(rng):
    model = AdaLossScaled(L.Linear(4, 3), "auto", init_scale=2.0**-7)
    x = chainer.Variable(draw(rng))
    weighted_sum(model(x)).backward()
    assert [decision.site.path for decision in model.ada_loss.decisions] == ["/"]
    assert model.ada_loss.report.converted == {"/": "AdaLossLinear"}


def test_sending_to_a_device_keeps_everything_working(rng):
    model = scaled_net()
    model.to_device("@numpy")
    assert step(model, draw(rng))["/a/W"] is not None


def test_what_is_kept_on_a_model_prints_as_a_table_a_row_a_layer():
    model = AdaLossScaled(Net())
    assert "No backward pass" in repr(model.ada_loss)
    F.sum(model(np.ones((2, 4), np.float32)) ** 2).backward()
    first, headings, *rows = str(model.ada_loss).splitlines()
    assert first.startswith("auto: 2 layers scaled")
    assert headings.split()[0] == "layer"
    assert {decision.site.path for decision in model.ada_loss.decisions} <= {row.split()[0] for row in rows}
