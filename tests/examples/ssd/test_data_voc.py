from __future__ import annotations

import os
import re
import shutil

import numpy as np
import pytest
from chainercv.datasets import VOCBboxDataset
from PIL import Image

import data_voc
from data_voc import TEST_PARTS, TRAIN_PARTS, VOC_CLASSES, find_devkit, open_parts
from errors import InputError


@pytest.fixture
def broken(devkit, tmp_path):
    """A copy of the devkit to damage."""
    return shutil.copytree(devkit, tmp_path / "devkit")


def open_train(folder):
    return open_parts(folder, TRAIN_PARTS, VOC_CLASSES, use_difficult=False)


@pytest.mark.filterwarnings("ignore:please pick split", "ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("parts", "use_difficult"), [(TRAIN_PARTS, False), (TEST_PARTS, True)], ids=["training", "test"]
)
def test_reads_what_chainercv_reads(devkit, parts, use_difficult):
    ours = open_parts(devkit, parts, VOC_CLASSES, use_difficult)
    theirs = [
        sample
        for year, split in parts
        for sample in VOCBboxDataset(
            str(devkit / year), split, use_difficult=use_difficult, return_difficult=True
        )
    ]
    assert len(ours) == len(theirs)
    for i, (image, bbox, label, difficult) in enumerate(theirs):
        np.testing.assert_array_equal(ours.image(i), image)
        for mine, reference in zip(ours.objects(i), (bbox, label, difficult), strict=True):
            np.testing.assert_array_equal(mine, reference)
            assert mine.dtype == reference.dtype


def test_the_devkit_is_found_below_the_folder_given(devkit, tmp_path):
    (tmp_path / "VOCdevkit").symlink_to(devkit)
    assert find_devkit(tmp_path) == tmp_path / "VOCdevkit"
    assert find_devkit(devkit) == devkit


def test_without_voc_the_sentence_names_the_place_and_the_digits(tmp_path, monkeypatch):
    monkeypatch.setattr("data_voc.get_dataset_root", lambda: str(tmp_path))
    with pytest.raises(InputError) as error:
        find_devkit(None)
    assert str(tmp_path / "pfnet" / "chainercv" / "voc" / "VOCdevkit" / "VOC2007") in str(error.value)
    assert "--dataset digits" in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("<name>dog</name>", "<name>unicorn</name>", "no class is called 'unicorn'"),
        ("<name>dog</name>", "", "an object has no name"),
        ("</annotation>", "", "no element found"),
        ("<xmin>", "<xmin>many", "could not convert"),
    ],
)
def test_a_damaged_annotation_is_named(broken, old, new, words):
    path = broken / "VOC2012" / "Annotations" / "trainval_1.xml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    dataset = open_train(broken)
    with pytest.raises(InputError, match=words) as error:
        dataset.objects(3)
    assert str(path) in str(error.value)


def test_an_empty_list_is_an_error(broken):
    (broken / "VOC2007" / "ImageSets" / "Main" / "trainval.txt").write_text("\n")
    with pytest.raises(InputError, match="names no image"):
        open_train(broken)


def test_a_list_that_names_a_missing_file_is_an_error(broken):
    (broken / "VOC2012" / "JPEGImages" / "trainval_0.jpg").unlink()
    with pytest.raises(InputError, match="trainval_0.jpg is missing"):
        open_train(broken)


def test_what_has_been_read_is_not_read_again(broken):
    dataset = open_train(broken)
    image, objects = dataset.image(1), dataset.objects(1)
    for folder in ("JPEGImages", "Annotations"):
        shutil.rmtree(broken / "VOC2007" / folder)
    assert dataset.image(1) is image
    assert dataset.objects(1) is objects
    for array in (image, *objects):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


def test_only_so_many_images_stay_in_memory(devkit, monkeypatch):
    dataset = open_train(devkit)
    monkeypatch.setattr(data_voc, "IN_MEMORY", dataset.image(0).nbytes)
    for i in range(2):
        np.testing.assert_array_equal(dataset.image(i), dataset.image(i))
    assert [dataset.image(i) is dataset.image(i) for i in range(2)] == [True, False]


def rewrite_list(folder, content: bytes) -> None:
    (folder / "VOC2007" / "ImageSets" / "Main" / "trainval.txt").write_bytes(content)


@pytest.mark.parametrize(
    "content",
    [
        b"trainval_0\ntrainval_1",
        b"\n\ntrainval_0\n\n  trainval_1  \n\n",
        b"trainval_0\r\ntrainval_1\r\n",
        b"trainval_0\rtrainval_1",
        b"\xef\xbb\xbftrainval_0\ntrainval_1\n",
        "trainval_0\r\ntrainval_1\r\n".encode("utf-16"),
    ],
    ids=["no end", "blank lines", "CRLF", "CR", "BOM", "UTF-16"],
)
def test_lists_of_any_tool_are_read(broken, content):
    rewrite_list(broken, content)
    assert open_train(broken).parts[0].ids == ("trainval_0", "trainval_1")


def test_names_with_blanks_or_of_bytes_that_are_no_text_are_read(broken):
    for folder, ending in (("JPEGImages", "jpg"), ("Annotations", "xml")):
        place = broken / "VOC2007" / folder
        for name in (b"my photo", b"caf\xe9"):
            shutil.copy(
                place / f"trainval_0.{ending}", os.fsencode(place) + b"/" + name + f".{ending}".encode()
            )
    rewrite_list(broken, b"my photo\ncaf\xe9\n")
    dataset = open_train(broken)
    for i in range(2):
        assert dataset.image(i).shape[0] == 3
        assert len(dataset.objects(i).label) == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xef\xbb\xbf\r\n", "names no image"),
        (b"trainval_0\ntrainval_1\ntrainval_0\n", "names trainval_0 2 times: name every image once"),
        (b"trainval_0 1\n", "trainval_0 1.jpg is missing"),
        (b"../../passwd\n", "passwd.jpg is missing"),
        (b"a" * 300, "File name too long"),
        (b"trainval\0\n", "is missing"),
        (b"\xff\xfea", "can't be read"),
    ],
)
def test_a_list_that_can_not_be_right_is_one_sentence(broken, content, words):
    rewrite_list(broken, content)
    with pytest.raises(InputError, match=re.escape(words)) as error:
        open_train(broken)
    assert "\n" not in str(error.value)


def test_a_list_or_folder_that_may_not_be_read_is_one_sentence(broken, monkeypatch):
    def forbidden(path, *args) -> None:
        raise PermissionError(13, "Permission denied")

    for method in ("is_file", "read_bytes"):
        with monkeypatch.context() as patched:
            patched.setattr(f"pathlib.Path.{method}", forbidden)
            with pytest.raises(InputError, match="Permission denied"):
                open_train(broken)


def test_objects_are_refused_where_their_image_is_of_another_size(broken):
    path = broken / "VOC2007" / "JPEGImages" / "trainval_0.jpg"
    Image.open(path).resize((20, 20)).save(path)
    with pytest.raises(
        InputError, match="trainval_0.xml is damaged .a box ends outside of its image of 20x20"
    ):
        open_train(broken).objects(0)
