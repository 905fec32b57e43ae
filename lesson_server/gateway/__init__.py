"""Between Socket.IO events and connections."""
