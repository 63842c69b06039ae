"""A pytest plugin (-p bench.record): each test's result is in a file as soon as it is there.

A run that is cut short keeps what it found so far. Two environment variables steer it: RECORD, the
file (JSON Lines), and TEST_LIMIT, the seconds that one test may take, its fixtures apart.
"""

import json
import os
import signal

import pytest

TAIL = 4000  # characters of a failure's text


def pytest_runtest_logreport(report):
    """A line for each test, and for a fixture that failed or a test that was skipped."""
    if report.when != "call" and report.passed:
        return
    words = [report.longreprtext, *(text for _, text in report.sections)]
    row = {
        "test": report.nodeid,
        "when": report.when,
        "outcome": report.outcome,
        "seconds": round(report.duration, 2),
        "words": "\n".join(filter(None, words))[-TAIL:],
    }
    with open(os.environ["RECORD"], "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """TimeoutError in a test that takes too long."""

    def stop(number, frame):
        raise TimeoutError(f"more than {os.environ['TEST_LIMIT']} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(int(os.environ["TEST_LIMIT"]))
    try:
        return (yield)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
