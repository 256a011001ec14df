"""Trials of the integration pages on the codebases that they are about."""
