"""The settings: each with its default and its check, and where its value is found."""
