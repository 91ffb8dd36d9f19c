"""What the four scripts stand on."""
