"""Who holds what: pure accounting, without I/O and without locks."""
