"""What may leave, and with which secrets: values and decisions. Pure; `taskvm.net` does what is decided."""
