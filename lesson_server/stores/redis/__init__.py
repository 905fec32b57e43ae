"""Redis: the seats of a lesson, who is present, and which nodes live."""
