"""The HTTP pages for operators."""
