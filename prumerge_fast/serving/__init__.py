"""PruMerge where models are served and where they read images by the million."""
