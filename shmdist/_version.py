"""The version of shmdist, read by the build and told to peers in the handshake."""

__version__ = "0.1.0"
