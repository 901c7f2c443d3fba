"""What tests share: tiny models, the matrix of policies, definitions by brute force, and how results are compared."""
