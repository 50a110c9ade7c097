"""Log-probabilities of every behavior, and all that is made from them."""
