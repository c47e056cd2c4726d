"""evaluate.py --dataset coco: ChainerCV's loader and metric, on a stand-in in COCO's layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from chainer.serializers import save_npz
from chainercv.datasets import coco_bbox_label_names
from PIL import Image
from runs import assert_one_sentence

import evaluate
import evaluation
import predict
from data_coco import COCO_CLASSES, CocoDataset, labels_in_coco
from data_voc import VOC_CLASSES
from detector import Boxes
from errors import InputError
from evaluation import coco_precisions
from models import build_model

# ChainerCV's loader leaves the closing of its file to Python.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

# COCO's identities of categories have gaps.
IDENTITIES = [label + 1 + label // 10 for label in range(80)]


@pytest.fixture
def coco(tmp_path, rng) -> Path:
    """Three images, the last one without objects; one object is a crowd."""
    root = tmp_path / "coco"
    images, annotations = [], []
    (root / "images" / "val2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    for number, labels in enumerate(([0, 5], [5, 14, 14], [])):
        name = f"{number:012d}.jpg"
        Image.fromarray(rng.integers(0, 256, size=(60, 80, 3), dtype=np.uint8)).save(
            root / "images" / "val2017" / name
        )
        images.append({"id": 100 + number, "file_name": name, "height": 60, "width": 80})
        for place, label in enumerate(labels):
            box = [5 + 20 * place, 10, 15, 30]
            entry = {"id": len(annotations), "image_id": 100 + number, "category_id": IDENTITIES[label]}
            crowd = int(number == 1 and place == 2)
            annotations.append(entry | {"bbox": box, "area": 450, "iscrowd": crowd, "segmentation": []})
    categories = [{"id": i, "name": name} for i, name in zip(IDENTITIES, coco_bbox_label_names, strict=True)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def voc_weights(tmp_path) -> Path:
    path = tmp_path / "model.npz"
    save_npz(path, build_model("small", 20, "lecun-uniform", seed=0))
    return path


def exact(objects) -> Boxes:
    """What a perfect detector finds; it need not find crowds."""
    wanted = ~objects.crowded.astype(bool)
    return Boxes(objects.bbox[wanted], objects.label[wanted], np.ones(wanted.sum(), np.float32))


def test_boxes_labels_and_crowds_are_read(coco):
    dataset = CocoDataset.open(coco)
    assert len(dataset) == 3
    objects = dataset.objects(1)
    np.testing.assert_array_equal(objects.bbox[0], [10, 5, 40, 20])
    assert objects.label.tolist() == [5, 14, 14]
    assert objects.crowded.tolist() == [0, 0, 1]
    assert objects.area.tolist() == [450, 450, 450]
    assert dataset.image(0).shape == (3, 60, 80)
    assert len(dataset.objects(2).label) == 0


def test_the_classes_of_voc_are_found_in_coco():
    labels = labels_in_coco(20)
    assert len(set(labels)) == 20
    names = dict(zip(VOC_CLASSES, (COCO_CLASSES[label] for label in labels), strict=True))
    assert (names["cat"], names["sofa"], names["tvmonitor"]) == ("cat", "couch", "tv")
    assert labels_in_coco(80).tolist() == list(range(80))
    assert labels_in_coco(10) is None


def test_a_perfect_detector_has_precision_one(coco):
    pytest.importorskip("pycocotools")
    dataset = CocoDataset.open(coco)
    results = [(exact(dataset.objects(i)), dataset.objects(i)) for i in range(3)]
    for precisions in coco_precisions(results, labels_in_coco(80)).values():
        assert precisions[[0, 5, 14]].tolist() == [1, 1, 1]
        assert np.isnan(np.delete(precisions, [0, 5, 14])).all()


def test_a_detector_of_vocs_classes_is_measured_by_coco(coco):
    pytest.importorskip("pycocotools")
    dataset, labels = CocoDataset.open(coco), labels_in_coco(20)
    results = []
    for i in range(3):
        found = exact(dataset.objects(i))
        as_voc = np.array([labels.tolist().index(label) for label in found.label], np.int32)
        results.append((found._replace(label=as_voc), dataset.objects(i)))
    precisions = coco_precisions(results, labels)["0.50:0.95"]
    seen = [VOC_CLASSES.index(name) for name in ("person", "bus", "bird")]
    assert precisions[seen].tolist() == [1, 1, 1]
    assert np.isnan(np.delete(precisions, seen)).all()


def test_evaluate_prints_cocos_three_overlaps(coco, voc_weights, capsys):
    pytest.importorskip("pycocotools")
    assert evaluate.main([str(voc_weights), "--dataset", "coco", "--dataset-dir", str(coco)]) == 0
    head, *lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert head == ["overlap", "0.50:0.95", "0.50", "0.75"]
    assert len(lines) == 21
    assert lines[-1][0] == "mAP"
    assert all(0 <= float(mean) <= 1 for mean in lines[-1][1:])


def test_without_objects_there_is_no_map(coco):
    dataset = CocoDataset.open(coco)
    nothing = Boxes(np.zeros((0, 4), np.float32), np.zeros(0, np.int32), np.zeros(0, np.float32))
    precisions = coco_precisions([(nothing, dataset.objects(2))], labels_in_coco(20))
    assert all(np.isnan(column).all() for column in precisions.values())


def test_without_pycocotools_the_sentence_names_it(coco, voc_weights, capsys, monkeypatch):
    monkeypatch.setattr(evaluation.importlib.util, "find_spec", lambda name: None)
    assert evaluate.main([str(voc_weights), "--dataset", "coco", "--dataset-dir", str(coco)]) == 2
    assert_one_sentence(capsys, "--dataset coco needs a package that is not there: pip install pycocotools.")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"images"', '"pictures"', "instances_val2017.json is damaged ("),
        ("[", "", "instances_val2017.json is damaged ("),
        ('"id": 1,', '"no": 1,', "instances_val2017.json is damaged ("),
        ('"bbox": [5', '"bbox": ["x"', "annotations of image 100 are damaged ("),
        ('"category_id": 1,', '"category_id": 999,', "annotations of image 100 are damaged ("),
    ],
)
def test_damaged_annotations_are_one_sentence(coco, old, new, words):
    path = coco / "annotations" / "instances_val2017.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(InputError) as error:
        CocoDataset.open(coco).objects(0)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_coco_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match="COCO is not in .*instances_val2017.json exists"):
        CocoDataset.open(tmp_path)


def test_a_detector_of_digits_is_not_tested_on_coco(coco, tmp_path, capsys):
    path = tmp_path / "model.npz"
    save_npz(path, build_model("small", 10, "lecun-uniform", seed=0))
    assert evaluate.main([str(path), "--dataset", "coco", "--dataset-dir", str(coco)]) == 2
    assert_one_sentence(capsys, "knows the classes of digits: use --dataset digits")


def test_predict_names_cocos_classes(coco, tmp_path, capsys):
    path, image = tmp_path / "model.npz", coco / "images" / "val2017" / "000000000000.jpg"
    save_npz(path, build_model("small", 80, "lecun-uniform", seed=0))
    assert predict.main([str(path), str(image), "--out", str(tmp_path / "out"), "--score", "0.01"]) == 0
    printed = capsys.readouterr().out
    assert any(f"({name} 0." in printed for name in COCO_CLASSES)
