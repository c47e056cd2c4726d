import dataclasses

import numpy as np
import pytest

from ada_loss.core.config import METHODS, AdaLossConfig


def test_defaults_are_the_papers():
    config = AdaLossConfig()
    assert config.loss_scale_method == "auto"
    assert (config.scale_upper_bound, config.accum_upper_bound, config.n_uf) == (16.0, 1024.0, 1e-3)
    assert (config.init_scale, config.init_exponent) == (1.0, 0)
    assert config.dynamic_interval is None


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_accepted(method):
    assert AdaLossConfig(loss_scale_method=method).loss_scale_method == method


@pytest.mark.parametrize("exponent", [-16, -1, 0, 1, 7, 40])
def test_init_exponent_is_the_logarithm_of_the_scale(exponent):
    assert AdaLossConfig(init_scale=2.0**exponent).init_exponent == exponent
    assert AdaLossConfig(init_scale=np.float32(2.0**exponent)).init_exponent == exponent


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("init_scale", 0),
        ("init_scale", -2.0),
        ("init_scale", 3.0),
        ("init_scale", float("inf")),
        ("init_scale", float("nan")),
        ("init_scale", "128"),
        ("init_scale", True),
        ("scale_upper_bound", 0.5),
        ("scale_upper_bound", float("nan")),
        ("scale_upper_bound", "16"),
        ("accum_upper_bound", 0.0),
        ("accum_upper_bound", float("inf")),
        ("n_uf", 0.0),
        ("n_uf", 0.5),
        ("n_uf", float("nan")),
        ("update_per_n_iteration", 0),
        ("update_per_n_iteration", 1.5),
        ("update_per_n_iteration", True),
        ("dynamic_interval", 0),
        ("dynamic_interval", -3),
        ("dynamic_interval", 10.0),
        ("cast_distribution", "uniform"),
        ("loss_scale_method", "approx"),
        ("loss_scale_method", None),
    ],
)
def test_a_bad_value_is_named_in_one_sentence(field, value):
    with pytest.raises(ValueError) as caught:
        AdaLossConfig(**{field: value})
    message = str(caught.value)
    assert message.startswith(field) and repr(value) in message
    assert message.endswith(".") and "\n" not in message


def test_an_unknown_method_is_told_the_known_ones():
    with pytest.raises(ValueError) as caught:
        AdaLossConfig(loss_scale_method="aprox_range")
    assert all(method in str(caught.value) for method in METHODS)


def test_no_bounds_and_numpy_integers_are_fine():
    config = AdaLossConfig(
        scale_upper_bound=None,
        accum_upper_bound=None,
        update_per_n_iteration=np.int64(10),
        dynamic_interval=1,
    )
    assert config.update_per_n_iteration == 10


def test_a_config_cannot_change_or_be_made_by_position():
    with pytest.raises(dataclasses.FrozenInstanceError):
        AdaLossConfig().init_scale = 2.0
    with pytest.raises(TypeError):
        AdaLossConfig("fixed")
