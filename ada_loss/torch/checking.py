"""A model's gradients on trial in PyTorch: in float32, and in float16 with scales of their own."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map

from ada_loss.core.record_file import RecordsInMemory, Run
from ada_loss.core.recorder import RunRecorder
from ada_loss.core.records import RunHeader
from ada_loss.torch.backward_mode import backward
from ada_loss.torch.watching import Watch

IMAGE, BATCH = 224, 8
"""Of random images, for models that do not say what they take."""


def trial(model: torch.nn.Module, batch: Any, loss: Any, steps: int) -> tuple[Run, Run]:
    """A few steps of copies of a model: in float32, and under autocast to float16 scaled by `auto`.

    Args:
        model: any module.
        batch: see `ada_loss.check`.
        loss: see there.
        steps: how many.

    Returns:
        The records of both.

    Raises:
        ValueError: no batch can be made for the model.
    """
    batch = _random_batch(model) if batch is None else batch
    arguments = batch if isinstance(batch, tuple) else (batch,)
    with torch.random.fork_rng():
        single = _copy(model)
        truth = _run(single, arguments, loss, steps, half=False, name="float32")
        return truth, _run(single, arguments, loss, steps, half=True, name="auto")


def _run(
    model: torch.nn.Module, batch: tuple[Any, ...], loss: Any, steps: int, *, half: bool, name: str
) -> Run:
    records = RecordsInMemory(
        RunHeader(name=name, method=name, model=type(model).__name__, framework="PyTorch", adaptive=True)
    )
    recorder = RunRecorder(records, every=1)
    watch = Watch(model, recorder, truth=False, wide=not half)
    device = next((parameter.device.type for parameter in model.parameters()), "cpu")
    for step in range(steps):
        watch.begin()
        torch.manual_seed(step)
        model.zero_grad()
        try:
            with torch.enable_grad(), torch.autocast(device, torch.float16, enabled=half):
                value = _loss(model, tree_map(_wide, batch), loss)
            if half:
                with backward():
                    value.backward()
            else:
                value.backward()
        finally:
            watch.end()
        recorder.end_step(loss=float(value.detach()))
    recorder.end()
    return records.run


def _loss(model: torch.nn.Module, batch: tuple[Any, ...], loss: Any) -> torch.Tensor:
    """The loss that was given, the model's own, or the cross entropy with random classes."""
    if loss is not None:
        return loss(model, *batch).float()
    returned = model(*batch)
    if isinstance(returned, torch.Tensor) and returned.numel() == 1:
        return returned.float()
    results = [y for y in tree_flatten(returned)[0] if isinstance(y, torch.Tensor) and y.requires_grad]
    if not results:
        raise ValueError("The model returns no tensor that a loss could be made of: give check a loss.")
    return torch.stack([_pseudo_loss(y.float()) for y in results]).sum()


def _pseudo_loss(y: torch.Tensor) -> torch.Tensor:
    rows = y.reshape(-1, y.shape[-1]) if y.ndim > 1 and y.shape[-1] > 1 else y.reshape(1, -1)
    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(rows.shape[1], (len(rows),), generator=generator).to(y.device)
    return torch.nn.functional.cross_entropy(rows, classes)


def _copy(model: torch.nn.Module) -> torch.nn.Module:
    """A copy in float32 that trains, without modules that overwrite their input."""
    copied = copy.deepcopy(model).float().train()
    for module in copied.modules():
        if getattr(module, "inplace", False):
            module.inplace = False
    return copied


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _random_batch(model: torch.nn.Module) -> Any:
    """Images, or vectors, as the first layer of a model takes them."""
    generator = torch.Generator().manual_seed(0)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            shape = (BATCH, module.in_channels, IMAGE, IMAGE)
            return torch.randn(shape, generator=generator).to(device)
        if isinstance(module, torch.nn.Linear):
            return torch.randn((BATCH, module.in_features), generator=generator).to(device)
        if isinstance(module, torch.nn.Embedding):
            return torch.randint(module.num_embeddings, (BATCH, 32), generator=generator).to(device)
    raise ValueError(f"What {type(model).__name__} takes cannot be told from its layers: give check a batch.")
