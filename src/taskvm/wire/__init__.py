"""Sans-IO protocols: bytes in, values out. Nothing here opens, waits, logs or knows the time."""
