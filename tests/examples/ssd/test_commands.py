"""The published commands: they parse, and they train SSD300 and SSD512 on VOC."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from chainer.dataset.download import get_dataset_root, set_dataset_root
from processes import EXAMPLE, run_script
from runs import assert_same_end, meanwhile, press_ctrl_c, read, weights

import train_multi
from arguments import parse_settings
from batches import Schedule
from conftest import make_devkit
from errors import InputError
from models import MODELS
from weights import IMAGENET_URL, find_pretrained

IMAGENET_FILE = "ssd_vgg16_imagenet_converted_2017_06_09.npz"
VGG_WIDTHS = {1: (64, 2), 2: (128, 2), 3: (256, 3), 4: (512, 3), 5: (512, 3)}

PUBLISHED = {
    "adaptive": "--model ssd512 --dtype mixed16 --out DIR --loss-scale-method approx_range",
    "static": "--model ssd512 --dtype mixed16 --out DIR --loss-scale-method fixed --init-scale 128",
    "dynamic": "--model ssd512 --dtype mixed16 --out DIR --loss-scale-method fixed --dynamic-interval 10",
    "none": "--model ssd512 --dtype mixed16 --out DIR --loss-scale-method fixed --init-scale 1",
}
MORE_METHODS = {
    "float32": "--model ssd512 --dtype float32 --out DIR",
    "freq=10": f"{PUBLISHED['adaptive']} --update-per-n-iteration 10",
    "abs_range": "--model ssd512 --dtype mixed16 --out DIR --loss-scale-method abs_range",
    "element_wise_range": "--model ssd512 --dtype mixed16 --out DIR --loss-scale-method element_wise_range",
    "auto": "--model ssd512 --dtype mixed16 --out DIR --loss-scale-method auto",
}
# What keeps a run short: one image a batch, and samples made in the process itself.
BRIEF = ("--batchsize", "1", "--loaders", "0", "--log-interval", "1", "--device", "cpu")


def command(name: str, out: Path, model: str = "ssd512") -> list[str]:
    text = (PUBLISHED | MORE_METHODS)[name].replace("ssd512", model).replace("DIR", str(out))
    return text.split()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chainer's data sets: VOC with one image a split, and a file in the place of ImageNet's weights."""
    root = tmp_path_factory.mktemp("dataset")
    below = root / "pfnet" / "chainercv"
    make_devkit(below / "voc" / "VOCdevkit", n_images=1)
    (below / "models").mkdir()
    np.savez(below / "models" / IMAGENET_FILE, **random_vgg(np.random.default_rng(11)))
    return root


@pytest.fixture
def at_home(home: Path):
    before = get_dataset_root()
    set_dataset_root(str(home))
    yield home
    set_dataset_root(before)


def random_vgg(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Arrays with the paths and shapes of VGG-16 in ChainerCV's SSD."""
    shapes, channels = {}, 3
    for block, (width, depth) in VGG_WIDTHS.items():
        for layer in range(1, depth + 1):
            shapes[f"conv{block}_{layer}"] = (width, channels, 3, 3)
            channels = width
    shapes |= {"conv6": (1024, 512, 3, 3), "conv7": (1024, 1024, 1, 1)}
    arrays = {}
    for name, shape in shapes.items():
        # Pixels are of the order of 100, and go on through the layers as large as the first leaves them.
        deviation = np.float32(np.sqrt(2 / np.prod(shape[1:])) / (64 if name == "conv1_1" else 1))
        arrays[f"extractor/{name}/W"] = deviation * rng.standard_normal(shape, dtype=np.float32)
        arrays[f"extractor/{name}/b"] = np.zeros(shape[0], np.float32)
    return arrays


@pytest.mark.parametrize("model", ["ssd300", "ssd512"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_commands_mean_what_the_page_says(name, model):
    settings = parse_settings(command(name, Path("/home/user/results"), model))
    assert (settings.model, settings.dtype, settings.dataset) == (model, "mixed16", "voc")
    assert settings.out == Path("/home/user/results")
    expected = {
        "adaptive": ("approx_range", 1, None),
        "static": ("fixed", 128, None),
        "dynamic": ("fixed", 1, 10),
        "none": ("fixed", 1, None),
    }[name]
    assert (settings.loss_scale_method, settings.init_scale, settings.dynamic_interval) == expected
    assert (settings.pretrained, settings.batchsize, settings.lr) == ("imagenet", 32, 1e-3)
    assert (settings.iteration, settings.step, settings.warm_up) == (120_000, (80_000, 100_000), 0)


def test_other_batch_sizes_warm_up():
    settings = parse_settings([*command("adaptive", Path("out")), "--batchsize", "8"])
    assert settings.warm_up == 1000


def test_the_readme_shows_the_published_commands_and_all_its_commands_parse():
    shown = re.findall(r"^python3 train_multi\.py (.*)$", (EXAMPLE / "README.md").read_text(), re.MULTILINE)
    assert set(PUBLISHED.values()) <= set(shown)
    for line in shown:
        parse_settings(shlex.split(line))


def test_missing_imagenet_weights_are_named_with_their_place(home, tmp_path, capsys):
    voc = home / "pfnet" / "chainercv" / "voc"
    more = ["--dataset-dir", str(voc), "--model-dir", str(tmp_path)]
    assert train_multi.main([*command("adaptive", tmp_path / "run"), *more]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: The ImageNet weights {IMAGENET_FILE} can't be had (it is not there): ")
    assert f"into {tmp_path}, or start without them with --pretrained none.\n" in printed
    assert printed.count("\n") == 1


def test_without_a_network_the_place_for_imagenet_weights_is_chainercvs(tmp_path, monkeypatch):
    def offline(url: str) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr("weights.get_dataset_root", lambda: str(tmp_path))
    monkeypatch.setattr("weights.download_model", offline)
    folder = tmp_path / "pfnet" / "chainercv" / "models"
    with pytest.raises(
        InputError,
        match=re.escape(f"(no route to host): put that file, which is at {IMAGENET_URL}, into {folder}"),
    ):
        find_pretrained("imagenet", None)


def test_ssd512_trains_from_imagenet_is_interrupted_goes_on_and_is_evaluated(at_home, tmp_path, monkeypatch):
    more = ("--iteration", "2", "--checkpoint-interval", "1", "--lr", "1e-4", "--step")
    line = [*command("adaptive", tmp_path), *BRIEF, *more]
    with monkeypatch.context() as patched:
        patched.setattr(Schedule, "share", meanwhile(press_ctrl_c, after=1))
        assert train_multi.main(line) == 130
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["iteration-00000001"]
    assert not (tmp_path / "result.json").exists()

    assert train_multi.main([*line, "--resume", "auto"]) == 0
    result, rows = read(tmp_path / "result.json"), read(tmp_path / "log.json")
    assert (result["outcome"], result["iterations"], result["skipped_steps"]) == ("finished", 2, 0)
    assert [row["iteration"] for row in rows] == [1, 2]
    assert all(np.isfinite(row["main/loss"]) for row in rows)
    assert 0 <= result["map"] <= 1
    assert result["map"] == rows[-1]["map"]
    # The one test image has cats and dogs that count, and a person that is flagged as difficult.
    assert {name for name, ap in result["average_precision"].items() if ap is not None} >= {"cat", "dog"}

    trained, start = weights(tmp_path), random_vgg(np.random.default_rng(11))
    assert trained.keys() == {path.lstrip("/") for path, _ in MODELS["ssd512"].build(20).namedparams()}
    assert all(array.dtype == np.float16 and np.isfinite(array).all() for array in trained.values())
    for name in ("extractor/conv1_1/W", "extractor/conv5_3/W"):
        begun = start[name].astype(np.float16).astype(np.float32)
        moved = np.linalg.norm(trained[name] - begun) / np.linalg.norm(begun)
        assert 0 < moved < 0.5, name


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED | MORE_METHODS)
def test_ssd512_resumes_with_every_method_as_if_never_stopped(at_home, tmp_path, name):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    more = (*BRIEF, "--iteration", "2", "--checkpoint-interval", "1")
    assert train_multi.main([*command(name, whole), *more]) == 0
    assert read(whole / "result.json")["outcome"] == "finished"
    checkpoint = str(whole / "checkpoints" / "iteration-00000001")
    assert train_multi.main([*command(name, resumed), *more, "--resume", checkpoint]) == 0
    assert_same_end(whole, resumed)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [None, 2])
@pytest.mark.parametrize("model", ["ssd300", "ssd512"])
def test_the_command_runs_from_the_example_alone_and_behind_mpiexec(home, tmp_path, model, ranks):
    line = [*command("adaptive", tmp_path, model), "--batchsize", "2", "--iteration", "1"]
    result = run_script("train_multi.py", *line, ranks=ranks, CHAINER_DATASET_ROOT=str(home))
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].startswith(f"{model} on voc | mixed16, approx_range")
    assert read(tmp_path / "result.json")["ranks"] == (ranks or 1)


@pytest.mark.slow
def test_ssd300_trains_with_the_other_choices(at_home, tmp_path):
    choices = ("--initializer", "xavier", "--decoder", "argmax", "--loss-norm", "sample")
    assert (
        train_multi.main([*command("adaptive", tmp_path, "ssd300"), *BRIEF, *choices, "--iteration", "1"])
        == 0
    )
    assert read(tmp_path / "result.json")["outcome"] == "finished"
