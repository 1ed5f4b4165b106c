"""Bytes between two processes: messages, their encoding, the handshake and the link."""
