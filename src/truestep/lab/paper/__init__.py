"""The two papers' experiments: what is run, what is kept, what it says of each claim."""
