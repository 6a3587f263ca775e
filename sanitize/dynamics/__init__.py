"""The proxy model and the loss trajectories it leaves."""
