"""The statecharts: the only definition of the states of a connection, and the source of the drawings.

A folder is an event of Socket.IO, a module in it the chart of one client that may send the event. A chart has these
constants:

* ``EVENT`` and ``CLIENT``: the event, and who sends it.
* ``STATES``: each state, with one sentence that says what is true in it.
* ``INITIAL``: the state before the event. ``FINAL``: the states of a connection that has ended.
* ``PATH``: the triggers that make up the event, in order.
* ``PRESENT`` and ``SEATED``: the states in which Redis holds the client's presence, and the seat map of its lesson.
* ``TRANSITIONS``: the rows.

Rules of the charts:

* Everything that changes a state is written here, row by row. What is not written is refused and changes nothing.
* States are past participles (what is now true), triggers imperatives (what is asked), steps verb + object (what is
  done). Each arrow of the sequence diagram that the server performs is a step, in the order of the diagram. The table
  of arrows is in the page of the event, ``docs/events/``.
* The steps of ``before`` run in order. A step that raises leaves the state unchanged, so every step that can fail
  stands there.
* ``abandon`` leads back after a failed event, and ``disconnect`` ends the connection. Each row says what its state must
  clean up, including the failed step of the *next* state: a write that timed out may have been carried out. Cleaning up
  is idempotent.
* ``restore`` writes again what Redis has lost. The state stays the same, because nothing has changed for the client.
* Not drawn: an event that is sent a second time. It fires the rest of ``PATH`` from the current state.
"""
