"""Find poisoned samples in WebDataset image corpora before training on them."""

__version__ = "0.1.0"
