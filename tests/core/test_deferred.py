"""Results that are not there yet come over together, and in order."""

import pytest

from ada_loss.core.deferred import Figures, OnDevice, Ready, combine, fetch


class Device:
    """Stands for a device: vectors are tuples, transfers are counted."""

    def __init__(self):
        self.transfers = 0

    def transfer(self, vectors):
        self.transfers += 1
        return [float(number) for vector in vectors for number in vector]

    def deferred(self, *figures):
        return OnDevice((Figures(figures, len(figures), self.transfer),), sum)


@pytest.fixture
def device():
    # Bound methods are equal only for one object.
    return Device()


def test_everything_comes_over_in_one_transfer_and_in_order(device):
    results = [device.deferred(1, 2), Ready("here"), device.deferred(3), device.deferred(4, 5, 6)]
    assert fetch(results) == [3, "here", 3, 15]
    assert device.transfers == 1


def test_two_devices_take_a_transfer_each(device):
    other = Device()
    results = [other.deferred(1), device.deferred(2, 3), other.deferred(4, 5)]
    assert fetch(results) == [1, 5, 9]
    assert (device.transfers, other.transfers) == (1, 1)


def test_what_is_made_of_several_results_comes_over_in_one_transfer(device):
    inner = combine(lambda a, b: a * b, device.deferred(1, 2), Ready(10))
    outer = combine(lambda a, b, c: (a, b, c), Ready("here"), inner, device.deferred(4, 5))
    assert fetch([outer, device.deferred(7)]) == [("here", 30, 9), 7]
    assert device.transfers == 1


def test_what_is_made_of_ready_results_is_ready():
    assert combine(max, Ready(3), Ready(4)) == Ready(4)


def test_nothing_is_transferred_for_results_that_are_there(device):
    assert fetch([Ready(1), Ready(2)]) == [1, 2]
    assert fetch([]) == []
    assert device.transfers == 0
