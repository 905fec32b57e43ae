"""Between the bytes of clients and Socket.IO events."""
