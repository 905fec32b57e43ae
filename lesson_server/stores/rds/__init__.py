"""RDS (PostgreSQL): the lessons."""
