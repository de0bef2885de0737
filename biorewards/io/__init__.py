"""Reading images and manifests, writing tables."""
