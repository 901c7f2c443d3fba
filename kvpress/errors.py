"""What kvpress raises when it is asked for something it cannot do."""


class PolicyError(ValueError):
    """A policy, a budget, a cache or a call that cannot work; the message names the value, the limit and the remedy."""


class UnsupportedModelError(TypeError):
    """A model that kvpress cannot patch; raised before anything on the model is changed."""
