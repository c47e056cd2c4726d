"""ChainerCV's models, as they are: wrapped, in float32 they have plain Chainer's gradients, bit for bit."""

import chainer
import chainer.functions as F
import chainer.links as L
import chainercv.links as V
import numpy as np
import pytest
from chainercv.experimental.links import PSPNetResNet50
from chainercv.functions import ps_roi_average_pooling_2d
from chainercv.links.model.faster_rcnn import FasterRCNNTrainChain
from chainercv.links.model.ssd import Normalize

from ada_loss.chainer import AdaLossScaled
from helpers import assert_same_bits, dtype, signal_to_noise
from twins import gradients, weighted_sum

ROIS = np.array([[2, 4, 30, 40], [0, 0, 60, 50], [10, 20, 25, 64], [5, 5, 9, 9]], np.float32)
TRUTH = np.array([[[10, 10, 90, 90]]], np.float32), np.array([[1]], np.int32), np.array([1.0])


class FeaturePyramid(chainer.Chain):
    """What a training calls of Faster R-CNN with feature pyramids."""

    def __init__(self):
        super().__init__(model=V.FasterRCNNFPNResNet50(n_fg_class=3, pretrained_model=None))

    def forward(self, x):
        features = self.model.extractor(x)
        rois, indices = self.model.bbox_head.distribute(ROIS, np.zeros(len(ROIS), np.int32))
        return [*self.model.rpn(features), *self.model.bbox_head(features, rois, indices)]


def thin(model):
    """The same detector with an eighth of the channels in layers that do not know their input's yet."""
    for link in model.links():
        if isinstance(link, L.Convolution2D) and link.W.array is None and link.out_channels >= 64:
            link.out_channels //= 8
            link.b.array = link.b.array[: link.out_channels]
        elif isinstance(link, Normalize):
            link.scale.array = link.scale.array[::8]
    return model


def thin_faster_rcnn():
    """With 32 units in the layers that would hold nearly all of the weights."""
    model = V.FasterRCNNVGG16(n_fg_class=3, pretrained_model=None, vgg_initialW=chainer.initializers.Zero())
    thin(model)
    for child in model.extractor.links():
        if isinstance(child, L.Convolution2D):
            child.W.initializer = chainer.initializers.HeNormal()
    n_features, n_class = 49 * 64, model.head.n_class
    model.rpn.conv1 = L.Convolution2D(64, 512, 3, pad=1)
    model.head.fc6, model.head.fc7 = L.Linear(n_features, 32), L.Linear(32, 32)
    model.head.cls_loc, model.head.score = L.Linear(32, 4 * n_class), L.Linear(32, n_class)
    return FasterRCNNTrainChain(model)


MODELS = {
    "SSD300": (lambda: V.SSD300(n_fg_class=3, pretrained_model=None), (1, 3, 257, 257)),
    "ResNet50": (lambda: V.ResNet50(n_class=5, pretrained_model=None, arch="he"), (2, 3, 64, 64)),
    "SEResNet50": (lambda: V.SEResNet50(n_class=5, pretrained_model=None), (2, 3, 64, 64)),
    "SEResNeXt50": (lambda: V.SEResNeXt50(n_class=5, pretrained_model=None), (2, 3, 64, 64)),
    "VGG16": (
        lambda: V.VGG16(n_class=5, pretrained_model=None, initialW=chainer.initializers.HeNormal()),
        (1, 3, 32, 32),
    ),
    "SegNetBasic": (lambda: V.SegNetBasic(n_class=4, pretrained_model=None), (2, 3, 32, 32)),
    "YOLOv2": (lambda: V.YOLOv2(n_fg_class=3, pretrained_model=None), (2, 3, 64, 64)),
    "YOLOv3": (lambda: V.YOLOv3(n_fg_class=3, pretrained_model=None), (2, 3, 64, 64)),
    "DeepLab": (
        lambda: V.DeepLabV3plusXception65(n_class=4, pretrained_model=None, min_input_size=(65, 65)),
        (2, 3, 65, 65),
    ),
    "PSPNet": (lambda: PSPNetResNet50(n_class=4, pretrained_model=None, input_size=(48, 48)), (2, 3, 48, 48)),
    "Faster R-CNN with FPN": (FeaturePyramid, (1, 3, 64, 64)),
    "Faster R-CNN": (
        lambda: FasterRCNNTrainChain(V.FasterRCNNVGG16(n_fg_class=3, pretrained_model=None)),
        (1, 3, 160, 160),
    ),
    "SSD512": (lambda: V.SSD512(n_fg_class=3, pretrained_model=None), (1, 3, 385, 385)),
    "thin SSD512": (lambda: thin(V.SSD512(n_fg_class=3, pretrained_model=None)), (1, 3, 385, 385)),
    "thin Faster R-CNN": (thin_faster_rcnn, (1, 3, 160, 160)),
}
SLOW = {"SSD512", "Faster R-CNN"}
DECISIONS = {"SSD300": 35, "SSD512": 39, "thin SSD512": 39, "ResNet50": 54, "VGG16": 16, "SegNetBasic": 9}


def loss(model, x):
    results = model(x, *TRUTH) if "anchor_target_creator" in vars(model) else model(x)
    return results if isinstance(results, chainer.Variable) and results.ndim == 0 else weighted_sum(results)


def initialized(model, x):
    """The model; layers that wait for their sizes draw their weights now, and not in a pass to compare."""
    if not all(parameter.is_initialized for parameter in model.params()):
        with chainer.no_backprop_mode():
            loss(model, x)
    return model


def models(names):
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]


@pytest.mark.parametrize("name", models(MODELS))
def test_an_unchanged_model_has_plain_chainers_gradients(name, rng):
    make, shape = MODELS[name]
    x = rng.standard_normal(shape).astype(np.float32)
    model = initialized(make(), x)
    plain, expected = gradients(model, loss, [x])
    scaled = AdaLossScaled(model, "auto", init_scale=2.0**-7)
    ours, found = gradients(scaled, loss, [x])
    assert ours == plain
    assert_same_bits(found, expected)
    assert np.mean([np.any(gradient) for gradient in found.values() if gradient is not None]) > 0.9
    assert any(decision.shift for decision in scaled.ada_loss.decisions)
    assert len(scaled.ada_loss.decisions) == DECISIONS.get(name, len(scaled.ada_loss.decisions))


@pytest.mark.parametrize("name", models(["thin SSD512", "ResNet50", "SegNetBasic", "VGG16", "YOLOv3"]))
def test_in_mixed16_a_model_has_finite_gradients_of_float32s_magnitude(name, rng):
    # Not its values: rounding flips units of networks with random weights, and small batches amplify that.
    make, shape = MODELS[name]
    x = rng.standard_normal(shape).astype(np.float16)
    with dtype("mixed16"):
        scaled = AdaLossScaled(initialized(make(), x), "auto")
        _, found = gradients(scaled, loss, [x])
    wide = initialized(make(), x.astype(np.float32))
    wide.copyparams(scaled)
    _, expected = gradients(wide, loss, [x.astype(np.float32)])
    assert all(np.isfinite(gradient).all() for gradient in found.values())
    for path, reference in expected.items():
        if path.endswith("/W") and reference.any():
            assert 0.7 < np.linalg.norm(found[path]) / np.linalg.norm(reference) < 1.4, path


def test_the_fan_outs_of_a_detector_are_shown(rng):
    scaled = AdaLossScaled(V.SSD300(n_fg_class=3, pretrained_model=None))
    scaled(np.zeros((1, 3, 257, 257), np.float32))
    uses = {(branch.path, branch.layer.split("/")[-1]): branch.uses for branch in scaled.ada_loss.fan_outs}
    # The layers that are picked feed the next one and two heads; conv4_3 is normalized for its heads.
    picked = {("/extractor", name): 3 for name in ("conv7", "conv8_2", "conv9_2", "conv10_2")}
    ends = {("/extractor", "conv4_3"): 2, ("/extractor/norm4", "conv4_3"): 2, ("/extractor", "conv11_2"): 2}
    assert uses == picked | ends
    assert "/extractor ReLU after /extractor/conv7, used 3 times" in str(scaled)


def test_methods_of_a_wrapped_detector_are_its_own(rng):
    detector = V.SSD300(n_fg_class=3, pretrained_model=None)
    coder, scaled = detector.coder, AdaLossScaled(detector)
    scaled.use_preset("evaluate")
    assert scaled.score_thresh == 0.01
    scaled.score_thresh = 0.99
    bboxes, labels, scores = scaled.predict([rng.uniform(0, 255, (3, 40, 30)).astype(np.float32)])
    assert len(bboxes) == len(labels) == len(scores) == 1
    assert scaled.coder is coder
    assert scaled.ada_loss.report.converted["/extractor/conv1_1"] == "AdaLossConvolution2D"


def test_functions_of_float32_only_work_between_casts(rng):
    class Pooled(chainer.Chain):
        def __init__(self):
            super().__init__(conv=L.Convolution2D(3, 18, 3), out=L.Linear(18, 2))

        def forward(self, x):
            h = F.cast(self.conv(x), np.float32)
            h = ps_roi_average_pooling_2d(h, ROIS / 8, np.zeros(len(ROIS), np.int32), (2, 3, 3), 1.0, 3)
            return self.out(F.cast(h, x.dtype))

    x = rng.standard_normal((1, 3, 10, 10)).astype(np.float32)
    link = Pooled()
    _, expected = gradients(link, loss, [x])
    assert_same_bits(gradients(AdaLossScaled(link, "auto"), loss, [x])[1], expected)
    with dtype("mixed16"):
        narrow = AdaLossScaled(Pooled(), "auto")
    narrow.copyparams(link)
    _, found = gradients(narrow, loss, [x.astype(np.float16)])
    assert min(signal_to_noise(found[path], expected[path]) for path in expected) > 30
