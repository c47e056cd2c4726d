"""What train_multi.py looks at before it begins."""

from __future__ import annotations

import io
import re
import shutil
import sys

import pytest
from PIL import Image
from runs import BRIEF, assert_one_sentence, read, status_of, train

import checking
import train_multi
from checking import look_through
from conftest import make_devkit
from data_voc import TEST_PARTS, TRAIN_PARTS, VOC_CLASSES, open_parts
from errors import InputError
from ranks import Alone

NO_OBJECTS = "<annotation></annotation>"


@pytest.fixture
def broken(digits, tmp_path):
    """A digits set to damage: images 1 to 12 are for training, 13 to 16 for tests."""
    return shutil.copytree(digits, tmp_path / "digits")


def image_of(folder, number: int):
    return folder / "VOC2007" / "JPEGImages" / f"{number:06d}.jpg"


def annotation_of(folder, number: int):
    return folder / "VOC2007" / "Annotations" / f"{number:06d}.xml"


def damage_annotation(folder, number: int) -> None:
    path = annotation_of(folder, number)
    path.write_text(path.read_text().replace("<xmax>", "<xmax>1e999"))


def cut_image(folder, number: int) -> None:
    path = image_of(folder, number)
    path.write_bytes(path.read_bytes()[:30])


def turn_image(folder, number: int) -> None:
    """What a camera does that was held sideways, to an image that is not square."""
    path = image_of(folder, number)
    exif = Image.Exif()
    exif[0x112] = 6
    Image.open(path).resize((96, 60)).save(path, exif=exif)


@pytest.mark.parametrize("number", [1, 12, 13, 16])
@pytest.mark.parametrize(
    ("damage", "file"),
    [(damage_annotation, annotation_of), (cut_image, image_of), (turn_image, annotation_of)],
)
def test_any_damaged_file_is_named_before_training_begins(broken, tmp_path, capsys, damage, file, number):
    damage(broken, number)
    out = tmp_path / "run"
    assert status_of(broken, out, "--iteration", 1) == 2
    assert_one_sentence(capsys, str(file(broken, number)))
    assert not any(out.rglob("*"))


def test_several_damaged_files_are_named_together(broken, tmp_path, capsys):
    for number in (2, 5, 9):
        damage_annotation(broken, number)
    assert status_of(broken, tmp_path / "run", "--iteration", 1) == 2
    assert_one_sentence(capsys, "restore or mend it, and so are 2 others (000005, 000009).")


def test_told_not_to_it_looks_at_nothing(broken, tmp_path):
    damage_annotation(broken, 16)
    arguments = ("--iteration", 2, "--dtype", "float32", "--no-check")
    assert status_of(broken, tmp_path / "run", *arguments) == 2, "the evaluation meets it"
    assert len(read(tmp_path / "run" / "log.json")) == 1


def test_a_training_set_without_objects_is_refused(broken, tmp_path, capsys):
    for number in range(1, 13):
        annotation_of(broken, number).write_text(NO_OBJECTS)
    assert status_of(broken, tmp_path / "run", "--iteration", 1) == 2
    assert_one_sentence(capsys, "No training image shows an object of a class that is known here")


@pytest.mark.parametrize("check", [(), ("--no-check",)], ids=["looked", "not looked"])
@pytest.mark.parametrize("dtype", ["float32", "mixed16"])
def test_a_test_set_without_objects_ends_without_map(broken, tmp_path, capsys, check, dtype):
    for number in range(13, 17):
        annotation_of(broken, number).write_text(NO_OBJECTS)
    out = tmp_path / "run"
    assert train(broken, out, "--iteration", 2, "--step", 1, "--dtype", dtype, *check) == 0
    result = read(out / "result.json")
    assert (result["outcome"], result["map"]) == ("finished", None)
    printed = capsys.readouterr()
    assert "| no mAP |" in printed.out
    assert ("No test image shows an object that counts" in printed.err) == (not check)
    assert not (out / "best.npz").exists()


@pytest.fixture
def sets(tmp_path):
    devkit = make_devkit(tmp_path / "devkit", n_images=4)
    return tuple(
        open_parts(devkit, parts, VOC_CLASSES, use_difficult=difficult)
        for parts, difficult in ((TRAIN_PARTS, False), (TEST_PARTS, True))
    )


def test_large_sets_show_how_far_it_is(sets, monkeypatch, capsys):
    look_through(*sets, Alone())
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(checking, "LARGE", 5)
    look_through(*sets, Alone())
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "looking through the training images 0%"
    assert re.fullmatch(r"looked through 8 training images in \d+ s", lines[-1])


def test_on_a_terminal_it_is_a_bar(sets, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(checking, "LARGE", 5)
    monkeypatch.setattr(sys, "stderr", terminal)
    look_through(*sets, Alone())
    shown = terminal.getvalue().split("\r")[1:]
    assert len(shown) == 9
    assert re.match(r"looking through the training images \[\.{40}\] 0%", shown[0])
    assert re.match(r"looking through the training images \[#{20}\.{20}\] 50%", shown[4])
    assert shown[-1].endswith("\n")
    assert terminal.getvalue().count("\n") == 1


def test_ranks_share_the_work(sets, monkeypatch):
    class OneOfThree(Alone):
        rank, size = 1, 3

    seen = []
    for dataset in sets:
        monkeypatch.setattr(
            type(dataset), "objects", lambda self, i: seen.append(i) or self.parts[0].objects(0)
        )
    look_through(*sets, OneOfThree())
    assert seen == [1, 4, 7, 1]


def test_objects_that_no_evaluation_counts_are_none(sets, capsys, monkeypatch):
    train_set, test_set = sets
    for i in range(len(test_set)):
        path = test_set.parts[0].objects_path(i)
        path.write_text(path.read_text().replace("<difficult>0", "<difficult>1"))
    look_through(train_set, test_set, Alone())
    assert "there will be no mAP" in capsys.readouterr().err


def test_voc_itself_is_looked_through(tmp_path, capsys):
    devkit = make_devkit(tmp_path / "devkit", n_images=2)
    path = devkit / "VOC2012" / "Annotations" / "trainval_1.xml"
    path.write_text(path.read_text().replace("dog", "unicorn"))
    command = ["--dataset", "voc", "--dataset-dir", str(devkit), "--out", str(tmp_path / "run"), *BRIEF]
    assert train_multi.main(command) == 2
    assert_one_sentence(capsys, f"{path} is damaged (no class is called 'unicorn')")


def test_a_fault_is_an_input_error(sets):
    path = sets[0].parts[0].objects_path(0)
    path.write_text("nothing")
    with pytest.raises(InputError, match="trainval_0.xml"):
        look_through(*sets, Alone())
