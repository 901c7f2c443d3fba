"""Products and softmax of lists of numbers."""

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
