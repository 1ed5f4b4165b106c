"""Objects to payloads and back: a body of bytes, large buffers beside it, references."""
