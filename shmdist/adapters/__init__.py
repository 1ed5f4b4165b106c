"""Other libraries' ways of asking for parallel work, served by shmdist."""
