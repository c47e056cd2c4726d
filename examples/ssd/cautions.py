"""Options that have no effect together: each is named, so that nobody takes a run for another one."""

from __future__ import annotations

from collections.abc import Iterator, Set
from typing import TYPE_CHECKING

from ada_loss.core.rules import RULES
from command_line import flag
from ranks import launched_size

if TYPE_CHECKING:
    from arguments import Settings

BOUNDS = ("scale_upper_bound", "accum_upper_bound", "n_uf")
CHOICES = ("update_per_n_iteration", "timing")
ENTRY = ("loss_scale_method", "init_scale", "dynamic_interval")


def cautions(settings: Settings, given: Set[str]) -> Iterator[str]:
    """A sentence for every option given that changes nothing.

    Args:
        settings: all of them.
        given: names of those that the command line sets.
    """

    def without_effect(names: tuple[str, ...], why: str) -> Iterator[str]:
        for name in names:
            if name in given:
                yield f"{flag(name)} has no effect {why}."

    if settings.dtype == "float32":
        idle = (*ENTRY, *CHOICES, *BOUNDS, "loss_multiplier")
        yield from without_effect(idle, "with --dtype float32, which trains without loss scaling")
    elif not RULES[settings.loss_scale_method].measures:
        yield from without_effect(
            (*CHOICES, *BOUNDS),
            f"with --loss-scale-method {settings.loss_scale_method}, in which layers choose no scales",
        )
    elif not RULES[settings.loss_scale_method].bounded:
        why = f"with --loss-scale-method {settings.loss_scale_method}, which has no bounds to set"
        yield from without_effect(BOUNDS, why)
    if "step" in given:
        late = [str(step) for step in settings.step if step >= settings.iteration]
        if late:
            steps, last = " ".join(late), settings.iteration
            yield f"--step {steps} has no effect, since training ends with --iteration {last}."
    if "warm_up" in given and settings.warm_up > settings.iteration:
        yield (
            f"--warm-up {settings.warm_up} goes on for longer than training does, which ends with "
            f"--iteration {settings.iteration}: the learning rate is never --lr."
        )
    if settings.pretrained != "imagenet":
        yield from without_effect(("model_dir",), "without --pretrained imagenet")
    if launched_size() is None:
        yield from without_effect(("communicator",), "without mpiexec in front")
