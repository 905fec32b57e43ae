"""The statecharts of a connection: the only definition of its states, and what the documentation is drawn from."""
