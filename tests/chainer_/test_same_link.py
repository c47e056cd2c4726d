"""`AdaLossScaled(link)` is the link: names, attributes, containers and copies are its own."""

import copy
import pickle

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer.training import extensions

import ada_loss.chainer as ada
from helpers import assert_same_bits, plain_gradients, scoped_gradients
from twins import draw, weighted_sum


class OldStyle(chainer.Chain):
    """Computes in `__call__`, as models did before Chainer 5."""

    def __init__(self):
        super().__init__(a=L.Linear(4, 4), b=L.Linear(4, 4))

    def __call__(self, x):
        return self.b(F.relu(self.a(x)))


class Forwarding(chainer.Chain):
    """Answers for names that it does not have, and notes the names that are set."""

    def __init__(self):
        super().__init__(a=L.Linear(4, 4), b=L.Linear(4, 4))
        self.noted = []

    def __getattr__(self, name):
        if name.startswith("my_"):
            return name
        raise AttributeError(f"Forwarding knows no {name}")

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if "noted" in vars(self) and name != "noted":
            self.noted.append(name)

    def forward(self, x):
        return self.b(F.relu(self.a(x)))


class Slotted(chainer.Chain):
    """Has a slot beside its dictionary."""

    __slots__ = ("kept",)

    def __init__(self):
        super().__init__(a=L.Linear(4, 4), b=L.Linear(4, 4))
        self.kept = 3

    def forward(self, x):
        return self.b(F.relu(self.a(x)))


class Registering(chainer.Chain):
    """Wants to know of its subclasses, and something of each of them."""

    known: list = []

    def __init__(self):
        super().__init__(a=L.Linear(4, 4), b=L.Linear(4, 4))

    def __init_subclass__(cls, *, tag, **kwargs):
        super().__init_subclass__(**kwargs)
        Registering.known.append(tag)

    def forward(self, x):
        return self.b(F.relu(self.a(x)))


class Rebuilt(chainer.Chain):
    """Tells pickle how it is made."""

    def __init__(self, size=4):
        super().__init__(a=L.Linear(size, size), b=L.Linear(size, size))
        self.size = size

    def forward(self, x):
        return self.b(F.relu(self.a(x)))

    def __reduce__(self):
        return Rebuilt, (self.size,), {"a": self.a, "b": self.b}


class Compared(chainer.ChainList):
    """Equal where its layers are, and so without a hash."""

    def __init__(self):
        super().__init__(L.Linear(4, 4), L.Linear(4, 4))

    def __eq__(self, other):
        return len(self) == len(other)

    def forward(self, x):
        return self[1](F.relu(self[0](x)))


MODELS = {
    "old style": OldStyle,
    "forwarding": Forwarding,
    "slotted": Slotted,
    "registering": Registering,
    "rebuilt": Rebuilt,
    "compared": Compared,
    "sequential": lambda: chainer.Sequential(L.Linear(4, 4), F.relu, L.Linear(4, 4)),
    "layer": lambda: L.Linear(4, 4),
}

COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "share": lambda model: model.copy("share"),
    "init": lambda model: model.copy("init"),
}


@pytest.fixture
def rng():
    return np.random.default_rng(62)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
class TestAnyModel:
    def test_stays_the_same_object_of_its_class(self, make):
        net = make()
        plain = type(net)
        assert ada.AdaLossScaled(net) is net
        assert isinstance(net, plain) and isinstance(net, ada.AdaLossScaled)

    def test_has_its_gradients(self, make, rng):
        net, x = make(), draw(rng)
        run = lambda model: weighted_sum(model(x))  # noqa: E731
        expected = plain_gradients(net, run)
        model = ada.AdaLossScaled(net, init_scale=2.0**-7)
        assert_same_bits(scoped_gradients(model, run), expected)
        assert model.ada_loss.policy.iteration == 0 and (make is MODELS["layer"] or model.ada_loss.decisions)

    @pytest.mark.parametrize("how", COPIES.values(), ids=COPIES)
    def test_has_copies_that_are_scaled(self, make, how, rng):
        model, x = ada.AdaLossScaled(make(), init_scale=2.0**-7), chainer.Variable(draw(rng))
        run = lambda model: weighted_sum(model(x))  # noqa: E731
        found = scoped_gradients(model, run)
        twin = how(model)
        assert type(twin) is type(model) and twin is not model
        again = scoped_gradients(twin, run)
        assert twin.ada_loss.decisions
        if how is not COPIES["init"]:
            assert_same_bits(again, found)

    def test_keeps_its_paths_and_its_name(self, make):
        net = make()
        holder = chainer.Chain(net=net)
        names = [path for path, _ in holder.namedlinks()], [path for path, _ in holder.namedparams()]
        ada.AdaLossScaled(net)
        assert (
            [path for path, _ in holder.namedlinks()],
            [path for path, _ in holder.namedparams()],
        ) == names
        assert net.name == "net"


def test_the_models_own_ways_with_attributes_go_on():
    model = ada.AdaLossScaled(Forwarding())
    assert model.my_thing == "my_thing" and model.noted == []
    model.extra = 3
    assert model.noted == ["extra"]
    with pytest.raises(AttributeError, match="Forwarding knows no thing"):
        model.thing  # noqa: B018


def test_a_property_that_raises_says_why():
    class Net(chainer.Chain):
        @property
        def broken(self):
            return self.nothing_like_this

    with pytest.raises(AttributeError, match="nothing_like_this"):
        ada.AdaLossScaled(Net()).broken  # noqa: B018


def test_a_model_makes_plain_ones_of_its_kind():
    model = ada.AdaLossScaled(Rebuilt(3))
    other = type(model)(5)
    assert type(other) is Rebuilt and other.a.W.shape == (5, 5)


def test_subclasses_that_are_made_here_are_no_business_of_the_models():
    before = list(Registering.known)
    ada.AdaLossScaled(Registering())
    assert Registering.known == before


@pytest.mark.parametrize("name", ["config", "policy", "report", "decisions", "branches", "link"])
def test_a_model_has_its_own_under_any_name_but_one(name):
    net = chainer.Chain(a=L.Linear(4, 4))
    setattr(net, name, 3)
    model = ada.AdaLossScaled(net)
    assert getattr(model, name) == 3
    late = ada.AdaLossScaled(chainer.Chain(a=L.Linear(4, 4)))
    with late.init_scope():
        setattr(late, name, L.Linear(4, 4))
    assert f"/{name}/W" in dict(late.namedparams())


@pytest.mark.parametrize(
    ("former", "name"), [("config", "config"), ("policy", "policy"), ("branches", "fan_outs")]
)
def test_former_names_say_where_it_is(former, name):
    model = ada.AdaLossScaled(chainer.Chain())
    with pytest.raises(AttributeError, match=f"ada_loss.{name}"):
        getattr(model, former)


def test_the_former_name_of_the_link_is_the_model_with_a_warning():
    model = ada.AdaLossScaled(chainer.Chain())
    with pytest.warns(DeprecationWarning, match="the link itself"):
        assert model.link is model


@pytest.mark.parametrize("take", ["attribute", "child", "parameter", "method"])
def test_a_model_that_needs_our_name_is_refused(take):
    class Net(chainer.Chain):
        def __init__(self):
            super().__init__()
            with self.init_scope():
                if take == "child":
                    self.ada_loss = L.Linear(2, 2)
                elif take == "parameter":
                    self.ada_loss = chainer.Parameter(0, (2,))
            if take == "attribute":
                self.ada_loss = "mine"

    if take == "method":
        Net.ada_loss = lambda self: None
    with pytest.raises(ValueError, match="'ada_loss'"):
        ada.AdaLossScaled(Net())


def test_a_model_is_scaled_once():
    model = ada.AdaLossScaled(chainer.Chain())
    with pytest.raises(ValueError, match="scaled already"):
        ada.AdaLossScaled(model)


def test_a_trainer_reports_the_names_of_the_plain_model(rng):
    x, t = draw(rng, 12, 4), np.arange(12, dtype=np.int32) % 4
    iterator = chainer.iterators.SerialIterator(chainer.datasets.TupleDataset(x, t), 6, repeat=False)
    model = ada.AdaLossScaled(L.Classifier(L.Linear(4, 4)))
    result = extensions.Evaluator(iterator, model)()
    assert result.keys() == {"main/loss", "main/accuracy"}


def test_a_part_of_a_scaled_model_is_told_where_its_settings_go():
    model = ada.AdaLossScaled(chainer.Chain(body=chainer.Sequential(L.Linear(4, 4))))
    with pytest.raises(ValueError, match=r"/body/0 of a model.*layers=\{'/body/0'"):
        ada.AdaLossScaled(model.body[0])


def test_a_model_that_is_gone_but_for_the_garbage_refuses_nothing():
    part = L.Linear(4, 4)
    holder = [chainer.Chain(part=part)]
    holder[0].forward = lambda x, model=holder[0]: model.part(x)
    ada.AdaLossScaled(holder.pop())
    assert ada.AdaLossScaled(part) is part


@pytest.mark.parametrize("where", ["class", "instance"])
def test_a_model_keeps_what_it_calls_true_gradients(where):
    class Net(chainer.Chain):
        pass

    net = Net()
    holder = Net if where == "class" else net
    holder.true_gradients = lambda *_: "mine"
    assert ada.AdaLossScaled(net).true_gradients() == "mine"
