"""Redis: the seat maps, the presence records, and the liveness of nodes."""
