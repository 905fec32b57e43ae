"""The statecharts: the only definition of the states of a connection, and the source of the drawings.

Each folder is a Socket.IO event. Each module in the folder is the chart of one client that may send the event. A chart
has these constants:

* ``EVENT`` and ``CLIENT``: the event, and the client that sends the event.
* ``STATES``: each state, with one sentence that says what is true in it.
* ``INITIAL``: the state before the event. ``FINAL``: the states of a connection that has ended.
* ``PATH``: the triggers that make up the event, in order.
* ``PRESENT`` and ``SEATED``: the states in which Redis holds the client's presence, and the seat map of its lesson.
* ``RESTING``: the states in which a connection may stay as long as it likes. ``GUEST``: those of them in which the
  client is a guest.
* ``TRANSITIONS``: the rows.

Rules of the charts:

* Every transition is written here as a row. A trigger that has no row in a state is refused and changes nothing.
* States are past participles (what is now true), triggers imperatives (what is asked), steps verb + object (what is
  done). Each arrow of the sequence diagram that the server performs is a step, in the order of the diagram. The table
  of arrows is in the page of the event, ``docs/events/``.
* The steps of ``before`` run in order. A step that raises leaves the state unchanged, so every step that can fail is in
  ``before``.
* ``abandon`` returns to ``INITIAL`` after a failed event; ``disconnect`` ends the connection, and ``remove`` closes it
  from the server's side. Each row says what the state must clean up, including the failed step of the *next* state: a
  write that timed out may have been carried out. Clean-up is idempotent.
* An event that changes no state leads from ``INITIAL`` to ``INITIAL``.
* ``restore`` writes again what Redis has lost. The state stays the same, because nothing has changed for the client.
* Not drawn: an event that is sent a second time, which fires the rest of ``PATH`` from the current state.
"""
