"""`kvpress demo`: policies against full attention on needles in a haystack, in a few minutes on a CPU."""
