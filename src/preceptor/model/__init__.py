"""Hugging Face causal models: loading, the forward pass over packed sequences, the loss, saving."""

import logging

# Where it is installed, peft imports it, and it warns of kernels that nothing here asks for.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
