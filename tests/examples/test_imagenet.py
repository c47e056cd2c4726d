"""examples/imagenet: reads folders of images, makes its stand-in, trains end to end, also on two ranks."""

from __future__ import annotations

import json

import numpy as np
import pytest
from chainercv.datasets import DirectoryParsingLabelDataset

from errors import InputError
from example_scripts import EXAMPLES, assert_one_sentence, run
from imagenet_data import ImageNetSamples, make_stand_in, open_imagenet, random_part
from train_imagenet_multi import build_model, rate_in_epoch

SCRIPT = EXAMPLES / "imagenet" / "train_imagenet_multi.py"
FEW = ("--dataset", "digits", "--arch", "resnet18", "--size", "32", "--batchsize", "4", "--iter", "3")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return make_stand_in(tmp_path_factory.mktemp("data") / "digits")


def test_the_stand_in_is_read_as_imagenet_is(digits):
    train, val, n_class = open_imagenet(digits)
    assert (len(train), len(val), n_class) == (300, 60, 10)
    assert isinstance(train, DirectoryParsingLabelDataset)
    image, label = train[0]
    assert image.shape[0] == 3 and 48 <= min(image.shape[1:]) and label == 0


def test_training_images_change_from_epoch_to_epoch_and_validation_images_do_not(digits):
    train, val, _ = open_imagenet(digits)
    changed, plain = ImageNetSamples(train, 32, np.float32, seed=1), ImageNetSamples(val, 32, np.float32)
    assert changed.sample(0, 0)[0].shape == plain.sample(0, 0)[0].shape == (3, 32, 32)
    assert (changed.sample(0, 0)[0] != changed.sample(1, 0)[0]).any()
    np.testing.assert_array_equal(changed.sample(3, 5)[0], changed.sample(3, 5)[0])
    np.testing.assert_array_equal(plain.sample(0, 0)[0], plain.sample(7, 0)[0])


def test_a_part_lies_in_its_image(rng):
    for _ in range(200):
        height, width = rng.integers(1, 60, size=2)
        image = np.arange(height * width).reshape(1, height, width)
        part = random_part(image, rng)
        assert 0 < part.shape[1] <= height and 0 < part.shape[2] <= width
        # Rows and columns of a part are neighbours in the image as well.
        assert (np.diff(part[0], axis=0) == width).all() and (np.diff(part[0], axis=1) == 1).all()


def test_residual_branches_of_resnet_50_begin_as_zeros():
    model = build_model("resnet50", 7, first_bn_mixed16=False)
    gammas = [param.array for name, param in model.namedparams() if name.endswith("conv3/bn/gamma")]
    assert len(gammas) == 16 and not any(gamma.any() for gamma in gammas)


def test_the_learning_rate_follows_the_paper():
    assert [rate_in_epoch(epoch, 0.1, 0.1) for epoch in (0, 29, 30, 60, 80)] == pytest.approx(
        [0.1, 0.1, 0.01, 0.001, 0.0001]
    )
    # Eight ranks of 256 images: 0.1 at first, 0.8 from the fifth epoch on.
    assert [rate_in_epoch(epoch, 0.8, 0.1) for epoch in (0, 2.5, 5, 30)] == pytest.approx(
        [0.1, 0.45, 0.8, 0.08]
    )


def test_folders_that_are_no_imagenet_are_refused(tmp_path):
    with pytest.raises(InputError, match="--dataset-dir"):
        open_imagenet(tmp_path)
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "val" / "dog").mkdir(parents=True)
    with pytest.raises(InputError, match="the same classes"):
        open_imagenet(tmp_path)
    (tmp_path / "val" / "dog").rename(tmp_path / "val" / "cat")
    with pytest.raises(InputError, match="no images"):
        open_imagenet(tmp_path)


def test_an_image_that_cannot_be_read_is_named(digits, tmp_path):
    for part in ("train", "val"):
        (tmp_path / part / "cat").mkdir(parents=True)
        (tmp_path / part / "cat" / "broken.JPEG").write_bytes(b"no picture")
    train, _, _ = open_imagenet(tmp_path)
    with pytest.raises(InputError, match="broken.JPEG"):
        ImageNetSamples(train, 32, np.float32).sample(0, 0)


@pytest.mark.parametrize("ranks", [None, 2])
def test_trains(digits, tmp_path, ranks):
    arguments = ("--dtype", "mixed16", "--loss-scale-method", "approx_range", "--manual-seed", 1)
    loaders = ("--loaderjob", 1 if ranks is None else 0)
    finished = run(
        SCRIPT, *FEW, *arguments, *loaders, "--dataset-dir", digits, "--out", tmp_path, ranks=ranks
    )
    assert finished.returncode == 0, finished.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["outcome"] == "finished" and result["iterations"] == 3 and result["ranks"] == (ranks or 1)
    assert 0 <= result["validation/main/accuracy"] <= 1
    # 0.1 for 256 images.
    rate = json.loads((tmp_path / "log.json").read_text())[-1]["lr"]
    assert rate == pytest.approx(0.1 * 4 * (ranks or 1) / 256)


def test_resnet_50_trains(digits, tmp_path):
    arguments = (*FEW, "--arch", "resnet50", "--iter", "1", "--loaderjob", "0", "--dtype", "mixed16")
    finished = run(SCRIPT, *arguments, "--dataset-dir", digits, "--out", tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert json.loads((tmp_path / "result.json").read_text())["scaling"] == "abs_range"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("--dataset-dir",)),
        (("--dataset-dir", "nowhere"), ("nowhere has no folder train",)),
        (("--batchsize", "0"), ("--batchsize", "at least 1")),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, arguments, words):
    assert_one_sentence(run(SCRIPT, *arguments, "--out", tmp_path), *words)
