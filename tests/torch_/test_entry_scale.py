"""The entry scale on a device against that of the core."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ada_loss.core.config import AdaLossConfig
from ada_loss.core.entry_scale import EntryScale
from ada_loss.torch.entry_scale import EntryScaleOnDevice


@given(
    st.lists(st.booleans(), max_size=60),
    st.sampled_from([2.0**-23, 1.0, 2.0**14]),
    st.sampled_from([None, 1, 3]),
)
def test_changes_as_the_cores_does(steps, init_scale, interval):
    config = AdaLossConfig(init_scale=init_scale, dynamic_interval=interval)
    core, ours = EntryScale.from_config(config), EntryScaleOnDevice.from_config(config)
    for finite in steps:
        core, ours = core.after(finite=finite), ours.after(torch.tensor(not finite))
        assert ours.to_state() == core.to_state() and ours.scale.item() == core.scale


def test_recovers_slowly_without_an_interval():
    config = AdaLossConfig()
    core, ours = EntryScale.from_config(config), EntryScaleOnDevice.from_config(config)
    for finite in [False, False] + [True] * 2001:
        core, ours = core.after(finite=finite), ours.after(torch.tensor(not finite))
    assert ours.to_state() == core.to_state() and core.exponent == 0


@pytest.mark.parametrize("init_scale", [1.0, 4.0])
def test_restores_as_the_cores_does(init_scale):
    state = EntryScale.from_config(AdaLossConfig()).after(finite=False).to_state()
    config = AdaLossConfig(init_scale=init_scale)
    core = EntryScale.from_config(config).restored(state)
    assert EntryScaleOnDevice.from_config(config).restored(state).to_state() == core.to_state()
