"""The method, on tensors alone: no files, no network, no logging, no user interface."""
