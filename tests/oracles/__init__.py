"""Slow, plain re-implementations that the product is tested against. They share no code with it."""
