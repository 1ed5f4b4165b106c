"""Frames between two processes: messages, the handshake, the link, rings in shared memory."""
