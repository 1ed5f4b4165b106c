"""The stress tests run on a cluster of their own, under the same proof that nothing is left."""

import pytest

from tests.integration.conftest import *  # noqa: F403 - the same fixtures
from tests.integration.conftest import _cluster, pytest_runtest_makereport  # noqa: F401 - names that * leaves out


def pytest_collection_modifyitems(items):
    for item in items:
        if "/stress/" in str(item.path):
            item.add_marker(pytest.mark.stress)
