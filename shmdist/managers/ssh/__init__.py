"""Workers on other hosts, by SSH."""
