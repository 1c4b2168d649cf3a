"""Fixtures for the tests of models."""

import jaxtyping
import pytest


@pytest.fixture
def unchecked():
    """Without jaxtyping's run-time checks, as users run: our own errors must speak."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
