"""The charts of ``take_seat``."""
