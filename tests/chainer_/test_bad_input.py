"""What a user hands over by mistake is answered by one sentence that says what to write."""

import copy
import inspect
import pickle
from dataclasses import fields, replace

import chainer
import chainer.links as L
import numpy as np
import pytest
from chainer import optimizers

from ada_loss.chainer import AdaLossLinear, AdaLossScaled, functions, prepare
from ada_loss.chainer.settings import FORMER_NAMES
from ada_loss.core.config import AdaLossConfig


def refusal(call, kind):
    """The one line with which `call` is refused."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and message.endswith((".", "?"))
    return message


@pytest.mark.parametrize(
    "written, meant",
    [
        ("init_scal", "init_scale"),
        ("initscale", "init_scale"),
        ("dynamic_intervall", "dynamic_interval"),
        ("loss_scale_methods", "loss_scale_method"),
        ("outputdtype", "output_dtype"),
        ("filters", "filter"),
        ("timeing", "timing"),
    ],
)
def test_a_setting_that_is_spelt_wrong_is_answered_by_the_one_that_was_meant(written, meant):
    message = refusal(lambda: AdaLossScaled(L.Linear(2, 2), **{written: 1}), TypeError)
    assert message == f"AdaLossScaled takes no {written}=: did you mean {meant}=?"


def test_a_setting_that_is_like_no_other_is_answered_by_all_there_are():
    message = refusal(lambda: AdaLossScaled(L.Linear(2, 2), zzz=1), TypeError)
    assert "zzz=" in message and "init_scale" in message and "output_dtype" in message


@pytest.mark.parametrize("name", FORMER_NAMES)
def test_a_name_of_the_papers_code_is_answered_by_what_stands_for_it(name):
    message = refusal(lambda: AdaLossScaled(L.Linear(2, 2), **{name: {}}), TypeError)
    assert f"{name}=" in message and FORMER_NAMES[name] in message


def test_a_refused_model_is_left_as_it_was():
    model = chainer.Sequential(L.Linear(2, 2))
    for settings in ({"cfg": {}}, {"init_scale": 3}, {"output_dtype": "int32"}):
        with pytest.raises((TypeError, ValueError)):
            AdaLossScaled(model, **settings)
    assert type(model) is chainer.Sequential and type(model[0]) is L.Linear
    assert type(model[0].W) is chainer.Parameter


@pytest.mark.parametrize("wrong", ["int32", "float15", bool, "complex64", 16, object(), np.longdouble])
def test_results_have_a_floating_point_type(wrong):
    message = refusal(lambda: AdaLossScaled(L.Linear(2, 2), output_dtype=wrong), ValueError)
    assert message.startswith("output_dtype must be float16, float32 or float64") and repr(wrong) in message


@pytest.mark.parametrize("right", ["float16", np.float32, np.dtype("float64"), "e", None])
def test_every_spelling_of_such_a_type_will_do(right):
    AdaLossScaled(L.Linear(2, 2), output_dtype=right)


@pytest.mark.parametrize("wrong", [3, [1], ["/0", None], object()])
def test_a_filter_is_a_function_or_patterns(wrong):
    message = refusal(lambda: AdaLossScaled(L.Linear(2, 2), filter=wrong), TypeError)
    assert message.startswith("filter must be a function of path and link, or a pattern of paths")


@pytest.mark.parametrize("wrong", [3, "/head", ["/head"], {1: {}}, {"/head": "fixed"}, {"/head": {1: 2}}])
def test_settings_of_parts_are_dictionaries_by_pattern(wrong):
    message = refusal(lambda: AdaLossScaled(L.Linear(2, 2), layers=wrong), TypeError)
    assert message.startswith("layers must be a dictionary of settings by pattern")


@pytest.mark.parametrize("wrong", ["fixed", {"loss_scale_method": "fixed"}, 8])
def test_a_layer_takes_its_settings_as_a_configuration(wrong):
    for call in (
        lambda: AdaLossLinear(2, 2).with_config(wrong),
        lambda: functions.linear(np.ones((1, 2)), np.ones((1, 2)), config=wrong),
    ):
        assert refusal(call, TypeError).startswith("A layer takes its settings as an AdaLossConfig")


def test_a_configuration_says_which_setting_was_meant():
    message = refusal(lambda: AdaLossConfig(init_scal=1), TypeError)
    assert message == "AdaLossConfig takes no init_scal=: did you mean init_scale=?"


def test_tools_see_the_settings():
    assert [*inspect.signature(AdaLossConfig).parameters] == [field.name for field in fields(AdaLossConfig)]


@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, replace, lambda c: pickle.loads(pickle.dumps(c))]
)
def test_a_configuration_can_be_copied(again):
    config = AdaLossConfig(loss_scale_method="fixed", init_scale=8)
    assert again(config) == config


@pytest.mark.parametrize(
    "thing, said",
    [
        (None, "not None"),
        (3, "of type int"),
        (lambda x: x, "of type function"),
        (L.Linear, "write AdaLossScaled(Linear(...))"),
        (optimizers.Adam(), "prepare takes the optimizer"),
        (optimizers.Adam().setup(L.Linear(2, 2)), "prepare takes the optimizer"),
    ],
)
def test_only_a_link_can_be_scaled(thing, said):
    assert said in refusal(lambda: AdaLossScaled(thing), TypeError)


@pytest.mark.parametrize(
    "thing, said",
    [
        (None, "not None"),
        ("Adam", "of type str"),
        (L.Linear(2, 2), "not the model"),
        (optimizers.Adam, "write prepare(Adam().setup(model))"),
        (chainer.optimizers.Adam().create_update_rule(), "of type AdamRule"),
    ],
)
def test_only_an_optimizer_can_be_prepared(thing, said):
    assert said in refusal(lambda: prepare(thing), TypeError)


def test_a_scaled_model_is_no_optimizer():
    assert "not the model" in refusal(lambda: prepare(AdaLossScaled(L.Linear(2, 2))), TypeError)


def test_an_optimizer_is_prepared_after_its_setup():
    assert "optimizer.setup(model) before" in refusal(lambda: prepare(optimizers.Adam()), ValueError)
