"""RDS, which is PostgreSQL: the lessons."""
