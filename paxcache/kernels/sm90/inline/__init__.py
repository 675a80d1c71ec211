"""Code for single threads, registers and bytes of shared memory, below what Pallas can say."""
