"""`patch` and what it changes: `forward`, `generate`, prompts and caches of a patched model."""
