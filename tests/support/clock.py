"""A clock that a test sets, in place of the module ``time``."""


class Clock:
    """Has the part of ``time`` that the server asks."""

    now = 1_000.0

    def monotonic(self):
        return self.now

    def time(self):
        return self.now
