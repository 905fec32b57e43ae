"""The charts of ``join_lesson``.

They differ in ``register``, where the diagrams differ, and in ``restore``: only a participant has a seat.
"""
