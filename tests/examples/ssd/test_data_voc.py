from __future__ import annotations

import shutil

import numpy as np
import pytest
from chainercv.datasets import VOCBboxDataset

import data_voc
from data_voc import TEST_PARTS, TRAIN_PARTS, VOC_CLASSES, find_devkit, open_parts, read_image
from errors import InputError


@pytest.fixture
def broken(devkit, tmp_path):
    """A copy of the devkit to damage."""
    return shutil.copytree(devkit, tmp_path / "devkit")


def open_train(folder):
    return open_parts(folder, TRAIN_PARTS, VOC_CLASSES, use_difficult=False)


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
        ("<xmin>", "<xmin>many", "invalid literal|could not convert"),
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


def test_a_truncated_image_is_named(broken):
    path = broken / "VOC2007" / "JPEGImages" / "trainval_0.jpg"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(InputError, match="can't be read as an image") as error:
        open_train(broken).image(0)
    assert str(path) in str(error.value)


def test_something_else_than_an_image_is_named(tmp_path):
    (tmp_path / "notes.jpg").write_text("not an image")
    with pytest.raises(InputError, match="notes.jpg"):
        read_image(tmp_path / "notes.jpg")


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
