"""The modules that the four scripts import."""
