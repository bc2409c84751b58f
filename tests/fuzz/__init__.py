"""Fuzzers, their corpus, and the program that runs them; see CONTRIBUTING.md."""
