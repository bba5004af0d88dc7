"""``tune``: private knowledge in a named stream over a frozen base.

config      the settings
columns     which columns a stream takes
reading     records, texts to keep, and the columns that both choose
layers      a layer while a stream is trained on it
train       cross-entropy on the data, divergence from the base on text to keep
result      what a tuning did
tune        the phases
"""
