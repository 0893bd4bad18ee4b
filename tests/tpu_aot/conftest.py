"""Compilations for TPUs that are not here, in a fraction of their time."""

import pytest

EFFORT = "JAX_EXEC_TIME_OPTIMIZATION_EFFORT"


@pytest.fixture(scope="module", autouse=True)
def least_effort():
    """XLA makes all machine code, and looks for no faster one. test_head_aot.py compares memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(EFFORT, "-1")
        yield


@pytest.fixture(autouse=True)
def whole_effort_of_slow_tests(request, monkeypatch):
    """As a user's programs are compiled."""
    if request.node.get_closest_marker("slow"):
        monkeypatch.delenv(EFFORT)
