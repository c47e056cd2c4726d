"""Layers inside a scope have plain Chainer's gradients; variants are the layers that they are made from."""

import copy
import pickle

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest

from ada_loss.chainer import AdaLossBranch, AdaLossScaled, links
from ada_loss.core.config import AdaLossConfig
from helpers import dtype
from twins import assert_exact, weighted_sum

LAYERS = {
    "linear": (lambda: L.Linear(6, 4), (3, 6)),
    "linear of images": (lambda: L.Linear(12, 4, nobias=True), (3, 3, 2, 2)),
    "linear over the last axis": (lambda: Applied(L.Linear(5, 4), n_batch_axes=2), (3, 2, 5)),
    "convolution 1d": (lambda: L.Convolution1D(3, 4, 3, pad=1), (2, 3, 7)),
    "convolution 2d": (lambda: L.Convolution2D(3, 4, 3, pad=1), (2, 3, 6, 5)),
    "strided convolution": (lambda: L.Convolution2D(3, 4, 3, stride=2), (2, 3, 7, 6)),
    "dilated convolution": (lambda: L.Convolution2D(3, 4, 3, dilate=2), (2, 3, 7, 7)),
    "grouped convolution": (lambda: L.Convolution2D(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "depthwise convolution": (lambda: L.DepthwiseConvolution2D(3, 2, 3), (2, 3, 5, 5)),
    "dilated convolution link": (lambda: L.DilatedConvolution2D(3, 4, 3, dilate=2), (2, 3, 7, 7)),
    "local convolution": (lambda: L.LocalConvolution2D(3, 4, 5, 3), (2, 3, 5, 5)),
    "convolution 3d": (lambda: L.Convolution3D(2, 3, 2), (2, 2, 4, 3, 3)),
    "convolution nd": (lambda: L.ConvolutionND(2, 3, 4, 3, stride=2), (2, 3, 5, 5)),
    "deconvolution 1d": (lambda: L.Deconvolution1D(3, 4, 3), (2, 3, 5)),
    "deconvolution 2d": (lambda: L.Deconvolution2D(3, 4, 3, stride=2), (2, 3, 4, 4)),
    "grouped deconvolution": (lambda: L.Deconvolution2D(4, 6, 3, groups=2), (2, 4, 4, 4)),
    "deconvolution 3d": (lambda: L.Deconvolution3D(2, 3, 2), (2, 2, 3, 3, 3)),
    "deconvolution nd": (lambda: L.DeconvolutionND(2, 3, 4, 3), (2, 3, 4, 4)),
    "deformable convolution": (lambda: L.DeformableConvolution2D(3, 4, 3, pad=1), (1, 3, 5, 5)),
    "inception": (lambda: L.Inception(3, 2, 2, 3, 2, 2, 2), (2, 3, 6, 6)),
    "mlp convolution": (lambda: L.MLPConvolution2D(3, (4, 5), 3), (2, 3, 5, 5)),
    "highway": (lambda: L.Highway(5), (3, 5)),
    "dropconnect": (lambda: L.SimplifiedDropconnect(5, 4), (3, 5)),
    "dropconnect with one mask": (
        lambda: Applied(L.SimplifiedDropconnect(5, 4), use_batchwise_mask=False),
        (3, 5),
    ),
    "maxout": (lambda: L.Maxout(5, 3, 2), (4, 5)),
    "gru": (lambda: Steps(L.GRU(5, 4)), (3, 5)),
    "stateful gru": (lambda: Steps(L.StatefulGRU(5, 4)), (3, 5)),
    "stateful mgu": (lambda: Steps(L.StatefulMGU(5, 4)), (3, 5)),
    "lstm": (lambda: Steps(L.LSTM(5, 4)), (3, 5)),
    "peephole lstm": (lambda: Steps(L.StatefulPeepholeLSTM(5, 4)), (3, 5)),
    "zoneout lstm": (lambda: Steps(L.StatefulZoneoutLSTM(5, 4, c_ratio=0.5)), (3, 5)),
}


class Applied(chainer.Chain):
    """A layer that is called with keywords."""

    def __init__(self, layer, **keywords):
        super().__init__(layer=layer)
        self.keywords = keywords

    def forward(self, x):
        return self.layer(x, **self.keywords)


class Steps(chainer.Chain):
    """A recurrent layer that is applied a few times."""

    def __init__(self, layer):
        super().__init__(layer=layer)

    def forward(self, x):
        self.layer.reset_state()
        return [self.layer(x * factor) for factor in (0.5, -1.0, 2.0)]


def draw(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_in_a_scope_has_plain_chainers_gradients(name, rng):
    make, shape = LAYERS[name]
    assert_exact(make(), [draw(rng, *shape)])


@pytest.mark.parametrize("make", [L.NStepLSTM, L.NStepBiLSTM, L.NStepGRU, L.NStepRNNTanh])
def test_recurrent_layers_over_sequences_have_plain_chainers_gradients(make, rng):
    def run(model, *sequences):
        *states, ys = model(*[None] * (2 if "LSTM" in make.__name__ else 1), list(sequences))
        return weighted_sum([*states, *ys])

    scaled = assert_exact(make(2, 4, 3, 0.3), [draw(rng, length, 4) for length in (4, 2, 3)], run)
    assert {decision.site.path for decision in scaled.ada_loss.decisions} == {"/"}


def test_a_tree_lstm_has_plain_chainers_gradients(rng):
    def run(model, c1, c2, h1, h2, x):
        return weighted_sum(model(c1, c2, h1, h2, x))

    assert_exact(L.ChildSumTreeLSTM(5, 4), [*(draw(rng, 3, 4) for _ in range(4)), draw(rng, 3, 5)], run)


def test_bilinear_passes_the_exponent_through(rng):
    # Chainer computes it in float32 only, where there is no underflow to prevent.
    assert_exact(Pair(3, 5), [draw(rng, 4, 4)], decisions=2, mixed16=None)


class Pair(chainer.Chain):
    """Two layers whose results meet in a bilinear one."""

    def __init__(self, left, right):
        super().__init__(a=L.Linear(4, left), b=L.Linear(4, right), c=L.Bilinear(left, right, 2))

    def forward(self, x):
        return self.c(self.a(x), self.b(x))


def test_embeddings_pass_the_exponent_through_to_their_weights(rng):
    class Words(chainer.Chain):
        def __init__(self):
            super().__init__(embed=L.EmbedID(9, 4, ignore_label=-1), out=L.Linear(4, 3))

        def forward(self, ids):
            # The embedding serves as the output layer as well.
            h = F.sum(self.embed(ids), axis=1)
            return self.out(h), F.linear(h, self.embed.W)

    assert_exact(Words(), [np.array([[1, 2, -1], [8, 1, 1]], np.int32)], decisions=2)


NORMALIZATIONS = {
    "batch": lambda: L.BatchNormalization(8),
    "batch renormalization": lambda: L.BatchRenormalization(8),
    "decorrelated": lambda: L.DecorrelatedBatchNormalization(8, groups=2),
    "group": lambda: L.GroupNormalization(2, 8),
    "layer": lambda: L.LayerNormalization(8),
    "prelu": lambda: L.PReLU((8,)),
    "swish": lambda: L.Swish((8,)),
    "scale": lambda: L.Scale(1, (8,)),
    "bias": lambda: L.Bias(1, (8,)),
}


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_other_links_with_parameters_pass_the_exponent_through(name, train, rng):
    link = chainer.Sequential(L.Linear(5, 8), NORMALIZATIONS[name](), L.Linear(8, 3))
    link(draw(rng, 16, 5))
    # Chainer decorrelates in float32 only.
    settings = {"mixed16": None} if name == "decorrelated" else {}
    with chainer.using_config("train", train):
        scaled = assert_exact(link, [draw(rng, 16, 5)], decisions=2, **settings)
    for path, value in scaled[1].__dict__.items():
        if path in scaled[1]._persistent:
            np.testing.assert_array_equal(value, getattr(link[1], path), err_msg=path)


VARIANTS = {
    "AdaLossLinear": ((6, 4), (3, 6)),
    "AdaLossConvolution1D": ((3, 4, 3), (2, 3, 7)),
    "AdaLossConvolution2D": ((3, 4, 3), (2, 3, 5, 5)),
    "AdaLossConvolution3D": ((2, 3, 2), (2, 2, 4, 3, 3)),
    "AdaLossConvolutionND": ((2, 3, 4, 3), (2, 3, 5, 5)),
    "AdaLossDilatedConvolution2D": ((3, 4, 3), (2, 3, 7, 7)),
    "AdaLossDepthwiseConvolution2D": ((3, 2, 3), (2, 3, 5, 5)),
    "AdaLossLocalConvolution2D": ((3, 4, 5, 3), (2, 3, 5, 5)),
    "AdaLossSimplifiedDropconnect": ((6, 4, 0.0), (3, 6)),
    "AdaLossDeconvolution1D": ((3, 4, 3), (2, 3, 5)),
    "AdaLossDeconvolution2D": ((3, 4, 3), (2, 3, 4, 4)),
    "AdaLossDeconvolution3D": ((2, 3, 2), (2, 2, 3, 3, 3)),
    "AdaLossDeconvolutionND": ((2, 3, 4, 3), (2, 3, 4, 4)),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_outside_a_scope_is_the_plain_layer(name, rng):
    arguments, shape = VARIANTS[name]
    variant, plain = getattr(links, name)(*arguments), getattr(L, name.removeprefix("AdaLoss"))(*arguments)
    plain.copyparams(variant)
    x, z = chainer.Variable(draw(rng, *shape)), chainer.Variable(draw(rng, *shape))
    z.array[...] = x.array
    weighted_sum(variant(x)).backward()
    weighted_sum(plain(z)).backward()
    np.testing.assert_array_equal(x.grad, z.grad)
    np.testing.assert_array_equal(variant.W.grad, plain.W.grad)


def test_every_layer_with_a_variant_is_listed():
    assert {f"AdaLoss{layer.__name__}" for layer in links.LAYERS} == VARIANTS.keys()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda link: pickle.loads(pickle.dumps(link)), copy.copy])
@pytest.mark.parametrize("make", [lambda: L.Linear(6, 4), lambda: Doubling(6, 4), lambda: Derived(6, 4)])
def test_a_variant_survives_copying_and_pickling(make, copied, rng):
    layer = links.as_variant(make()).with_config(AdaLossConfig(init_scale=4.0))
    twin = copied(layer)
    assert type(twin) is type(layer)
    assert twin.ada_loss_config == layer.ada_loss_config
    x = draw(rng, 3, 6)
    np.testing.assert_array_equal(twin(x).array, layer(x).array)


class Doubling(L.Linear):
    """A user's own layer."""

    def forward(self, x):
        return 2 * super().forward(x)


class Derived(links.AdaLossLinear):
    """A user's own variant."""


def test_a_users_subclass_of_a_layer_becomes_a_variant_of_its_own(rng):
    scaled = assert_exact(
        chainer.Sequential(Doubling(6, 4), F.relu, Doubling(4, 3)), [draw(rng, 2, 6)], decisions=2
    )
    assert scaled.ada_loss.report.converted == {"/0": "AdaLossDoubling", "/1": "AdaLossDoubling"}
    assert isinstance(scaled[0], Doubling)
    assert type(scaled[0]) is type(scaled[2])


def test_a_layer_can_have_settings_of_its_own(rng):
    link = chainer.Sequential(
        L.Linear(6, 4), links.AdaLossLinear(4, 3).with_config(AdaLossConfig(loss_scale_method="fixed"))
    )
    scaled = assert_exact(link, [draw(rng, 2, 6)])
    shifts = {decision.site.path: decision.shift for decision in scaled.ada_loss.decisions}
    assert shifts["/1"] == 0 != shifts["/0"]


def test_a_branch_link_gives_its_input_to_every_consumer(rng):
    class Fork(chainer.Chain):
        def __init__(self):
            super().__init__(a=L.Linear(4, 4), branch=AdaLossBranch(3), b=L.Linear(4, 2))

        def forward(self, x):
            first, second, third = self.branch(self.a(x))
            return self.b(first) * self.b(F.sin(second)), F.sum(third)

    scaled = assert_exact(Fork(), [draw(rng, 2, 4)])
    assert "(branch): AdaLossBranch(n=3)" in str(scaled)
    assert [branch.uses for branch in scaled.ada_loss.fan_outs if branch.path == "/branch"] == [3]


@pytest.mark.parametrize("n", [0, -1, 1.5, True, None])
def test_a_branch_of_no_consumers_is_an_error(n):
    with pytest.raises(ValueError, match="at least 1"):
        AdaLossBranch(n)(np.zeros(3, np.float32))


def test_layers_keep_float16_and_float32_parameters(rng):
    with dtype("mixed16"):
        link = chainer.Sequential(L.Linear(5, 4), L.BatchNormalization(4), F.relu, L.Linear(4, 3))
        kinds = {path: parameter.dtype for path, parameter in link.namedparams()}
        scaled = AdaLossScaled(link)
        y = scaled(draw(rng, 6, 5).astype(np.float16))
        weighted_sum(y).backward()
    assert y.dtype == np.float32
    assert {path: parameter.dtype for path, parameter in scaled.namedparams()} == kinds
    assert {g.dtype for g in scaled.true_gradients().values()} == {np.dtype(np.float32)}
