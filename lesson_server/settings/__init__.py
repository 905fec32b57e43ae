"""The settings: their defaults and checks, and the sources of their values."""
