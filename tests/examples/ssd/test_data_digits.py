from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

import data_digits
from data_digits import DIGIT_CLASSES, DigitsSettings, draw_image, find_digits
from data_voc import open_parts
from digit_images import load_sources, split_digits
from errors import InputError

TINY = DigitsSettings(train_images=5, test_images=3)


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def cut_short(path: Path) -> None:
    path.write_text(path.read_text().splitlines()[0] + "\n")


def open_train(folder: Path):
    return open_parts(folder, data_digits.TRAIN_PARTS, DIGIT_CLASSES, use_difficult=False)


def test_same_settings_make_the_same_files(tmp_path):
    first, second = find_digits(tmp_path / "a", TINY), find_digits(tmp_path / "b", TINY)
    assert contents(first) == contents(second)


def test_another_seed_makes_other_images(tmp_path):
    first = contents(find_digits(tmp_path / "a", TINY))
    second = contents(find_digits(tmp_path / "b", DigitsSettings(seed=1, train_images=5, test_images=3)))
    images = [name for name in first if name.endswith(".jpg")]
    assert len(images) == 8
    assert all(first[name] != second[name] for name in images)


def test_making_it_does_not_touch_the_global_random_state(tmp_path):
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    find_digits(tmp_path / "a", TINY)
    np.testing.assert_array_equal(np.random.get_state()[1], before)


def test_a_set_that_is_there_is_used_as_it_is(tmp_path, monkeypatch):
    folder = find_digits(tmp_path / "a", TINY)
    monkeypatch.setattr(data_digits, "load_sources", lambda: pytest.fail("made again"))
    assert find_digits(folder, TINY) == folder


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_training_and_test_images_share_no_digit(seed):
    train, test = split_digits(1797, seed)
    assert not set(train) & set(test)
    assert set(train) | set(test) == set(range(1797))


def test_images_show_digits_of_their_pool_only():
    sources = load_sources()
    rng = np.random.default_rng(4)
    for digit in rng.integers(len(sources.labels), size=20):
        _, placed = draw_image(sources, np.array([digit]), TINY, rng)
        assert placed
        assert {entry.label for entry in placed} == {sources.labels[digit]}


def test_boxes_hold_the_ink_and_do_not_overlap():
    sources = load_sources()
    pool = np.arange(len(sources.labels))
    black = sources._replace(photographs=[np.zeros((200, 200, 3), np.uint8)])
    for seed in range(20):
        image, placed = draw_image(black, pool, TINY, np.random.default_rng(seed))
        shown = np.zeros(image.shape[:2], bool)
        for _, (y_min, x_min, y_max, x_max) in placed:
            assert 0 <= y_min < y_max <= TINY.side
            assert 0 <= x_min < x_max <= TINY.side
            assert not shown[y_min:y_max, x_min:x_max].any()
            shown[y_min:y_max, x_min:x_max] = True
        # On black, a tint is light: strong ink is bright, and none of it is outside the boxes.
        assert image[~shown].max() < 110
        assert all(image[y0:y1, x0:x1].max() > 110 for _, (y0, x0, y1, x1) in placed)


def test_annotations_give_back_the_boxes(tmp_path):
    dataset = open_train(find_digits(tmp_path / "a", TINY))
    sources = load_sources()
    train_pool, _ = split_digits(len(sources.labels), TINY.seed)
    for i in range(len(dataset)):
        _, placed = draw_image(sources, train_pool, TINY, np.random.default_rng([TINY.seed, 1, i]))
        objects = dataset.objects(i)
        assert objects.label.tolist() == [entry.label for entry in placed]
        assert objects.bbox.astype(int).tolist() == [list(entry.box) for entry in placed]


def test_an_interrupted_making_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("interrupted")

    monkeypatch.setattr(data_digits, "_annotation", fail)
    with pytest.raises(RuntimeError, match="interrupted"):
        find_digits(tmp_path / "digits", TINY)
    assert list(tmp_path.iterdir()) == []


def test_the_set_of_a_faster_process_stays(tmp_path):
    folder = find_digits(tmp_path / "digits", TINY)
    before = contents(folder)
    data_digits.make_digits(folder, DigitsSettings(seed=9, train_images=2, test_images=2))
    assert contents(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda folder: (folder / "digits.json").unlink(), r"digits.json can't be read \(No such file"),
        (lambda folder: (folder / "digits.json").write_text("{"), "digits.json is damaged"),
        (lambda folder: (folder / "digits.json").write_text('{"sead": 5}'), "digits.json is damaged"),
        (
            lambda folder: (folder / "digits.json").write_text('{"version": 0}'),
            "it is of version 0 and not of 1",
        ),
        (
            lambda folder: cut_short(folder / "VOC2007/ImageSets/Main/test.txt"),
            "VOC2007/ImageSets/Main/test.txt names 1 images and not 3",
        ),
        (
            lambda folder: (folder / "VOC2007/JPEGImages/000002.jpg").unlink(),
            r"VOC2007/JPEGImages/000002.jpg can't be read \(No such file",
        ),
        (
            lambda folder: (folder / "VOC2007/Annotations/000003.xml").unlink(),
            r"VOC2007/Annotations/000003.xml can't be read \(No such file",
        ),
        (
            lambda folder: (folder / "VOC2007/ImageSets/Main/trainval.txt").unlink(),
            r"VOC2007/ImageSets/Main/trainval.txt can't be read \(No such file",
        ),
    ],
)
def test_a_damaged_set_is_one_sentence(tmp_path, damage, fault):
    folder = find_digits(tmp_path / "digits", TINY)
    damage(folder)
    with pytest.raises(InputError, match=f"^{folder} is no complete digits set, since {fault}") as error:
        find_digits(folder, TINY)
    assert str(error.value).endswith(
        f": delete it and train_multi.py --dataset-dir {folder} makes it again, or name another folder."
    )


def test_a_folder_that_can_not_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="can't be written"):
        find_digits(tmp_path / "file" / "digits", TINY)
