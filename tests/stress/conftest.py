"""The same proof as for the other tests: nothing is left over, on any process."""

from tests.integration.conftest import (  # noqa: F401 - fixtures
    _cluster,
    cluster,
    fresh,
    nothing_left,
    pytest_runtest_makereport,
)
