"""examples/cifar: reads the published files, draws its stand-in, trains end to end."""

from __future__ import annotations

import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from cifar_data import CifarSamples, draw_stand_in, read_cifar
from errors import InputError
from example_scripts import EXAMPLES, assert_one_sentence, run
from resnets import cifar_resnet
from train_resnet_on_cifar import rate_in_epoch

SCRIPT = EXAMPLES / "cifar" / "train_resnet_on_cifar.py"
FEW = ("--dataset", "digits", "--epoch", "0.05", "--train_batch", "8")


def published_batch(rng: np.random.Generator, n_images: int, labels: str, n_class: int) -> bytes:
    """A file as CIFAR's authors publish it: pickled by Python 2's protocol."""
    images = rng.integers(0, 256, size=(n_images, 3072), dtype=np.uint8)
    fields = {"data": images, labels: [int(label) for label in rng.integers(n_class, size=n_images)]}
    return pickle.dumps(fields, protocol=2)


def make_cifar10(folder: Path, rng: np.random.Generator) -> None:
    unpacked = folder / "cifar-10-batches-py"
    unpacked.mkdir(parents=True)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (unpacked / name).write_bytes(published_batch(rng, 4, "labels", 10))


def test_published_files_are_read_packed_and_unpacked(tmp_path, rng):
    make_cifar10(tmp_path, rng)
    train, test = read_cifar(tmp_path, 10)
    assert train.images.shape == (20, 3, 32, 32) and test.labels.shape == (4,)
    first = pickle.loads((tmp_path / "cifar-10-batches-py" / "data_batch_1").read_bytes())
    np.testing.assert_array_equal(train.images[0].ravel(), first["data"][0])

    packed = tmp_path / "packed"
    packed.mkdir()
    with tarfile.open(packed / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "cifar-10-batches-py", "cifar-10-batches-py")
    for ours, theirs in zip(read_cifar(packed, 10), (train, test), strict=True):
        np.testing.assert_array_equal(ours.images, theirs.images)
        np.testing.assert_array_equal(ours.labels, theirs.labels)


def test_cifar_100_has_its_fine_labels(tmp_path, rng):
    (tmp_path / "cifar-100-python").mkdir()
    for name in ("train", "test"):
        (tmp_path / "cifar-100-python" / name).write_bytes(published_batch(rng, 3, "fine_labels", 100))
    train, _ = read_cifar(tmp_path, 100)
    assert train.images.shape == (3, 3, 32, 32)


class Intruder:
    def __reduce__(self):
        return (Path.touch, (Path("intruder"),))


def test_a_pickle_that_would_run_code_is_refused(tmp_path, rng, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_cifar10(tmp_path, rng)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(pickle.dumps(Intruder()))
    with pytest.raises(InputError, match="data_batch_3"):
        read_cifar(tmp_path, 10)
    assert not Path("intruder").exists()


def test_half_a_file_is_named(tmp_path, rng):
    make_cifar10(tmp_path, rng)
    damaged = tmp_path / "cifar-10-batches-py" / "test_batch"
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(InputError, match="test_batch"):
        read_cifar(tmp_path, 10)


@pytest.mark.parametrize("n_class", [10, 100])
def test_the_stand_in_is_the_same_each_time_and_has_all_classes(n_class):
    train, test = draw_stand_in(n_class, n_train=20 * n_class, n_test=5)
    again, _ = draw_stand_in(n_class, n_train=20 * n_class, n_test=5)
    np.testing.assert_array_equal(train.images, again.images)
    assert set(train.labels) == set(range(n_class))
    assert train.images.shape[1:] == test.images.shape[1:] == (3, 32, 32)


def test_training_images_change_from_epoch_to_epoch_and_test_images_do_not():
    data, _ = draw_stand_in(10, n_train=2, n_test=1)
    changed, plain = CifarSamples(data, 10, np.float32, seed=1), CifarSamples(data, 10, np.float32)
    looks = {changed.sample(epoch, 0)[0].tobytes() for epoch in range(6)}
    assert len(looks) > 1
    np.testing.assert_array_equal(plain.sample(0, 1)[0], plain.sample(9, 1)[0])


def test_the_networks_have_as_many_layers_as_their_names_say():
    for n_layer in (20, 56, 110):
        weights = [param for name, param in cifar_resnet(n_layer, 10).namedparams() if name.endswith("/W")]
        # Shortcuts are not counted, one a stage.
        assert len(weights) - 3 == n_layer


def test_the_learning_rate_follows_the_paper():
    assert [rate_in_epoch(epoch, 0.1, 20) for epoch in (0, 81, 122)] == pytest.approx([0.1, 0.01, 0.001])
    assert [rate_in_epoch(epoch, 0.1, 110) for epoch in (0, 4.9, 5)] == pytest.approx([0.01, 0.01, 0.1])


def test_trains_writes_and_resumes(tmp_path):
    finished = run(SCRIPT, *FEW, "--update_per_n_iteration", 1000, "--out", tmp_path)
    assert finished.returncode == 0, finished.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["outcome"] == "finished" and result["iterations"] == 7
    assert 0 <= result["validation/main/accuracy"] <= 1
    assert result["scaling"] == "approx_range, chosen every 1000 iterations"
    assert (tmp_path / "model.npz").exists()

    assert_one_sentence(run(SCRIPT, *FEW, "--out", tmp_path), "earlier run", "--resume auto")
    assert_one_sentence(
        run(SCRIPT, *FEW, "--out", tmp_path, "--resume", "auto"), "--update-per-n-iteration 1000", "this is 1"
    )
    longer = ("--update_per_n_iteration", 1000, "--epoch", 0.07, "--out", tmp_path, "--resume", "auto")
    resumed = run(SCRIPT, *FEW, *longer)
    assert resumed.returncode == 0 and "Goes on after iteration 7" in resumed.stdout, resumed.stderr
    assert json.loads((tmp_path / "result.json").read_text())["iterations"] == 9


def test_a_run_that_diverges_says_so_and_ends_with_a_status_of_its_own(tmp_path):
    finished = run(SCRIPT, *FEW, "--dtype", "float32", "--lr", "1e30", "--out", tmp_path)
    assert finished.returncode == 3, finished.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["outcome"] == "diverged" and "diverged" in result["message"]
    assert not (tmp_path / "model.npz").exists()


def test_two_ranks_train_on_what_one_would(tmp_path):
    losses = []
    for ranks, out in ((None, tmp_path / "one"), (2, tmp_path / "two")):
        finished = run(SCRIPT, *FEW, "--dtype", "float32", "--lr", "1e-6", "--out", out, ranks=ranks)
        assert finished.returncode == 0, finished.stderr
        losses.append(json.loads((out / "log.json").read_text())[-1]["main/loss"])
    # Batch statistics are of each rank's own half.
    np.testing.assert_allclose(*losses, rtol=0.1)
    assert json.loads((tmp_path / "two" / "result.json").read_text())["ranks"] == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--data-dir", "nowhere"), ("CIFAR-10 is not in nowhere", "cifar-10-python.tar.gz")),
        (("--n_layer", "21"), ("--n_layer",)),
        (("--gpu", "0", "--dataset", "digits"), ("--device 0 needs a GPU",)),
        (("--loss_scale", "3", "--dataset", "digits"), ("power of two",)),
        (("--dataset", "digits", "--resume", "nowhere"), ("no complete checkpoint",)),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, arguments, words):
    finished = run(SCRIPT, *arguments, "--out", tmp_path, CUDA_VISIBLE_DEVICES="")
    assert_one_sentence(finished, *words)


def test_bad_input_is_one_sentence_on_two_ranks(tmp_path):
    finished = run(SCRIPT, "--data-dir", "nowhere", "--out", tmp_path, ranks=2)
    assert finished.returncode == 2 and finished.stderr.count("error:") == 1, finished.stderr
