"""What a user hands over by mistake is answered by one sentence that says what to write."""

import chainer
import chainer.links as L
import numpy as np
import pytest
from chainer import optimizers

from ada_loss.chainer import AdaLossScaled, prepare
from ada_loss.chainer.settings import FORMER_NAMES


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
