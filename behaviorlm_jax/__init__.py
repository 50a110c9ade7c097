"""Behavior logs in, a language-model adapter that predicts behaviors out."""
