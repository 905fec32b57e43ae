"""RDS and Redis: what stands where, and whether they answer."""
