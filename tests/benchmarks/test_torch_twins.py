"""The PyTorch models are the Chainer models."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")

import chainer  # noqa: E402
from machine import this_machine  # noqa: E402
from side_by_side import run  # noqa: E402
from torch_twins import PARAMETERS, TorchTraining, as_tensor  # noqa: E402
from workloads import WORKLOADS, Training  # noqa: E402

from ada_loss.chainer import kernels  # noqa: E402


@pytest.mark.parametrize(("name", "size", "steps"), [("resnet20", 4, 3), ("ssd300", 1, 1)])
def test_a_twin_takes_the_same_steps(name: str, size: int, steps: int) -> None:
    """Same weights and batches: the first loss, and where the parameters end up, agree."""
    machine, workload = this_machine(), replace(WORKLOADS[name](), batchsize=size)
    batches = workload.batches(np.random.default_rng(1), machine)
    ours = Training(workload, None, machine, 7, dtype=np.float32)
    model = ours.chain.model.model
    before = {path: parameter.array.copy() for path, parameter in model.namedparams()}
    theirs = TorchTraining(name, model, half=False)
    with kernels.using("torch"):
        batch = next(batches)
        assert theirs.loss(batch).item() == pytest.approx(float(ours.chain(*batch).array), rel=1e-4)
        for batch in islice(batches, steps):
            run(ours, batch)
            run(theirs, batch)
    found = dict(theirs.module.named_parameters())
    for path, parameter in model.namedparams():
        *links, last = path.strip("/").split("/")
        moved = found[".".join([*links, PARAMETERS[last]])].detach().numpy() - before[path]
        expected = parameter.array - before[path]
        assert np.linalg.norm(moved - expected) <= 1e-2 * np.linalg.norm(expected), path


def test_weights_of_another_model_are_refused() -> None:
    machine = this_machine()
    with chainer.using_config("dtype", np.float32):
        other = machine.place(WORKLOADS["mlp100"]().model(0))
    with pytest.raises(KeyError):
        TorchTraining("resnet20", other, half=False)


def test_arrays_share_their_memory_with_tensors() -> None:
    array = np.random.default_rng(8).standard_normal((3, 4), np.float32)
    as_tensor(array)[1, 2] = 5
    assert array[1, 2] == 5
