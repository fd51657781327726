"""Data sets by name."""

import pytest

from jdiff import data


def test_unknown_data():
    with pytest.raises(ValueError, match=r"unknown data set 'digts' \(did you mean 'digits'\?\); one of digits"):
        data.load("digts")


def test_a_data_set_of_ones_own():
    @data.register_dataset
    def my_set(n: int = 5):
        return data.scurve(n)

    try:
        assert data.load("my_set", n=7).size == 7
        my_set.__module__ = "elsewhere"

        def digits():
            return None

        with pytest.raises(ValueError, match="'digits' is registered already, by jdiff.data.embedded"):
            data.register_dataset(digits)
    finally:
        del data.DATASETS["my_set"]
