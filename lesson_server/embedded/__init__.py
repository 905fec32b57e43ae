"""The PostgreSQL and the Valkey of the default set-up."""
