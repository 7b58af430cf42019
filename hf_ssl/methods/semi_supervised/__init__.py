"""Few labels, many images: a classifier that learns from its own confident predictions."""
