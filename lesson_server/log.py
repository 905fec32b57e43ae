"""The log: each line has an event, a sentence and fields.

* The *event* is what an alert or a search looks for: a name in ``snake_case`` that never changes. It says what has
  happened, wherever it happens. All names are in docs/operating/logs.md.
* The *sentence* is for people. It names its fields in braces, and may change.
* The *fields* are numbers and short texts, under the same name everywhere: ``sid`` (the Socket.IO id of a connection),
  ``lesson_id``, ``client``, ``node``, ``store``, ``cause`` (one line for the operator). ``reason`` is one of a fixed
  set of texts: each reason has a rate limit of its own; see ``cli/log_limit.py``.

No field holds a token, a key, or a text that a client may choose freely.
"""

import logging

Value = str | int | float | None


class EventLogger:
    """Logs events, with the handlers and levels of the standard library.

    Args:
        name: the name of the module.
    """

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def info(self, event: str, sentence: str, /, **fields: Value) -> None:
        """Log what a client has caused."""
        self._log(logging.INFO, event, sentence, fields)

    def warning(self, event: str, sentence: str, /, **fields: Value) -> None:
        """Log what an operator should know, and the server has dealt with."""
        self._log(logging.WARNING, event, sentence, fields)

    def error(self, event: str, sentence: str, /, **fields: Value) -> None:
        """Log what has failed, and why it did is known."""
        self._log(logging.ERROR, event, sentence, fields)

    def exception(self, event: str, sentence: str, error: BaseException | None = None, /, **fields: Value) -> None:
        """Log a defect with its traceback.

        Args:
            event: the name of the event.
            sentence: the sentence.
            error: the exception; None: the exception that is being handled.
            fields: the fields.
        """
        self._log(logging.ERROR, event, sentence, fields, error or True)

    def _log(
        self,
        level: int,
        event: str,
        sentence: str,
        fields: dict[str, Value],
        error: BaseException | bool | None = None,
    ) -> None:
        if self._logger.isEnabledFor(level):
            extra = {"event": event, "fields": fields}
            # The statement is that of the caller of info, warning, ...: the rate limit tells lines apart by it.
            self._logger.log(level, sentence.format_map(fields), exc_info=error, extra=extra, stacklevel=3)
