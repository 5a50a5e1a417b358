"""What a guest has changed in a directory that is mounted for review, and how it reaches the host."""
