"""What the oracles share: a Llama forward over lists, choosing by scores, and how runs differ. No code of the product."""
