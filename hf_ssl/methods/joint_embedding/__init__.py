"""Two or more views of an image meet in one embedding space."""
