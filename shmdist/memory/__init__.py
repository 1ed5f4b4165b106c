"""Bytes that processes of one host share."""
