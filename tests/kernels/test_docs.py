"""The examples in the docstrings are true."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize("op", ["linear_logprob", "linear_policy_loss"])
def test_docstring_examples(op):
    result = doctest.testmod(importlib.import_module(f"xopd_kernels.{op}.api"))
    assert result.attempted > 0
    assert result.failed == 0
