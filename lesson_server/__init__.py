"""The lesson server: teachers and participants join lessons by Socket.IO.

The vocabulary, used with the same meaning everywhere in this project:

lesson
    One class that people meet in, a row in RDS. ``lesson_id`` names it and is also the name of its Socket.IO room.
seat
    A numbered place in a lesson. ``seat_count`` is how many a lesson has; the *seat map* in Redis says who sits where.
teacher, participant
    The two kinds of client that join. ``user_id`` names a teacher, ``client_id`` a participant; both are the ``sub``
    claim of an access token.
guest
    A participant without an access token: seated, but never registered, for nobody knows who it is.
sid
    The id of one Socket.IO connection. A person who reconnects keeps the ``client_id`` and gets a new sid.
presence
    The records in Redis that say which person is in which lesson, by which sid.
"""

__version__ = "1.0.0"
