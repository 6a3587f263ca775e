"""What a defence is worth: poison, scan, retrain, measure."""
