"""How features, queries and keys come out of a vision tower, one file a kind of tower."""
