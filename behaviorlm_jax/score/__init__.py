"""Log-probabilities of every behavior."""
