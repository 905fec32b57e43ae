"""Defects that a test plants into the server: in place of something that must be what it was when they were written."""

from inspect import signature


def plant(original):
    """Marks a method as the replacement of another: one that has changed or is gone would plant nothing."""

    def check(method):
        assert method.__name__ == original.__name__
        assert list(signature(method).parameters) == list(signature(original).parameters), f"{original} has changed"
        return method

    return check


def altered(script, text, replacement):
    """A script with a part of it replaced."""
    assert script.count(text) == 1, f"{text} is {script.count(text)} times in the script"
    return script.replace(text, replacement)
