"""The causal language model: what it says."""
