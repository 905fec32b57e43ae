"""The events of Socket.IO that the server answers: a module for each, and what runs their statecharts."""
