"""Image-text methods: one file each."""
