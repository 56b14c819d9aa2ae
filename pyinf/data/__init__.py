"""Examples out of files, and the batches made of them."""

from pyinf.data.loading import Examples, load_examples
from pyinf.data.models import load_model, load_tokenizer, model_limits

__all__ = ["Examples", "load_examples", "load_model", "load_tokenizer", "model_limits"]
