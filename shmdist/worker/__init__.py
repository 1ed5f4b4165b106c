"""The worker process: its program, its ``__main__``, the watchdog of a remote one."""
