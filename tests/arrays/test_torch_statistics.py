"""Statistics of PyTorch's tensors are those of NumPy's arrays."""

import numpy as np
import pytest

from ada_loss.arrays.library import all_finite, amax_of, cast, library_of, summarize
from ada_loss.core.deferred import OnDevice, fetch
from ada_loss.core.measurement import EMPTY, UNUSABLE

torch = pytest.importorskip("torch")

DTYPES = ["float16", "float32", "float64"]
ALL = {"amin": True, "logs": True}


def sparse(rng, shape, dtype="float32"):
    x = rng.standard_normal(shape) * 2.0 ** rng.uniform(-24, 12, shape)
    return (x * (rng.random(shape) < 0.7)).astype(dtype)


def found(*tensors, **flags):
    return fetch([summarize(tensor, **flags) for tensor in tensors])


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_are_numpys_whatever_the_layout(rng, dtype):
    x = sparse(rng, (4, 30, 7), dtype)
    views = [x, x.T, x[:, ::2, 1:], x[:0], np.zeros((3, 2), dtype)]
    for flags in (ALL, {"amin": True}, {"logs": True}, {}):
        for ours, theirs in zip(
            found(*map(torch.tensor, views), **flags), found(*views, **flags), strict=True
        ):
            assert ours[:2] == theirs[:2] and ours[3:6] == theirs[3:6]
            assert ours == pytest.approx(theirs, rel=1e-5)


def test_bfloat16_is_summarized_as_float32(rng):
    narrow = torch.tensor(sparse(rng, 1000)).bfloat16()
    assert found(narrow, **ALL)[0] == pytest.approx(found(narrow.float().numpy(), **ALL)[0], rel=1e-5)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_one_element_that_is_not_finite_is_seen(rng, bad):
    x = sparse(rng, 100)
    x[77] = bad
    tensor = torch.tensor(x)
    assert found(tensor, **ALL) == [UNUSABLE]
    assert not np.isfinite(amax_of(tensor))
    assert not all_finite([torch.ones(3), tensor])


def test_all_finite_asks_each_library_for_its_own(rng):
    assert all_finite([torch.ones(3), np.ones(2), torch.zeros(0), np.zeros(0)])
    assert not all_finite([torch.ones(3), np.array([np.inf])])


def test_nothing_is_waited_for_before_the_results_are_fetched(rng, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: pytest.fail("it waited"))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("it waited"))
    assert isinstance(summarize(torch.ones(3), **ALL), OnDevice)
    assert summarize(torch.ones(0)).value == EMPTY


def test_extremes_of_products_are_numpys(rng):
    gy, weight = sparse(rng, (6, 200)), sparse(rng, (6, 3))
    gy[2], weight[4] = 0, 0
    pairs = [(torch.tensor(gy), torch.tensor(weight)), (gy, weight)]
    pairs += [(torch.zeros(2, 3), torch.ones(2, 1)), (torch.zeros(2, 0), torch.ones(2, 1))]
    ours, theirs, *nothing = fetch([library_of(a).product_extremes(a, b) for a, b in pairs])
    assert ours == theirs
    assert nothing == [(0, 0), (0, 0)]


def test_casts_are_pytorchs():
    x = torch.tensor([1 / 3, 1e-8, 1e6])
    assert torch.equal(cast(x, torch.float16), x.half())


def test_what_is_no_array_is_refused():
    with pytest.raises(TypeError, match="not on list"):
        library_of([1.0])
