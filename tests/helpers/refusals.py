"""Commands that have to be rejected."""

from collections.abc import Callable
from typing import Any

import pytest

from pipeline.__main__ import main as fourstage


def refused(
    capture: pytest.CaptureFixture[str], *arguments: object, main: Callable[[list[str]], Any] = fourstage
) -> str:
    """Run a command that has to end as a mistake of the user does, and return what it wrote to stderr.

    Such a command exits with code 2. What was captured earlier is dropped.

    Args:
        capture: The test's `capsys`, or `capfd` if processes are started.
        arguments: What follows `fourstage` on the command line, such as "evaluate", run, "--stage", "2_sft".
        main: The program, if it is not `fourstage`.

    Example:
        assert refused(capsys, "plan", "nowhere").startswith("recipe: nowhere: does not exist")
    """
    capture.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code == 2
    return capture.readouterr().err
