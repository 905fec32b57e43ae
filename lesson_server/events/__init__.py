"""What a connection does: the statecharts, run."""
