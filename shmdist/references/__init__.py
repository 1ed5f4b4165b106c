"""Values that live on one process and are used from all: futures and channels."""
