"""Training the values of a stream inside a quantised layer."""
