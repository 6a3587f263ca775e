"""Triggers with ground truth, to test a defence on one's own data. One file a trigger family."""
