"""Optax transforms."""
