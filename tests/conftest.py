"""Runs each test that is marked `jail` in a forked copy of pytest, inside a jail of its own.

That works from a pytest-xdist worker too, needs no root, and leaves nothing behind whatever the
test does.
"""

from __future__ import annotations

import pickle

import pytest
from _pytest.runner import runtestprotocol

from netlab.kernel.jail import JailCallError, JailError, call_in_jail

# No such test takes more than some seconds; this only ends one that hangs. The marker's argument
# `timeout_seconds` is for those that can be told to take longer.
TIMEOUT_SECONDS = 60.0


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "jail: runs in Linux namespaces with only loopback")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    marker = item.get_closest_marker("jail")
    if marker is None:
        return None
    timeout = marker.kwargs.get("timeout_seconds", TIMEOUT_SECONDS)

    def run() -> bytes:
        reports = runtestprotocol(item, log=False)
        to_data = item.config.hook.pytest_report_to_serializable
        return pickle.dumps([to_data(config=item.config, report=report) for report in reports])

    try:
        data = pickle.loads(call_in_jail(run, timeout_seconds=timeout))
    except JailError as error:
        item.add_marker(pytest.mark.skip(reason=f"no jail here: {error}"))
        return None
    except JailCallError as error:
        problem = str(error)

        def fail() -> None:
            pytest.fail(problem, pytrace=False)

        item.obj = fail  # type: ignore[attr-defined]  # of pytest.Function, as all tests here are
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    from_data = item.config.hook.pytest_report_from_serializable
    for report in data:
        item.ihook.pytest_runtest_logreport(report=from_data(config=item.config, data=report))
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    # What tests before this one set up here for its module must go before the next module begins.
    item.session._setupstate.teardown_exact(nextitem)
    return True
