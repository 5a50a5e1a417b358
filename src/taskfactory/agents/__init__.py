"""Who does the work: the models, the loop that drives them, and the tools they are given."""
