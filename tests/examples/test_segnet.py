"""examples/segnet: CamVid's files, weights of the classes, training end to end, alone and on two ranks."""

from __future__ import annotations

import json

import chainer
import numpy as np
import pytest
from chainercv.evaluations import eval_semantic_segmentation
from chainercv.links import SegNetBasic
from PIL import Image

from calc_weight import class_weights
from camvid_data import N_CLASS, CamVidSamples, find_data, open_split, read
from errors import InputError
from example_scripts import EXAMPLES, assert_one_sentence, run
from ranks import Alone
from segnet import SegNet, figures

FOLDER = EXAMPLES / "segnet"
# ChainerCV leaves the lists of CamVid open.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return find_data("digits", tmp_path_factory.mktemp("data") / "digits")


def test_the_stand_in_is_read_as_camvid_is(digits):
    sizes = {split: len(open_split(digits, split)) for split in ("train", "val", "test")}
    assert sizes == {"train": 24, "val": 6, "test": 6}
    image, label = read(open_split(digits, "train"), 0)
    assert image.shape == (3, 64, 64) and label.shape == (64, 64)
    # -1 is what nobody labelled; 10 the background.
    assert {-1, 10} < set(np.unique(label)) <= set(range(-1, 11))


def test_half_of_the_training_images_are_mirrored_with_their_labels(digits):
    images = open_split(digits, "train")
    image, label = read(images, 3)
    samples = CamVidSamples(images, seed=0)
    mirrored = 0
    for epoch in range(20):
        changed_image, changed_label = samples.sample(epoch, 3)
        if (changed_image != image).any():
            mirrored += 1
            changed_image, changed_label = changed_image[:, :, ::-1], changed_label[:, ::-1]
        np.testing.assert_array_equal(changed_image, image)
        np.testing.assert_array_equal(changed_label, label)
    assert 4 < mirrored < 16


def test_weights_are_median_frequency_over_frequency():
    labels = [np.array([[0, 0, 0, 1]]), np.array([[0, 2, 2, -1]])]
    weights = class_weights([(np.zeros((3, 1, 4)), label) for label in labels])
    # Shares of the pixels of the images with the class: 4/8, 1/4, 2/4; their median is 1/2.
    np.testing.assert_allclose(weights, [1, 2, 1] + [0] * (N_CLASS - 3))


def test_the_network_is_chainercvs(rng):
    ours, theirs = SegNet(n_class=N_CLASS), SegNetBasic(n_class=N_CLASS)
    x = rng.uniform(0, 255, size=(1, 3, 24, 32)).astype(np.float32)
    theirs(x)
    ours.copyparams(theirs)
    ours(x)
    ours.copyparams(theirs)
    np.testing.assert_array_equal(ours(x).array, theirs(x).array)


def test_bright_images_do_not_overflow_in_float16():
    with chainer.using_config("dtype", chainer.mixed16):
        scores = SegNet(n_class=N_CLASS)(np.full((1, 3, 16, 16), 255, np.float32))
    assert scores.dtype == np.float16 and np.isfinite(scores.array).all()


def test_figures_are_chainercvs(digits):
    images = open_split(digits, "val")
    model, samples = SegNet(n_class=N_CLASS), CamVidSamples(images)
    with chainer.using_config("train", True):
        model(np.stack([read(images, i)[0] for i in range(4)]))
    found = figures(model, samples, len(images), N_CLASS, Alone())
    truth = [read(images, i)[1] for i in range(len(images))]
    labels = model.predict([read(images, i)[0] for i in range(6)])
    # Classes that are nowhere are 0 / 0.
    with np.errstate(invalid="ignore"):
        expected = eval_semantic_segmentation(labels, truth)
    assert found["validation/main/miou"] == pytest.approx(expected["miou"])
    assert found["validation/main/pixel_accuracy"] == pytest.approx(expected["pixel_accuracy"])


@pytest.mark.parametrize("ranks", [None, 2])
def test_weights_are_computed_and_the_network_trained(digits, tmp_path, ranks):
    data = ("--dataset", "digits", "--data-dir", digits)
    weights = run(FOLDER / "calc_weight.py", *data, "--out", tmp_path / "weight.npy")
    assert weights.returncode == 0, weights.stderr
    arguments = (
        "--class-weight",
        tmp_path / "weight.npy",
        "--iter",
        2,
        "--batchsize",
        4,
        "--dtype",
        "mixed16",
    )
    finished = run(FOLDER / "train.py", *data, *arguments, "--out", tmp_path / "run", ranks=ranks)
    assert finished.returncode == 0, finished.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["outcome"] == "finished" and result["ranks"] == (ranks or 1)
    assert 0 <= result["validation/main/miou"] <= 1
    assert result["scaling"] == "approx_range, chosen every 100 iterations"


def test_labels_that_are_no_classes_are_refused(tmp_path):
    (tmp_path / "train.txt").write_text("/SegNet/CamVid/a.png /SegNet/CamVid/b.png\n")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("L", (8, 8), 40).save(tmp_path / "b.png")
    with pytest.raises(InputError, match="a class of 0 to 11"):
        read(open_split(str(tmp_path), "train"), 0)


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("train.py", ("--data-dir", "nowhere"), ("train.txt", "--data-dir")),
        ("calc_weight.py", ("--data-dir", "nowhere"), ("train.txt", "--data-dir")),
        ("train.py", ("--dataset", "digits", "--class-weight", "nowhere.npy"), ("calc_weight.py",)),
    ],
)
def test_bad_input_is_one_sentence(digits, tmp_path, script, arguments, words):
    data = () if "--data-dir" in arguments else ("--data-dir", digits)
    assert_one_sentence(run(FOLDER / script, *arguments, *data, "--out", tmp_path / "run"), *words)
