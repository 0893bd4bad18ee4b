"""The head: hidden states to log-probabilities and entropy without an array of N x V."""
