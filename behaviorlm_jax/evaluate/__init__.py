"""How good predictions are, and what is fitted on top of them."""
