"""The graph decides what is scaled: whatever computed a loss, functions belong to the model that they use."""

import copy
import gc

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest

import ada_loss.chainer as ada
from ada_loss.chainer import ownership
from helpers import assert_same_bits, dtype, signal_to_noise
from toy import prepared
from twins import assert_exact, draw, gradients, weighted_sum, wide, wrapped_copy

TINY = 2.0**-26
"""A loss that counts so little has no float16 gradients without a scale."""

# Losses count so little here that float16 cannot hold true gradients, as those of inputs are.
pytestmark = pytest.mark.filterwarnings("ignore:The gradient of an input underflows")


class Net(chainer.Chain):
    """A body, a head, and several ways to compute with them."""

    def __init__(self):
        super().__init__(
            body=chainer.Sequential(L.Linear(4, 5), F.tanh, L.Linear(5, 4), F.relu),
            head=chainer.ChainList(L.Linear(4, 3), L.Linear(3, 4)),
        )

    def forward(self, x):
        return self.decode(self.body(x))

    def decode(self, h):
        return self.head[1](F.sin(self.head[0](h)))

    def loss(self, x):
        return weighted_sum(self(x) * 2)

    def score(self, x):
        return F.sum(F.matmul(self.body(x), self.decode(self.body(x)), transb=True))

    @staticmethod
    def of(model, x):
        return model.decode(model.body(x))

    def steps(self, x):
        for _ in range(3):
            x = F.tanh(self.body(x))
            yield self.head[0](x)

    def __getitem__(self, name):
        return getattr(self, name)


WAYS = {
    "a method": lambda m, x: m.loss(x),
    "a method with products of activations": lambda m, x: wide(m.score(x)),
    "a static method": lambda m, x: weighted_sum(Net.of(m, x)),
    "a generator": lambda m, x: sum(weighted_sum(y) for y in m.steps(x)),
    "forward": lambda m, x: weighted_sum(m.forward(x)),
    "a part": lambda m, x: weighted_sum(m.decode(m["body"](x))),
    "a part of a part": lambda m, x: weighted_sum(m.head[0](F.tanh(m.body[0](x))[:, :4])),
    "a slice of a part": lambda m, x: weighted_sum(chainer.Sequential(*list(m.body)[:2])(x)),
    "a part, repeatedly": lambda m, x: weighted_sum(m.body(m.body(m.body(x)))),
    "a function": lambda m, x: weighted_sum(F.linear(F.relu(m.body(x)), m.head[0].W, m.head[0].b)),
    "the model and its parts": lambda m, x: weighted_sum(m(x)) + weighted_sum(m.body(x)) * 3,
    "the model on what a part returns": lambda m, x: weighted_sum(m(m.body(x))),
    "a part on what the model returns": lambda m, x: weighted_sum(m.body(m(x))),
    "forgotten parts": lambda m, x: weighted_sum(F.forget(lambda h: m.decode(m.body(h)), x)),
    "recomputed by a method": lambda m, x: weighted_sum(m.decode(F.forget(m.body, x))),
}


@pytest.fixture
def rng():
    return np.random.default_rng(64)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
class TestAnyWayToComputeALoss:
    def test_has_the_gradients_of_float32(self, way, rng):
        assert_exact(Net(), [draw(rng)], way, mixed16=TINY)

    def test_over_two_passes_through_one_graph(self, way, rng):
        def twice(model, x):
            loss = way(model, x)
            loss.backward()
            return loss

        assert_exact(Net(), [draw(rng)], twice, mixed16=1)

    def test_has_the_same_sites_in_every_step(self, way, rng):
        model, x = wrapped_copy(Net()), draw(rng)
        optimizer, sites = prepared(model, chainer.optimizers.SGD(0)), []
        for _ in range(3):
            optimizer.update(way, model, chainer.Variable(x))
            sites.append({decision.site for decision in model.ada_loss.decisions})
        assert sites[0] == sites[1] == sites[2] != set()
        paths = {path for path, _ in model.namedlinks()} | {"(entry)"}
        assert {site.path for site in sites[0]} <= paths


def test_a_penalty_on_weights_is_scaled(rng):
    with dtype("mixed16"):
        model = ada.AdaLossScaled(Net())
    W = model.body[0].W
    model.cleargrads()
    (wide(F.sum(W**2)) * TINY).backward()
    assert signal_to_noise(W.grad / TINY, 2 * W.array.astype(np.float32)) > 40


class TestSeveralModels:
    def pair(self):
        with dtype("mixed16"):
            return Net(), Net()

    def reference(self, first, second, run, x):
        """Float32 gradients of the two in a row, by path."""
        wide_ones = chainer.Chain(first=Net(), second=Net())
        wide_ones.first.copyparams(first)
        wide_ones.second.copyparams(second)
        return gradients(wide_ones, lambda m, x: run(m.first, m.second, x), [x.astype(np.float32)])[1]

    ROWS = {
        "as they are": lambda one, other, x: weighted_sum(other(one(x))),
        "by methods": lambda one, other, x: other.loss(one.forward(x)),
        "with functions in between": lambda one, other, x: weighted_sum(other(F.tanh(one(x)) + 1)),
        "side by side": lambda one, other, x: weighted_sum(one(x) * other(x)),
        "one inside a function of the other": lambda one, other, x: weighted_sum(
            other.decode(one.body(other.body(x)))
        ),
        "the first once more": lambda one, other, x: weighted_sum(one(other(one(x)))),
        "both in one sum": lambda one, other, x: weighted_sum(one(x)) + 2.0**-12 * weighted_sum(other(x)),
        "parameters of one in a function of the other": lambda one, other, x: weighted_sum(
            other.decode(wide(F.linear(wide(one.body(x)), wide(other.body[0].W[:4]))))
        ),
    }

    @pytest.mark.parametrize("run", ROWS.values(), ids=ROWS)
    @pytest.mark.parametrize("output_dtype", ["float32", None])
    def test_need_nothing_between_them(self, run, output_dtype, rng):
        first, second = self.pair()
        if output_dtype is None and "1" in str(run.__code__.co_consts):
            pytest.skip("float16 and a Python number mix in other ways")
        x = draw(rng).astype(np.float16)
        expected = self.reference(first, second, run, x)
        for model in (first, second):
            ada.AdaLossScaled(model, output_dtype=output_dtype).cleargrads()
        (run(first, second, x) * TINY).backward()
        found = {f"/first{path}": gradient for path, gradient in first.true_gradients().items()}
        found |= {f"/second{path}": gradient for path, gradient in second.true_gradients().items()}
        for path, gradient in found.items():
            if expected[path] is not None and expected[path].any():
                assert signal_to_noise(gradient / TINY, expected[path]) > 30, path

    def test_that_share_layers_are_each_their_own(self, rng):
        with dtype("mixed16"):
            trunk = L.Linear(4, 4)
            actor, critic = (chainer.Chain(trunk=trunk, top=L.Linear(4, size)) for size in (2, 1))
        for model in (actor, critic):
            model.forward = lambda x, model=model: model.top(F.tanh(model.trunk(x)))
        plain = copy.deepcopy(chainer.Chain(actor=actor, critic=critic))
        for parameter in plain.params():
            parameter.array = parameter.array.astype(np.float32)
        x = draw(rng)
        plain.cleargrads()
        run = lambda a, c: sum(  # noqa: E731
            weighted_sum(model.top(F.tanh(model.trunk(x)))) for model in (a, c)
        )
        run(plain.actor, plain.critic).backward()
        for model in (actor, critic):
            ada.AdaLossScaled(model)
        trunk.cleargrads()
        (sum(weighted_sum(model(x.astype(np.float16))) for model in (actor, critic)) * TINY).backward()
        assert signal_to_noise(trunk.W.grad / TINY, plain.actor.trunk.W.grad) > 30
        paths = [{d.site.path for d in model.ada_loss.decisions} for model in (actor, critic)]
        assert paths == [{"/top", "(entry)"}] * 2

    def test_inside_one_another_are_the_outermost(self, rng):
        inner = ada.AdaLossScaled(Net())
        outer = ada.AdaLossScaled(chainer.Chain(inner=inner, last=L.Linear(4, 4)), init_scale=2.0**-7)
        weighted_sum(outer.last(inner.decode(inner.body(draw(rng))))).backward()
        assert not inner.ada_loss.decisions
        assert {d.site.path.split("/")[1] for d in outer.ada_loss.decisions} == {"inner", "last"}

    def test_of_which_the_outermost_is_gone_are_their_own_again(self, rng):
        inner = ada.AdaLossScaled(Net())
        outer = ada.AdaLossScaled(chainer.Chain(inner=inner))
        assert ownership.owner_of(inner.body[0].W) is outer
        del outer
        gc.collect()
        weighted_sum(inner.body(chainer.Variable(draw(rng)))).backward()
        assert ownership.owner_of(inner.body[0].W) is inner

    def test_in_training_with_an_optimizer_each(self, rng):
        # Generator and critic, taught in turns; one step overflows neither's scale.
        generator, critic = self.pair()
        for model in (generator, critic):
            ada.AdaLossScaled(model)
        optimizers = [prepared(model, chainer.optimizers.SGD(2.0**20)) for model in (generator, critic)]
        z, real = draw(rng).astype(np.float16), draw(rng).astype(np.float16)
        before = [copy.deepcopy(dict(model.namedparams())) for model in (generator, critic)]
        for _ in range(3):
            fake = generator(z)
            critic.cleargrads()
            (weighted_sum(critic(real)) * TINY - weighted_sum(critic(fake.array)) * TINY).backward()
            optimizers[1].update()
            generator.cleargrads()
            (weighted_sum(critic(generator(z))) * TINY).backward()
            optimizers[0].update()
        for model, old in zip((generator, critic), before, strict=True):
            for path, parameter in model.namedparams():
                assert (parameter.master != old[path].array).any(), path


class TestPartsOfAModel:
    def test_have_optimizers_of_their_own(self, rng):
        with dtype("mixed16"):
            model = ada.AdaLossScaled(Net())
        rates = {"body": 2.0**22, "head": 2.0**24}
        optimizers = {
            name: prepared(model[name], chainer.optimizers.SGD(rate)) for name, rate in rates.items()
        }
        x, before = draw(rng).astype(np.float16), copy.deepcopy(dict(model.namedparams()))
        model.cleargrads()
        (weighted_sum(model(x)) * TINY).backward()
        found = model.true_gradients()
        for optimizer in optimizers.values():
            optimizer.update()
        for path, parameter in model.namedparams():
            moved = before[path].array.astype(np.float32) - parameter.master
            expected = rates[path.split("/")[1]] * found[path]
            np.testing.assert_allclose(moved, expected, rtol=1e-3, atol=1e-6, err_msg=path)
        assert optimizers["body"].entry_scale is model.ada_loss.policy.entry

    @pytest.mark.parametrize("where", ["root", "deep"])
    def test_that_are_added_later_are_scaled_saved_and_trained(self, where, rng):
        with dtype("mixed16"):
            model = ada.AdaLossScaled(Net())
            holder = model if where == "root" else model.body[0]
            late = chainer.Sequential(L.Linear(4, 3), F.tanh)
            if where == "root":
                with model.init_scope():
                    model.late = late
            else:
                model.head.append(late)
        optimizer = prepared(model, chainer.optimizers.SGD(2.0**20))
        x, before = draw(rng).astype(np.float16), late[0].W.array.copy()
        del holder
        optimizer.update(lambda: weighted_sum(late(model.body(x))) * TINY)
        assert (late[0].W.array != before).any()
        path = "/late/0" if where == "root" else "/head/2/0"
        assert path in {decision.site.path for decision in model.ada_loss.decisions}
        assert f"{path}/W" in model.true_gradients()

    def test_that_only_namedparams_tells_of_are_parts_as_well(self, rng):
        class Hiding(chainer.Chain):
            def __init__(self):
                super().__init__(seen=L.Linear(4, 4))
                self.hidden = L.Linear(4, 4)

            def params(self, include_uninit=True):
                return (parameter for _, parameter in self.namedparams(include_uninit))

            def namedparams(self, include_uninit=True):
                yield from super().namedparams(include_uninit)
                for path, parameter in self.hidden.namedparams(include_uninit):
                    yield f"/hidden{path}", parameter

        with dtype("mixed16"):
            model = ada.AdaLossScaled(Hiding())
        model.cleargrads()
        (weighted_sum(model.hidden(draw(rng).astype(np.float16))) * TINY).backward()
        assert model.hidden.W.grad.any()
        assert {d.site.path for d in model.ada_loss.decisions} <= {"/hidden"}

    def test_of_copies_belong_to_the_copies(self, rng):
        model = ada.AdaLossScaled(Net(), init_scale=2.0**-7)
        for twin in (copy.deepcopy(model), model.copy("copy"), model.copy("share"), model.copy("init")):
            x = chainer.Variable(draw(rng))
            weighted_sum(twin.body(x)).backward()
            assert {d.site.path for d in twin.ada_loss.decisions} == {"/body/0", "/body/1"}
            assert not model.ada_loss.decisions
            assert ownership.owner_of(twin.body[0].W) is twin

    def test_repeated_in_a_row(self, rng):
        with dtype("mixed16"):
            row = ada.AdaLossScaled(Net()).repeat(3, "init")
        row.cleargrads()
        (weighted_sum(row(draw(rng).astype(np.float16))) * TINY).backward()
        for model in row:
            assert isinstance(model, ada.AdaLossScaled)
            assert all(gradient.any() for gradient in model.true_gradients().values())


class TestOtherGraphs:
    def test_of_plain_models_are_chainers_while_scaled_models_exist(self, rng, monkeypatch):
        from ada_loss.chainer import backward

        scaled, plain = wrapped_copy(Net()), Net()
        monkeypatch.setattr(backward, "BackwardPass", None)
        weighted_sum(plain(draw(rng))).backward()
        with pytest.raises(TypeError):
            scaled.loss(draw(rng)).backward()

    def test_keep_no_model_alive(self, rng):
        model = wrapped_copy(Net())
        loss = model.loss(draw(rng))
        loss.backward()
        gc.collect()
        count = len(ownership._models)
        gc.disable()
        try:
            del model
            assert len(ownership._models) == count - 1
        finally:
            gc.enable()

    def test_the_fan_outs_of_other_methods_are_known_after_their_first_pass(self, rng):
        model = wrapped_copy(Net())
        h = model.body(chainer.Variable(draw(rng)))
        weighted_sum(model.decode(h) + h).backward()
        assert [fan_out.uses for fan_out in model.ada_loss.fan_outs] == [2]

    def test_gradients_of_a_float32_function_in_between_are_true(self, rng):
        class Seen(chainer.FunctionHook):
            gys = None

            def backward_preprocess(self, function, in_data, gys):
                if function.label == "cos":
                    self.gys = gys[0]

        with dtype("mixed16"):
            first, second = ada.AdaLossScaled(Net()), ada.AdaLossScaled(Net(), init_scale=2.0**10)
        hook, x = Seen(), draw(rng).astype(np.float16)
        y = first(x)
        z = F.cos(y)
        with hook:
            loss = weighted_sum(second(z))
            loss.backward(retain_grad=True)
        np.testing.assert_array_equal(hook.gys, z.grad)


def test_in_float32_two_models_in_a_row_keep_every_bit(rng):
    class Row(chainer.Chain):
        def __init__(self, wrap):
            super().__init__(first=wrap(Net()), second=wrap(Net()))

    plain = Row(lambda link: link)
    scaled = copy.deepcopy(plain)
    for model in (scaled.first, scaled.second):
        ada.AdaLossScaled(model, init_scale=2.0**9)
    run = lambda m, x: m.second.loss(F.cos(m.first(x))) + weighted_sum(m.second.body(m.first.body(x)))  # noqa: E731
    x = draw(rng)
    assert_same_bits(gradients(scaled, run, [x])[1], gradients(plain, run, [x])[1])
    assert scaled.first.ada_loss.decisions and scaled.second.ada_loss.decisions


class TestPartsThatAreComputedAgain:
    """In float16 nothing of a model shows in the graph but the function that computes a part of it again."""

    def gradient(self, make, rng):
        with dtype("mixed16"):
            model = ada.AdaLossScaled(Net())
        x = draw(rng).astype(np.float16)
        optimizer = prepared(model, chainer.optimizers.SGD(0))
        optimizer.update(lambda: weighted_sum(make(model, chainer.Variable(x))) * TINY)
        plain = Net()
        plain.copyparams(model)
        expected = gradients(plain, lambda m, x: weighted_sum(m.decode(m.body(x))), [x.astype(np.float32)])[1]
        return signal_to_noise(model.body[0].W.grad / TINY, expected["/body/0/W"])

    class Again(chainer.FunctionNode):
        """Computes a callable without a graph, and with one on the way back."""

        def __init__(self, call):
            self.call = call

        def forward(self, inputs):
            self.retain_inputs((0,))
            with chainer.no_backprop_mode():
                return (self.call(chainer.Variable(*inputs)).array,)

        def backward(self, targets, gys):
            x = chainer.Variable(self.get_retained_inputs()[0].array)
            with chainer.force_backprop_mode():
                y = self.call(x)
            y.grad_var = gys[0]
            y.backward()
            return (x.grad_var,)

    WAYS = {
        "a method": lambda model, x: F.forget(model.forward, x),
        "a closure": lambda model, x: F.forget(lambda h: model.decode(model.body(h)), x),
        "an object": lambda model, x: F.forget(Held(model), x),
        "a function of the script's own": lambda model, x: TestPartsThatAreComputedAgain.Again(
            model.forward
        ).apply((x,))[0],
    }

    @pytest.mark.parametrize("make", WAYS.values(), ids=WAYS)
    def test_belong_to_what_they_refer_to(self, make, rng):
        assert self.gradient(make, rng) > 30

    def test_that_refer_to_a_model_in_secret_are_told_of(self, rng, caplog):
        hidden = {}

        class Secret:
            def __call__(self, x):
                model = hidden["model"]
                return model.decode(model.body(x))

        def make(model, x):
            hidden["model"] = model
            return F.forget(Secret(), x)

        assert self.gradient(make, rng) < 10
        assert "outside every scaled model" in caplog.text


class Held:
    """Calls a model's parts."""

    def __init__(self, model):
        self.model = model

    def __call__(self, x):
        return self.model.decode(self.model.body(x))


class TestNames:
    def test_of_functions_outside_a_call_hold_as_inside(self, rng):
        model = wrapped_copy(Net())
        fixed = ada.AdaLossConfig(loss_scale_method="fixed")
        with ada.functions.named("outer"), ada.functions.named("inner"):
            h = F.linear(draw(rng), model.body[0].W)
        y = ada.functions.linear(h[:, :4], model.head[0].W, name="mine", config=fixed)
        weighted_sum(y).backward()
        found = {decision.site.path: decision.rule.name for decision in model.ada_loss.decisions}
        assert found["mine"] == "fixed"


def test_layers_that_are_added_become_variants_when_an_optimizer_is_prepared(rng):
    with dtype("mixed16"):
        model = ada.AdaLossScaled(Net())
        model.head.append(L.Linear(4, 2))
    prepared(model)
    assert model.ada_loss.report.converted["/head/2"] == "AdaLossLinear"
    assert model.head[2](draw(rng)).dtype == np.float16
