"""Products, means and softmax of lists of numbers."""

from math import exp, hypot


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def cosine(a, b):
    return dot(a, b) / (hypot(*a) * hypot(*b))


def softmax(numbers):
    largest = max(numbers)
    powers = [exp(number - largest) for number in numbers]
    total = sum(powers)
    return [power / total for power in powers]


def mean_vector(vectors):
    return [sum(numbers) / len(vectors) for numbers in zip(*vectors, strict=True)]


def block_means(vectors, size):
    """{block: mean vector}, of {entry: vector}."""
    blocks = sorted({entry // size for entry in vectors})
    return {block: mean_vector([v for entry, v in vectors.items() if entry // size == block]) for block in blocks}
