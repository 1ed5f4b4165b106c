"""The engine of one process: its threads, what it reads and sends, the calls it runs."""
