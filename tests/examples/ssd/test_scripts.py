"""predict.py, evaluate.py and demo.py, in this process."""

from __future__ import annotations

import os
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from chainer.serializers import save_npz
from chainercv.links import SSD300
from PIL import Image
from processes import run_script

import demo
import evaluate
import predict
from ada_loss.chainer import kernels
from data_digits import DIGIT_CLASSES
from data_voc import VOC_CLASSES, read_image
from detector import Boxes
from drawing import draw_boxes, tile
from models import MODELS, build_model
from weights import identify


@pytest.fixture(scope="module")
def model_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model.npz"
    save_npz(path, build_model("small", 10, "lecun-uniform", seed=0))
    return path


def one_sentence(capsys, words: str) -> None:
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert words in printed.err


def test_predict_draws_files_and_folders(digits, model_file, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    originals = sorted((digits / "VOC2007" / "JPEGImages").iterdir())[:3]
    for path in originals[:2]:
        shutil.copy(path, folder)
    (folder / "notes.txt").write_text("no image")
    out = tmp_path / "pictures"
    assert (
        predict.main([str(model_file), str(folder), str(originals[2]), "--out", str(out), "--score", "0.15"])
        == 0
    )
    assert sorted(path.name for path in out.iterdir()) == [f"{path.stem}.png" for path in originals]
    assert (
        len(re.findall(r": \d+ objects? \((\w+ 0\.\d\d(, )?)+(\.\.\.)?\) -> ", capsys.readouterr().out)) == 3
    )
    drawn = Image.open(out / f"{originals[2].stem}.png")
    assert drawn.size == (288, 288), "small images are enlarged"
    plain = Image.open(originals[2]).resize(drawn.size, Image.Resampling.BICUBIC)
    assert (np.asarray(drawn) != np.asarray(plain)).any()


def test_predict_says_when_nothing_is_sure_enough(digits, model_file, tmp_path, capsys):
    image = str(digits / "VOC2007" / "JPEGImages" / "000001.jpg")
    assert predict.main([str(model_file), image, "--out", str(tmp_path), "--score", "0.99"]) == 0
    assert "000001.jpg: no object with a score of 0.99 or more -> " in capsys.readouterr().out


@pytest.fixture
def folder(digits, tmp_path) -> Path:
    """A folder with two images, a damaged one, a folder that is called like one, and no image."""
    folder = tmp_path / "images"
    folder.mkdir()
    for path in sorted((digits / "VOC2007" / "JPEGImages").iterdir())[:2]:
        shutil.copy(path, folder)
    (folder / "000001a.jpg").write_bytes((folder / "000001.jpg").read_bytes()[:100])
    (folder / "0.png").mkdir()
    (folder / "notes.txt").write_text("no image")
    return folder


def test_predict_goes_on_after_files_that_it_can_not_read_and_lists_them(
    folder, model_file, tmp_path, capsys
):
    out = tmp_path / "pictures"
    assert predict.main([str(model_file), str(folder), "--out", str(out), "--score", "0.15"]) == 2
    assert sorted(path.name for path in out.iterdir()) == ["000001.png", "000002.png"]
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 2
    head, *listed = printed.err.splitlines()
    assert head == "error: 2 of 4 images were left out:"
    assert [line.split()[0] for line in listed] == [str(folder / "0.png"), str(folder / "000001a.jpg")]
    assert all("can't be read as an image" in line for line in listed)


def test_predict_tells_images_of_one_name_apart_by_their_endings(digits, model_file, tmp_path):
    original = digits / "VOC2007" / "JPEGImages" / "000001.jpg"
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.jpg", "a.png", "b.jpg"):
        Image.open(original).save(folder / name)
    assert predict.main([str(model_file), str(folder), "--out", str(tmp_path / "pictures")]) == 0
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [
        "a.jpg.png",
        "a.png.png",
        "b.png",
    ]


@pytest.mark.parametrize("shape", [(1, 1), (2, 400), (400, 2), (3, 6000), (6000, 3)])
def test_predict_draws_strips(model_file, tmp_path, shape):
    path = tmp_path / "strip.png"
    Image.fromarray(np.full(shape, 90, np.uint8)).save(path)
    assert predict.main([str(model_file), str(path), "--out", str(tmp_path / "out"), "--score", "0.1"]) == 0
    with Image.open(tmp_path / "out" / "strip.png") as picture:
        width, height = picture.size
    assert width % shape[1] == height % shape[0] == 0
    assert max(width, height) <= 6000


def test_predict_draws_images_upright(digits, model_file, tmp_path):
    """As its camera stored it, and as it was seen."""
    seen = Image.open(digits / "VOC2007" / "JPEGImages" / "000001.jpg").crop((0, 0, 96, 60))
    exif = Image.Exif()
    exif[0x112] = 6
    seen.save(tmp_path / "seen.png")
    seen.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "stored.png", exif=exif)
    arguments = [str(model_file), str(tmp_path / "seen.png"), str(tmp_path / "stored.png")]
    assert predict.main([*arguments, "--out", str(tmp_path / "out"), "--score", "0.1"]) == 0
    pictures = [np.asarray(Image.open(tmp_path / "out" / f"{name}.png")) for name in ("seen", "stored")]
    np.testing.assert_array_equal(*pictures)


def test_names_that_are_no_text_are_printed(digits, model_file, tmp_path):
    name = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    shutil.copy(digits / "VOC2007" / "JPEGImages" / "000001.jpg", name)
    result = run_script("predict.py", model_file, os.fsdecode(name), "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "caf\\udce9.jpg: " in result.stdout
    assert os.listdir(os.fsencode(tmp_path / "out")) == [b"caf\xe9.png"]


@pytest.mark.parametrize("place", ["file", "file/below", "a" * 300])
def test_a_folder_for_pictures_that_can_not_be_made_is_one_sentence(
    digits, model_file, tmp_path, capsys, place
):
    (tmp_path / "file").write_text("")
    image = str(digits / "VOC2007" / "JPEGImages" / "000001.jpg")
    assert predict.main([str(model_file), image, "--out", str(tmp_path / place)]) == 2
    one_sentence(capsys, f"{tmp_path / place} can't be made (")


def test_a_picture_that_can_not_be_written_is_one_sentence(digits, model_file, tmp_path, capsys, monkeypatch):
    def full(picture, target) -> None:
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    image = str(digits / "VOC2007" / "JPEGImages" / "000001.jpg")
    assert predict.main([str(model_file), image, "--out", str(tmp_path / "out")]) == 2
    one_sentence(capsys, "000001.png can't be written (No space left on device)")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("options", [("--top-k", "3"), ("--nms-threshold", "0.05")])
def test_predict_finds_by_its_options(digits, model_file, tmp_path, options):
    image = digits / "VOC2007" / "JPEGImages" / "000001.jpg"
    arguments = [str(model_file), str(image), "--score", "0.1", "--out"]
    assert predict.main([*arguments, str(tmp_path / "usual")]) == 0
    assert predict.main([*arguments, str(tmp_path / "other"), *options]) == 0
    usual, other = (np.asarray(Image.open(tmp_path / name / "000001.png")) for name in ("usual", "other"))
    assert (usual != other).any()


@pytest.fixture(scope="module")
def chainercv_model() -> SSD300:
    """SSD300 as ChainerCV makes it, which is surer of the background than of anything else."""
    np.random.seed(2)
    model = SSD300(n_fg_class=20)
    with kernels.using("numpy"):
        model(np.zeros((1, 3, 300, 300), np.float32))
    for head in model.multibox.conf:
        head.b.array[::21] = 5
    return model


def test_predict_finds_with_chainercvs_weights_what_it_finds(chainercv_model, devkit, tmp_path, capsys):
    path, score = tmp_path / "ssd300_voc0712_converted.npz", 0.1
    save_npz(path, chainercv_model, compression=False)
    image = devkit / "VOC2007" / "JPEGImages" / "test_0.jpg"
    assert predict.main([str(path), str(image), "--score", str(score), "--out", str(tmp_path)]) == 0
    chainercv_model.nms_thresh, chainercv_model.score_thresh = 0.45, score
    with kernels.using("numpy"):
        _, labels, scores = chainercv_model.predict([read_image(image).astype(np.float32)])
    best = np.argmax(scores[0])
    printed = capsys.readouterr().out
    assert f": {len(scores[0])} objects (" in printed
    assert f"({VOC_CLASSES[labels[0][best]]} {scores[0][best]:.2f}, " in printed


@pytest.mark.slow
def test_evaluate_takes_chainercvs_weights(chainercv_model, devkit, tmp_path, capsys):
    path = tmp_path / "ssd300_voc0712_converted.npz"
    save_npz(path, chainercv_model, compression=False)
    assert evaluate.main([str(path), "--dataset-dir", str(devkit)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [*VOC_CLASSES, "mAP"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/nowhere.npz", "IMAGE"], "The weights /nowhere.npz can't be read"),
        (["MODEL", "/nowhere.jpg"], "There is no image or folder /nowhere.jpg"),
        (["MODEL", "EMPTY"], "no image in the folders named"),
        (["MODEL", "MODEL"], "can't be read as an image"),
        (["MODEL", "/dev/null"], "can't be read as an image"),
        (["MODEL", "a" * 300], "can't be looked at (File name too long)"),
        (["MODEL", "IMAGE", "IMAGE"], "Two images would both be drawn"),
        (["MODEL", "IMAGE", "--score", "2"], "'2' is not a number from 0 to 1"),
        (["MODEL", "IMAGE", "--decoder", "best"], "best"),
        (["IMAGE", "IMAGE"], "can't be read (it is no .npz file, or a damaged one)"),
    ],
)
def test_bad_input_of_predict_is_one_sentence(digits, model_file, tmp_path, capsys, arguments, words):
    (tmp_path / "empty").mkdir()
    image = digits / "VOC2007" / "JPEGImages" / "000001.jpg"
    places = {"MODEL": str(model_file), "IMAGE": str(image), "EMPTY": str(tmp_path / "empty")}
    argv = [places.get(argument, argument) for argument in arguments]
    assert status_of(predict.main, [*argv, "--out", str(tmp_path / "pictures")]) == 2
    one_sentence(capsys, words)


def test_predict_overwrites_nothing(digits, model_file, tmp_path, capsys):
    image = str(digits / "VOC2007" / "JPEGImages" / "000001.jpg")
    (tmp_path / "000001.png").write_text("mine")
    assert predict.main([str(model_file), image, "--out", str(tmp_path)]) == 2
    one_sentence(capsys, "is already there")
    assert (tmp_path / "000001.png").read_text() == "mine"


def test_evaluate_prints_every_class_and_the_mean(digits, model_file, capsys):
    assert evaluate.main([str(model_file), "--dataset-dir", str(digits)]) == 0
    printed = capsys.readouterr()
    assert re.fullmatch(r"4 images in \d+\.\d s\n", printed.err)
    lines = [line.split() for line in printed.out.splitlines()]
    assert [name for name, _ in lines] == [*DIGIT_CLASSES, "mAP"]
    values = [float("nan" if value == "-" else value) for _, value in lines]
    assert values[-1] == pytest.approx(np.nanmean(values[:-1]), abs=1e-4)


def test_evaluate_gives_the_same_on_two_ranks(digits, model_file, capsys):
    arguments = [str(model_file), "--dataset-dir", str(digits)]
    evaluate.main(arguments)
    alone = capsys.readouterr().out
    two = run_script("evaluate.py", *arguments, ranks=2)
    assert two.returncode == 0, two.stderr
    assert two.stdout == alone


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/nowhere.npz"], "The weights /nowhere.npz can't be read"),
        (["MODEL", "--dataset-dir", "/nowhere/digits"], "There is no folder /nowhere/digits: name one that"),
        (["MODEL", "--dataset", "voc"], "knows the classes of digits: use --dataset digits"),
    ],
)
def test_bad_input_of_evaluate_is_one_sentence(model_file, capsys, arguments, words):
    argv = [str(model_file) if argument == "MODEL" else argument for argument in arguments]
    assert status_of(evaluate.main, argv) == 2
    one_sentence(capsys, words)


def test_evaluate_in_batches_of_any_size_finds_the_same(digits, model_file, capsys):
    arguments = [str(model_file), "--dataset-dir", str(digits)]
    printed = []
    for more in ((), ("--test-batchsize", "3"), ("--top-k", "200", "--nms-threshold", "0.45")):
        assert evaluate.main([*arguments, *more]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] == printed[2]


def test_evaluate_without_objects_that_count_says_so(digits, model_file, tmp_path, capsys):
    folder = shutil.copytree(digits, tmp_path / "digits")
    for number in range(13, 17):
        (folder / "VOC2007" / "Annotations" / f"{number:06d}.xml").write_text("<annotation/>")
    assert evaluate.main([str(model_file), "--dataset-dir", str(folder)]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1].split() == ["mAP", "-"]
    assert "no test image shows an object that counts, so that there is no mAP" in printed.err


def test_evaluate_says_what_an_incomplete_set_lacks(digits, model_file, tmp_path, capsys):
    folder = shutil.copytree(digits, tmp_path / "digits")
    (folder / "digits.json").unlink()
    assert status_of(evaluate.main, [str(model_file), "--dataset-dir", str(folder)]) == 2
    one_sentence(capsys, f"{folder} is no complete digits set, since digits.json can't be read (No such file")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("n_fg_class", [10, 20])
def test_a_file_tells_its_model_and_number_of_classes(tmp_path, name, n_fg_class):
    model = MODELS[name].build(n_fg_class)
    # Names and the shape of one bias are all that it takes; the arrays themselves would be large.
    names = {path.lstrip("/"): np.zeros(1, np.float32) for path, _ in model.namedparams()}
    names["multibox/conf/0/b"] = model.multibox.conf[0].b.array
    np.savez(tmp_path / "weights.npz", **names)
    assert identify(tmp_path / "weights.npz") == (name, n_fg_class, np.float32, (0.1, 0.2))


def test_the_demonstration_ends_with_map_and_picture(digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "OUT", tmp_path / "out")
    monkeypatch.setattr(demo, "COLUMNS", 2)
    monkeypatch.setattr(demo, "ROWS", 2)
    arguments = ["--dataset-dir", str(digits), "--iteration", "2", "--picture", str(tmp_path / "demo.png")]
    assert demo.main(arguments) == 0
    assert re.match(r"mAP 0\.\d{4} on test images", capsys.readouterr().out.splitlines()[-1])
    with Image.open(tmp_path / "demo.png") as picture:
        width, height = picture.size
    assert width == 2 * (3 * 96 + 8) + 8
    # The windows of its layers are below, where the packages are that draw them.
    assert (height > width) == all(find_spec(name) for name in ("altair", "vl_convert"))
    # A second demonstration replaces the first.
    assert demo.main(arguments) == 0


def test_boxes_are_drawn_where_they_are():
    image = np.zeros((3, 50, 60), np.uint8)
    boxes = Boxes(
        np.array([[20, 10, 40, 30]], np.float32), np.array([1], np.int32), np.array([0.9], np.float32)
    )
    picture = np.asarray(draw_boxes(image, boxes, ("cat", "dog"), enlarge=2))
    assert picture.shape == (100, 120, 3)
    assert picture[80, 20:61].any(axis=1).all(), "lower edge"
    assert picture[40:81, 60].any(axis=1).all(), "right edge"
    assert not picture[84:].any()
    assert not picture[50:70, 30:50].any(), "nothing inside"


def test_pictures_are_tiled_in_rows():
    pictures = [Image.new("RGB", (10, 20), colour) for colour in ("red", "lime", "blue")]
    sheet = tile(pictures, columns=2)
    assert sheet.size == (2 * 18 + 8, 2 * 28 + 8)
    corners = [sheet.getpixel(place) for place in ((8, 8), (26, 8), (8, 36), (26, 36))]
    assert corners == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]


def status_of(main, argv: list[str]) -> int:
    try:
        return main(argv)
    except SystemExit as end:
        return end.code
