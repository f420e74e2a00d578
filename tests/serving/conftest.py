"""Fixtures of the commands, shared with the tests of other rooms."""

from command_line import folder  # noqa: F401
