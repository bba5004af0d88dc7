"""Tasks and the harness: how able a model is."""
