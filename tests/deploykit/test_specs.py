"""Specs, and feeds that are made to fit or refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploykit.errors import DataError
from deploykit.specs import DTYPES, Signature, TensorSpec, fit_feeds

IDS = TensorSpec("ids", "int64", ("batch", "length"))
MASK = TensorSpec("mask", "bool", ("batch", "length"))
IMAGE = TensorSpec("image", "float32", ("batch", 3, 8, 8))


def one(dtype: str) -> Signature:
    return Signature((TensorSpec("x", dtype, ("n",)),), ())


def fit(dtype: str, values: Any) -> Any:
    return fit_feeds(one(dtype), {"x": values})["x"]


def refused(signature: Signature, feeds: dict[str, Any]) -> str:
    with pytest.raises(DataError) as caught:
        fit_feeds(signature, feeds)
    text = str(caught.value)
    assert text.isprintable()
    return text


def test_spec() -> None:
    assert IDS.symbols == ("batch", "length")
    assert IMAGE.symbols == ("batch",)
    assert IMAGE.concrete({"batch": 2, "unused": 9}) == (2, 3, 8, 8)
    assert str(IMAGE) == "image: float32[batch, 3, 8, 8]"
    assert TensorSpec("s", "int64", ()).concrete({}) == ()
    assert str(TensorSpec("s", "int64", ())) == "s: int64[]"
    with pytest.raises(DataError, match=r"--dim length=SIZE"):
        IDS.concrete({"batch": 2})
    unknown = TensorSpec("u", "float32", None)
    assert str(unknown) == "u: float32[?]"
    assert unknown.symbols == ()
    with pytest.raises(DataError, match="rank of 'u' is unknown"):
        unknown.concrete({})


def test_signature() -> None:
    signature = Signature((IDS, MASK, IMAGE), (TensorSpec("y", "float32", ("batch", "other")),))
    assert signature.symbols == ("batch", "length")
    assert [s.name for s in signature] == ["ids", "mask", "image", "y"]


def test_good_feeds_are_taken_as_they_are_in_the_models_order() -> None:
    ids, mask = np.zeros((2, 5), np.int64), np.ones((2, 5), bool)
    fitted = fit_feeds(Signature((IDS, MASK), ()), {"labels": np.zeros(2), "mask": mask, "ids": ids})
    assert list(fitted) == ["ids", "mask"]
    assert fitted["ids"] is ids
    assert fitted["mask"] is mask


def test_missing_input() -> None:
    text = refused(Signature((IDS, MASK), ()), {"ids": np.zeros((1, 1), np.int64), "maks": np.zeros(1)})
    assert "no data for input 'mask' (the data has: ids, maks)" in text
    assert "the data has: nothing" in refused(Signature((IDS,), ()), {})


def test_shapes() -> None:
    signature = Signature((IMAGE,), ())
    assert "4 dimensions" not in refused(signature, {"image": np.zeros((2, 4, 8, 8), np.float32)})
    assert "axis 1 is 4" in refused(signature, {"image": np.zeros((2, 4, 8, 8), np.float32)})
    assert "3 dimensions" in refused(signature, {"image": np.zeros((3, 8, 8), np.float32)})
    assert "0 dimensions" in refused(signature, {"image": np.float32(0)})
    fit_feeds(signature, {"image": np.zeros((0, 3, 8, 8), np.float32)})
    fit_feeds(Signature((TensorSpec("x", "float32", None),), ()), {"x": np.zeros((1, 2, 3), np.float32)})


def test_one_symbol_has_one_size() -> None:
    feeds = {"ids": np.zeros((2, 5), np.int64), "mask": np.ones((2, 6), bool)}
    assert "'length' is 5 in 'ids' and 6 in 'mask'" in refused(Signature((IDS, MASK), ()), feeds)
    square = Signature((TensorSpec("s", "float32", ("n", "n")),), ())
    fit_feeds(square, {"s": np.zeros((3, 3), np.float32)})
    assert "'n' is 3 in 's' and 4 in 's'" in refused(square, {"s": np.zeros((3, 4), np.float32)})


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        ("int64", np.array([1, 2], np.int32)),
        ("int32", np.array([-(2**31), 2**31 - 1], np.int64)),
        ("uint8", np.array([0, 255])),
        ("int64", np.array([2**63 - 1], np.uint64)),
        ("int8", np.array([], np.int64)),
        ("int64", np.array([True, False])),
        ("float32", np.array([True, False])),
        ("float32", np.array([0.1, np.inf, -np.inf, np.nan, 3e38])),
        ("float16", np.array([0.1, 65504], np.float32)),
        ("float64", np.array([0.1], np.float32)),
        ("int64", [1, 2, 3]),
        ("float32", np.array([1, 2], ">f4")),
        ("int64", np.array([1, 2], ">i8")),
        ("int64", np.array([1, 2], ">i2")),
    ],
)
def test_dtypes_that_can_be_made_to_fit(dtype: str, values: Any) -> None:
    fitted = fit(dtype, values)
    assert fitted.dtype.name == dtype
    assert fitted.dtype.isnative
    np.testing.assert_array_equal(fitted, np.asarray(values).astype(dtype))


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        ("int32", np.array([2**31])),
        ("uint8", np.array([-1])),
        ("int64", np.array([2**63], np.uint64)),
        ("int64", np.array([1.0])),
        ("float32", np.array([1])),
        ("bool", np.array([1])),
        ("float32", np.array([1e300])),
        ("float16", np.array([1.0, -7e4], np.float32)),
        ("float32", np.array([1 + 0j])),
        ("float32", np.array(["1"])),
        ("float32", np.array([None], object)),
        ("string", np.array([1])),
        ("bfloat16", np.array([1], np.float32)),
        ("float8_e4m3fn", np.array([1], np.float32)),
        ("int64", np.array(["2020-01-01"], "datetime64[D]")),
    ],
)
def test_dtypes_that_cannot(dtype: str, values: Any) -> None:
    assert "'x'" in refused(one(dtype), {"x": values})


def test_strings_become_objects() -> None:
    for values in (np.array(["a", "é"]), np.array(["a", "é"], object)):
        fitted = fit("string", values)
        assert fitted.dtype == object
        assert list(fitted) == ["a", "é"]


def test_bfloat16_values_are_taken() -> None:
    import ml_dtypes

    values = np.array([1, 2], ml_dtypes.bfloat16)
    assert fit("bfloat16", values) is values


INTEGERS = sorted(d for d in DTYPES if d.startswith(("int", "uint")))


@given(
    st.sampled_from(INTEGERS),
    st.sampled_from(INTEGERS),
    st.lists(st.integers(-(2**63), 2**64 - 1), max_size=4),
)
def test_integers_never_change(source: str, wanted: str, numbers: list[int]) -> None:
    """Either all values survive, or there is an error that says so for a reason."""
    info = np.iinfo(source)
    kept = [n for n in numbers if info.min <= n <= info.max]
    limits = np.iinfo(wanted)
    fits = all(limits.min <= n <= limits.max for n in kept)
    values = np.array(kept, source)
    if fits:
        fitted = fit(wanted, values)
        assert fitted.dtype == wanted
        assert [int(n) for n in fitted] == kept
    else:
        refused(one(wanted), {"x": values})


def test_dimensions_that_are_sums() -> None:
    from deploykit.specs import terms

    assert terms("past_sequence + sequence") == ("past_sequence", "sequence")
    assert terms("past + 1") == ("past", 1)
    assert terms("2*s0") == ("2*s0",)
    mask = TensorSpec("mask", "int64", ("batch", "past + sequence"))
    assert mask.symbols == ("batch", "past", "sequence")
    assert mask.concrete({"batch": 2, "past": 3, "sequence": 4}) == (2, 7)


@pytest.mark.parametrize(("length", "fits"), [(7, True), (6, False)])
def test_feeds_have_to_fit_sums(length: int, fits: bool) -> None:
    specs = (
        TensorSpec("mask", "int64", ("batch", "past + sequence")),
        TensorSpec("ids", "int64", ("batch", "sequence")),
        TensorSpec("keys", "float32", ("batch", "past")),
    )
    feeds = {"ids": np.zeros((1, 4), np.int64), "keys": np.zeros((1, 3), np.float32)}
    feeds["mask"] = np.ones((1, length), np.int64)
    if fits:
        assert set(fit_feeds(Signature(specs, ()), feeds)) == {"mask", "ids", "keys"}
    else:
        with pytest.raises(DataError, match=r"past \+ sequence = 7"):
            fit_feeds(Signature(specs, ()), feeds)


def test_one_array_is_the_one_input_whatever_it_is_called():
    one = Signature((TensorSpec("x", "float32", ("n", 2)),), ())
    rows = np.zeros((3, 2), np.float32)
    assert list(fit_feeds(one, {"image": rows})) == ["x"]
    with pytest.raises(DataError, match="'x' has shape"):
        fit_feeds(one, {"image": np.zeros((3, 5), np.float32)})
    with pytest.raises(DataError, match="no data for input 'x'"):
        fit_feeds(one, {"image": rows, "mask": rows})
    two = Signature((TensorSpec("x", "float32", ("n", 2)), TensorSpec("y", "float32", ("n", 2))), ())
    with pytest.raises(DataError, match="no data for input"):
        fit_feeds(two, {"image": rows})
