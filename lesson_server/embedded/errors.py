"""What may go wrong with the embedded stores."""


class EmbeddedError(Exception):
    """The stores can't be started; the message is for the operator."""


class DataDirInUseError(EmbeddedError):
    """Another process owns the data directory."""
