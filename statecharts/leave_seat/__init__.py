"""The charts of ``leave_seat``."""
