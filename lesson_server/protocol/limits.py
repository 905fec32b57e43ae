"""Limits on what a client may send, delay or leave unread, if several modules enforce them."""

# Bytes of the head of a request, and of its URL. nginx and Apache allow 8 kB per line; our URLs have about 100 bytes.
MAX_HEAD_SIZE = 8 * 1024
MAX_URL_SIZE = 2 * 1024
# Header lines, as in Apache; URL parameters, of which Engine.IO has five.
MAX_HEADER_LINES = 100
MAX_PARAMETERS = 32
# Bytes of a message or a polling request. Our clients send no data except the access token in the handshake.
MAX_MESSAGE_SIZE = 16 * 1024
# Bytes that a client may leave unread before it is dropped. An acknowledgement has about 40 bytes.
MAX_UNREAD_BYTES = 32 * 1024
# Seconds for a client to complete its handshake, or an upgrade. Tests shorten it, so modules read it as an attribute of
# this module.
HANDSHAKE_TIMEOUT = 10
