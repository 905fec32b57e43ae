"""The Socket.IO events that the server answers: one module per event, and the modules that run the statecharts."""
