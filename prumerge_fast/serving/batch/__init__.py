"""Questions about images by the million, on Ray Data: in a folder of parquet, resumed by Ray."""
