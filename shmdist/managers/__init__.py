"""How worker processes come to be."""
