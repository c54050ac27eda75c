"""psi and lambda of the tools are those of the layer: both keep to the tables
in tests/facts, which tests/facts.rs reads as well."""
import os
import sys
import types

import pytest

TESTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(os.path.dirname(TESTS), "myexamples"))

import caffe_proto  # noqa: E402
import plot_psi  # noqa: E402


def table(name):
    with open(os.path.join(TESTS, "facts", name)) as lines:
        rows = [[float(n) for n in line.split()] for line in lines
                if not line.startswith("#")]
    assert len(rows) > 100
    return rows


def test_psi_is_that_of_the_table():
    for m, theta, want in table("psi.txt"):
        assert plot_psi.psi(theta, m) == pytest.approx(want, abs=1e-9)


def test_largest_margin_is_the_layers():
    with open(os.path.join(os.path.dirname(TESTS), "src", "large_margin",
                           "margin.rs")) as file:
        assert "MAX: u32 = %d;" % caffe_proto.MAX_MARGIN in file.read()


def test_lambda_is_that_of_the_table():
    for base, gamma, power, lambda_min, iteration, want in table("lambda.txt"):
        param = types.SimpleNamespace(
            base=base, gamma=gamma, power=power, lambda_min=lambda_min,
            iteration=0)
        assert caffe_proto.lambda_at(param, iteration - 1) == pytest.approx(
            want, rel=1e-9), (base, gamma, power, lambda_min, iteration)
