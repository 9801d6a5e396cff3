"""What evaluate.py measures a checkpoint by, and how a figure becomes one. No tensors."""
