"""A model's gradients on trial in Chainer: in float32, and in float16 with scales of their own."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ada_loss.chainer import compat as compat  # isort: skip  (has to come before Chainer)

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np

from ada_loss.chainer import kernels
from ada_loss.chainer.nested import map_variables
from ada_loss.chainer.recording import number
from ada_loss.chainer.scaled import AdaLossScaled
from ada_loss.chainer.watching import Watch
from ada_loss.core.record_file import RecordsInMemory, Run
from ada_loss.core.recorder import RunRecorder
from ada_loss.core.records import RunHeader

IMAGE, CHANNELS, BATCH = 224, 3, 8
"""Of random images, for models that do not say what they take."""


def trial(model: chainer.Link, batch: Any, loss: Any, steps: int) -> tuple[Run, Run]:
    """A few steps of copies of a model: in float32, and in float16 scaled by `auto`.

    Args:
        model: any link.
        batch: see `ada_loss.check`.
        loss: see there.
        steps: how many.

    Returns:
        The records of both.

    Raises:
        ValueError: no batch can be made for the model.
    """
    with _undisturbed():
        batch = _random_batch(model) if batch is None else batch
        arrays = batch if isinstance(batch, tuple) else (batch,)
        single = _copy(model, np.float32)
        with kernels.using("auto"):
            truth = _run(single, arrays, loss, steps, np.float32, "float32")
            half = _copy(single, np.float16)
            scaled = half if isinstance(half, AdaLossScaled) else AdaLossScaled(half, "auto")
            return truth, _run(scaled, arrays, loss, steps, np.float16, "auto")


def _run(model: chainer.Link, batch: tuple[Any, ...], loss: Any, steps: int, dtype: Any, name: str) -> Run:
    records = RecordsInMemory(
        RunHeader(name=name, method=name, model=type(model).__name__, framework="Chainer", adaptive=True)
    )
    recorder = RunRecorder(records, every=1)
    watch = Watch(model, recorder, wide=dtype == np.float32)
    # In mixed16 Chainer keeps normalization in float32.
    configured = chainer.mixed16 if dtype == np.float16 else np.dtype(dtype)
    with chainer.using_config("dtype", configured), chainer.using_config("train", True):
        for step in range(steps):
            watch.begin()
            np.random.seed(step)
            try:
                value = _loss(model, [_cast(array, dtype) for array in batch], loss)
                if isinstance(model, AdaLossScaled):
                    model.cleargrads()
                    value.backward()
                else:
                    watch.differentiate(value)
            finally:
                watch.end()
            recorder.end_step(loss=number(value))
    recorder.end()
    return records.run


def _loss(model: chainer.Link, batch: list[Any], loss: Any) -> chainer.Variable:
    """The loss that was given, the model's own, or the cross entropy with random classes."""
    if loss is not None:
        return F.cast(loss(model, *batch), np.float32)
    results: list[chainer.Variable] = []

    def note(result: chainer.Variable) -> chainer.Variable:
        results.append(result)
        return result

    returned = model(*batch)
    if isinstance(returned, chainer.Variable) and returned.size == 1:
        return F.cast(returned, np.float32)
    map_variables(note, returned)
    terms = [_pseudo_loss(F.cast(y, np.float32)) for y in results if y.dtype.kind == "f"]
    if not terms:
        raise ValueError("The model returns no variable that a loss could be made of: give check a loss.")
    return sum(terms[1:], terms[0])


def _pseudo_loss(y: chainer.Variable) -> chainer.Variable:
    rows = y.reshape(-1, y.shape[-1]) if y.ndim > 1 and y.shape[-1] > 1 else y.reshape(1, -1)
    classes = np.random.RandomState(0).randint(0, rows.shape[1], len(rows)).astype(np.int32)
    return F.softmax_cross_entropy(rows, model_device(y).send(classes))


def model_device(y: chainer.Variable) -> Any:
    """Where a result is."""
    return chainer.backend.get_device_from_array(y.array)


def _copy(model: chainer.Link, dtype: Any) -> chainer.Link:
    """A copy with parameters of a type; of float16, normalization stays float32."""
    copied = copy.deepcopy(model)
    for link in copied.links():
        kept = dtype == np.float16 and isinstance(link, L.BatchNormalization)
        for name in link._params:
            parameter = getattr(link, name)
            if parameter.array is not None and parameter.dtype.kind == "f":
                # What float16 cannot hold becomes infinite, and is found where it does harm.
                with np.errstate(over="ignore"):
                    parameter.array = parameter.array.astype(np.float32 if kept else dtype)
                parameter.cleargrad()
        for name in link._persistent:
            value = getattr(link, name)
            if isinstance(value, chainer.get_array_types()) and value.dtype == np.float16:
                setattr(link, name, value.astype(np.float32))
    return copied


def _cast(array: Any, dtype: Any) -> Any:
    floating = getattr(getattr(array, "dtype", None), "kind", "") == "f"
    return array.astype(dtype) if floating else array


def _random_batch(model: chainer.Link) -> Any:
    """Images, or vectors, as the first layer of a model takes them."""
    generator = np.random.RandomState(0)
    for link in model.links():
        weight = getattr(link, "W", None)
        shape = getattr(weight, "shape", None)
        if isinstance(link, L.Convolution2D):
            channels = shape[1] * link.groups if shape else CHANNELS
            size = getattr(model, "insize", IMAGE)
            return generator.normal(size=(BATCH, channels, size, size)).astype(np.float32)
        if isinstance(link, L.Linear) and shape:
            return generator.normal(size=(BATCH, shape[1])).astype(np.float32)
    raise ValueError(f"What {type(model).__name__} takes cannot be told from its layers: give check a batch.")


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Random generators and Chainer's configuration are afterwards what they were."""
    states = np.random.get_state(), random.getstate()
    try:
        with chainer.using_config("enable_backprop", True):
            yield
    finally:
        np.random.set_state(states[0])
        random.setstate(states[1])
