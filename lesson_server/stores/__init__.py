"""RDS and Redis: what each store holds, and whether it answers."""
