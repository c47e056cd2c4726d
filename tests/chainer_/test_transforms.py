"""The transform: it reaches every layer of every container, keeps what they are, and says what it did."""

import copy

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainercv.links import PickableSequentialChain

from ada_loss.chainer import AdaLossScaled
from ada_loss.chainer.links import ScaledLayer
from ada_loss.chainer.tagging import named_links
from ada_loss.chainer.transforms import transform
from ada_loss.core.decision import Site
from helpers import dtype
from twins import assert_exact, weighted_sum


def draw(rng, *shape):
    return rng.standard_normal(shape or (3, 4)).astype(np.float32)


class Listed(chainer.ChainList):
    """Layers in a list."""

    def __init__(self):
        super().__init__(L.Linear(4, 4), chainer.Sequential(L.Linear(4, 4), F.relu))

    def forward(self, x):
        for layer in self:
            x = layer(x) + x
        return x


class Picking(PickableSequentialChain):
    """Layers of which several give results."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.first = L.Linear(4, 4)
            self.relu = F.relu
            self.second = L.Linear(4, 4)
            self.third = Listed()
        self.pick = ("relu", "third", "first")


class Twice(chainer.Chain):
    """The same layer under two names."""

    def __init__(self):
        layer = L.Linear(4, 4)
        super().__init__(first=layer, second=layer, last=L.Linear(4, 2))

    def forward(self, x):
        return self.last(self.second(F.sin(self.first(x))))


class Own(chainer.Chain):
    """A container with a parameter of its own."""

    def __init__(self):
        super().__init__(layer=L.Linear(4, 4))
        with self.init_scope():
            self.W = chainer.Parameter(chainer.initializers.Normal(0.5), (3, 4))

    def forward(self, x):
        return F.linear(self.layer(x), self.W)


CONTAINERS = {
    "a layer": (lambda: L.Linear(4, 3), ["/"]),
    "chain": (lambda: chainer.Chain(a=L.Linear(4, 3)), ["/a"]),
    "chain list": (Listed, ["/0", "/1/0"]),
    "sequential": (lambda: chainer.Sequential(L.Linear(4, 3), F.relu, L.Linear(3, 2)), ["/0", "/1"]),
    "pickable": (Picking, ["/first", "/second", "/third/0", "/third/1/0"]),
    "nested": (lambda: chainer.Sequential(Listed(), Picking()).repeat(2), None),
    "one layer twice": (Twice, ["/first", "/last"]),
    "own parameter": (Own, ["/layer"]),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_layer_of_a_container_becomes_a_variant(name):
    link = CONTAINERS[name][0]()
    layers = [child for child in link.links() if isinstance(child, L.Linear)]
    report = transform(named_links(link))
    assert all(isinstance(layer, ScaledLayer) for layer in layers)
    assert len(report.converted) == len({id(layer) for layer in layers})
    expected = CONTAINERS[name][1]
    assert expected is None or [*report.converted] == expected
    assert set(report.converted.values()) == {"AdaLossLinear"}


@pytest.mark.parametrize("name", ["chain list", "sequential", "pickable", "one layer twice", "own parameter"])
def test_a_container_has_plain_chainers_gradients(name, rng):
    scaled = assert_exact(CONTAINERS[name][0](), [draw(rng)])
    paths = {decision.site.path for decision in scaled.ada_loss.decisions}
    assert paths == {*CONTAINERS[name][1]} | ({"/"} if name == "own parameter" else set())


@pytest.mark.parametrize("name", CONTAINERS)
def test_files_of_a_plain_container_load_into_the_transformed_one_and_back(name, tmp_path):
    plain, scaled, again = (CONTAINERS[name][0]() for _ in range(3))
    scaled = AdaLossScaled(scaled)
    chainer.serializers.save_npz(tmp_path / "plain.npz", plain)
    chainer.serializers.load_npz(tmp_path / "plain.npz", scaled)
    chainer.serializers.save_npz(tmp_path / "scaled.npz", scaled)
    chainer.serializers.load_npz(tmp_path / "scaled.npz", again)
    for (path, first), (_, second), (_, third) in zip(
        *(sorted(link.namedparams()) for link in (plain, scaled, again)), strict=True
    ):
        np.testing.assert_array_equal(second.array, first.array, err_msg=path)
        np.testing.assert_array_equal(third.array, first.array, err_msg=path)


def test_a_transform_again_changes_nothing(rng):
    link = Listed()
    first = transform(named_links(link))
    classes = [type(child) for child in link.links()]
    assert transform(named_links(link)) == first
    assert [type(child) for child in link.links()] == classes


def test_links_and_parameters_stay_the_same_objects(rng):
    link = Picking()
    children, parameters = [*link.namedlinks()], [*link.namedparams()]
    scaled = AdaLossScaled(link)
    assert scaled is link
    for (path, before), (same_path, after) in zip(children, link.namedlinks(), strict=True):
        assert (path, before) == (same_path, after)
    for (path, before), (same_path, after) in zip(parameters, scaled.namedparams(), strict=True):
        assert path == same_path
        assert before is after


def test_names_initializers_update_rules_and_hooks_survive(rng):
    class Hook(chainer.LinkHook):
        calls = 0

        def forward_postprocess(self, args):
            type(self).calls += 1

    link = chainer.Sequential(L.Linear(None, 5, initialW=3.0, initial_bias=2.0), L.Linear(5, 2))
    link[1].add_hook(Hook())
    optimizer = chainer.optimizers.Adam().setup(link)
    rule = link[1].W.update_rule
    scaled = AdaLossScaled(link)
    assert link[0].W.array is None
    assert [child.name for child in link.links(skipself=True)] == ["0", "1"]
    y = scaled(draw(rng))
    assert y.shape == (3, 2)
    assert link[0].W.array.shape == (5, 4)
    assert (link[0].W.array == 3).all() and (link[0].b.array == 2).all()
    assert link[1].W.update_rule is rule and optimizer.target is link
    assert Hook.calls == 1
    assert (link[1].W.name, link[1].b.name) == ("W", "b")


def test_lazy_shapes_have_plain_chainers_gradients(rng):
    link = chainer.Sequential(L.Linear(None, 5), F.relu, L.Linear(None, 2))
    scaled, x = AdaLossScaled(copy.deepcopy(link), "auto", init_scale=2.0**-7), draw(rng)
    for model in (scaled, link):
        np.random.seed(0)
        weighted_sum(model(x)).backward()
    for (path, ours), (_, plain) in zip(scaled.namedparams(), link.namedparams(), strict=True):
        np.testing.assert_array_equal(ours.array, plain.array, err_msg=path)
        np.testing.assert_array_equal(ours.grad, plain.grad, err_msg=path)


@pytest.mark.parametrize("precision", ["float16", "mixed16", "float32", "float64"])
def test_dtypes_stay(precision):
    with dtype(precision):
        link = chainer.Sequential(L.Linear(4, 3), L.BatchNormalization(3))
        kinds = [parameter.dtype for parameter in link.params()]
        AdaLossScaled(link)
    assert [parameter.dtype for parameter in link.params()] == kinds


class TestFilter:
    def asked(self, link, answer):
        """The paths that a filter is asked about, but for the model itself, by which its kind is told."""
        asked = []
        AdaLossScaled(link, filter=lambda path, child: bool(asked.append(path)) or answer(path))
        return [path for path in asked if path != "/"]

    def test_it_is_asked_about_every_link_but_those_below_one_that_it_refuses(self):
        link = chainer.Chain(own=Own(), norm=L.BatchNormalization(3), inner=Listed())
        paths = ["/inner", "/inner/0", "/inner/1", "/inner/1/0", "/norm", "/own", "/own/layer"]
        assert self.asked(copy.deepcopy(link), lambda path: True) == paths
        assert self.asked(link, lambda path: path not in ("/inner", "/own")) == ["/inner", "/norm", "/own"]

    def test_that_refuses_the_model_itself_is_asked_about_layers_only(self):
        link = chainer.Chain(own=Own(), norm=L.BatchNormalization(3), inner=Listed())
        paths = ["/inner/0", "/inner/1/0", "/norm", "/own", "/own/layer"]
        assert self.asked(link, lambda path: path == "/inner/0") == paths

    def test_what_it_refuses_is_not_scaled(self, rng):
        scaled = assert_exact(Picking(), [draw(rng)], filter=lambda path, link: "third" not in path)
        shifts = {decision.site.path: decision.shift for decision in scaled.ada_loss.decisions}
        assert shifts["/third/0"] == shifts["/third/1/0"] == 0
        assert shifts["/second"] != 0
        assert type(scaled.third[0]) is L.Linear

    def test_products_of_a_refused_container_are_not_scaled(self, rng):
        scaled = assert_exact(Own(), [draw(rng)], filter=lambda path, link: path != "/")
        shifts = {decision.site.path: decision.shift for decision in scaled.ada_loss.decisions}
        assert shifts["/"] == 0 != shifts["/layer"]

    def test_it_does_not_outlast_the_wrapping(self, rng):
        link = Listed()
        with pytest.warns(UserWarning, match="leaves out every layer"):
            AdaLossScaled(link, filter=lambda path, link: False)
        scaled = AdaLossScaled(chainer.Sequential(link), "auto", init_scale=2.0**-7)
        weighted_sum(scaled(draw(rng))).backward()
        assert any(decision.shift for decision in scaled.ada_loss.decisions)


def test_the_report_says_what_was_converted_and_what_was_left_and_why():
    link = chainer.Chain(
        conv=L.Convolution2D(3, 4, 3), norm=L.BatchNormalization(4), out=L.Linear(4), words=L.EmbedID(3, 4)
    )
    report = AdaLossScaled(link, filter=lambda path, child: path != "/out").ada_loss.report
    assert report.converted == {"/conv": "AdaLossConvolution2D"}
    assert report.left.keys() == {"/norm", "/out", "/words"}
    assert report.left["/out"] == "refused by the filter"
    assert "BatchNormalization" in report.left["/norm"]
    lines = str(report).splitlines()
    assert lines[0] == "/conv: AdaLossConvolution2D"
    assert "/out: left, refused by the filter" in lines


class Head(chainer.Chain):
    """A layer, and one in a list."""

    def __init__(self):
        super().__init__(one=L.Linear(4, 4), inner=chainer.ChainList(L.Linear(4, 4)))

    def forward(self, x):
        return self.inner[0](F.relu(self.one(x)))


class Deep(chainer.Chain):
    """A body and a head of two layers each."""

    def __init__(self):
        super().__init__(body=chainer.Sequential(L.Linear(4, 4), F.relu, L.Linear(4, 4)), head=Head())

    def forward(self, x):
        return self.head(F.relu(self.body(x)))


HEAD = {"/head/one", "/head/inner/0"}


class TestFiltersOfParts:
    FILTERS = {
        "a function of paths": lambda path, link: path != "/head",
        "a function of links": lambda path, link: not isinstance(link, Head),
        "what is left out": "!/head",
        "what is left out, below": ["!/head/*"],
        "what is scaled": ["/body"],
        "what is scaled, by a glob": ("/b*/0", "/body/1"),
        "both": ["/*", "!/head"],
    }

    @pytest.mark.parametrize("filter", FILTERS.values(), ids=FILTERS)
    def test_refuse_all_that_is_below(self, filter, rng):
        model = AdaLossScaled(Deep(), filter=filter, init_scale=2.0**-7)
        assert set(model.ada_loss.report.left) == HEAD
        assert set(model.ada_loss.report.converted) == {"/body/0", "/body/1"}
        model.cleargrads()
        weighted_sum(model(chainer.Variable(draw(rng)))).backward()
        shifts = {decision.site.path: decision.shift for decision in model.ada_loss.decisions}
        assert all(shifts[path] == 0 for path in HEAD) and shifts["/body/1"]

    def test_by_class_are_asked_about_layers(self):
        model = AdaLossScaled(Deep(), filter=lambda path, link: isinstance(link, L.Linear) and link.W.size)
        assert not model.ada_loss.report.left

    @pytest.mark.filterwarnings("ignore:The filter leaves out every layer")
    @pytest.mark.parametrize("filter", ["/haed", ["/body", "!/hed/*"]])
    def test_that_match_nothing_say_so_and_what_is_meant(self, filter):
        with pytest.warns(UserWarning, match="filter matched nothing.*'/head"):
            AdaLossScaled(Deep(), filter=filter)

    def test_that_leave_out_everything_say_so(self):
        with pytest.warns(UserWarning, match="leaves out every layer"):
            AdaLossScaled(Deep(), filter=lambda path, link: False)

    def test_hold_for_layers_that_are_added_later(self, rng):
        model = AdaLossScaled(Deep(), filter="!/head", init_scale=2.0**-7)
        head = model.head
        head.add_link("late", L.Linear(4, 4))
        head.forward = lambda x: head.late(head.one(x))
        weighted_sum(model(chainer.Variable(draw(rng)))).backward()
        shifts = {decision.site.path: decision.shift for decision in model.ada_loss.decisions}
        assert shifts["/head/late"] == 0

    def test_travel_with_copies(self, rng):
        model = copy.deepcopy(AdaLossScaled(Deep(), filter="!/head"))
        assert "/head/one" in model.ada_loss.policy.parts and "/body/0" not in model.ada_loss.policy.parts


class TestSettingsOfParts:
    def exponents(self, rng, **settings):
        with dtype("mixed16"):
            model = AdaLossScaled(Deep(), **settings)
        model.cleargrads()
        weighted_sum(model(draw(rng).astype(np.float16))).backward()
        return model, {d.site.path: (d.exponent, d.shift) for d in model.ada_loss.decisions}

    @pytest.mark.parametrize("pattern", ["/head", "/head/*", "/hea?/*"])
    def test_a_fixed_scale_holds_in_its_part_only(self, pattern, rng):
        layers = {pattern: {"loss_scale_method": "fixed", "init_scale": 8}}
        _, found = self.exponents(rng, layers=layers)
        assert all(found[path] == (3, 0) for path in HEAD)
        assert found["/body/1"][1] != 0

    def test_the_rest_of_a_model_with_a_fixed_scale_keeps_its_own(self, rng):
        layers = {"/head": {"init_scale": 8}}
        _, found = self.exponents(
            rng, loss_scale_method="fixed", init_scale=128, layers=layers, output_dtype=None
        )
        assert all(found[path] == (3, 0) for path in HEAD)
        assert found["/body/1"] == (7, 0)

    def test_without_a_scale_of_its_own_a_fixed_part_takes_what_arrives(self, rng):
        _, found = self.exponents(rng, layers={"/head": {"loss_scale_method": "fixed"}})
        assert all(shift == 0 for shift in (found[path][1] for path in HEAD))
        assert found["/head/one"][0] == sum(found["(entry)"])

    def test_gradients_are_right_whatever_the_parts(self, rng):
        layers = {"/head": {"loss_scale_method": "fixed", "init_scale": 2.0**12}, "/body/0": {"n_uf": 0.1}}
        assert_exact(Deep(), [draw(rng)], layers=layers, decisions=4)

    def test_later_ones_and_settings_of_a_layer_itself_win(self):
        model = AdaLossScaled(Deep(), layers={"/*": {"n_uf": 0.1}, "/head": {"n_uf": 0.2}})
        policy = model.ada_loss.policy
        found = {path: policy.settings(Site(path, 0)).n_uf for path in ("/body/0", "/head/one")}
        assert found == {"/body/0": 0.1, "/head/one": 0.2}

    def test_that_are_wrong_are_errors_before_anything_changes(self):
        for settings, error in [
            ({"n_uff": 0.1}, "did you mean n_uf"),
            ({"n_uf": 3}, "n_uf must be"),
            ({"init_scale": 8}, "'fixed'"),
        ]:
            model = Deep()
            with pytest.raises((TypeError, ValueError), match=error):
                AdaLossScaled(model, layers={"/head": settings})
            assert type(model) is Deep

    def test_of_no_link_say_so(self):
        with pytest.warns(UserWarning, match="layers matched nothing.*'/head'"):
            AdaLossScaled(Deep(), layers={"/heads": {"n_uf": 0.1}})
