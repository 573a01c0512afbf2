"""Rewards of one's own: a Python function's scores of what a model writes."""
