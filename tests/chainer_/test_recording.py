"""Recording tells what a training's arrays are like, and changes nothing of it."""

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import training

from ada_loss.chainer import AdaLossScaled, extensions, observing, prepare, record
from ada_loss.core.histogram import Histogram
from ada_loss.core.record_file import read
from ada_loss.core.records import ACTIVATION, BIAS_GRADIENT, INPUT_GRADIENT, WEIGHT_GRADIENT, Place
from helpers import dtype

TINY = 2.0**-16


class Net(chainer.Chain):
    """Two convolutions with normalization and ReLU in between, and a classifier."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.conv1 = L.Convolution2D(3, 8, 3, pad=1)
            self.bn = L.BatchNormalization(8)
            self.conv2 = L.Convolution2D(8, 8, 3, pad=1)
            self.head = L.Linear(None, 4)

    def forward(self, x):
        h = F.relu(self.bn(self.conv1(x)))
        h = F.relu(self.conv2(h))
        return self.head(F.average_pooling_2d(h, 4))


def batches(rng, count=4, half=np.float16):
    return [
        (rng.normal(size=(8, 3, 8, 8)).astype(half), rng.integers(0, 4, 8).astype(np.int32))
        for _ in range(count)
    ]


def loss_of(model, x, t, factor=TINY):
    return factor * F.softmax_cross_entropy(F.cast(model(x), np.float32), t)


def new(method, seed=0):
    """A model and its optimizer."""
    np.random.seed(seed)
    with dtype("float16"):
        model = Net()
        model.head(np.zeros((1, 32), np.float16))
    if method not in ("none", "loss scale"):
        model = AdaLossScaled(model, method)
    optimizer = chainer.optimizers.MomentumSGD(0.1).setup(model)
    if method == "loss scale":
        optimizer.loss_scaling(1000.0)
    return model, prepare(optimizer) if method not in ("none", "loss scale") else optimizer


def train(model, optimizer, data, factor=TINY, recording=None):
    for x, t in data:
        optimizer.update(lambda x=x, t=t: loss_of(model, x, t, factor))
        if recording is not None:
            recording.end_step(loss=1.5)


METHODS = ("none", "loss scale", "fixed", "auto")


@pytest.mark.parametrize("method", METHODS)
def test_a_training_that_is_recorded_has_the_same_bits(rng, tmp_path, method):
    data = batches(rng)
    model, optimizer = new(method)
    train(model, optimizer, data)
    watched, other = new(method)
    with record(other, tmp_path, every=2) as recording:
        train(watched, other, data, recording=recording)
    for (path, p), (_, q) in zip(model.namedparams(), watched.namedparams(), strict=True):
        np.testing.assert_array_equal(p.array, q.array, err_msg=path)
        assert type(p) is type(q)


@pytest.mark.parametrize("method", METHODS)
def test_every_layer_is_recorded_in_both_directions(rng, tmp_path, method):
    model, optimizer = new(method)
    with record(optimizer, tmp_path, every=2) as recording:
        train(model, optimizer, batches(rng), recording=recording)
    run = read(tmp_path)
    assert [step.step for step in run.steps] == [0, 2] and run.end.outcome == "finished"
    first = {record.place for record in run.places if record.step == 0}
    layers = ("/conv1", "/bn", "/conv2", "/head")
    assert {Place(path, ACTIVATION) for path in layers} <= first
    # The image needs no gradient.
    assert {Place(path, INPUT_GRADIENT) for path in layers[1:]} <= first
    assert {Place(f"{path}/W", WEIGHT_GRADIENT) for path in ("/conv1", "/conv2", "/head")} <= first
    assert {Place(f"{path}/b", BIAS_GRADIENT) for path in ("/conv1", "/conv2", "/head")} <= first


def parameter_gradients(model, x, t):
    model.cleargrads()
    loss_of(model, x, t).backward()
    return {path: p.grad.copy() for path, p in model.namedparams()}


def test_a_plain_model_s_gradients_are_chainer_s_own(rng, tmp_path):
    ((x, t),) = batches(rng, 1)
    model, _ = new("none")
    own = parameter_gradients(model, x, t)
    model, optimizer = new("none")
    with record(optimizer, tmp_path) as recording:
        train(model, optimizer, [(x, t)], recording=recording)
    found = {record.place.path: record for record in read(tmp_path).places if record.place.kind != ACTIVATION}
    for path in ("/conv1/W", "/conv2/W", "/conv2/b", "/head/W"):
        assert found[path].histogram == Histogram.of(own[path])


def test_what_float16_lost_is_what_float32_has(rng, tmp_path):
    """Element by element, against the same model computed in float32 from the same numbers."""
    ((x, t),) = batches(rng, 1)
    half, _ = new("none")
    lossy = parameter_gradients(half, x, t)
    with dtype("float32"):
        single = Net()
        single.head(np.zeros((1, 32), np.float32))
    for (_, p), (_, q) in zip(single.namedparams(), half.namedparams(), strict=True):
        p.array = q.array.astype(np.float32)
    truth = parameter_gradients(single, x.astype(np.float32), t)
    model, optimizer = new("none")
    with record(optimizer, tmp_path) as recording:
        train(model, optimizer, [(x, t)], recording=recording)
    found = {record.place.path: record for record in read(tmp_path).places}
    lost = 0
    for path in ("/conv1/W", "/conv2/W", "/conv2/b", "/head/W", "/head/b"):
        expected = np.count_nonzero((lossy[path] == 0) & (truth[path] != 0))
        assert found[path].lost == pytest.approx(expected, abs=max(2, 0.01 * truth[path].size))
        assert found[path].reference.nonzero == pytest.approx(np.count_nonzero(truth[path]), rel=0.01)
        lost += expected
    assert lost > 100, "the test would say nothing"


def test_dead_units_are_no_underflow(rng, tmp_path):
    model, optimizer = new("none")
    model.conv1.W.array[:4] = 0
    model.bn.beta.array[:4] = -1
    with record(optimizer, tmp_path) as recording:
        ((x, t),) = batches(rng, 1)
        optimizer.update(lambda: loss_of(model, x, t, 1.0))
        recording.end_step()
    found = {record.place: record for record in read(tmp_path).places}
    dead = found[Place("/bn", INPUT_GRADIENT)]
    assert dead.histogram.zeros > 0.4 * dead.histogram.size
    assert dead.lost <= 0.01 * dead.histogram.size


def test_the_same_truth_whatever_the_method(rng, tmp_path):
    """Histograms of true values: scales are taken out."""
    data = batches(rng, 1)
    found = {}
    for method in METHODS:
        model, optimizer = new(method)
        with record(optimizer, tmp_path / method) as recording:
            train(model, optimizer, data, recording=recording)
        run = read(tmp_path / method)
        found[method] = {
            record.place: (record.reference or record.histogram)
            for record in run.places
            if record.place.kind != ACTIVATION
        }
    for place, auto in found["auto"].items():
        for method in METHODS:
            assert found[method][place].largest == pytest.approx(auto.largest, rel=0.02), (method, place)


def test_auto_s_exponents_are_those_that_gradients_carried(rng, tmp_path):
    model, optimizer = new("auto")
    with record(optimizer, tmp_path) as recording:
        train(model, optimizer, batches(rng, 1), recording=recording)
    run = read(tmp_path)
    record_ = next(r for r in run.places if r.place == Place("/conv2", INPUT_GRADIENT))
    assert record_.exponent > 10, "at loss * 2^-16 gradients are scaled up"
    assert record_.shift.used is not None and record_.shift.safe is not None
    carried = record_.histogram.scaled(record_.exponent)
    assert carried.largest <= 65504 and carried.underflow() == 0


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")
def test_skipped_steps_and_where_they_began(rng, tmp_path):
    model, optimizer = new("auto")
    with record(optimizer, tmp_path) as recording:
        ((x, t),) = batches(rng, 1)
        x[0, 0, 0, 0] = np.inf
        optimizer.update(lambda: loss_of(model, x, t))
        recording.end_step(loss=float("inf"))
    (step,) = read(tmp_path).steps
    assert step.skipped and step.began == Place("/conv1", ACTIVATION) and step.loss is None


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")
def test_a_step_that_is_skipped_between_samples_says_where_it_began_too(rng, tmp_path):
    model, optimizer = new("auto")
    good, (x, t) = batches(rng, 2)
    x[0, 0, 0, 0] = np.inf
    with record(optimizer, tmp_path) as recording:
        train(model, optimizer, [good, (x, t)], recording=recording)
    _, step = read(tmp_path).steps
    assert step.skipped and step.step == 1
    assert step.began == Place("/conv1", ACTIVATION)


@pytest.mark.filterwarnings("ignore:Non finite", "ignore:invalid value", "ignore:overflow")
def test_dynamic_scaling_of_chainer_itself_is_recorded(rng, tmp_path):
    model, optimizer = new("none")
    optimizer.loss_scaling(interval=2)
    optimizer._loss_scale = 2.0**15
    with record(optimizer, tmp_path, every=1) as recording:
        train(model, optimizer, batches(rng, 3), factor=2.0**30, recording=recording)
    run = read(tmp_path)
    assert run.header.method == "dynamic"
    assert [step.exponent for step in run.steps] == [15, 14, 13]
    assert all(step.skipped for step in run.steps) and run.steps[-1].skipped_so_far == 3


def test_function_hooks_of_the_user_see_one_pass(rng, tmp_path):
    class Count(chainer.FunctionHook):
        name = "Count"
        calls = 0

        def backward_postprocess(self, function, in_data, out_grad):
            self.calls += 1

    counts = []
    for recorded in (False, True):
        model, optimizer = new("none")
        data = batches(rng, 1)
        with Count() as hook:
            if recorded:
                with record(optimizer, tmp_path) as recording:
                    train(model, optimizer, data, recording=recording)
            else:
                train(model, optimizer, data)
        counts.append(hook.calls)
    assert counts[0] == counts[1] > 0


def test_nothing_of_it_stays(rng, tmp_path):
    model, optimizer = new("auto")
    with record(optimizer, tmp_path) as recording:
        train(model, optimizer, batches(rng, 1), recording=recording)
    assert not any("AdaLossWatched" in name for name in chainer.get_function_hooks())
    assert observing._observers == []


def test_an_optimizer_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="setup"):
        record(chainer.optimizers.SGD(), tmp_path)


def test_a_trainer_records_by_its_extension(rng, tmp_path):
    model, optimizer = new("auto")
    data = [(x[0], t[0]) for x, t in batches(rng, 16)]
    iterator = chainer.iterators.SerialIterator(data, 4)

    def loss(x, t):
        found = loss_of(model, x, t)
        chainer.report({"loss": found, "accuracy": 0.5}, model)
        return found

    updater = training.StandardUpdater(iterator, optimizer, loss_func=loss)
    trainer = training.Trainer(updater, (6, "iteration"), out=str(tmp_path))
    trainer.extend(extensions.Record(every=2))
    trainer.run()
    run = read(tmp_path)
    assert run.header.total == 6 and run.end.outcome == "finished"
    assert [step.step for step in run.steps] == [0, 2, 4]
    assert all(step.loss > 0 and step.metrics == {"main/accuracy": 0.5} for step in run.steps)


def test_a_training_that_fails_says_so(rng, tmp_path):
    model, optimizer = new("auto")
    with pytest.raises(KeyboardInterrupt), record(optimizer, tmp_path):
        raise KeyboardInterrupt
    assert read(tmp_path).end.outcome == "KeyboardInterrupt"


@pytest.mark.parametrize("method", ["approx_range", "abs_range"])
def test_what_a_bounded_method_lost_is_measured(rng, tmp_path, method):
    """At loss * 2^-40 the paper's bounds do not let gradients become large enough."""
    model, optimizer = new(method)
    with record(optimizer, tmp_path) as recording:
        train(model, optimizer, batches(rng, 1), factor=2.0**-40, recording=recording)
    run = read(tmp_path)
    assert run.header.adaptive
    lost = [record.lost for record in run.places if record.place.kind != ACTIVATION]
    assert None not in lost and sum(lost) > 1000
