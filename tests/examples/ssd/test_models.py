from __future__ import annotations

import chainer
import numpy as np
import pytest

from coding import BoxCoder
from models import BOXES_IN_FIRST_CELLS, MODELS, added_layers, build_model, input_dtype


def added_weights(initializer: str, seed: int = 0) -> list[np.ndarray]:
    return [layer.W.array for layer in added_layers(build_model("small", 10, initializer, seed))]


def test_feature_maps_of_the_small_model_have_the_sizes_of_its_grids():
    model = build_model("small", 10, "lecun-uniform", seed=0)
    maps = model.extractor(np.zeros((1, 3, model.insize, model.insize), np.float32))
    assert tuple(feature_map.shape[2] for feature_map in maps) == model.extractor.grids


def test_lecun_uniform_fills_up_to_the_root_of_3_over_fan_in():
    for weight in added_weights("lecun-uniform"):
        limit = np.sqrt(3 / np.prod(weight.shape[1:]))
        assert 0.99 * limit < np.abs(weight).max() <= limit


def test_xavier_is_gaussian_with_variance_2_over_fan_out():
    for weight in added_weights("xavier"):
        fan_out = weight.shape[0] * 9
        assert np.std(weight) == pytest.approx(np.sqrt(2 / fan_out), rel=0.03)
        assert np.abs(weight).max() > 3 * np.std(weight)


def test_uniform_fills_up_to_007():
    for weight in added_weights("uniform"):
        assert 0.0695 < np.abs(weight).max() <= 0.07


def test_the_initializer_leaves_the_backbone_alone():
    first, second = (build_model("small", 10, name, seed=0) for name in ("xavier", "uniform"))
    limit = np.sqrt(2 / (64 * 9))
    for model in (first, second):
        assert np.std(model.extractor.conv3_2.W.array) == pytest.approx(limit, rel=0.03)


def test_weights_depend_on_the_seed_only():
    models = [build_model("small", 10, "lecun-uniform", seed) for seed in (1, 1, 2)]
    first, again, other = (dict(model.namedparams()) for model in models)
    weights = [name for name in first if name.endswith("/W")]
    assert len(weights) == 14
    assert all((first[name].array == again[name].array).all() for name in weights)
    assert not any((first[name].array == other[name].array).any() for name in weights)


def test_building_does_not_touch_the_global_random_state():
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    build_model("small", 10, "xavier", seed=0)
    np.testing.assert_array_equal(np.random.get_state()[1], before)


@pytest.mark.parametrize(("name", "n_extra", "n_maps"), [("ssd300", 8, 6), ("ssd512", 10, 7)])
def test_added_layers_are_the_extra_maps_and_both_heads(name, n_extra, n_maps):
    assert len(list(added_layers(MODELS[name].build(20)))) == n_extra + 2 * n_maps


@pytest.mark.parametrize("name", MODELS)
def test_first_cells_of_all_models_have_as_many_boxes_as_their_files_are_told_apart_by(name):
    model = MODELS[name].build(20)
    assert model.multibox.conf[0].b.shape[0] == BOXES_IN_FIRST_CELLS * 21


@pytest.mark.parametrize(("dtype", "expected"), [("float32", np.float32), ("float16", np.float16)])
def test_images_are_cast_to_the_dtype_of_the_parameters(dtype, expected):
    with chainer.using_config("dtype", np.dtype(dtype)):
        model = build_model("small", 10, "lecun-uniform", seed=0)
    assert input_dtype(model) == expected


def test_normal_is_gaussian_with_a_deviation_of_001():
    weights = np.concatenate([weight.ravel() for weight in added_weights("normal")])
    assert np.std(weights) == pytest.approx(0.01, rel=0.02)
    assert np.abs(weights).max() > 0.03


def test_variances_are_those_asked_for():
    for variances in ((0.1, 0.2), (0.3, 0.05)):
        model = build_model("small", 10, "normal", 0, variances)
        assert BoxCoder.of(model.coder).variance == variances
